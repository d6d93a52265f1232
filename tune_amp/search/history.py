"""Reads from the journal of a run what a resumed search needs: how the run began, and the state of each trial."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tune_amp.results.journal import JOURNAL_VERSION, Journal, read_journal
from tune_amp.results.records import Provenance, build_from
from tune_amp.results.run_folder import RunFolder
from tune_amp.trial.config import (
    MOST_SECONDS,
    OBJECTIVES,
    RUNNING,
    InputError,
    TrialConfig,
    TrialStatus,
    checked_type,
    shown,
)


@dataclasses.dataclass(kw_only=True)
class PastTrial:
    """A trial that was submitted before the search was cut off."""

    trial_id: str
    place: int
    """Its position in the order of submission, from 1."""
    number: int
    """Number of its Optuna trial; the latest one if it was submitted more than once."""
    config: TrialConfig
    status: TrialStatus | None = None
    """How it ended; None if it has not ended."""
    last_result: dict[str, Any] | None = None
    """Its last report, in the form that Tune's schedulers and searchers receive."""
    epoch: int = 0
    """Highest epoch that it reported. A retried trial may not have reached it again."""
    reports: dict[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Metrics of its first report of each epoch, as in the journal."""
    checkpoints: list[str] = dataclasses.field(default_factory=list)
    """Paths in the file system of the run's storage, the newest last. Most have been deleted since."""

    @property
    def last_checkpoints(self) -> list[str]:
        """Paths of the checkpoints that may still exist, the newest first.

        Each session of a search has its own folder. It keeps one checkpoint of a trial there, or two if it was cut off
        while it replaced one.
        """
        folders: dict[str, list[str]] = {}
        for path in reversed(self.checkpoints):
            folders.setdefault(path.split("/")[0], []).append(path)
        return [path for paths in folders.values() for path in paths[:2]]

    @property
    def unheard_end(self) -> TrialStatus | None:
        """Status of a trial that had ended when the search was cut off, if its end was not recorded; else None."""
        if self.status is not None or self.last_result is None or not self.last_result["done"]:
            return None
        told = self.last_result["status"]
        return TrialStatus.STOPPED if told == RUNNING else TrialStatus(told)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PastRun:
    """A run as recorded in its journal."""

    journal: Journal
    """The open journal, locked against other processes."""
    events: Sequence[Mapping[str, Any]]
    """All events of the journal but the first."""
    arguments: Mapping[str, Any]
    """Arguments of the command line, by ``argparse``'s names, with which the search was last started or resumed."""
    provenance: Provenance
    trials: Sequence[PastTrial]
    """In the order of submission."""
    sessions: Sequence[Mapping[str, Any]]
    """One event for each time the search was started or resumed."""

    @property
    def num_samples(self) -> int | None:
        """Number of trials with which the search was started; None if it was cut off before its first session."""
        return int(self.sessions[0]["num_samples"]) if self.sessions else None

    @property
    def storages(self) -> list[tuple[str | None, str, str | None]]:
        """Place, name and token of the storage of each session's checkpoints: see ``checkpoints.RunStorage``.

        Older versions wrote no token.
        """
        storages = [session["storage"] for session in self.sessions]
        return [(storage["place"], storage["name"], storage.get("token")) for storage in storages]

    @property
    def seconds(self) -> float:
        """Seconds that the search has taken so far."""
        return float(self.events[-1]["at"]) if self.events else 0.0

    @property
    def reported(self) -> dict[str, int]:
        """Highest reported epoch of each unfinished trial that has reported one, by trial id."""
        return {trial.trial_id: trial.epoch for trial in self.unfinished if trial.epoch}

    @property
    def unfinished(self) -> list[PastTrial]:
        """Trials that a resumed search continues."""
        return [trial for trial in self.trials if trial.status is None and trial.unheard_end is None]


@contextlib.contextmanager
def open_past(folder: Path) -> Iterator[PastRun]:
    """Read the journal of a run, and lock it against other processes in the ``with`` block.

    Raises:
        InputError: the journal is missing, held by another process, damaged, of another version, or holds what no
            search writes.
    """
    path = RunFolder(folder).journal
    links = sorted(entry for entry in folder.iterdir() if entry.is_symlink())
    if links:
        raise InputError(f"{links[0]}: must be no link, which may lead anywhere, in a run that goes on")
    if not path.is_file():
        raise InputError(f"{folder}: must hold reports.journal, from which a run goes on")
    with Journal(path) as journal:
        events = read_journal(path)
        if not events:
            raise InputError(f"{path}: must hold how the run began: it was cut off before, start it anew")
        try:
            past = _build_past(events, journal)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{path}: must be the journal of a run ({type(error).__name__}: {error})") from None
        journal.cut_torn_line()
        yield past


def _build_past(events: Sequence[Mapping[str, Any]], journal: Journal) -> PastRun:
    begin, *rest = events
    if begin["event"] != "run" or begin["version"] != JOURNAL_VERSION:
        version = shown(begin.get("version"))
        raise InputError(f"was written by journal version {version}; this tune_amp continues {JOURNAL_VERSION}")
    trials: dict[str, PastTrial] = {}
    at = 0.0
    for event in rest:
        if not at <= event["at"] < math.inf:
            raise InputError(f"at: must not go back, got {shown(event['at'])} after {at}")
        if event["at"] > MOST_SECONDS:
            raise InputError(f"at: must be at most {MOST_SECONDS:g} seconds, got {shown(event['at'])}")
        at = event["at"]
        _take(event, trials)
    sessions = [event for event in rest if event["event"] == "session"]
    return PastRun(
        journal=journal,
        events=rest,
        arguments=dict([begin, *sessions][-1]["arguments"]),
        provenance=build_from(Provenance, begin["provenance"]),
        trials=list(trials.values()),
        sessions=sessions,
    )


def _take(event: Mapping[str, Any], trials: dict[str, PastTrial]) -> None:
    kind = event["event"]
    if kind == "session":
        checked_type("num_samples", event["num_samples"], int)
        checked_type("storage.place", event["storage"]["place"], str | None)
        checked_type("storage.token", event["storage"].get("token"), str | None)
        name = checked_type("storage.name", event["storage"]["name"], str)
        if PurePosixPath(name).name != name or name in ("", ".."):
            raise InputError(f"storage.name: must name a folder, got {shown(name)}")
    elif kind == "trial":
        for name, hint in (("trial_id", str), ("name", str), ("number", int)):
            checked_type(name, event[name], hint)
        config = build_from(TrialConfig, event["config"])
        new = PastTrial(trial_id=event["trial_id"], place=len(trials) + 1, number=event["number"], config=config)
        trials.setdefault(event["trial_id"], new).number = event["number"]
    elif kind == "report":
        trial = trials[event["trial_id"]]
        trial.last_result = result_of(event)
        if event["metrics"]:
            epoch = checked_type("epoch", event["metrics"]["epoch"], int)
            trial.epoch = max(trial.epoch, epoch)
            trial.reports.setdefault(epoch, event["metrics"])
    elif kind == "checkpoint":
        path = PurePosixPath(checked_type("path", event["path"], str))
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"path: must lie in the run's storage, got {shown(str(path))}")
        trials[event["trial_id"]].checkpoints.append(str(path))
    elif kind == "end":
        trials[event["trial_id"]].status = TrialStatus(event["status"])
    elif kind not in ("start", "lost", "finish"):
        raise InputError(f"event: must be one that this tune_amp knows, got {shown(kind)}")


def result_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of an event as Tune passed it on; the report of an exception has NaN for its objectives."""
    about = {name: event[name] for name in ("status", "error", "done", "config_fault")}
    return (dict(event["metrics"]) if event["metrics"] else dict.fromkeys(OBJECTIVES, math.nan)) | about
