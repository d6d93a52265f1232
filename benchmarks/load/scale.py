"""What a search costs besides training, as it grows: the driver's time and memory, and Optuna's suggest and tell.

Trials of a few milliseconds go through the real ``run_search``, so that nearly all that is left is the search itself.
Each search runs in a process of its own (``python -m benchmarks.load.scale``), whose clock, CPU time and memory are
read whenever a trial ends; what comes before the first trial and after the last is not in the figures. Searches take
turns, and are repeated: what else the machine does does not fall on one size alone.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load.instant import TRAIN_IMAGES, Sample, Sampler, load_images, load_small_space
from benchmarks.machine import describe_machine, describe_versions, render_versions
from benchmarks.markdown import judge, render_table
from benchmarks.rows import describe_measurement, write_rows
from benchmarks.spread import render_spread
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.options import SearchOptions, run_folder
from tune_amp.trial.config import described

TRIALS = (100, 500, 2_000)
STUDY_SIZES = (100, 500, 1_000, 2_000)
REPORTS = 10
"""Epochs of each trial in the search that tells what a report costs; elsewhere a trial reports once."""
REPEATS = 3
MOST_REPEATED_SECONDS = 360.0
"""A search whose repeats together would take longer is not repeated; the table shows how often each was run."""
MOST_DRIVER_SECONDS = 0.050
MOST_GROWTH_BYTES = 50_000
LATE_SHARE = 0.1
"""Figures "at the end" are those of the last tenth: a cost that grows with the study shows there, not in the mean."""
STUDY_WINDOW = 20
"""Suggestions and tellings of which the median is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRow:
    """One search of near-instant trials, from the end of its first trial to that of its last."""

    repeat: int = described("number of the search among those of its size, from 0")
    trials: int = described("trials of the search")
    epochs: int = described("epochs, and so reports, of each trial", unit="epochs")
    slots: int = described("trials at a time")
    wall_seconds: float = described("wall time of a trial, slots side by side: search time / trials", unit="s")
    late_wall_seconds: float = described("the same, of the last tenth of the trials", unit="s")
    driver_seconds: float = described("the driver's CPU time of a trial", unit="s")
    late_driver_seconds: float = described("the same, of the last tenth of the trials", unit="s")
    peak_memory_bytes: int | None = described("the driver's largest resident memory; null but on Linux", unit="B")
    growth_bytes: float | None = described(
        "resident memory that the driver gains a trial, by least squares over the last nine tenths; null but on Linux",
        unit="B",
    )
    journal_bytes: int = described("size of the study's journal at the end", unit="B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRow:
    """What Optuna costs at a size of the study, without Ray."""

    repeat: int
    """Number of the study, from 0."""
    size: int
    """Trials that the study has."""
    suggest_seconds: float
    """Median of the last ``STUDY_WINDOW`` suggestions."""
    tell_seconds: float
    """Median of the last ``STUDY_WINDOW`` tellings, the epoch's report included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleResult:
    """The result of the benchmark."""

    rows: tuple[ScaleRow, ...]
    study: tuple[StudyRow, ...]
    machine: dict[str, str]
    versions: dict[str, str]


def measure_scale(
    trials: Sequence[int] = TRIALS,
    study_sizes: Sequence[int] = STUDY_SIZES,
    *,
    repeats: int = REPEATS,
    report: Callable[[ScaleRow], None] = lambda _: None,
) -> ScaleResult:
    """Run a search of each number of trials, one more for the cost of a report, and a study without Ray.

    Args:
        trials: of the searches.
        study_sizes: at which suggest and tell are timed.
        repeats: of each search that is not too long for it, and of the study.
        report: told of each search as it ends.
    """
    plans = [*((count, 1) for count in trials), (min(trials), REPORTS)]
    rows = []
    for row in repeat_searches(plans, repeats, measure_search):
        rows.append(row)
        report(row)
    return ScaleResult(
        rows=tuple(rows),
        study=tuple(row for repeat in range(repeats) for row in measure_study(study_sizes, repeat)),
        machine=describe_machine(),
        versions=describe_versions(),
    )


def repeat_searches(
    plans: Sequence[tuple[int, int]],
    repeats: int,
    measure: Callable[[int, int, int], ScaleRow],
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[ScaleRow]:
    """All ``plans`` in turn, ``repeats`` times, but for those whose repeats would take too long.

    Args:
        plans: trials and epochs of each.
        repeats: of a plan.
        measure: runs a search, given its trials, epochs and number.
        clock: in seconds.
    """
    for repeat in range(repeats):
        affordable = []
        for trials, epochs in plans:
            started = clock()
            yield measure(trials, epochs, repeat)
            if repeats * (clock() - started) <= MOST_REPEATED_SECONDS:
                affordable.append((trials, epochs))
        plans = affordable


def measure_search(trials: int, epochs: int, repeat: int = 0) -> ScaleRow:
    """Search once, in a new process: what an earlier search left in memory is not this one's."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "samples.json"
        size = ["--trials", str(trials), "--epochs", str(epochs), "--output", str(output)]
        subprocess.run([sys.executable, "-m", "benchmarks.load.scale", *size], check=True)  # noqa: S603
        found = json.loads(output.read_text(encoding="utf-8"))
    samples = [Sample(**sample) for sample in found.pop("samples")]
    return summarise_samples(samples, trials=trials, epochs=epochs, repeat=repeat, **found)


def summarise_samples(
    samples: Sequence[Sample], *, trials: int, epochs: int, slots: int, journal_bytes: int, repeat: int = 0
) -> ScaleRow:
    """The costs of a search from the samples taken as its trials ended."""
    late = [sample for sample in samples if sample.ended >= (1 - LATE_SHARE) * trials or sample in samples[-2:]]
    measured = [sample for sample in samples if sample.ended >= LATE_SHARE * trials]
    memory = [sample.memory_bytes for sample in measured if sample.memory_bytes is not None]
    growth = None
    if len(memory) > 1:
        growth = statistics.linear_regression([sample.ended for sample in measured], memory).slope
    return ScaleRow(
        repeat=repeat,
        trials=trials,
        epochs=epochs,
        slots=slots,
        wall_seconds=_rise(samples, "clock"),
        late_wall_seconds=_rise(late, "clock"),
        driver_seconds=_rise(samples, "driver"),
        late_driver_seconds=_rise(late, "driver"),
        peak_memory_bytes=max(memory, default=None),
        growth_bytes=growth,
        journal_bytes=journal_bytes,
    )


def _rise(samples: Sequence[Sample], name: str) -> float:
    """How much a field rises from one trial's end to the next, on average."""
    first, last = samples[0], samples[-1]
    return float((getattr(last, name) - getattr(first, name)) / (last.ended - first.ended))


# ---- the search itself, in its own process ----


def search_small(trials: int, epochs: int) -> dict[str, Any]:
    """Run the search. Returns its samples, slots and the journal's size, as JSON can hold them."""
    from tune_amp.cluster.session import ray_session

    samples: list[Sample] = []
    options = SearchOptions(num_samples=trials, max_epochs=epochs, grace_period=epochs, confirm_seeds=0)
    with tempfile.TemporaryDirectory() as results, run_folder(Path(results), "scale") as folder:
        space = load_small_space(Path(results))
        dataset = load_images()
        with ray_session(num_gpus=0):
            from tune_amp.search.plan import plan_search
            from tune_amp.search.run import run_search

            plan = plan_search(space, dataset, options, folder=folder)
            slots = plan.resources.max_concurrent
            run_search(plan, Sampler(samples.append))
        journal_bytes = RunFolder(folder).study.stat().st_size
    kept = [dataclasses.asdict(sample) for sample in samples]
    return {"samples": kept, "slots": slots, "journal_bytes": journal_bytes}


# ---- the study alone ----


def measure_study(sizes: Sequence[int], repeat: int = 0) -> Iterator[StudyRow]:
    """Time suggest and tell of the searcher as its study grows to the largest of ``sizes``."""
    suggesting: list[float] = []
    telling: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for suggest_seconds, tell_seconds in _grow_study(Path(name), max(sizes)):
            suggesting.append(suggest_seconds)
            telling.append(tell_seconds)
            if len(telling) in sizes:
                yield StudyRow(
                    repeat=repeat,
                    size=len(telling),
                    suggest_seconds=statistics.median(suggesting[-STUDY_WINDOW:]),
                    tell_seconds=statistics.median(telling[-STUDY_WINDOW:]),
                )


def _grow_study(folder: Path, trials: int) -> Iterator[tuple[float, float]]:
    """Seconds of each suggestion and telling of a study in ``folder``."""
    from tune_amp.search.study import AmpSearch

    values = np.random.default_rng(0).random(trials)
    shared = {"model": "simple_net", "dataset": "mnist", "max_epochs": 1, "seed": 0}
    searcher = AmpSearch(
        load_small_space(folder),
        shared,
        train_images=TRAIN_IMAGES,
        objectives=("val_accuracy",),
        seed=0,
        folder=folder,
        study_name="scale",
        num_samples=trials,
    )
    for number, value in enumerate(values):
        started = time.perf_counter()
        searcher.suggest(str(number))
        suggested = time.perf_counter()
        result = {"val_accuracy": float(value), "epoch": 1, "status": "completed", "done": True}
        searcher.on_trial_complete(str(number), result)
        yield suggested - started, time.perf_counter() - suggested


# ---- the table ----


SEARCH_TITLES = (
    "trials",
    "reports of each",
    "slots",
    "n",
    "wall",
    "of the last tenth",
    "driver CPU",
    "of the last tenth",
    "driver memory, largest",
    "gained",
    "journal",
)
STUDY_TITLES = ("trials in the study", "n", "suggest", "tell")


def render_scale(result: ScaleResult) -> str:
    """Markdown: a table of the searches beside the targets, and one of the study."""
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    searches = group_repeats(result.rows)
    sizes = dict.fromkeys(row.size for row in result.study)
    studies = {size: [row for row in result.study if row.size == size] for size in sizes}
    lines = [
        f"Near-instant trials through the real search; {machine}; {render_versions(result.versions)}. Of a trial: "
        "medians of n searches, the smallest and largest in brackets. A search whose repeats would have taken more "
        f"than {MOST_REPEATED_SECONDS / 60:g} minutes was run once.",
        "",
        render_table(SEARCH_TITLES, map(_render_repeats, searches.values())),
        "",
        *_judge(searches),
        "",
        f"Optuna's study without Ray: of each of n studies the median of {STUDY_WINDOW}, of these the median, the "
        "smallest and largest in brackets:",
        "",
        render_table(STUDY_TITLES, (_render_study(size, rows) for size, rows in studies.items())),
    ]
    return "\n".join(lines) + "\n"


def group_repeats(rows: Sequence[ScaleRow]) -> dict[tuple[int, int], list[ScaleRow]]:
    """Rows by trials and epochs."""
    groups: dict[tuple[int, int], list[ScaleRow]] = {}
    for row in rows:
        groups.setdefault((row.trials, row.epochs), []).append(row)
    return groups


def _render_repeats(rows: Sequence[ScaleRow]) -> list[str]:
    first = rows[0]

    def render(name: str, form: str, unit: float) -> str:
        values = _find_known(rows, name)
        return render_spread([value / unit for value in values], form) if values else "-"

    return [
        f"{first.trials:,}",
        str(first.epochs),
        str(first.slots),
        str(len(rows)),
        *(render(name, "{:.1f} ms", 1e-3) for name in ("wall_seconds", "late_wall_seconds")),
        *(render(name, "{:.1f} ms", 1e-3) for name in ("driver_seconds", "late_driver_seconds")),
        render("peak_memory_bytes", "{:.0f} MiB", 2**20),
        render("growth_bytes", "{:.1f} kB", 1000),
        render("journal_bytes", "{:.1f} kB", 1000 * first.trials),
    ]


def _render_study(size: int, rows: Sequence[StudyRow]) -> tuple[str, ...]:
    suggest = render_spread([1000 * row.suggest_seconds for row in rows], "{:.1f} ms")
    tell = render_spread([1000 * row.tell_seconds for row in rows], "{:.1f} ms")
    return f"{size:,}", str(len(rows)), suggest, tell


def _find_known(rows: Sequence[ScaleRow], name: str) -> list[float]:
    return [value for row in rows if (value := getattr(row, name)) is not None]


def _judge(searches: Mapping[tuple[int, int], Sequence[ScaleRow]]) -> list[str]:
    """What a report costs, and whether the targets are met by the largest search."""

    def find_median(search: tuple[int, int], name: str) -> float:
        return statistics.median(_find_known(searches[search], name))

    lines = []
    for trials, epochs in searches:
        if epochs > 1 and (trials, 1) in searches:
            rise = find_median((trials, epochs), "driver_seconds") - find_median((trials, 1), "driver_seconds")
            # A checkpoint is asked for where there is much to lose, and these trials have nothing.
            lines.append(f"A report more costs the driver {_ms(rise / (epochs - 1))}, without a checkpoint.")
    largest = max(searches, key=lambda search: (search[0], -search[1]))
    driver = find_median(largest, "late_driver_seconds")
    lines.append(
        f"Driver time of a trial at the end of {largest[0]:,}: {_ms(driver)}, target at most "
        f"{_ms(MOST_DRIVER_SECONDS)}: {judge(driver <= MOST_DRIVER_SECONDS)}."
    )
    if _find_known(searches[largest], "growth_bytes"):
        growth = find_median(largest, "growth_bytes")
        lines.append(
            f"Driver memory gained a trial over {largest[0]:,}: {growth / 1000:.1f} kB, target under "
            f"{MOST_GROWTH_BYTES / 1000:.0f} kB: {judge(growth < MOST_GROWTH_BYTES)}."
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def write_scale(path: Path, result: ScaleResult) -> None:
    """Write one row a search; the study's figures stand in the metadata."""
    about = describe_measurement(result.machine, result.versions, study=[vars(row) for row in result.study])
    write_rows(path, "scale", ScaleRow, result.rows, about)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one search and leave its samples in a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.scale")
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parsed = parser.parse_args(arguments)
    parsed.output.write_text(json.dumps(search_small(parsed.trials, parsed.epochs)), encoding="utf-8")


if __name__ == "__main__":
    main()
