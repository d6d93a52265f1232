"""Ends a trial that hangs: kills its worker once the trial exceeds its time limit."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

from tune_amp.cluster.failures import describe_limit, find_cause

LOOK_SECONDS = 0.5


class TimeLimit(tune.Callback):
    """Kills the worker of a trial that has taken too long, and prevents a retry of the trial.

    A worker that hangs in a system call or an endless kernel reports nothing and cannot be asked to end.

    Args:
        seconds: limit of a trial's time in its workers, attempts added up, since the search started or resumed; None
            for no limit.
        kill: ends a worker.
        clock: returns seconds.
    """

    def __init__(
        self,
        seconds: float | None,
        *,
        kill: Callable[[Any], object] = ray.kill,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._kill, self._clock = kill, clock
        self._spent: dict[str, float] = {}
        self._running: dict[str, tuple[Any, float]] = {}
        self._killed: set[str] = set()
        self._looked = -LOOK_SECONDS

    def explain_death(self, trial: Any) -> str:
        """Return why a trial's worker died, in a line."""
        return describe_limit(self._seconds or 0.0) if trial.trial_id in self._killed else find_cause(trial)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Start the clock of a trial that got a worker, perhaps not its first."""
        self._running[trial.trial_id] = trial, self._clock()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Stop the clock of a trial that is over, or waits for its next worker."""
        _, since = self._running.pop(trial.trial_id, (trial, self._clock()))
        self._spent[trial.trial_id] = self._spent.get(trial.trial_id, 0.0) + self._clock() - since

    on_trial_error = on_trial_recover = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Kill the workers of trials over the limit. Tune calls this after each round, several times a second."""
        now = self._clock()
        if self._seconds is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for trial_id, (trial, since) in self._running.items():
            worker = trial.temporary_state.ray_actor
            taken = self._spent.get(trial_id, 0.0) + now - since
            if worker is not None and trial_id not in self._killed and taken > self._seconds:
                self._killed.add(trial_id)
                trial.max_failures = 0
                self._kill(worker)
