"""A search and its confirmation as they stand, in plain values, for whoever shows them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.records import BestRow, TrialRecord
from tune_amp.trial.config import TrialConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """A search as it stands, for whoever shows it."""

    run: str
    model: str
    dataset: str
    objectives: tuple[str, ...]
    num_samples: int
    """Trials that the search will make."""
    time_budget: float | None
    """Seconds after which they are interrupted, or None."""
    started: float
    """``time.monotonic()`` when the search began, less what it had taken before it was resumed."""
    trials: Sequence[TrialRecord] = ()
    """Every trial so far. One still running bears the status it would end with if all stopped now: interrupted."""
    running: frozenset[str] = frozenset()
    """Trial ids of the running ones."""

    def count_ended(self) -> int:
        """Trials that are over."""
        return len(self.trials) - len(self.running)


class Observer(Protocol):
    """Shows a search to its user."""

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """A trial started, reported, or (``ended``) came to its end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmJob:
    """A configuration to be trained on one seed."""

    trial_ids: tuple[str, ...]
    """Whose it is: of several where they differ in nothing, which then share its run."""
    config: TrialConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmProgress:
    """A confirmation as it stands, for whoever shows it."""

    run: str
    """Name of the search's run."""
    names: Mapping[str, str]
    """Trial id -> what to call it, best first."""
    jobs: Sequence[ConfirmJob] = ()
    """Those under way: all configurations on the first seeds, then two of them on further ones."""
    total: int = 0
    """Trainings that will be made as far as is known; configurations that are alike share theirs."""
    done: int = 0
    runs: Sequence[ConfirmedRun] = ()
    """Those that have ended."""
    started: float
    """``time.monotonic()`` when the confirmation began."""


class ConfirmObserver(Protocol):
    """Shows a confirmation to its user."""

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """The confirmation begins, or a run (``ended``) came to its end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmResult:
    """What a confirmation left behind."""

    rows: Sequence[BestRow]
    """As in ``best.parquet``; empty where it was interrupted, and ``best.parquet`` is as the search wrote it."""
    runs: Sequence[ConfirmedRun]
    """As in ``confirm.parquet``."""
    progress: ConfirmProgress
    """As it ended."""
    left_out: str | None
    """Why the default configuration was not trained, or None."""
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return not self.rows
