"""Early stopping by epoch: Ray's own schedulers, in which a trial that diverged ranks last, and is stopped."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tune_amp.search.history import result_of
from tune_amp.trial.config import MORE_IS_BETTER, RANKING_OBJECTIVES, RUNNING, SCHEDULERS, TrialStatus

LOOK_SECONDS = 0.1
"""How long Tune may sleep where all of its trials wait."""

# Finite, because ASHA's cutoff interpolates between neighbours, and anything between infinity and a number is infinite.
WORST_VALUES = {"val_accuracy": 0.0, "val_loss": 1e9, "train_seconds": 1e9, "peak_memory_bytes": 1e15}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialKey:
    """A trial as far as schedulers remember it: they look at nothing but its id."""

    trial_id: str


class DivergenceAware(FIFOScheduler):
    """Stops nothing but trials that diverged; before one of Ray's rules, in the order of bases, it mends that rule.

    Ray's rules compare by ``<``, which is false for NaN: a trial whose metric is NaN goes on, and the others are not
    measured by it. Here a result counts as the worst there is where its validation loss or accuracy is not finite, or
    where the trial says that it diverged; a training loss that is not finite says only that some batches overflowed.

    A report without an epoch, which is that of a failure, changes nothing. Of a trial that is tried again, the rule
    sees every epoch once.

    Args:
        objective: ``val_accuracy`` or ``val_loss``.
        on_worker_death: is called with the trial whose worker died, also where that trial will be tried again; may say
            how many seconds the trial waits before that.
        clock: tells seconds.
        rule: what Ray's class takes.
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
        self._objective = objective
        self._on_worker_death = on_worker_death
        self._clock = clock
        self._waiting: dict[str, float] = {}
        self._seen_epochs: dict[str, int] = {}
        self._to_stop: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop."""
        if trial.trial_id in self._to_stop:
            # The worker died before the stop reached it: saving comes first. Ray's median rule would fail here, and
            # its ASHA would let the trial go on to the next rung.
            return TrialScheduler.STOP
        if result.get("epoch", 0) <= self._seen_epochs.get(trial.trial_id, 0):
            return TrialScheduler.CONTINUE
        self._seen_epochs[trial.trial_id] = result["epoch"]
        decision: str = super().on_trial_result(tune_controller, trial, self._ranked(result))
        if is_hopeless(result):
            decision = TrialScheduler.STOP
        if decision == TrialScheduler.STOP:
            self._to_stop.add(trial.trial_id)
        return decision

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """In the ``with`` block, results are seen whose decisions are known: this rule need not find them."""
        yield

    def remember_stop(self, trial_id: str) -> None:
        """A trial was stopped."""
        self._to_stop.add(trial_id)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record a trial's last value, the worst there is where it diverged."""
        if "epoch" in result:
            super().on_trial_complete(tune_controller, trial, self._ranked(result))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass on that the trial's worker died, and let the trial wait where it has to."""
        seconds = self._on_worker_death(trial)
        if seconds:
            self._waiting[trial.trial_id] = self._clock() + seconds
        super().on_trial_error(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next trial, none that waits. Tune starts pending ones by itself, so that those that wait are paused."""
        now = self._clock()
        self._waiting = {trial_id: until for trial_id, until in self._waiting.items() if until > now}
        if self._waiting:
            live = tune_controller.get_live_trials()
            for trial in live:
                if trial.trial_id in self._waiting and trial.status == Trial.PENDING:
                    tune_controller._set_trial_status(trial, Trial.PAUSED)  # noqa: SLF001 - Ray's own schedulers do
            if not any(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in live):
                time.sleep(LOOK_SECONDS)  # Tune waits for events of workers: without one, its loop spins
        chosen = super().choose_trial_to_run(tune_controller)
        return None if chosen is not None and chosen.trial_id in self._waiting else chosen

    def _ranked(self, result: dict[str, Any]) -> dict[str, Any]:
        return {**result, self._objective: WORST_VALUES[self._objective]} if is_hopeless(result) else result


class DivergenceAwareHyperBand(DivergenceAware, AsyncHyperBandScheduler):
    """ASHA, or asynchronous HyperBand with more brackets than one (Li et al. 2020, arXiv:1810.05934).

    Ray draws a trial's bracket from numpy's global generator, and anew where the trial is tried again, which leaves its
    values in two brackets. Here the n-th trial of a search has always the same bracket, and keeps it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._draws = np.random.RandomState(0).get_state()  # the kind that Ray draws from

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Give a new trial its bracket."""
        if trial.trial_id not in self._trial_info:
            with self._drawing():
                super().on_trial_add(tune_controller, trial)

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """In the ``with`` block, rungs record values and look for no cutoff: with 10,000 trials that took 5 s."""
        for bracket in self._brackets:
            bracket.cutoff = _find_no_cutoff  # type: ignore[method-assign]
        try:
            yield
        finally:
            for bracket in self._brackets:
                del bracket.cutoff

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Inside, numpy's global generator is this scheduler's own."""
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._draws)  # noqa: NPY002
        try:
            yield
        finally:
            self._draws = np.random.get_state()  # noqa: NPY002
            np.random.set_state(outside)  # noqa: NPY002


def _find_no_cutoff(recorded: Mapping[str, float]) -> None:
    """In the place of the bracket's own."""


class MedianByTrialId(MedianStoppingRule):
    """Ray's median rule, which remembers trials by their id, not as objects: those do not outlive a process."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop."""
        return super().on_trial_result(tune_controller, TrialKey(trial_id=trial.trial_id), result)  # type: ignore[arg-type]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record a trial's last value."""
        super().on_trial_complete(tune_controller, TrialKey(trial_id=trial.trial_id), result)  # type: ignore[arg-type]


class DivergenceAwareMedian(DivergenceAware, MedianByTrialId):
    """Stops a trial whose best value is worse than the median of the others' averages (Golovin et al. 2017, Vizier).

    Ray's own fails with a KeyError at the next report after one without an epoch.
    """


def build_scheduler(
    name: str,
    *,
    objective: str,
    max_epochs: int,
    grace_period: int,
    reduction_factor: float,
    on_worker_death: Callable[[Any], float | None],
) -> DivergenceAware:
    """The scheduler of a search.

    HyperBand is the asynchronous one. Ray's synchronous ``HyperBandScheduler`` opens a bracket only when the trials
    that are alive fill the one before, and its first bracket runs all of them to the end: of 40 trials with a budget of
    8 epochs, 4 at a time, it stopped none.

    Args:
        name: one of ``config.SCHEDULERS``.
        objective: the first objective of the search; the scheduler sees no other.
        max_epochs: a trial's full budget.
        grace_period: epochs that every trial gets.
        reduction_factor: one trial in so many goes on from rung to rung, of ASHA and HyperBand.
        on_worker_death: is called with a trial whose worker died, also where it will be tried again; may say how
            many seconds the trial waits before that.
    """
    assert name in SCHEDULERS
    assert objective in RANKING_OBJECTIVES
    shared: dict[str, Any] = {"objective": objective, "on_worker_death": on_worker_death}
    if name == "none":
        return DivergenceAware(**shared)
    shared |= {"time_attr": "epoch", "metric": objective, "mode": objective_mode(objective)}
    shared |= {"grace_period": grace_period}
    if name == "median":
        # Before it has enough trials to compare, Ray would pause those that run whenever others wait; never, with an
        # infinite slice. A paused trial is saved and given another worker, only to be continued the same way.
        return DivergenceAwareMedian(**shared, hard_stop=True, min_time_slice=math.inf)
    brackets = count_brackets(max_epochs, grace_period, reduction_factor) if name == "hyperband" else 1
    return DivergenceAwareHyperBand(**shared, max_t=max_epochs, reduction_factor=reduction_factor, brackets=brackets)


def replay(scheduler: DivergenceAware, events: Iterable[Mapping[str, Any]]) -> None:
    """Let a new scheduler see what the one before it saw, in the same order: rungs and averages come back as they were.

    ``Tuner.restore`` brings a scheduler back empty (ray-project/ray#30838).

    Args:
        scheduler: from ``build_scheduler``, with the same arguments.
        events: of the run's journal.
    """
    results: dict[str, dict[str, Any]] = {}
    controller: Any = None  # no rule of ours asks it anything
    with scheduler.replaying():
        for event in events:
            key: Any = TrialKey(trial_id=event.get("trial_id", ""))
            last = results.get(key.trial_id, {})
            if event["event"] == "trial":
                scheduler.on_trial_add(controller, key)
            elif event["event"] == "report":
                last = results[key.trial_id] = result_of(event)
                if last["status"] == RUNNING:  # of a report that ends the trial, Tune tells as its end alone
                    scheduler.on_trial_result(controller, key, last)
                    if last["done"]:  # so the scheduler said
                        scheduler.remember_stop(key.trial_id)
            elif event["event"] == "end" and last.get("done"):
                scheduler.on_trial_complete(controller, key, last)


def count_brackets(max_epochs: int, grace_period: int, reduction_factor: float) -> int:
    """HyperBand's number of brackets, 1 + floor(log(max_epochs / grace_period) / log(reduction_factor)).

    At most one for each epoch at which a trial can be stopped first: a factor near 1 would ask for thousands.
    """
    brackets = 1
    while brackets <= max_epochs - grace_period and grace_period * reduction_factor**brackets <= max_epochs:
        brackets += 1
    return brackets


def is_hopeless(result: dict[str, Any]) -> bool:
    """Whether a result with an epoch is that of a trial that diverged."""
    values = [result[name] for name in RANKING_OBJECTIVES if name in result]
    finite = all(value is not None and math.isfinite(value) for value in values)
    return not finite or result.get("status") == TrialStatus.DIVERGED


def objective_mode(objective: str) -> str:
    """Tune's word for which way is better."""
    return "max" if objective in MORE_IS_BETTER else "min"
