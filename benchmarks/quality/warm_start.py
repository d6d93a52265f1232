"""Whether a warm start saves epochs, and what a misleading one costs: searches beside cold ones of the same seed.

A cold search of another seed is the donor. It is an arm of its own, too: a search reaches its own best sooner or later,
but another one need not, so that beside the cold search every other one looks slow. Real searches train on MNIST;
replayed ones (``replay``) run over curves that were recorded there.
"""

import dataclasses
import datetime
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from benchmarks.machine import machine_line
from benchmarks.markdown import render_table
from benchmarks.quality.curves import load_curves
from benchmarks.quality.replay import (
    CurveTable,
    Problem,
    Program,
    ReplayedTrial,
    build_amp_scheduler,
    build_amp_search,
    build_record,
    is_state_hopeless,
    replay_program,
)
from tune_amp.results.parquet import METADATA_KEY, build_columns, write_parquet
from tune_amp.results.progress import Observer, SearchProgress
from tune_amp.results.provenance import Provenance, list_versions
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import TrialRecord
from tune_amp.results.statistics import MeanInterval, paired_interval
from tune_amp.search.options import SearchOptions
from tune_amp.search.plan import adapt_donor, plan_search
from tune_amp.search.run import run_search
from tune_amp.search.warm_start import DECISIVE_VERSIONS, Donor, WarmStart, load_donor, plan_warm_start
from tune_amp.space.space import parse_space
from tune_amp.training.data import Dataset
from tune_amp.trial.config import InputError, described

OBJECTIVE = "val_accuracy"
DONOR_SEEDS = 100
"""A donor's seed is its search's plus this."""
TOP_K = 3
CLOSE = 0.002
"""A standard error of an accuracy of 98 % on 5,000 images: what nobody could tell apart."""
REPLAY_BUDGET = 96
"""Trial-epochs of a replayed search."""

COLD, DONOR = "cold", "cold, another seed"
WARM, SUGGESTED, MISLED = "warm", "warm, suggestions only", "warm, from the donor's worst trials"
OTHER_DATA = "warm, from digits"
OTHER = "other data"
"""In the place of a data hash."""

# Five decades of learning rates, of which one is good, and no batch so small that a search takes minutes.
SPACE = """\
parameters:
  lr: {low: 1.0e-5, high: 1.0, log: true}
  batch_size: {low: 128, high: 1024, power_of_two: true}
  optimizer: {choices: [adam, sgd]}
fixed:
  precision: bf16
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartRow:
    """One search: a row of ``warm-start.parquet``."""

    problem: str = described("what was searched")
    arm: str = described("how the search began")
    seed: int = described("of the cold search that it is compared with")
    epochs: int = described("trial-epochs of the whole search")
    reached: int | None = described("trial-epochs until the cold search's best accuracy; null: never")
    came_close: int | None = described(f"trial-epochs until {CLOSE} below it; null: never")
    best: float = described("best validation accuracy of any epoch")
    suggestions: int = described("suggestions from the donor")
    trials_added: int = described("trials of the donor that the sampler learned from")


SCHEMA = pa.schema(build_columns(WarmStartRow))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchPath:
    """The validation accuracy of every epoch of a search, in the order of their reports."""

    accuracies: Sequence[float]
    warm_start: WarmStart | None = None

    def count_until(self, accuracy: float) -> int | None:
        """Trial-epochs until an accuracy is reached; None where it never is."""
        return next((count for count, value in enumerate(self.accuracies, start=1) if value >= accuracy), None)


def compare_paths(problem: str, seed: int, paths: Mapping[str, SearchPath]) -> list[WarmStartRow]:
    """A row an arm, measured by the best of the cold one."""
    target = max(paths[COLD].accuracies)
    return [
        WarmStartRow(
            problem=problem,
            arm=arm,
            seed=seed,
            epochs=len(path.accuracies),
            reached=path.count_until(target),
            came_close=path.count_until(target - CLOSE),
            best=max(path.accuracies),
            suggestions=len(path.warm_start.suggestions) if path.warm_start else 0,
            trials_added=len(path.warm_start.old_trials) if path.warm_start else 0,
        )
        for arm, path in paths.items()
    ]


def mislead(donor: Donor) -> Donor:
    """The donor as if its worst trials had won, on other data."""
    worst = sorted(donor.trials, key=_last_accuracy)[:TOP_K]
    return dataclasses.replace(strip_trials(donor), winners=tuple(worst))


def strip_trials(donor: Donor) -> Donor:
    """The donor as if it were of other data: its trials count nowhere else."""
    return dataclasses.replace(donor, provenance=dataclasses.replace(donor.provenance, data_hash=OTHER))


def _last_accuracy(trial: TrialRecord) -> float:
    accuracy = None if trial.last is None else trial.last.val_accuracy
    return accuracy if accuracy is not None and math.isfinite(accuracy) else 0.0


# ---- replayed ----


def replay_arms(table: CurveTable, seed: int, *, budget: int = REPLAY_BUDGET) -> dict[str, SearchPath]:
    """All arms of one seed over recorded curves."""
    trials = replay_search(table, seed + DONOR_SEEDS, None, budget)
    donor = make_donor(table, trials, budget)
    plans: dict[str, WarmStart | None] = {COLD: None}
    plans |= {WARM: plan_replay(table, donor), SUGGESTED: plan_replay(table, strip_trials(donor))}
    plans |= {MISLED: plan_replay(table, mislead(donor))}
    paths = {arm: trace_replay(table, replay_search(table, seed, plan, budget), plan) for arm, plan in plans.items()}
    return {**paths, DONOR: trace_replay(table, trials, None)}


def replay_search(table: CurveTable, seed: int, warm_start: WarmStart | None, budget: int) -> list[ReplayedTrial]:
    """A search of ours, replayed."""
    program = Program(
        build_searcher=functools.partial(build_amp_search, warm_start=warm_start),
        build_scheduler=build_amp_scheduler,
        is_over=is_state_hopeless,
    )
    return replay_program(program, Problem(table=table, objective=OBJECTIVE, seed=seed, budget=budget))


def trace_replay(table: CurveTable, trials: Sequence[ReplayedTrial], warm_start: WarmStart | None) -> SearchPath:
    """A replayed search's epochs in the order in which they were spent."""
    reports = sorted(
        (spent, table.curves.epochs[trial.curve][place].val_accuracy or 0.0)
        for trial in trials
        for place, spent in enumerate(trial.spent_at)
    )
    return SearchPath(accuracies=[accuracy for _, accuracy in reports], warm_start=warm_start)


def make_donor(table: CurveTable, trials: Sequence[ReplayedTrial], budget: int) -> Donor:
    """What ``load_donor`` would make of a replayed search's files."""
    records = [build_record(trial, table.curves, budget) for trial in trials if trial.spent_at]
    return Donor(
        path=Path("replayed"),
        checksum="",
        winners=tuple(choose_best(records, (OBJECTIVE,), TOP_K)),
        trials=tuple(records),
        provenance=Provenance(
            run="replayed",
            command=(),
            created="",
            space_source=table.space.source,
            space_text=table.space.text,
            dataset=table.shared["dataset"],
            data_hash="",
            train_images=table.train_images,
            validation_images=0,
            objective=OBJECTIVE,
            sampler="tpe",
            scheduler="asha",
            seed=0,
            device="cpu",
            versions=list_versions(*DECISIVE_VERSIONS),
        ),
    )


def plan_replay(table: CurveTable, donor: Donor) -> WarmStart:
    """What a replayed search takes over from a donor that ``make_donor`` made."""
    return plan_warm_start(
        donor,
        table.space,
        table.shared,
        data_hash="",
        train_images=table.train_images,
        objectives=(OBJECTIVE,),
        sampler="tpe",
    )


# ---- trained ----


class _Tracer(Observer):
    """Notes the accuracies of all epochs as they are reported."""

    def __init__(self) -> None:
        self.accuracies: list[float] = []
        self._seen: dict[str, int] = {}

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        for trial in progress.trials:
            new = trial.epochs[self._seen.get(trial.trial_id, 0) :]
            self._seen[trial.trial_id] = len(trial.epochs)
            self.accuracies += [epoch.val_accuracy or 0.0 for epoch in new]


def search_arms(
    dataset: Dataset, others: Dataset, options: SearchOptions, folder: Path
) -> Iterator[tuple[str, SearchPath]]:
    """All arms of one seed, trained. Call it inside ``session.ray_session``.

    Args:
        dataset: what is searched on.
        others: what a mismatching file was searched on.
        options: of every search; a donor has another seed.
        folder: an empty one.
    """
    space = parse_space("warm-start", SPACE)

    def search(name: str, on: Dataset, seed: int, donor: Donor | None) -> SearchPath:
        own = dataclasses.replace(options, seed=seed)
        warm_start = None if donor is None else adapt_donor(donor, space, on, own)
        (folder / name).mkdir()
        tracer = _Tracer()
        run_search(plan_search(space, on, own, folder=folder / name, warm_start=warm_start), tracer)
        return SearchPath(accuracies=tracer.accuracies, warm_start=warm_start)

    def load(name: str) -> Donor:
        return load_donor(folder / name, objectives=options.objectives, top_k=options.top_k)

    yield COLD, search("cold", dataset, options.seed, None)
    yield DONOR, search("donor", dataset, options.seed + DONOR_SEEDS, None)
    yield WARM, search("warm", dataset, options.seed, load("donor"))
    yield SUGGESTED, search("suggested", dataset, options.seed, strip_trials(load("donor")))
    yield MISLED, search("misled", dataset, options.seed, mislead(load("donor")))
    search("others", others, options.seed + 2 * DONOR_SEEDS, None)  # the donor's seed would draw the donor's settings
    yield OTHER_DATA, search("from-others", dataset, options.seed, load("others"))


# ---- measurement ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartResult:
    """The result of the benchmark."""

    rows: tuple[WarmStartRow, ...]
    about: Mapping[str, Any]


def measure_warm_start(
    dataset: Dataset | None,
    others: Dataset,
    options: SearchOptions,
    *,
    folder: Path,
    seeds: int,
    curves: Mapping[str, Path],
    replay_seeds: int,
    report: Callable[[WarmStartRow], None],
) -> WarmStartResult:
    """Run every arm, trained and replayed.

    Args:
        dataset: to train on; None to replay only.
        others: what a mismatching file was searched on.
        options: of the trained searches.
        folder: an empty one, for their runs.
        seeds: of the trained searches.
        curves: space -> recorded curves; those of conditional spaces cannot be replayed.
        replay_seeds: of the replayed searches.
        report: is told every row as it comes.
    """
    rows: list[WarmStartRow] = []

    def keep(problem: str, seed: int, paths: Mapping[str, SearchPath]) -> None:
        rows.extend(compare_paths(problem, seed, paths))
        for row in rows[-len(paths) :]:
            report(row)

    if dataset is not None:
        from tune_amp.cluster.session import ray_session

        with ray_session(run="warm-start", num_gpus=0, preload=("tune_amp.cluster.trainable",)):
            for seed in range(seeds):
                (folder / str(seed)).mkdir()
                own = dataclasses.replace(options, seed=seed)
                keep(f"{dataset.name}, trained", seed, dict(search_arms(dataset, others, own, folder / str(seed))))
    for space, path in curves.items():
        table = CurveTable(load_curves(path))
        for seed in range(replay_seeds):
            keep(f"{space}, replayed", seed, replay_arms(table, seed))
    if not rows:
        raise InputError("warm_start: must have something to search: --seeds, or recorded curves and --replay-seeds")
    return WarmStartResult(rows=tuple(rows), about=_describe_benchmark(options))


def _describe_benchmark(options: SearchOptions) -> dict[str, Any]:
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_line(),
        "trained": {"space": SPACE, "num_samples": options.num_samples, "max_epochs": options.max_epochs},
        "replayed": {"budget": REPLAY_BUDGET},
        "top_k": TOP_K,
        "close": CLOSE,
    }


def write_warm_start(path: Path, result: WarmStartResult) -> None:
    """Write the rows, with what they rest on in the metadata."""
    table = pa.Table.from_pylist([vars(row) for row in result.rows], schema=SCHEMA)
    write_parquet(table.replace_schema_metadata({METADATA_KEY: json.dumps(dict(result.about))}), path)


# ---- the table ----


def render_warm_start(result: WarmStartResult) -> str:
    """Markdown: a table for each problem."""
    head = _explain(result.about)
    problems = list(dict.fromkeys(row.problem for row in result.rows))
    return "\n\n".join([head, *(_render_problem(problem, result.rows) for problem in problems)]) + "\n"


def _explain(about: Mapping[str, Any]) -> str:
    trained = about["trained"]
    return (
        f"{about['machine']}. Trained: {trained['num_samples']} trials of at most {trained['max_epochs']} epochs, "
        f"bf16; replayed: {about['replayed']['budget']} trial-epochs over recorded curves. Trial-epochs, on average, "
        "until the best validation accuracy that the cold search of the same seed ever reports; a search that never "
        "reaches it counts with all of its epochs or the cold one's, whichever are more. Beside them the mean "
        "difference from the cold search, and from a cold search of another seed, which is the donor: paired, with "
        "its 95 % interval, in bold where that excludes 0. The cold search cannot miss its own best: what another one "
        f"needs for it is told by the donor's row. Close: within {100 * about['close']:.1f} points, a standard error."
    )


def _render_problem(problem: str, rows: Sequence[WarmStartRow]) -> str:
    arms = {row.arm: [r for r in rows if (r.problem, r.arm) == (problem, row.arm)] for row in rows}
    arms = {arm: of_arm for arm, of_arm in arms.items() if of_arm}
    titles = ["", "epochs to the cold best", "from cold", "from another cold", "never", "close", "from cold"]
    titles += ["from another cold", "never", "points at the end, from cold", "epochs of all"]
    lines = []
    for arm, of_arm in arms.items():
        cells = [arm]
        for field in ("reached", "came_close"):
            costs = {name: count_costs(arms[name], arms[COLD], field) for name in (arm, COLD, DONOR)}
            cells += [
                f"{statistics.fmean(costs[arm]):.1f}",
                "" if arm == COLD else _render_difference(costs[arm], costs[COLD], 1),
                "" if arm in (COLD, DONOR) else _render_difference(costs[arm], costs[DONOR], 1),
                str(sum(getattr(row, field) is None for row in of_arm)),
            ]
        ends = [[100 * row.best for row in arms[name]] for name in (arm, COLD)]
        cells.append("" if arm == COLD else _render_difference(ends[0], ends[1], 2))
        cells.append(f"{statistics.fmean(row.epochs for row in of_arm):.1f}")
        lines.append(cells)
    return f"### {problem} (n = {len(arms[COLD])} seeds)\n\n" + render_table(titles, lines)


def count_costs(rows: Sequence[WarmStartRow], cold: Sequence[WarmStartRow], field: str) -> list[int]:
    """Trial-epochs by seed; where the accuracy was never reached, those of the longer of both searches."""
    return [
        value if (value := getattr(row, field)) is not None else max(row.epochs, other.epochs)
        for row, other in zip(rows, cold, strict=True)
    ]


def _render_difference(values: Sequence[float], others: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0] - others[0]:+.{digits}f}"
    return render_interval(paired_interval(values, others), digits)


def render_interval(interval: MeanInterval, digits: int) -> str:
    """``**-3.2 [-5.0, -1.4]**``; in bold where it excludes 0."""
    text = f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text
