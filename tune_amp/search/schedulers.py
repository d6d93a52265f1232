"""Early stopping by epoch: Ray's schedulers, changed so that a trial that diverged ranks last and is stopped."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tune_amp.cluster.ray_patches import pause_pending
from tune_amp.search.options import SearchOptions
from tune_amp.trial.config import RANKING_OBJECTIVES, RUNNING, TrialStatus
from tune_amp.trial.objectives import MAX, MIN, is_maximized, metric_of
from tune_amp.trial.report import TrialReport

LOOK_SECONDS = 0.1
"""Seconds that Tune sleeps if all of its trials wait."""

_WORST_VALUES = {"val_accuracy": 0.0, "peak_memory_bytes": 1e15}


class TrialKey(NamedTuple):
    """Stands for a trial in calls of schedulers, which use only its id."""

    trial_id: str


def make_key(trial_id: str) -> Any:
    """Return the key of a trial, of no type, since schedulers are typed for Ray's class."""
    return TrialKey(trial_id)


class DivergenceAware(FIFOScheduler):
    """Stops only trials that diverged. Listed before one of Ray's rules in the bases, it corrects that rule.

    Ray's rules compare by ``<``, which is false for NaN: a trial whose metric is NaN continues, and the others are not
    compared with it. Here a result counts as the worst possible if its validation loss or accuracy is not finite, or if
    the trial reports that it diverged. A training loss that is not finite shows only that some batches overflowed.

    A report without an epoch, which is that of a failure, changes nothing. The rule sees every epoch of a retried trial
    once.

    Ray's rules get a ``TrialKey`` for the trial: the median rule's memory would not outlive the process otherwise.

    Args:
        objective: the objective, see ``trial.objectives``.
        on_worker_death: is called with the trial whose worker died, even if that trial will be retried; may return the
            seconds that the trial waits before the retry.
        clock: returns seconds.
        rule: arguments of Ray's class.
    """

    def __init__(
        self,
        *,
        objective: str,
        on_worker_death: Callable[[Any], float | None],
        clock: Callable[[], float] = time.monotonic,
        **rule: Any,
    ) -> None:
        super().__init__(**rule)  # type: ignore[no-untyped-call]
        self._ranked_metric, self._worst_value = metric_of(objective), find_worst_value(objective)
        self._on_worker_death = on_worker_death
        self._clock = clock
        self._waiting: dict[str, float] = {}
        self._seen_epochs: dict[str, int] = {}
        self._to_stop: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial continues or stops."""
        if trial.trial_id in self._to_stop:
            # The worker died before the stop reached it, since saving comes first. Ray's median rule would fail here,
            # and its ASHA would let the trial continue to the next rung.
            return TrialScheduler.STOP
        if result.get("epoch", 0) <= self._seen_epochs.get(trial.trial_id, 0):
            return TrialScheduler.CONTINUE
        self._seen_epochs[trial.trial_id] = result["epoch"]
        decision: str = super().on_trial_result(tune_controller, make_key(trial.trial_id), self._ranked(result))
        if is_hopeless(result):
            decision = TrialScheduler.STOP
        if decision == TrialScheduler.STOP:
            self._to_stop.add(trial.trial_id)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record a trial's last value, or the worst possible if it diverged."""
        if "epoch" in result:
            super().on_trial_complete(tune_controller, make_key(trial.trial_id), self._ranked(result))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass on that the trial's worker died, and make the trial wait if it has to."""
        seconds = self._on_worker_death(trial)
        if seconds:
            self._waiting[trial.trial_id] = self._clock() + seconds
        super().on_trial_error(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the next trial that need not wait. Waiting ones are paused, as Tune starts pending ones by itself."""
        now = self._clock()
        self._waiting = {trial_id: until for trial_id, until in self._waiting.items() if until > now}
        if self._waiting:
            live = tune_controller.get_live_trials()
            for trial in live:
                if trial.trial_id in self._waiting and trial.status == Trial.PENDING:
                    pause_pending(tune_controller, trial)
            if not any(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in live):
                time.sleep(LOOK_SECONDS)  # Tune waits for events of workers: without a worker, its loop spins
        chosen = super().choose_trial_to_run(tune_controller)
        return None if chosen is not None and chosen.trial_id in self._waiting else chosen

    def _ranked(self, result: dict[str, Any]) -> dict[str, Any]:
        return {**result, self._ranked_metric: self._worst_value} if is_hopeless(result) else result


class DivergenceAwareHyperBand(DivergenceAware, AsyncHyperBandScheduler):
    """ASHA, or asynchronous HyperBand if there is more than one bracket (Li et al. 2020, arXiv:1810.05934).

    Ray draws a trial's bracket from numpy's global generator, and draws again if the trial is retried, which leaves its
    values in two brackets. Here the n-th trial of a search always has the same bracket, and keeps it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._draws = np.random.RandomState(0).get_state()  # the kind of generator that Ray draws from

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Give a new trial its bracket."""
        if trial.trial_id in self._trial_info:
            return
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._draws)  # noqa: NPY002
        super().on_trial_add(tune_controller, trial)
        self._draws = np.random.get_state()  # noqa: NPY002
        np.random.set_state(outside)  # noqa: NPY002


class DivergenceAwareMedian(DivergenceAware, MedianStoppingRule):
    """Stops a trial whose best value is worse than the median of the others' averages (Golovin et al. 2017, Vizier).

    Ray's own fails with a KeyError at the next report after one without an epoch.
    """


def build_scheduler(options: SearchOptions, on_worker_death: Callable[[Any], float | None]) -> DivergenceAware:
    """Return the scheduler of a search, which sees only the first objective.

    HyperBand is the asynchronous one. Ray's synchronous ``HyperBandScheduler`` opens a bracket only when live trials
    fill the one before, and its first bracket runs all of them to the end: of 40 trials with a budget of 8 epochs, 4 at
    a time, it stopped none.

    Args:
        options: options of the search.
        on_worker_death: is called with a trial whose worker died, even if it will be retried; may return the seconds
            that the trial waits before the retry.
    """
    name, objective, grace_period = options.scheduler, options.objectives[0], options.grace_period
    shared: dict[str, Any] = {"objective": objective, "on_worker_death": on_worker_death}
    if name == "none":
        return DivergenceAware(**shared)
    shared |= {"time_attr": "epoch", "metric": metric_of(objective), "mode": objective_mode(objective)}
    shared |= {"grace_period": grace_period}
    if name == "median":
        # Before it has enough trials to compare, Ray would pause running trials whenever others wait; with an infinite
        # slice it never does. A paused trial is saved and gets another worker, only to continue the same way.
        return DivergenceAwareMedian(**shared, hard_stop=True, min_time_slice=math.inf)
    factor = options.reduction_factor
    brackets = count_brackets(options.max_epochs, grace_period, factor) if name == "hyperband" else 1
    return DivergenceAwareHyperBand(**shared, max_t=options.max_epochs, reduction_factor=factor, brackets=brackets)


def restore_scheduler(
    scheduler: DivergenceAware, trial_ids: Iterable[str], reports: Iterable[tuple[str, TrialReport | None]]
) -> None:
    """Pass to a new scheduler what the previous one received, in the same order, which restores rungs and averages.

    ``Tuner.restore`` restores a scheduler empty (ray-project/ray#30838).

    Args:
        scheduler: from ``build_scheduler``, with the same arguments.
        trial_ids: all trials, in the order of submission.
        reports: all reports, from ``RunHistory.reports``.
    """
    results: dict[str, dict[str, Any]] = {}
    controller: Any = None  # none of these rules uses it
    for trial_id in trial_ids:
        scheduler.on_trial_add(controller, make_key(trial_id))
    for trial_id, report in reports:
        key, last = make_key(trial_id), results.get(trial_id, {})
        if report is None and last.get("done"):
            scheduler.on_trial_complete(controller, key, last)
        elif report is not None:
            last = results[trial_id] = report.as_result()
            if report.status == RUNNING:  # a report that ends the trial reaches on_trial_complete only
                scheduler.on_trial_result(controller, key, last)


def count_brackets(max_epochs: int, grace_period: int, reduction_factor: float) -> int:
    """Return HyperBand's number of brackets, 1 + floor(log(max_epochs / grace_period) / log(reduction_factor)).

    There is at most one for each epoch at which a trial can first be stopped: a factor near 1 would give thousands.
    """
    brackets = 1
    while brackets <= max_epochs - grace_period and grace_period * reduction_factor**brackets <= max_epochs:
        brackets += 1
    return brackets


def is_hopeless(result: Mapping[str, Any]) -> bool:
    """Return whether a result with an epoch is that of a trial that diverged."""
    values = [value for name in RANKING_OBJECTIVES if (value := result.get(name)) is not None]
    return not all(map(math.isfinite, values)) or result.get("status") == TrialStatus.DIVERGED


def objective_mode(objective: str) -> str:
    """Return Tune's mode for an objective: ``max`` or ``min``."""
    return MAX if is_maximized(objective) else MIN


def find_worst_value(objective: str) -> float:
    """Return the value that counts for a trial that diverged.

    It is finite, because ASHA's cutoff interpolates between neighbours, and anything between infinity and a number is
    infinite.
    """
    return _WORST_VALUES.get(objective, -1e9 if is_maximized(objective) else 1e9)
