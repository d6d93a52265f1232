"""The files of a comparison: its rows in Parquet, and ``compare.md`` with tables, verdicts and how to read them.

The page is made from the rows of the Parquet files and their metadata alone.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]

from tune_amp.results.files import write_atomically
from tune_amp.results.parquet import build_columns, build_table, write_parquet
from tune_amp.results.statistics import Equivalence
from tune_amp.reuse.markdown import format_settings, list_settings, render_markdown
from tune_amp.reuse.precision_verdicts import (
    BASELINE,
    MARGIN_POINTS,
    ArmSummary,
    ComparedRun,
    ComparisonOrigin,
    MapCell,
    Ratio,
    judge_claims,
    map_ratio,
    memory_ratio,
    summarise_arm,
)
from tune_amp.trial.config import SCALER_DEFAULTS, TrialConfig, TrialStatus
from tune_amp.trial.text import code_span

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
    arms = [arm for arm in (summarise_arm(runs, precision) for precision in origin.precisions) if arm.runs]
    return render_markdown(
        "compare.md",
        origin=origin,
        settings=describe_settings(origin),
        runs=runs,
        cpu_meaning=CPU_MEANING,
        speed=_render_speed(arms),
        data_bytes=MEGABYTES(origin.data_bytes / 1e6),
        accuracy=_render_accuracy(arms),
        margin=MARGIN_POINTS,
        by_seed=_render_seeds(origin, arms, runs),
        verdicts=judge_claims(runs, origin.place),
        map_places=_sum_up_map(cells),
        map=_render_map(cells) if cells else "",
    )


def describe_settings(origin: ComparisonOrigin) -> str:
    """Return the trained settings in one line, without precision and its scaler settings, which differ between runs."""
    apart = {"precision", "seed", "max_epochs", "model", "dataset", *SCALER_DEFAULTS}
    settings = list_settings(TrialConfig(**origin.config))
    shared = format_settings({name: value for name, value in settings.items() if name not in apart})
    subject = f"{origin.config['model']} on {origin.dataset}: {shared}"
    return f"{subject}; in fp16 {format_settings(origin.scaler)}" if origin.scaler else subject


def render_table(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """Return a Markdown table whose columns also line up in a terminal.

    Cells must not contain a bar, since it would begin the next one. Columns are numbers, and right-aligned, except for
    those whose indices are in ``texts``.
    """
    columns = []
    for place, column in enumerate(zip(titles, *rows, strict=True)):
        width = max(3, *map(len, column))
        ruler = "-" * width if place in texts else "-" * (width - 1) + ":"
        columns.append([f"{cell:{'<' if place in texts else '>'}{width}}" for cell in (column[0], ruler, *column[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def _cell(form: Callable[..., str], value: object) -> str:
    return "" if value is None else form(value)


RATE = "{:,.0f}".format
RATIO = "{0.ratio:.2f} ({0.low:.2f} to {0.high:.2f})".format
MEGABYTES = "{:,.1f} MB".format
INTERVAL = "{0.mean:.2f} ({0.low:.2f} to {0.high:.2f})".format
DIFFERENCE = "{0.mean:+.2f} ({0.low:+.2f} to {0.high:+.2f})".format


def _render_speed(arms: Sequence[ArmSummary]) -> str:
    rows = [
        (
            arm.precision,
            _cell("{:.3g} s".format, arm.epoch_seconds),
            _cell(RATE, arm.samples_per_second),
            _cell(RATIO, arm.speed),
            _cell(MEGABYTES, arm.peak_memory_bytes and arm.peak_memory_bytes / 1e6),
            _cell(RATIO, arm.memory),
        )
        for arm in arms
    ]
    return render_table(("precision", "epoch", "images/s", "speed / fp32", "peak memory", "memory / fp32"), rows)


def _render_accuracy(arms: Sequence[ArmSummary]) -> str:
    rows = [
        (
            arm.precision,
            _cell(INTERVAL, arm.accuracy),
            _cell(DIFFERENCE, arm.difference and arm.difference.difference),
            _cell(describe_equivalence, arm.difference),
            _cell("{0.smallest_effect:.2f}".format, arm.difference),
            f"{arm.completed} of {arm.runs}",
        )
        for arm in arms
    ]
    within = f"within {MARGIN_POINTS} points"
    titles = ("precision", "accuracy, %", "minus fp32, points", within, "could have seen", "completed")
    return render_table(titles, rows)


def describe_equivalence(gap: Equivalence) -> str:
    """Return ``yes``, ``no`` if the difference is shown to be beyond the margin, else ``undecided``."""
    beyond = gap.difference.low > gap.margin or gap.difference.high < -gap.margin
    return "yes" if gap.equivalent else "no" if beyond else "undecided"


def _render_seeds(origin: ComparisonOrigin, arms: Sequence[ArmSummary], runs: Sequence[ComparedRun]) -> str:
    shown = {(run.seed, run.precision): _show_run(run) for run in runs}
    table = [[str(seed), *(shown.get((seed, arm.precision), "") for arm in arms)] for seed in origin.seeds]
    return render_table(
        ["accuracy, % by seed", *(arm.precision for arm in arms)], [row for row in table if any(row[1:])]
    )


def _show_run(run: ComparedRun) -> str:
    if run.status is not TrialStatus.COMPLETED or run.val_accuracy is None:
        return str(run.status)
    return f"{100 * run.val_accuracy:.2f}"


# ---- the map ----


def _pair_cells(cells: Sequence[MapCell]) -> list[tuple[MapCell, Ratio | None, float | None]]:
    """Return each cell with its speed and memory relative to the fp32 cell of its model and batch size."""
    baselines = {(cell.model, cell.batch_size): cell for cell in cells if cell.precision == BASELINE}
    pairs = [(cell, baselines[cell.model, cell.batch_size]) for cell in cells]
    return [(cell, map_ratio(cell, baseline), memory_ratio(cell, baseline)) for cell, baseline in pairs]


def _render_map(cells: Sequence[MapCell]) -> str:
    rows = []
    for cell, ratio, memory in _pair_cells(cells):
        compared = ["", "", ""]
        if cell.reason:
            compared[2] = code_span(cell.reason.replace("|", "/"))
        elif ratio is not None and cell.precision != BASELINE:
            compared = [RATIO(ratio), _cell("{:.2f}".format, memory), ratio.word]
        rate = f"{statistics.median(cell.turn_rates):,.0f}" if cell.turn_rates else ""
        rows.append([cell.model, str(cell.batch_size), cell.precision, rate, *compared])
    titles = ("model", "batch", "precision", "images/s", "speed / fp32", "memory / fp32", "")
    return render_table(titles, rows, texts=(0, 2, 6))


def _sum_up_map(cells: Sequence[MapCell]) -> dict[str, str]:
    """Return, for each precision, where it is faster and needs less memory than fp32, and where not."""
    words = ("faster", "undecided", "slower", "less memory", "no less memory", "not measured")
    places: dict[str, dict[str, list[str]]] = {}
    for cell, ratio, memory in _pair_cells(cells):
        if cell.precision == BASELINE:
            continue
        found = places.setdefault(cell.precision, {word: [] for word in words})
        name = f"{cell.model} at {cell.batch_size}"
        found["not measured" if ratio is None else ratio.word].append(name)
        if memory is not None:
            found["less memory" if memory < 1 else "no less memory"].append(name)
    return {
        precision: "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names)
        for precision, found in places.items()
    }
