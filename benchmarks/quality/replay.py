"""Searches replayed over recorded learning curves: no Ray process, no training, the real searchers and schedulers.

The loop makes the calls of Ray 2.60's ``TuneController`` and ``SearchGenerator`` in their order. Every epoch of every
trial costs one unit of the budget, whatever its batch size. A suggestion is answered by the recorded configuration that
is nearest to it (``CurveTable.find_nearest``), the same for every program that is compared.
"""

import bisect
import collections
import contextlib
import dataclasses
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks.quality.curves import Curves
from tune_amp.cluster.failures import find_status
from tune_amp.cluster.trainable import progress_report
from tune_amp.results.records import TrialRecord
from tune_amp.search.options import SearchOptions
from tune_amp.search.samplers import reseed
from tune_amp.search.schedulers import build_scheduler, objective_mode
from tune_amp.search.study import AmpSearch
from tune_amp.search.warm_start import WarmStart
from tune_amp.space.document import SHARED
from tune_amp.space.parameter import Parameter
from tune_amp.space.space import SearchSpace, parse_space
from tune_amp.trial.config import HOPELESS_STATES, RUNNING, EpochMetrics, InputError, TrialConfig, TrialStatus

SLOTS = 4
GRACE_PERIOD = 1
REDUCTION_FACTOR = 2.0

# Of the distance along each field. Leave one out, the final accuracy of the nearest of 128 curves of stress is off by
# 9.6 points on average and 1.7 in the median; with equal weights by 17.6 and 2.6, by lr alone 14.4 and 3.3, and that of
# a random curve by 26.2 on average. Chosen on those curves from a coarse grid, before a search was replayed over them.
WEIGHTS: Mapping[str, float] = {"lr": 1.0, "batch_size": 0.25, "init_scale": 0.5}
OTHER_WEIGHT = 0.125


# ---- what a suggestion is answered with ----


class CurveTable:
    """Recorded curves of a space, found by their settings.

    Args:
        curves: as recorded; the space is the one that they were recorded with.
        weights: of the distance along each searched field, ``OTHER_WEIGHT`` for fields that it does not name.

    Raises:
        InputError: the space has conditional parameters, for which there is no distance here.
    """

    def __init__(self, curves: Curves, weights: Mapping[str, float] = WEIGHTS) -> None:
        self.curves = curves
        self.space = load_recorded_space(curves)
        if self.space.is_conditional:
            raise InputError(f"{self.space.source}: must have no parameter with when, to be replayed")
        self.train_images: int = curves.origin["train_images"]
        self.shared = {name: getattr(curves.configs[0], name) for name in SHARED}
        self._weights = np.array([weights.get(p.name, OTHER_WEIGHT) for p in self.space.parameters])
        self._is_choice = np.array([bool(p.choices) for p in self.space.parameters])
        self._places = np.array([self._place(config) for config in curves.configs])

    @property
    def max_epochs(self) -> int:
        """Full budget of a trial."""
        return self.curves.max_epochs

    def find_nearest(self, config: TrialConfig) -> int:
        """Number of the curve whose settings are nearest; of several the first."""
        return int(np.argmin(self._distances(self._place(config))))

    def measure_lookup(self) -> list[float]:
        """Leave one out: of each curve, how far the final accuracy of the nearest other one is off."""
        finals = [curve[-1].val_accuracy or 0.0 for curve in self.curves.epochs]
        errors = []
        for number, place in enumerate(self._places):
            distances = self._distances(place)
            distances[number] = np.inf
            errors.append(abs(finals[number] - finals[int(np.argmin(distances))]))
        return errors

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """All settings of a trial, as an ordinary define-by-run function of Optuna's would return them."""
        sizes = {"train_images": self.train_images, "max_epochs": self.max_epochs}
        return vars(TrialConfig(**{**self.shared, **self.space.suggest(trial, **sizes)})).copy()

    def _distances(self, place: NDArray[np.float64]) -> NDArray[np.float64]:
        apart = np.abs(self._places - place)
        apart[:, self._is_choice] = apart[:, self._is_choice] != 0
        squares: NDArray[np.float64] = ((apart * self._weights) ** 2).sum(axis=1)
        return squares

    def _place(self, config: TrialConfig) -> NDArray[np.float64]:
        steps = self.train_images // config.batch_size * self.max_epochs
        return np.array([locate_setting(p, getattr(config, p.name), steps) for p in self.space.parameters])


def locate_setting(parameter: Parameter, value: Any, trial_steps: int) -> float:
    """A setting's place in its range, from 0 to 1 on the range's own scale; of a choice, its number."""
    if parameter.choices:
        return float(parameter.choices.index(value))
    assert parameter.low is not None
    assert parameter.high is not None
    number = value / trial_steps if parameter.fraction_of_trial else value
    scale = math.log if parameter.log or parameter.power_of_two else float
    low, high = scale(parameter.low), scale(parameter.high)
    return (scale(number) - low) / (high - low)


def load_recorded_space(curves: Curves) -> SearchSpace:
    """The space that the curves were recorded with, from its text: the file may have changed since."""
    return parse_space(curves.origin["space_source"], curves.origin["space_text"])


# ---- what is compared ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One search: what every program is given."""

    table: CurveTable
    objective: str
    seed: int
    budget: int
    """Trial-epochs."""
    slots: int = SLOTS
    """Trials at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program on Ray Tune, of its parts."""

    build_searcher: Callable[[Problem, Path], Any]
    """Its second argument is an empty folder."""
    build_scheduler: Callable[[Problem], TrialScheduler]
    is_over: Callable[[EpochMetrics], bool]
    """Whether the trial itself ends after this epoch as diverged."""


@dataclasses.dataclass(kw_only=True)
class ReplayedTrial:
    """A trial as far as it came. Ray's searchers and schedulers know a trial by its ``trial_id``."""

    trial_id: str
    config: TrialConfig
    """As suggested."""
    curve: int
    """What answered it."""
    spent_at: list[int] = dataclasses.field(default_factory=list)
    """For each of its epochs, which unit of the budget it was, from 1."""
    status: TrialStatus | None = None
    """None while it runs."""
    last_result: dict[str, Any] = dataclasses.field(default_factory=dict)

    def count_epochs(self, spent: int) -> int:
        """Its epochs within the first ``spent`` units of the budget."""
        return bisect.bisect_right(self.spent_at, spent)

    def find_status(self, spent: int) -> TrialStatus:
        """How it stood then. What still runs bears the status it would end with if all stopped: interrupted."""
        ended = self.status is not None and self.spent_at[-1] <= spent
        return self.status if ended and self.status is not None else TrialStatus.INTERRUPTED


def build_amp_search(problem: Problem, folder: Path, warm_start: WarmStart | None = None) -> AmpSearch:
    """Ours."""
    table = problem.table
    return AmpSearch(
        table.space,
        table.shared,
        train_images=table.train_images,
        objectives=(problem.objective,),
        seed=problem.seed,
        folder=folder,
        study_name="replay",
        num_samples=problem.budget,  # more than any search of this budget starts
        warm_start=warm_start,
    )


def build_amp_search_without_defaults(problem: Problem, folder: Path) -> AmpSearch:
    """Ours, but that the defaults are not tried first: they are asked for, and forgotten."""
    searcher = build_amp_search(problem, folder)
    searcher.study.tell(searcher.study.ask(), state=TrialState.FAIL)
    return searcher


def build_optuna_search_with_defaults(problem: Problem, folder: Path) -> OptunaSearch:
    """Ray's, told to try the defaults first as ours does."""
    searcher = build_optuna_search(problem, folder)
    table = problem.table
    defaults = table.space.find_defaults(train_images=table.train_images, max_epochs=table.max_epochs)
    study: Any = searcher._ot_study  # noqa: SLF001 - points_to_evaluate is not for define-by-run spaces
    study.enqueue_trial(defaults)
    return searcher


def build_optuna_search(problem: Problem, folder: Path) -> OptunaSearch:
    """Ray's, with the sampler that it makes by itself, and its study in memory."""
    return _build_stock(problem, seed=problem.seed)


def build_random_search(problem: Problem, folder: Path) -> OptunaSearch:
    """Ray's, with Optuna's random sampler."""
    return _build_stock(problem, sampler=optuna.samplers.RandomSampler(seed=problem.seed))


class SameDraws(OptunaSearch):
    """Ray's, which draws for its n-th trial what ours draws: all programs begin with the same random trials."""

    def __init__(self, *arguments: Any, draws: int, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._draws, self._drawn = draws, 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The settings of the next trial."""
        reseed(cast("optuna.Study", self._ot_study).sampler, self._draws, self._drawn)
        self._drawn += 1
        return super().suggest(trial_id)


def _build_stock(problem: Problem, **settings: Any) -> OptunaSearch:
    _silence_optuna()
    # It warns of every value that is not finite, which is what is measured here.
    logging.getLogger("ray.tune.search.optuna.optuna_search").setLevel(logging.ERROR)
    mode = objective_mode(problem.objective)
    return SameDraws(problem.table.suggest, metric=problem.objective, mode=mode, draws=problem.seed, **settings)


def build_amp_scheduler(problem: Problem) -> TrialScheduler:
    """Ours."""
    options = SearchOptions(
        objective=problem.objective,
        max_epochs=problem.table.max_epochs,
        grace_period=GRACE_PERIOD,
        reduction_factor=REDUCTION_FACTOR,
    )
    return build_scheduler(options, lambda trial: None)  # no worker dies in a replay


def build_asha(problem: Problem, reduction_factor: float = REDUCTION_FACTOR) -> TrialScheduler:
    """Ray's, measured in epochs."""
    return ASHAScheduler(
        time_attr="epoch",
        metric=problem.objective,
        mode=objective_mode(problem.objective),
        max_t=problem.table.max_epochs,
        grace_period=GRACE_PERIOD,
        reduction_factor=reduction_factor,
    )


def build_fifo(problem: Problem) -> TrialScheduler:
    """Ray's that stops nothing."""
    return FIFOScheduler()


def is_state_hopeless(metrics: EpochMetrics) -> bool:
    """Our trainable's rule."""
    return metrics.state in HOPELESS_STATES


def is_loss_infinite(metrics: EpochMetrics) -> bool:
    """The rule of a careful loop that looks at its loss only."""
    return metrics.val_loss is not None and not math.isfinite(metrics.val_loss)


def is_never_over(metrics: EpochMetrics) -> bool:
    """The rule of an ordinary loop."""
    return False


# ---- the replay ----


def replay_program(program: Program, problem: Problem) -> list[ReplayedTrial]:
    """The trials of a search with Ray Tune, in the order of their start, when the budget is spent."""
    with _fast_folder() as folder:
        searcher = program.build_searcher(problem, folder)
        return run_trials(searcher, program.build_scheduler(problem), problem, program.is_over)


def run_trials(
    searcher: Any, scheduler: Any, problem: Problem, is_over: Callable[[EpochMetrics], bool]
) -> list[ReplayedTrial]:
    """The event loop. As all epochs take as long as each other, the trials in the slots report in turn."""
    trials: list[ReplayedTrial] = []
    running: collections.deque[ReplayedTrial] = collections.deque()
    for spent in range(1, problem.budget + 1):
        while len(running) < problem.slots:
            trials.append(_start_trial(searcher, scheduler, problem.table, number=len(trials)))
            running.append(trials[-1])
        trial = running.popleft()
        trial.spent_at.append(spent)
        metrics = problem.table.curves.epochs[trial.curve][len(trial.spent_at) - 1]
        if _process_result(searcher, scheduler, trial, report_epoch(metrics, problem.table.max_epochs, is_over)):
            running.append(trial)
    return trials


def report_epoch(metrics: EpochMetrics, max_epochs: int, is_over: Callable[[EpochMetrics], bool]) -> dict[str, Any]:
    """What a trainable would tell Tune after this epoch."""
    if is_over(metrics):
        report = progress_report(metrics, TrialStatus.DIVERGED, f"{metrics.state}: replayed")
    else:
        report = progress_report(metrics, TrialStatus.COMPLETED if metrics.epoch >= max_epochs else RUNNING)
    return {**report, "training_iteration": metrics.epoch}  # Tune adds it, and its OptunaSearch reads it


def _start_trial(searcher: Any, scheduler: Any, table: CurveTable, *, number: int) -> ReplayedTrial:
    """As in ``SearchGenerator.create_trial_if_possible`` and ``TuneController.add_trial``."""
    trial_id = f"{number:08x}"
    suggested = searcher.suggest(trial_id)
    if not isinstance(suggested, TrialConfig):  # Ray's searcher suggests parameters besides
        fields = dataclasses.fields(TrialConfig)
        suggested = TrialConfig(**{field.name: suggested[field.name] for field in fields})
    trial = ReplayedTrial(trial_id=trial_id, config=suggested, curve=table.find_nearest(suggested))
    scheduler.on_trial_add(None, trial)
    return trial


def _process_result(searcher: Any, scheduler: Any, trial: ReplayedTrial, result: dict[str, Any]) -> bool:
    """As in ``TuneController._process_trial_result`` and ``stop_trial``. Returns whether the trial goes on."""
    decision = TrialScheduler.STOP
    if not result["done"]:  # a trial that ended by itself is no more the scheduler's to decide on
        decision = scheduler.on_trial_result(None, trial, dict(result))
    if decision == TrialScheduler.STOP:
        result["done"] = True
    else:
        searcher.on_trial_result(trial.trial_id, dict(result))
    trial.last_result = result
    if decision == TrialScheduler.CONTINUE:
        return True
    assert decision == TrialScheduler.STOP  # none of the schedulers here pauses
    scheduler.on_trial_complete(None, trial, dict(result))
    searcher.on_trial_complete(trial.trial_id, result=dict(result))
    trial.status = find_status(result, error=False)
    return False


def replay_optuna(problem: Problem) -> list[ReplayedTrial]:
    """The same with Optuna alone: its default sampler and pruner, and as many trials in turn."""
    _, trials = run_optuna(problem)
    return trials


def run_optuna(problem: Problem) -> tuple[optuna.Study, list[ReplayedTrial]]:
    """An ordinary loop of ask, report, should_prune and tell, and its study."""
    _silence_optuna()
    is_more_better = objective_mode(problem.objective) == "max"
    direction = StudyDirection.MAXIMIZE if is_more_better else StudyDirection.MINIMIZE
    sampler = optuna.samplers.TPESampler(seed=problem.seed)
    study = optuna.create_study(direction=direction, sampler=sampler)  # its default pruner: MedianPruner()
    trials: list[ReplayedTrial] = []
    running: collections.deque[tuple[optuna.Trial, ReplayedTrial]] = collections.deque()
    for spent in range(1, problem.budget + 1):
        while len(running) < problem.slots:
            reseed(sampler, problem.seed, len(trials))
            asked = study.ask()
            config = TrialConfig(**problem.table.suggest(asked))
            nearest = problem.table.find_nearest(config)
            trials.append(ReplayedTrial(trial_id=str(asked.number), config=config, curve=nearest))
            running.append((asked, trials[-1]))
        asked, trial = running.popleft()
        trial.spent_at.append(spent)
        metrics = problem.table.curves.epochs[trial.curve][len(trial.spent_at) - 1]
        value = getattr(metrics, problem.objective)
        asked.report(value, metrics.epoch)
        if metrics.epoch >= problem.table.max_epochs:
            trial.status = TrialStatus.COMPLETED if math.isfinite(value) else TrialStatus.FAILED
            if math.isfinite(value):
                study.tell(asked, value)
            else:  # as Study.optimize does with a value that is no number
                study.tell(asked, state=TrialState.FAIL)
        elif _should_prune(asked):
            study.tell(asked, state=TrialState.PRUNED)
            trial.status = TrialStatus.STOPPED
        else:
            running.append((asked, trial))
    return study, trials


def _should_prune(asked: optuna.Trial) -> bool:
    with warnings.catch_warnings():
        # numpy's, in Optuna's pruner, about a trial whose values were none so far
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        return asked.should_prune()


# ---- what a trial's record would be ----


def build_record(trial: ReplayedTrial, curves: Curves, spent: int) -> TrialRecord:
    """The trial as our recorder would have it after ``spent`` units of the budget."""
    return TrialRecord(
        trial_id=trial.trial_id,
        status=trial.find_status(spent),
        config=trial.config,
        epochs=curves.epochs[trial.curve][: trial.count_epochs(spent)],
        trial_name=trial.trial_id,
        wall_seconds=0.0,
        device="cpu",
        num_threads=1,
    )


def select_started(trials: Sequence[ReplayedTrial], spent: int) -> list[ReplayedTrial]:
    """Those that had reported something by then."""
    return [trial for trial in trials if trial.count_epochs(spent)]


def _silence_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce every study and trial


@contextlib.contextmanager
def _fast_folder() -> Iterator[Path]:
    """A temporary folder, in memory where the system has such a place: journals wait for the disk at every line."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder within is made by tempfile
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
