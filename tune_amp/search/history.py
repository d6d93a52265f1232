"""Keeps the history of a run: read from the journal of a resumed run, and continued by each event of this session."""

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tune_amp.results.files import check_free, write_atomically
from tune_amp.results.journal import JOURNAL_VERSION, Journal, read_journal
from tune_amp.results.provenance import Provenance
from tune_amp.results.records import TrialRecord
from tune_amp.results.rows import MOST_SECONDS, build_from
from tune_amp.results.run_folder import RunFolder
from tune_amp.space.no_effect import find_inert
from tune_amp.space.space import SearchSpace
from tune_amp.trial.config import RUNNING, EpochMetrics, InputError, TrialConfig, TrialStatus, checked_type
from tune_amp.trial.report import TrialReport
from tune_amp.trial.text import describe_error, shown


@dataclasses.dataclass(kw_only=True, slots=True)
class RecordedTrial:
    """A trial, with everything that was recorded of it."""

    place: int
    """Its position in the order of submission, from 1."""
    number: int
    """Number of its Optuna trial; the latest one if it was submitted more than once."""
    record: TrialRecord
    """What the Parquet files hold of it."""
    status: TrialStatus | None = None
    """How it ended; None if it has not ended."""
    report: TrialReport | None = None
    """Its last report."""
    first_metrics: dict[int, EpochMetrics] = dataclasses.field(default_factory=dict)
    """Metrics of its first report of each epoch. A retried trial reports epochs again."""
    checkpoints: Sequence[str] = ()
    """Paths of the checkpoints that may still exist, the newest first, in the file system of the run's storage."""
    began: float | None = None
    """Search time at which it began, later by the time between sessions; None if it has not begun."""

    @property
    def trial_id(self) -> str:
        """Ray Tune's id of the trial."""
        return self.record.trial_id

    @property
    def config(self) -> TrialConfig:
        """Its settings."""
        return self.record.config

    @property
    def last_result(self) -> dict[str, Any] | None:
        """Its last report in the form that Tune's schedulers and searchers receive; None if there is none."""
        return None if self.report is None else self.report.as_result()

    @property
    def unrecorded_end(self) -> TrialStatus | None:
        """Status of a trial that ended with its last report, if its end was not recorded; else None."""
        if self.status is not None or self.report is None or not self.report.done:
            return None
        return TrialStatus.STOPPED if self.report.status == RUNNING else TrialStatus(self.report.status)


class RunHistory:
    """The history of a run. This is the only code that interprets the events of a journal.

    Args:
        journal: the open journal, locked against other processes.
        provenance: how the run began.
        arguments: arguments of the command line, by ``argparse``'s names, with which it began.
    """

    def __init__(self, journal: Journal, provenance: Provenance, arguments: Mapping[str, Any]) -> None:
        self.journal = journal
        self.provenance = provenance
        self.arguments = arguments
        """Arguments with which the search was last started or resumed."""
        self.sessions: list[Mapping[str, Any]] = []
        """One event for each time the search was started or resumed."""
        self.seconds = 0.0
        """Seconds that the earlier sessions took."""
        self.reports: list[tuple[str, TrialReport | None]] = []
        """Trial id and report of each report of the earlier sessions, in order; None stands for the trial's end."""
        self.running: set[str] = set()
        """Ids of the trials that have a worker, or wait for another after its worker died."""
        self.most_running = 0
        """Largest number of trials that had a worker at the same time."""
        self._trials: dict[str, RecordedTrial] = {}
        self.waiting: set[str] = set()
        """Ids of the trials that ran when a session ended and have not resumed yet."""
        self._workers: dict[str, int] = {}  # number of each worker process, from 1
        self._places: dict[str, int] = {}  # trial id -> number of the worker that runs it

    @property
    def trials(self) -> list[RecordedTrial]:
        """All trials, in the order of submission."""
        return list(self._trials.values())

    @property
    def records(self) -> list[TrialRecord]:
        """Records of all trials that have begun, in the order of submission."""
        return [trial.record for trial in self._trials.values() if trial.began is not None]

    @property
    def unfinished(self) -> list[RecordedTrial]:
        """Trials that a resumed search continues."""
        return [trial for trial in self._trials.values() if trial.status is None and trial.unrecorded_end is None]

    @property
    def last_epochs(self) -> dict[str, int]:
        """Highest reported epoch of each unfinished trial that has reported one, by trial id."""
        return {trial.trial_id: max(trial.first_metrics) for trial in self.unfinished if trial.first_metrics}

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

    def find(self, trial_id: str) -> RecordedTrial:
        """Return a trial."""
        return self._trials[trial_id]

    def read(self, event: Mapping[str, Any]) -> None:
        """Apply an event of an earlier session."""
        at = event["at"]
        if not self.seconds <= at < math.inf:
            raise InputError(f"at: must not go back, got {shown(at)} after {self.seconds}")
        if at > MOST_SECONDS:
            raise InputError(f"at: must be at most {MOST_SECONDS:g} seconds, got {shown(at)}")
        self.seconds = float(at)
        self.apply(event)
        if event["event"] in ("report", "end"):
            report = self.find(event["trial_id"]).report
            self.reports.append((event["trial_id"], report if event["event"] == "report" else None))

    def apply(self, event: Mapping[str, Any], value: Any = None) -> None:
        """Apply an event.

        Args:
            event: as in the journal.
            value: its ``TrialConfig`` or ``TrialReport``; None: it is built from the event.

        Raises:
            InputError: the event breaks a rule. So do LookupError, TypeError, ValueError, ArithmeticError and
                AttributeError.
        """
        match event["event"]:
            case "session":
                self._start_session(event)
            case "trial":
                self._add_trial(event, value or build_from(TrialConfig, event["config"]))
            case "start":
                self._start_trial(self.find(event["trial_id"]), event)
            case "report":
                self._add_report(self.find(event["trial_id"]), event, value or _build_report(event))
            case "checkpoint":
                self._add_checkpoint(self.find(event["trial_id"]), checked_type("path", event["path"], str))
            case "lost":
                self._places.pop(event["trial_id"], None)
            case "end":
                self._end_trial(self.find(event["trial_id"]), event)
            case "finish":
                pass
            case kind:
                raise InputError(f"event: must be one that this tune_amp knows, got {shown(kind)}")

    def cut_off(self, now: float) -> list[TrialRecord]:
        """Mark running trials as interrupted by the end of a session, and return their records."""
        cut = [trial for trial in self._trials.values() if trial.trial_id in self.running]
        for trial in cut:
            _change(trial, now)
        self.waiting |= self.running
        self.running.clear()
        self._places.clear()
        return [trial.record for trial in cut]

    def _start_session(self, event: Mapping[str, Any]) -> None:
        checked_type("num_samples", event["num_samples"], int)
        checked_type("storage.place", event["storage"]["place"], str | None)
        checked_type("storage.token", event["storage"].get("token"), str | None)
        name = checked_type("storage.name", event["storage"]["name"], str)
        if PurePosixPath(name).name != name or name in ("", ".."):
            raise InputError(f"storage.name: must name a folder, got {shown(name)}")
        self.cut_off(event["at"])
        self.arguments = dict(event["arguments"])
        self.sessions.append(event)

    def _add_trial(self, event: Mapping[str, Any], config: TrialConfig) -> None:
        """Add a trial in the order of submission, which breaks ties: workers start in any order."""
        for name, hint in (("trial_id", str), ("name", str), ("number", int)):
            checked_type(name, event[name], hint)
        known = self._trials.get(event["trial_id"])
        if known is not None:  # submitted again by a resumed search
            known.number = event["number"]
            return
        record = TrialRecord(
            trial_id=event["trial_id"],
            trial_name=event["name"],
            status=TrialStatus.INTERRUPTED,
            config=config,
            epochs=(),
            inert=find_inert(config, self.provenance.train_images),
            wall_seconds=0.0,
            device="",
            num_threads=0,
        )
        place = len(self._trials) + 1
        self._trials[record.trial_id] = RecordedTrial(place=place, number=event["number"], record=record)

    def _start_trial(self, trial: RecordedTrial, event: Mapping[str, Any]) -> None:
        self._places[trial.trial_id] = self._workers.setdefault(event["worker"], len(self._workers) + 1)
        self.most_running = max(self.most_running, len(self._places))
        self.running.add(trial.trial_id)
        if trial.trial_id in self.waiting:  # the time between sessions does not count as the trial's
            self.waiting.discard(trial.trial_id)
            trial.began = event["at"] - trial.record.wall_seconds
        if trial.began is None:
            _change(trial, event["at"], started=datetime.datetime.fromtimestamp(event["time"], datetime.UTC))

    def _add_report(self, trial: RecordedTrial, event: Mapping[str, Any], report: TrialReport) -> None:
        """Add a report, whose epoch replaces an earlier report of it: a retried trial reports epochs again.

        Epochs that it has yet to reach keep the earlier report until then. A trial that ended has none after its last.
        """
        trial.report, metrics, epochs = report, report.metrics, trial.record.epochs
        if metrics is not None:
            trial.first_metrics.setdefault(metrics.epoch, metrics)
            before = [earlier for earlier in epochs if earlier.epoch < metrics.epoch]
            is_last = report.status in (TrialStatus.COMPLETED, TrialStatus.DIVERGED)
            after = [] if is_last else [earlier for earlier in epochs if earlier.epoch > metrics.epoch]
            epochs = (*before, metrics, *after)
        _change(
            trial,
            event["at"],
            epochs=epochs,
            error=report.error,
            config_fault=report.config_fault,
            device=report.device,
            num_threads=report.num_threads,
            setup_seconds=report.setup_seconds,
            checkpoint_seconds=report.checkpoint_seconds,
            worker=self._places.get(trial.trial_id),
        )

    def _add_checkpoint(self, trial: RecordedTrial, path: str) -> None:
        """Add the path of a checkpoint.

        Each session has its own folder. It keeps one checkpoint of a trial there, or two if it was cut off while it
        replaced one.
        """
        place = PurePosixPath(path)
        if place.is_absolute() or ".." in place.parts:
            raise InputError(f"path: must lie in the run's storage, got {shown(path)}")
        here = [other for other in trial.checkpoints if PurePosixPath(other).parts[:1] == place.parts[:1]]
        trial.checkpoints = [str(place), *here[:1], *(other for other in trial.checkpoints if other not in here)]

    def _end_trial(self, trial: RecordedTrial, event: Mapping[str, Any]) -> None:
        trial.status = TrialStatus(event["status"])
        self.running.discard(trial.trial_id)
        self.waiting.discard(trial.trial_id)
        self._places.pop(trial.trial_id, None)
        _change(trial, event["at"], status=trial.status, error=event["error"] or trial.record.error)


def _change(trial: RecordedTrial, now: float, **changes: Any) -> None:
    """Change the record of a trial, which begins now at the latest: its worker may have died before its start."""
    if trial.began is None:
        trial.began = now
    trial.record = dataclasses.replace(trial.record, wall_seconds=now - trial.began, **changes)


def _build_report(event: Mapping[str, Any]) -> TrialReport:
    names = [field.name for field in dataclasses.fields(TrialReport) if field.name != "metrics"]
    about = {name: event[name] for name in names}
    if about["status"] != RUNNING:
        TrialStatus(about["status"])
    if not event["metrics"]:
        return TrialReport(metrics=None, **about)
    checked_type("epoch", event["metrics"]["epoch"], int)
    return TrialReport(metrics=build_from(EpochMetrics, event["metrics"]), **about)


@contextlib.contextmanager
def begin_run(
    folder: Path, space: SearchSpace, provenance: Provenance, arguments: Mapping[str, Any]
) -> Iterator[RunHistory]:
    """Record how a run begins, before anything else of it happens; its journal is open in the ``with`` block."""
    check_free(*RunFolder(folder).files)
    with Journal(RunFolder(folder).journal) as journal:
        write_atomically(RunFolder(folder).space, lambda file: file.write(space.text.encode()), replace=False)
        about = {"arguments": dict(arguments), "provenance": dataclasses.asdict(provenance)}
        journal.append({"event": "run", "version": JOURNAL_VERSION, **about})
        yield RunHistory(journal, provenance, arguments)


@contextlib.contextmanager
def open_history(folder: Path) -> Iterator[RunHistory]:
    """Read the journal of a run, and lock it against other processes in the ``with`` block.

    Raises:
        InputError: the journal is missing, held by another process, damaged, of another version, or holds what no
            search writes.
    """
    path = RunFolder(folder).journal
    links = sorted(entry for entry in folder.iterdir() if entry.is_symlink())
    if links:
        raise InputError(f"{links[0]}: must not be a link in a run that is resumed, since a link may lead anywhere")
    if not path.is_file():
        raise InputError(f"{folder}: must hold {path.name}, from which a run resumes")
    with Journal(path) as journal:
        history = _read_history(path, journal)
        journal.cut_torn_line()
        yield history


def _read_history(path: Path, journal: Journal) -> RunHistory:
    events = read_journal(path)
    if not events:
        raise InputError(f"{path}: must hold how the run began, but it was cut off before; start it again")
    place = f"{path}"
    try:
        history = _begin_history(events[0], journal)
        for number, event in enumerate(events[1:], start=2):
            place = f"{path}: line {number}"
            history.read(event)
        history.cut_off(history.seconds)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{place}: must be written by a search ({describe_error(error)})") from None
    return history


def _begin_history(begin: Mapping[str, Any], journal: Journal) -> RunHistory:
    if begin["event"] != "run" or begin["version"] != JOURNAL_VERSION:
        version = shown(begin.get("version"))
        raise InputError(f"was written by journal version {version}; this tune_amp resumes {JOURNAL_VERSION}")
    return RunHistory(journal, build_from(Provenance, begin["provenance"]), dict(begin["arguments"]))
