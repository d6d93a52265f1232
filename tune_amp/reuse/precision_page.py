"""The files of a comparison: its rows in Parquet, and ``compare.md`` with tables, verdicts and how to read them.

The page is made from the rows of the Parquet files and their metadata alone.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]

from tune_amp.results.files import write_atomically
from tune_amp.results.parquet import build_columns, build_table, write_parquet
from tune_amp.results.statistics import Equivalence
from tune_amp.reuse.markdown import format_settings, render_markdown
from tune_amp.reuse.precision_verdicts import (
    BASELINE,
    MARGIN_POINTS,
    ArmSummary,
    ComparedRun,
    ComparisonOrigin,
    MapCell,
    RatioInterval,
    judge_claims,
    map_ratio,
    memory_ratio,
    summarise_arm,
)
from tune_amp.trial.config import TrialConfig, TrialStatus, code_span, list_settings

CPU_MEANING = (
    "On a CPU the arithmetic of bf16 and fp16 and the loss scaling are real, so that the accuracies count; the speed "
    "is this CPU's and says nothing about a GPU, and memory is not measured."
)


PAGE_FILE = "compare.md"
FILES = ("compare.parquet", "compare_map.parquet", PAGE_FILE)
SCHEMAS: Mapping[str, pa.Schema] = {
    "compare": pa.schema(build_columns(ComparedRun)),
    "compare_map": pa.schema(build_columns(MapCell)),
}


def write_comparison(
    folder: Path, origin: ComparisonOrigin, runs: Sequence[ComparedRun], cells: Sequence[MapCell]
) -> str:
    """Write ``compare.parquet``, ``compare_map.parquet`` if there is a map, and ``compare.md``; return the page.

    Raises:
        OSError: the folder is missing, or the disk is full; a file that is not written is unchanged.
    """
    for kind, rows in {"compare": runs, "compare_map": cells}.items():
        if rows:
            table = build_table(kind, SCHEMAS[kind], [vars(row).copy() for row in rows], dataclasses.asdict(origin))
            write_parquet(table, folder / f"{kind}.parquet")
    page = render_comparison(origin, runs, cells)
    write_atomically(folder / PAGE_FILE, lambda file: file.write(page.encode()))
    return page


def render_comparison(origin: ComparisonOrigin, runs: Sequence[ComparedRun], cells: Sequence[MapCell] = ()) -> str:
    """Return the whole page as Markdown, from ``templates/compare.md``."""
    arms = [summarise_arm(runs, precision) for precision in _list_measured(origin, runs)]
    return render_markdown(
        "compare.md",
        origin=origin,
        settings=describe_settings(origin),
        runs=runs,
        cpu_meaning=CPU_MEANING,
        speed=_render_speed(arms),
        data_bytes=_megabytes(origin.data_bytes),
        accuracy=_render_accuracy(arms),
        margin=MARGIN_POINTS,
        by_seed=_render_seeds(origin, arms, runs),
        verdicts=judge_claims(runs, origin.place),
        map_places=_sum_up_map(cells),
        map=_render_map(cells) if cells else "",
    )


def describe_settings(origin: ComparisonOrigin) -> str:
    """Return the trained settings in one line, without precision and its scaler settings, which differ between runs."""
    apart = {"precision", "seed", "max_epochs", "model", "dataset", *origin.scaler, "init_scale", "growth_interval"}
    apart |= {"growth_factor", "backoff_factor"}
    settings = list_settings(TrialConfig(**origin.config))
    shared = format_settings({name: value for name, value in settings.items() if name not in apart})
    subject = f"{origin.config['model']} on {origin.dataset}: {shared}"
    return f"{subject}; in fp16 {format_settings(origin.scaler)}" if origin.scaler else subject


def render_table(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """Return a Markdown table whose columns are also aligned in a terminal.

    Args:
        titles: titles of the columns.
        rows: cells, which must not contain a bar, since it would begin the next cell.
        texts: indices of the left-aligned columns; the others are numbers and right-aligned.
    """
    widths = [max(3, *(len(row[column]) for row in [titles, *rows])) for column in range(len(titles))]
    ruler = ["-" * width if column in texts else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [
        [
            cell.ljust(widths[column]) if column in texts else cell.rjust(widths[column])
            for column, cell in enumerate(row)
        ]
        for row in [titles, ruler, *rows]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list_measured(origin: ComparisonOrigin, runs: Sequence[ComparedRun]) -> list[str]:
    measured = {run.precision for run in runs}
    return [precision for precision in origin.precisions if precision in measured]


def _render_speed(arms: Sequence[ArmSummary]) -> str:
    titles = ("precision", "epoch", "images/s", "speed / fp32", "peak memory", "memory / fp32")
    return render_table(titles, [_speed_cells(arm) for arm in arms])


def _speed_cells(arm: ArmSummary) -> tuple[str, ...]:
    return (
        arm.precision,
        "" if arm.epoch_seconds is None else f"{arm.epoch_seconds:.3g} s",
        "" if arm.samples_per_second is None else f"{arm.samples_per_second:,.0f}",
        _show_ratio(arm.speed),
        "" if arm.peak_memory_bytes is None else _megabytes(arm.peak_memory_bytes),
        _show_ratio(arm.memory),
    )


def _show_ratio(ratio: RatioInterval | None) -> str:
    return "" if ratio is None else f"{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _render_accuracy(arms: Sequence[ArmSummary]) -> str:
    within = f"within {MARGIN_POINTS} points"
    titles = ("precision", "accuracy, %", "minus fp32, points", within, "could have seen", "completed")
    return render_table(titles, [_accuracy_cells(arm) for arm in arms])


def _accuracy_cells(arm: ArmSummary) -> tuple[str, ...]:
    mean, gap = arm.accuracy, arm.difference
    return (
        arm.precision,
        "" if mean is None else f"{mean.mean:.2f} ({mean.low:.2f} to {mean.high:.2f})",
        "" if gap is None else f"{gap.difference.mean:+.2f} ({gap.difference.low:+.2f} to {gap.difference.high:+.2f})",
        "" if gap is None else describe_equivalence(gap),
        "" if gap is None else f"{gap.smallest_effect:.2f}",
        f"{arm.completed} of {arm.runs}",
    )


def describe_equivalence(gap: Equivalence) -> str:
    """Return ``yes``, ``no`` if the difference is shown to be beyond the margin, else ``undecided``."""
    if gap.equivalent:
        return "yes"
    beyond = gap.difference.low > gap.margin or gap.difference.high < -gap.margin
    return "no" if beyond else "undecided"


def _render_seeds(origin: ComparisonOrigin, arms: Sequence[ArmSummary], runs: Sequence[ComparedRun]) -> str:
    by_place = {(run.seed, run.precision): run for run in runs}
    rows = [
        [str(seed), *(_show_run(by_place.get((seed, arm.precision))) for arm in arms)]
        for seed in origin.seeds
        if any((seed, arm.precision) in by_place for arm in arms)
    ]
    return render_table(["accuracy, % by seed", *(arm.precision for arm in arms)], rows)


def _show_run(run: ComparedRun | None) -> str:
    if run is None:
        return ""
    if run.status is not TrialStatus.COMPLETED or run.val_accuracy is None:
        return str(run.status)
    return f"{100 * run.val_accuracy:.2f}"


# ---- the map ----


def _render_map(cells: Sequence[MapCell]) -> str:
    titles = ("model", "batch", "precision", "images/s", "speed / fp32", "memory / fp32", "")
    rows = [_map_cells(cell, baseline) for cell, baseline in _pair_cells(cells)]
    return render_table(titles, rows, texts=(0, 2, 6))


def _pair_cells(cells: Sequence[MapCell]) -> list[tuple[MapCell, MapCell]]:
    """Return each cell with the fp32 cell of its model and batch size."""
    baselines = {(cell.model, cell.batch_size): cell for cell in cells if cell.precision == BASELINE}
    return [(cell, baselines[cell.model, cell.batch_size]) for cell in cells]


def _map_cells(cell: MapCell, baseline: MapCell) -> tuple[str, ...]:
    head = (cell.model, str(cell.batch_size), cell.precision)
    if cell.reason:
        return (*head, "", "", "", code_span(cell.reason.replace("|", "/")))
    rate = f"{statistics.median(cell.turn_rates):,.0f}"
    ratio = map_ratio(cell, baseline)
    if cell is baseline or ratio is None:
        return (*head, rate, "", "", "")
    compared = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    memory = memory_ratio(cell, baseline)
    return (*head, rate, compared, "" if memory is None else f"{memory:.2f}", ratio.word)


def _sum_up_map(cells: Sequence[MapCell]) -> dict[str, str]:
    """Return, for each precision, where it is faster and needs less memory than fp32, and where not."""
    pairs = [pair for pair in _pair_cells(cells) if pair[0].precision != BASELINE]
    precisions = dict.fromkeys(cell.precision for cell, _ in pairs)
    return {
        precision: _list_places([pair for pair in pairs if pair[0].precision == precision]) for precision in precisions
    }


def _list_places(pairs: Sequence[tuple[MapCell, MapCell]]) -> str:
    words = ("faster", "no difference", "slower", "less memory", "no less memory", "not measured")
    places: dict[str, list[str]] = {word: [] for word in words}
    for cell, baseline in pairs:
        ratio, memory = map_ratio(cell, baseline), memory_ratio(cell, baseline)
        name = f"{cell.model} at {cell.batch_size}"
        places["not measured" if ratio is None else ratio.word].append(name)
        if memory is not None:
            places["less memory" if memory < 1 else "no less memory"].append(name)
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in places.items() if names)
