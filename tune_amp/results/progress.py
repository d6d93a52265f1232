"""The current state of a search and of its confirmation, in plain values, for the code that shows them."""

import dataclasses
from collections.abc import Mapping, Sequence

from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.records import BestRow, TrialRecord
from tune_amp.trial.config import TrialConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """The current state of a search."""

    run: str
    model: str
    dataset: str
    objectives: tuple[str, ...]
    num_samples: int
    """Number of trials that the search will run."""
    time_budget: float | None
    """Seconds after which running trials are interrupted, or None."""
    slots: int = 1
    """Number of trials that run at a time."""
    confirm_runs: int = 0
    """Largest number of runs on fresh seeds that follow the search."""
    started: float
    """``time.monotonic()`` when the search began, minus the seconds that it had taken before it was resumed."""
    trials: Sequence[TrialRecord] = ()
    """All trials so far. A running trial has the status that it would end with if all stopped now: interrupted."""
    running: frozenset[str] = frozenset()
    """Ids of the running trials."""

    def count_ended(self) -> int:
        """Return the number of trials that have ended."""
        return len(self.trials) - len(self.running)

    @property
    def ended_trials(self) -> list[TrialRecord]:
        """Trials that have ended."""
        return [trial for trial in self.trials if trial.trial_id not in self.running]

    @property
    def running_trials(self) -> list[TrialRecord]:
        """Trials that are running."""
        return [trial for trial in self.trials if trial.trial_id in self.running]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmJob:
    """A configuration to train on one seed."""

    trial_ids: tuple[str, ...]
    """Ids of the trials with this configuration; trials with equal configurations share its run."""
    config: TrialConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmProgress:
    """The current state of a confirmation."""

    run: str
    """Name of the search's run."""
    names: Mapping[str, str]
    """Trial id -> displayed name, best first."""
    objective: str
    """The first objective of the search."""
    jobs: Sequence[ConfirmJob] = ()
    """Current jobs: all configurations on the first seeds, then two of them on further seeds."""
    total: int = 0
    """Number of planned trainings as far as it is known; equal configurations share theirs."""
    done: int = 0
    may_follow: int = 0
    """Largest number of trainings that follow the planned ones."""
    runs: Sequence[ConfirmedRun] = ()
    """Runs that have ended."""
    started: float
    """``time.monotonic()`` when the confirmation began."""

    @property
    def most_left(self) -> int:
        """Largest number of trainings that are left."""
        return self.total - self.done + self.may_follow


class Observer:
    """Shows a search and then its confirmation to the user. This one shows nothing."""

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """Show that a trial started, reported or ended; ``ended`` is the trial if it ended."""

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """Show that the confirmation begins, or that the run ``ended`` has ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmResult:
    """The result of a confirmation."""

    rows: Sequence[BestRow]
    """Rows of ``best.parquet``; empty if interrupted, which leaves ``best.parquet`` as the search wrote it."""
    runs: Sequence[ConfirmedRun]
    """Rows of ``confirm.parquet``."""
    progress: ConfirmProgress
    """State at the end."""
    left_out: str | None
    """Why the default configuration was not trained, or None."""
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the confirmation."""
        return not self.rows
