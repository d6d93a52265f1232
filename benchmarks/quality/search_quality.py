"""How good a search is at a given budget: ours beside stock Ray Tune with Optuna, Optuna alone and random search.

Every program runs over the same recorded curves (``replay``) with the same seeds; differences are paired by seed. What
a program is worth is what it hands its user when the budget is spent: regret is how much worse that configuration is,
trained to its full budget, than the best one recorded. Which trials were past saving is told in hindsight, by their
recorded validation accuracy, and by whether anything changed at all, not by our states.
"""

import collections
import dataclasses
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from benchmarks.markdown import render_table
from benchmarks.quality.curves import Curves, load_curves
from benchmarks.quality.replay import (
    GRACE_PERIOD,
    OTHER_WEIGHT,
    REDUCTION_FACTOR,
    SLOTS,
    WEIGHTS,
    CurveTable,
    Problem,
    Program,
    ReplayedTrial,
    build_amp_scheduler,
    build_amp_search,
    build_amp_search_without_defaults,
    build_asha,
    build_fifo,
    build_optuna_search,
    build_optuna_search_with_defaults,
    build_random_search,
    build_record,
    is_loss_infinite,
    is_never_over,
    is_state_hopeless,
    replay_optuna,
    replay_program,
    select_started,
)
from tune_amp.results.parquet import METADATA_KEY, build_columns, write_parquet
from tune_amp.results.provenance import list_versions
from tune_amp.results.ranking import choose_best
from tune_amp.results.statistics import CONFIDENCE, MeanInterval, mean_interval
from tune_amp.search.schedulers import objective_mode
from tune_amp.trial.config import HOPELESS_STATES, RANKING_OBJECTIVES, EpochMetrics, TrialStatus, described

BUDGETS = (16, 32, 64, 128, 192)
MEAN_FROM, MEAN_STEP = 32, 4
"""The mean regret is taken over the epochs from 32, where every program has finished a trial, in steps of 4."""

NUM_CLASSES = 10  # of every built-in data set
GUESSING_LOSS = math.log(NUM_CLASSES)
HOPELESS_ACCURACY = 2 / NUM_CLASSES
RANDOM_TRIALS = 10
"""TPE starts with as many random trials, in ours and in stock alike."""

OURS = "tune_amp"

Choose = Callable[[Sequence[ReplayedTrial], Curves, str, int], "int | None"]


# ---- what a program hands its user ----


def choose_as_amp(trials: Sequence[ReplayedTrial], curves: Curves, objective: str, spent: int) -> int | None:
    """The curve of our best trial."""
    started = select_started(trials, spent)
    best = choose_best([build_record(trial, curves, spent) for trial in started], (objective,), 1)
    return next((trial.curve for trial in started if best and trial.trial_id == best[0].trial_id), None)


def choose_as_ray(trials: Sequence[ReplayedTrial], curves: Curves, objective: str, spent: int) -> int | None:
    """As ``ResultGrid.get_best_result``: the best last value, at whatever epoch; the first of equals."""
    scored = [(_value_then(trial, curves, objective, spent), trial) for trial in select_started(trials, spent)]
    return _choose_first(scored, objective)


def choose_as_optuna(trials: Sequence[ReplayedTrial], curves: Curves, objective: str, spent: int) -> int | None:
    """As ``Study.best_trial``: the best completed one."""
    completed = [trial for trial in select_started(trials, spent) if trial.find_status(spent) is TrialStatus.COMPLETED]
    return _choose_first([(_value_then(trial, curves, objective, spent), trial) for trial in completed], objective)


def _value_then(trial: ReplayedTrial, curves: Curves, objective: str, spent: int) -> float:
    return float(getattr(curves.epochs[trial.curve][trial.count_epochs(spent) - 1], objective))


def _choose_first(scored: Iterable[tuple[float, ReplayedTrial]], objective: str) -> int | None:
    sign = -1.0 if objective_mode(objective) == "max" else 1.0
    finite = [(sign * value, trial) for value, trial in scored if math.isfinite(value)]
    return min(finite, key=lambda pair: pair[0])[1].curve if finite else None


# ---- the programs ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A program and how it chooses."""

    name: str
    program: Program | None
    """None: Optuna alone."""
    choose: Choose
    is_ablation: bool = False
    """Whether it differs from ours or from stock in one part."""


_AMP = Program(build_searcher=build_amp_search, build_scheduler=build_amp_scheduler, is_over=is_state_hopeless)
_STOCK = Program(build_searcher=build_optuna_search, build_scheduler=build_asha, is_over=is_never_over)
_RANDOM = Program(build_searcher=build_random_search, build_scheduler=build_fifo, is_over=is_never_over)
_change = dataclasses.replace


def _list_arms() -> tuple[Arm, ...]:
    factor_4 = _change(_STOCK, build_scheduler=functools.partial(build_asha, reduction_factor=4))
    # Our searcher must be told a finite value of a trial that completed: with it, a trial ends where its loss is none.
    parts: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("searcher", {"build_searcher": build_optuna_search}, {"build_searcher": build_amp_search}),
        ("scheduler", {"build_scheduler": build_asha}, {"build_scheduler": build_amp_scheduler}),
        ("stop on hopeless states", {"is_over": is_loss_infinite}, {"is_over": is_state_hopeless}),
    )
    without = (
        Arm(name=f"tune_amp, stock {part}", program=_change(_AMP, **old), choose=choose_as_amp, is_ablation=True)
        for part, old, _ in parts
    )
    with_ours = (
        Arm(
            name=f"stock, our {part}",
            program=_change(_STOCK, **new, **({"is_over": is_loss_infinite} if part == "searcher" else {})),
            choose=choose_as_ray,
            is_ablation=True,
        )
        for part, _, new in parts
    )
    defaults = (
        Arm(
            name="tune_amp, defaults not first",
            program=_change(_AMP, build_searcher=build_amp_search_without_defaults),
            choose=choose_as_amp,
            is_ablation=True,
        ),
        Arm(
            name="stock, defaults first",
            program=_change(_STOCK, build_searcher=build_optuna_search_with_defaults),
            choose=choose_as_ray,
            is_ablation=True,
        ),
    )
    return (
        Arm(name=OURS, program=_AMP, choose=choose_as_amp),
        Arm(name="stock Ray Tune + Optuna", program=_STOCK, choose=choose_as_ray),
        Arm(name="stock, Ray's reduction_factor 4", program=factor_4, choose=choose_as_ray),
        Arm(name="random search", program=_RANDOM, choose=choose_as_ray),
        Arm(name="Optuna alone", program=None, choose=choose_as_optuna),
        *defaults,
        *without,
        Arm(name="tune_amp, stock choice of the best", program=_AMP, choose=choose_as_ray, is_ablation=True),
        *with_ours,
        Arm(name="stock, our choice of the best", program=_STOCK, choose=choose_as_amp, is_ablation=True),
    )


ARMS = _list_arms()


# ---- what hindsight says ----


def find_hopeless_epoch(curve: Sequence[EpochMetrics]) -> int | None:
    """The first epoch from which on no epoch has more than twice the accuracy of guessing; None where the last has.

    An epoch that repeats the validation loss of the one before to the last digit changed nothing, and does not count.
    """
    last_learned = max((metrics.epoch for metrics in _select_learning(curve)), default=0)
    return None if last_learned == curve[-1].epoch else last_learned + 1


def _select_learning(curve: Sequence[EpochMetrics]) -> Iterator[EpochMetrics]:
    before: EpochMetrics | None = None
    for metrics in curve:
        is_frozen = before is not None and metrics.val_loss == before.val_loss
        if (metrics.val_accuracy or 0.0) > HOPELESS_ACCURACY and not is_frozen:
            yield metrics
        before = metrics


def count_hopeless_epochs(trials: Sequence[ReplayedTrial], curves: Curves, spent: int) -> int:
    """Epochs trained after the first hopeless one of their trial: that one was needed to know."""
    found = [(trial, find_hopeless_epoch(curves.epochs[trial.curve])) for trial in trials]
    return sum(max(0, trial.count_epochs(spent) - since) for trial, since in found if since is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateCheck:
    """Our states beside hindsight, over all recorded curves; no search is involved."""

    counts: Mapping[tuple[int | None, int | None], int]
    """(hopeless from this epoch on, stopped after this epoch) -> curves; None: never."""
    recovered: int
    """Curves that learned something at an epoch after the one our states would have stopped them at."""
    largest_gain: float
    """Most accuracy that one of those stopped would still have gained on what it had reached."""

    def count(self, *, hopeless: bool, stopped: bool) -> int:
        """A cell of the 2 by 2 table."""
        return sum(
            number
            for (truth, stop), number in self.counts.items()
            if (truth is not None) == hopeless and (stop is not None) == stopped
        )


def check_states(curves: Curves) -> StateCheck:
    """Compare our verdict on every curve with what became of it."""
    counts: collections.Counter[tuple[int | None, int | None]] = collections.Counter()
    recovered, largest_gain = 0, 0.0
    for curve in curves.epochs:
        stop = next((metrics.epoch for metrics in curve if metrics.state in HOPELESS_STATES), None)
        counts[find_hopeless_epoch(curve), stop] += 1
        if stop is not None and stop < len(curve):
            accuracies = [metrics.val_accuracy or 0.0 for metrics in curve]
            recovered += any(metrics.epoch > stop for metrics in _select_learning(curve))
            largest_gain = max(largest_gain, max(accuracies[stop:]) - max(accuracies[:stop]))
    return StateCheck(counts=counts, recovered=recovered, largest_gain=largest_gain)


def list_regrets(curves: Curves, objective: str) -> list[float]:
    """Of each curve, how much worse it ends than the best: in points of accuracy, or in nats of validation loss.

    A loss above that of guessing, or none at all, counts as that of guessing: nobody need use such a model.
    """
    finals = [float(getattr(curve[-1], objective)) for curve in curves.epochs]
    if objective == "val_accuracy":
        return [100 * (max(finals) - value) for value in finals]
    losses = [min(value, GUESSING_LOSS) if math.isfinite(value) else GUESSING_LOSS for value in finals]
    return [value - min(losses) for value in losses]


# ---- measurement ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One search after so many epochs: a row of ``search-quality.parquet``."""

    space: str = described("search space whose recorded curves were searched")
    objective: str = described("what was searched for")
    arm: str = described("the program")
    seed: int = described("of the sampler; the same in all arms")
    budget: int = described("trial-epochs spent")
    curve: int | None = described("recorded configuration that the program hands out at this moment; null: none yet")
    regret: float | None = described(
        "how much worse it is, fully trained, than the best recorded: accuracy points, or nats"
    )
    mean_regret: float | None = described(
        f"mean of regret over the epochs from {MEAN_FROM} to this budget; null where some had none"
    )
    trials: int = described("trials that had reported")
    hopeless_epochs: int = described("epochs trained after the first hopeless one of their trial, told in hindsight")
    later_suggestions: int = described(f"trials that had reported, without the first {RANDOM_TRIALS}")
    hopeless_suggestions: int = described("of those, how many were hopeless from their first epoch, told in hindsight")


SCHEMA = pa.schema(build_columns(QualityRow))


def measure_space(space: str, path: Path, objective: str, seed: int) -> list[QualityRow]:
    """All arms with one seed."""
    table = _load_table(path)
    problem = Problem(table=table, objective=objective, seed=seed, budget=BUDGETS[-1])
    # Arms that differ only in how they choose share their trials.
    programs = {arm.program for arm in ARMS}
    trials = {program: _replay(program, problem) for program in programs}
    return [row for arm in ARMS for row in measure_arm(arm, trials[arm.program], problem, space)]


def measure_arm(arm: Arm, trials: Sequence[ReplayedTrial], problem: Problem, space: str) -> list[QualityRow]:
    """The rows of one arm, one for each budget."""
    curves, objective = problem.table.curves, problem.objective
    regrets = list_regrets(curves, objective)
    moments = sorted({*BUDGETS, *range(MEAN_FROM, BUDGETS[-1] + 1, MEAN_STEP)})
    chosen = {spent: arm.choose(trials, curves, objective, spent) for spent in moments}
    regret = {spent: None if curve is None else regrets[curve] for spent, curve in chosen.items()}
    rows = []
    for budget in BUDGETS:
        started = select_started(trials, budget)
        later = started[RANDOM_TRIALS:]
        rows.append(
            QualityRow(
                space=space,
                objective=objective,
                arm=arm.name,
                seed=problem.seed,
                budget=budget,
                curve=chosen[budget],
                regret=regret[budget],
                mean_regret=_mean([regret[spent] for spent in moments if MEAN_FROM <= spent <= budget]),
                trials=len(started),
                hopeless_epochs=count_hopeless_epochs(trials, curves, budget),
                later_suggestions=len(later),
                hopeless_suggestions=sum(find_hopeless_epoch(curves.epochs[trial.curve]) == 1 for trial in later),
            )
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _replay(program: Program | None, problem: Problem) -> list[ReplayedTrial]:
    return replay_optuna(problem) if program is None else replay_program(program, problem)


@functools.cache  # of a worker process
def _load_table(path: Path) -> CurveTable:
    return CurveTable(load_curves(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchQuality:
    """The result of the benchmark."""

    rows: tuple[QualityRow, ...]
    checks: Mapping[str, StateCheck]
    """Space -> our states beside hindsight."""
    lookups: Mapping[str, Sequence[float]]
    """Space -> leave one out, how far the final accuracy of each curve's nearest other is off."""
    about: Mapping[str, Any]
    """Versions, seeds, date, and what the curves were recorded with."""


def measure_quality(files: Mapping[str, Path], *, seeds: int, workers: int) -> SearchQuality:
    """Run every arm on every space and objective.

    Args:
        files: space -> recorded curves.
        seeds: searches of each arm, seeded 0, 1, ...
        workers: processes.
    """
    # What cannot be replayed is refused here, not in a worker.
    tables = {space: CurveTable(load_curves(path)) for space, path in files.items()}
    curves = {space: table.curves for space, table in tables.items()}
    tasks = [
        (space, path, objective, seed)
        for space, path in files.items()
        for objective, seed in itertools.product(RANKING_OBJECTIVES, range(seeds))
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        rows = pool.starmap(measure_space, tasks, chunksize=1)
    return SearchQuality(
        rows=tuple(itertools.chain.from_iterable(rows)),
        checks={space: check_states(recorded) for space, recorded in curves.items()},
        lookups={space: table.measure_lookup() for space, table in tables.items()},
        about=describe_benchmark(curves, seeds),
    )


def describe_benchmark(curves: Mapping[str, Curves], seeds: int) -> dict[str, Any]:
    """What the figures rest on; nothing about the machine."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": list_versions("tune_amp", "ray", "optuna", "numpy", "torch"),
        "seeds": list(range(seeds)),
        "slots": SLOTS,
        "grace_period": GRACE_PERIOD,
        "reduction_factor": REDUCTION_FACTOR,
        "distance_weights": {**WEIGHTS, "others": OTHER_WEIGHT},
        "curves": {
            space: {**recorded.origin, "count": len(recorded.configs), "max_epochs": recorded.max_epochs}
            for space, recorded in curves.items()
        },
    }


def write_quality(path: Path, quality: SearchQuality) -> None:
    """Write the rows, with what they rest on in the metadata."""
    table = pa.Table.from_pylist([vars(row) for row in quality.rows], schema=SCHEMA)
    write_parquet(table.replace_schema_metadata({METADATA_KEY: json.dumps(dict(quality.about))}), path)


# ---- statistics ----


def compare_pairs(ours: Sequence[float | None], others: Sequence[float | None]) -> MeanInterval | None:
    """Ours minus the other, pair by pair; pairs in which one is missing are left out. None with fewer than two left."""
    pairs = zip(ours, others, strict=True)
    differences = [mine - other for mine, other in pairs if mine is not None and other is not None]
    return mean_interval(differences) if len(differences) >= 2 else None


# ---- the tables ----


def render_quality(quality: SearchQuality) -> str:
    """Markdown: of each space a table for each objective, one of the ablations, and a line about our states."""
    parts = [_explain(len(quality.about["seeds"]))]
    for space, check in quality.checks.items():
        for objective in RANKING_OBJECTIVES:
            unit = "points of accuracy" if objective == "val_accuracy" else "nats of validation loss"
            rows = [row for row in quality.rows if (row.space, row.objective) == (space, objective)]
            main = [arm for arm in ARMS if not arm.is_ablation]
            parts += [f"### {space}, {objective} (regret in {unit})", _render_table(rows, main)]
            ablations = [arm for arm in ARMS if arm.is_ablation or arm.name == OURS]
            parts += ["One part exchanged at a time:", _render_table(rows, ablations)]
        parts += [describe_check(space, check), _describe_lookup(space, quality.lookups[space])]
    return "\n\n".join(parts) + "\n"


def _explain(seeds: int) -> str:
    return (
        f"Regret of what each program hands out after so many trial-epochs, mean of {seeds} seeds; in brackets ours "
        f"minus this one, paired by seed, with its {CONFIDENCE:.0%} confidence interval: negative is in our favour; "
        "in bold the interval excludes 0. Of the many intervals one in twenty does so by chance: the comparison fixed "
        "beforehand is that of the mean (of the regret over the epochs from "
        f"{MEAN_FROM} to {BUDGETS[-1]}) with stock. Where not all seeds had anything to hand out, a number after / "
        "counts those that had."
    )


def _describe_lookup(space: str, errors: Sequence[float]) -> str:
    return (
        f"A suggestion in {space} is answered by the nearest of {len(errors)} curves: leave one out, its final "
        f"accuracy is off by {100 * statistics.median(errors):.2f} points in the median, "
        f"{100 * statistics.fmean(errors):.2f} on average."
    )


def _render_table(rows: Sequence[QualityRow], arms: Sequence[Arm]) -> str:
    titles = ["", *(f"{budget} epochs" for budget in BUDGETS), "mean", "epochs on hopeless", "hopeless suggestions"]
    lines = []
    ours = _rows_of(rows, OURS)
    for arm in arms:
        theirs = _rows_of(rows, arm.name)
        cells = [
            _render_regret([row.regret for row in ours[budget]], [row.regret for row in theirs[budget]], arm.name)
            for budget in BUDGETS
        ]
        last, our_last = theirs[BUDGETS[-1]], ours[BUDGETS[-1]]
        cells.append(_render_regret([r.mean_regret for r in our_last], [r.mean_regret for r in last], arm.name))
        suggested = sum(row.later_suggestions for row in last)
        hopeless = sum(row.hopeless_suggestions for row in last)
        cells.append(f"{statistics.fmean(row.hopeless_epochs / row.budget for row in last):.1%}")
        cells.append(f"{hopeless / suggested:.1%}" if suggested else "-")
        lines.append((arm.name, *cells))
    return render_table(titles, lines)


def _rows_of(rows: Sequence[QualityRow], arm: str) -> dict[int, list[QualityRow]]:
    """Budget -> the arm's rows, by seed."""
    chosen = sorted((row for row in rows if row.arm == arm), key=lambda row: row.seed)
    return {budget: [row for row in chosen if row.budget == budget] for budget in BUDGETS}


def _render_regret(ours: Sequence[float | None], theirs: Sequence[float | None], arm: str) -> str:
    known = [value for value in theirs if value is not None]
    if not known:
        return "nothing yet"
    cell = f"{statistics.fmean(known):.3f}" + (f" /{len(known)}" if len(known) < len(theirs) else "")
    difference = None if arm == OURS else compare_pairs(ours, theirs)
    if difference is None:
        return cell
    text = f"({difference.mean:+.3f} ± {difference.high - difference.mean:.3f})"
    return f"{cell} {text}" if difference.low <= 0 <= difference.high else f"{cell} **{text}**"


def describe_check(space: str, check: StateCheck) -> str:
    """One sentence on our states beside hindsight."""
    hopeless = check.count(hopeless=True, stopped=True) + check.count(hopeless=True, stopped=False)
    others = check.count(hopeless=False, stopped=True) + check.count(hopeless=False, stopped=False)
    when: collections.Counter[int] = collections.Counter()
    for (truth, stop), number in check.counts.items():
        if truth is not None and stop is not None:
            when[stop] += number
    epochs = ", ".join(f"{number} after epoch {epoch}" for epoch, number in sorted(when.items()))
    return (
        f"States on the recorded curves of {space}: of {hopeless} that are hopeless in hindsight "
        f"{check.count(hopeless=True, stopped=True)} are stopped ({epochs or 'none'}), of {others} others "
        f"{check.count(hopeless=False, stopped=True)}; {check.recovered} of those stopped learned anything "
        "later on, and none gained more than "
        f"{100 * check.largest_gain:.2f} points on what it had."
    )
