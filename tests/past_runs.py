"""Journals of runs, written without training anything: for tests of what goes on from them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from records import PROVENANCE, make_epoch, make_trial

from tune_amp.cluster.trainable import read_report
from tune_amp.results.journal import JOURNAL_VERSION, Journal
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import RecordedTrial, RunHistory, open_history
from tune_amp.trial.config import TrialConfig, TrialStatus
from tune_amp.trial.report import TrialReport

STORAGE = {"place": None, "name": "ray"}


def beginning(**changes: Any) -> dict[str, Any]:
    about = {"version": JOURNAL_VERSION, "arguments": {}, "provenance": dataclasses.asdict(PROVENANCE)}
    return {"event": "run", **about, **changes}


def session(at: float = 0.0, **about: Any) -> dict[str, Any]:
    return {"event": "session", "at": at, "num_samples": 4, "slots": 2, "arguments": {}, "storage": STORAGE, **about}


def trial(trial_id: str, number: int, at: float = 1.0, **settings: Any) -> dict[str, Any]:
    config = vars(TrialConfig(**settings))
    return {"event": "trial", "at": at, "trial_id": trial_id, "name": trial_id, "config": config, "number": number}


def start(trial_id: str, at: float = 1.0) -> dict[str, Any]:
    return {"event": "start", "at": at, "trial_id": trial_id, "worker": f"worker-{trial_id}-{at}", "time": 1.8e9 + at}


def report(trial_id: str, epoch: int, at: float = 2.0, **changes: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"status": "running", "error": None, "done": False, "config_fault": False, "device": "cpu"}
    about |= {"num_threads": 1, "setup_seconds": 0.1, "checkpoint_seconds": 0.0}
    metrics = vars(make_epoch(epoch, **changes.pop("metrics", {})))
    return {"event": "report", "at": at, "trial_id": trial_id, "metrics": metrics, **about, **changes}


def end(trial_id: str, status: str, at: float = 3.0) -> dict[str, Any]:
    return {"event": "end", "at": at, "trial_id": trial_id, "status": status, "error": None}


def write_journal(folder: Path, events: Sequence[Mapping[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = RunFolder(folder).journal
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        for event in events:
            journal.append(event)
    return path


@contextlib.contextmanager
def written_past(folder: Path, *events: Mapping[str, Any]) -> Iterator[RunHistory]:
    """A run whose journal holds these events after its beginning."""
    write_journal(folder, [beginning(), *events])
    with open_history(folder) as history:
        yield history


def recorded(
    trial_id: str,
    number: int,
    *,
    place: int = 1,
    config: TrialConfig | None = None,
    status: str | None = None,
    last: Mapping[str, Any] | None = None,
) -> RecordedTrial:
    """A trial as read from a journal; ``last`` is its last result."""
    return RecordedTrial(
        place=place,
        number=number,
        record=make_trial(trial_id, config=config or TrialConfig(), epochs=()),
        status=None if status is None else TrialStatus(status),
        report=None if last is None else as_report(last),
    )


def as_report(result: Mapping[str, Any]) -> TrialReport:
    """A result of a trial as a worker sends it; what is missing has some value."""
    worker = {"device": "cpu", "num_threads": 1, "setup_seconds": 0.1, "checkpoint_seconds": 0.0, "error": None}
    return read_report({**worker, **(vars(make_epoch()) if "epoch" in result else {}), **result})
