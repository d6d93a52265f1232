"""A search started through Ray Client: it runs on the cluster, and all that it writes and tells comes here meanwhile.

Ray Client would run Tune in a process of the cluster's, and leave our recorder and the study behind on this side. So
the whole search runs there, in an actor with a folder of its own. What its files have grown by is copied twice a second
into the run folder here, which a search goes on from whatever became of the cluster.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
import ray

from tune_amp.config import InputError
from tune_amp.consent import consent_to, list_consented
from tune_amp.files import check_free, write_atomically
from tune_amp.halt import StopRequest
from tune_amp.journal import Journal
from tune_amp.options import SearchOptions
from tune_amp.past import PastRun, open_past
from tune_amp.private_home import private_home
from tune_amp.resources import beside_this_process
from tune_amp.results import TrialRecord
from tune_amp.run_files import CONFIRM_FILE, JOURNAL_FILE, REWRITTEN_FILES, RUN_FILES, STUDY_FILE
from tune_amp.session import QUIET_TUNE
from tune_amp.untroubled import Untroubled

if TYPE_CHECKING:  # these bring Tune, which reads the environment
    from tune_amp.confirm import ConfirmProgress
    from tune_amp.confirmed import ConfirmedRun
    from tune_amp.data import Dataset
    from tune_amp.gauges import SearchObserver
    from tune_amp.recorder import SearchProgress
    from tune_amp.resources import TrialResources
    from tune_amp.search import SearchResult
    from tune_amp.space import SearchSpace
    from tune_amp.warm_start import WarmStart

POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What the actor is to search: see ``search.run_search``."""

    space: "SearchSpace"
    dataset: "Dataset"
    options: SearchOptions
    command: Sequence[str]
    storage_path: str | None
    seconds: float
    """Since the command began: clocks of two machines have nothing in common."""
    resources: "TrialResources | None"
    warm_start: "WarmStart | None"
    arguments: Mapping[str, Any]
    consented: Sequence[str]
    """What the user named: see ``consent.consent_to``."""
    past: Mapping[str, bytes]
    """Files of the run that goes on, by name; empty for a new one."""
    owner: str
    """The run folder here, from ``storage.identify_folder``: that of the actor is another each time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """What was appended to a file since it was last read."""

    name: str
    begin: int
    """Where the bytes belong: at the end, but for a file that was cut or begun anew."""
    data: bytes
    """Whole lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchEvent:
    """What the observer of a search was told."""

    progress: "SearchProgress"
    """Without its trials."""
    trials: Sequence[TrialRecord | str]
    """Its trials; of one that has not changed since it was last sent, the id."""
    ended: TrialRecord | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmEvent:
    """What the observer of a confirmation was told."""

    progress: "ConfirmProgress"
    ended: "ConfirmedRun | None"


@dataclasses.dataclass(frozen=True, kw_only=True)
class News:
    """What has happened since the last look."""

    now: float
    """``time.monotonic()`` there."""
    study: Growth | None
    journal: Growth | None
    whole: Mapping[str, bytes]
    events: Sequence[SearchEvent | ConfirmEvent]
    lines: Sequence[str]
    """What was announced."""


# ---- on the cluster ----


class RemoteSearch:
    """The actor: runs a search in one thread, and answers in others.

    Args:
        run: the run's name.
    """

    def __init__(self, run: str) -> None:
        os.environ.update(QUIET_TUNE)
        self._cleanup = contextlib.ExitStack()
        self._folder = self._cleanup.enter_context(private_home()) / run
        self._folder.mkdir()
        self._stop = StopRequest(functools.partial(os._exit, 1))
        self._heard = EventQueue()
        self._lines: collections.deque[str] = collections.deque()
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._thread: int | None = None

    def run(self, order: Order) -> "SearchResult | BaseException":
        """Search. What the caller is to raise is returned: Ray would wrap it."""
        from tune_amp.search import run_search

        self._thread = threading.get_ident()
        consent_to(*order.consented)
        try:
            with self._open_past(order.past) as past:
                return run_search(
                    order.space,
                    order.dataset,
                    order.options,
                    folder=self._folder,
                    observer=self._heard,
                    command=order.command,
                    storage_path=order.storage_path,
                    started=time.monotonic() - order.seconds,
                    resources=order.resources,
                    warm_start=order.warm_start,
                    past=past,
                    arguments=order.arguments,
                    stop=self._stop,
                    owner=order.owner,
                    announce=self._lines.append,
                )
        except (InputError, OSError, KeyboardInterrupt) as error:
            return error
        finally:
            self._thread = None

    def stop(self, reason: str) -> None:
        """Ask the search to end; where Tune does not run, it is interrupted as Ctrl-C would interrupt it."""
        self._stop.ask(reason)
        if self._thread is not None and not self._stop.is_heard:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread), ctypes.py_object(KeyboardInterrupt)
            )

    def read(self, known: Mapping[str, int]) -> News:
        """What has happened since the last call.

        Args:
            known: how much the caller has of the study and of the journal, in bytes.
        """
        events = self._heard.take()
        # In this order: the study that is read after it holds all trials that the journal tells of.
        journal = self._read_growth(JOURNAL_FILE, known.get(JOURNAL_FILE, 0))
        study = self._read_growth(STUDY_FILE, known.get(STUDY_FILE, 0))
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        whole = self._read_changed()
        return News(now=time.monotonic(), study=study, journal=journal, whole=whole, events=events, lines=lines)

    def close(self) -> None:
        """Remove the folder."""
        self._cleanup.close()

    @contextlib.contextmanager
    def _open_past(self, files: Mapping[str, bytes]) -> Iterator[PastRun | None]:
        if not files:
            yield None
            return
        for name, content in files.items():
            (self._folder / name).write_bytes(content)
        with open_past(self._folder) as past:
            yield past

    def _read_growth(self, name: str, known: int) -> Growth | None:
        path = self._folder / name
        if not path.exists():
            return None
        with path.open("rb") as file:
            begin = known if known <= file.seek(0, os.SEEK_END) else 0  # a line that found no room was cut off again
            file.seek(begin)
            data = file.read()
        return Growth(name=name, begin=begin, data=data[: data.rfind(b"\n") + 1])

    def _read_changed(self) -> dict[str, bytes]:
        changed = {}
        for name in REWRITTEN_FILES:
            path = self._folder / name
            if not path.exists():
                continue
            status = path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._seen.get(name) != stamp:
                changed[name] = path.read_bytes()
                self._seen[name] = stamp
        return changed


class EventQueue:
    """An observer that keeps what it is told until somebody asks."""

    def __init__(self) -> None:
        self._events: list[tuple[SearchProgress | ConfirmProgress, TrialRecord | ConfirmedRun | None]] = []
        self._lock = threading.Lock()
        self._sent: dict[str, TrialRecord] = {}

    def on_progress(self, progress: "SearchProgress", ended: TrialRecord | None) -> None:
        """Keep it."""
        self._put(progress, ended)

    def on_confirmation(self, progress: "ConfirmProgress", ended: "ConfirmedRun | None") -> None:
        """Keep it."""
        self._put(progress, ended)

    def _put(self, progress: Any, ended: Any) -> None:
        with self._lock:
            if self._events and self._events[-1][1] is None and type(self._events[-1][0]) is type(progress):
                self._events.pop()  # of what only goes on, the latest is enough
            self._events.append((progress, ended))

    def take(self) -> list[SearchEvent | ConfirmEvent]:
        """All since the last call. Each trial is told once as it is: there may be thousands."""
        with self._lock:
            events, self._events = self._events, []
        return [self._shorten(*event) for event in events]

    def _shorten(self, progress: Any, ended: Any) -> SearchEvent | ConfirmEvent:
        if not hasattr(progress, "trials"):
            return ConfirmEvent(progress=progress, ended=ended)
        trials: Sequence[TrialRecord] = progress.trials
        short = [trial.trial_id if self._sent.get(trial.trial_id) is trial else trial for trial in trials]
        self._sent = {trial.trial_id: trial for trial in trials}
        return SearchEvent(progress=dataclasses.replace(progress, trials=()), trials=short, ended=ended)


# ---- here ----


def run_search_remotely(
    space: "SearchSpace",
    dataset: "Dataset",
    options: SearchOptions,
    *,
    folder: Path,
    observer: "SearchObserver",
    stop: StopRequest,
    started: float,
    command: Sequence[str] = (),
    storage_path: str | None = None,
    resources: "TrialResources | None" = None,
    warm_start: "WarmStart | None" = None,
    past: PastRun | None = None,
    arguments: Mapping[str, Any] | None = None,
    announce: Callable[[str], object] = lambda line: None,
) -> "SearchResult":
    """``search.run_search`` on the cluster to which this process is a client, with the run folder here.

    Raises:
        InputError: as ``run_search``.
        OSError: as ``run_search``; or the connection or the search is lost. What came here until then is in ``folder``.
        KeyboardInterrupt: ``stop`` was asked before anything was trained.
    """
    from tune_amp.storage import identify_folder

    order = Order(
        space=space,
        dataset=dataset,
        options=options,
        command=command,
        storage_path=storage_path,
        seconds=time.monotonic() - started,
        resources=resources,
        warm_start=warm_start,
        arguments=arguments or {},
        consented=list_consented(),
        past={} if past is None else _read_past(folder, past, announce),
        owner=identify_folder(folder),
    )
    with LocalCopy(folder, observer, past, announce) as copy, stop.heard(), _naming_what_is_lost():
        # Ours is the server of the clients, on a node that stays.
        actor: Any = (
            ray.remote(RemoteSearch)
            .options(num_cpus=0, max_concurrency=4, scheduling_strategy=beside_this_process())
            .remote(folder.name)
        )
        outcome = _follow(actor, actor.run.remote(order), copy, stop)
        ray.get(actor.close.remote())
        ray.kill(actor)
    if isinstance(outcome, BaseException):
        raise outcome
    return dataclasses.replace(outcome, folder=folder)


def _follow(actor: Any, answer: Any, copy: "LocalCopy", stop: StopRequest) -> "SearchResult | BaseException":
    """Copy what comes until the search is over, and all that was left then."""
    asked = over = False
    while not over:
        over = bool(ray.wait([answer], timeout=POLL_SECONDS)[0])
        if stop.reason is not None and not asked:
            ray.get(actor.stop.remote(stop.reason))
            asked = True
        copy.take(ray.get(actor.read.remote(copy.sizes)))
    outcome: SearchResult | BaseException = ray.get(answer)
    return outcome


def _read_past(folder: Path, past: PastRun, announce: Callable[[str], object]) -> dict[str, bytes]:
    """The files that a search goes on from. One that had no trials begins its study anew."""
    from tune_amp.mending import mend_run

    for line in mend_run(folder, past):
        announce(line)
    names = (JOURNAL_FILE, STUDY_FILE, CONFIRM_FILE) if past.trials else (JOURNAL_FILE,)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@contextlib.contextmanager
def _naming_what_is_lost() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayTaskError:  # a fault of ours: it would be hidden
        raise
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise ConnectionError("the search's process on the cluster has died") from error
    except (ConnectionError, RuntimeError, ray.exceptions.RayError, grpc.RpcError) as error:
        raise ConnectionError("the connection to the cluster is lost") from error


class LocalCopy:
    """The run folder here, as it follows that of the actor. Use it as a context manager.

    Its journal is ours alone as long as this process lives.

    Args:
        folder: the run folder.
        observer: is told of everything that happens.
        past: the run that goes on.
        announce: is told what the search announces.
    """

    def __init__(
        self,
        folder: Path,
        observer: "SearchObserver",
        past: PastRun | None = None,
        announce: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._folder = folder
        self._observer, self._announce = Untroubled(observer), announce
        self._trials: dict[str, TrialRecord] = {}
        self._lock = contextlib.ExitStack()
        self._is_locked = past is not None
        self.sizes: dict[str, int] = {}
        """How much is here of the files that grow, in bytes."""
        if past is None:
            check_free(folder, *RUN_FILES)
        else:  # a study that was set aside comes anew, and so does one without trials
            grown = [folder / name for name in ((STUDY_FILE, JOURNAL_FILE) if past.trials else (JOURNAL_FILE,))]
            self.sizes = {path.name: path.stat().st_size for path in grown if path.exists()}

    def __enter__(self) -> "LocalCopy":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def take(self, news: News) -> None:
        """Write what is new, and tell of it.

        Raises:
            OSError: a file cannot be written.
        """
        # In this order: a search does not go on from a study that lacks a trial of the journal's.
        if news.study is not None:
            self._append(news.study)
        if news.journal is not None and news.journal.data:
            if not self._is_locked:
                self._lock.enter_context(Journal(self._folder / JOURNAL_FILE))
                self._is_locked = True
            self._append(news.journal)
        for name in REWRITTEN_FILES:  # no other: a cluster does not choose what is written here
            if name in news.whole:
                write_atomically(self._folder / name, functools.partial(_write, news.whole[name]))
        for line in news.lines:
            self._announce(line)
        for event in news.events:
            self._tell(event, time.monotonic() - news.now)

    def _append(self, growth: Growth) -> None:
        path = self._folder / growth.name
        if growth.begin == self.sizes.get(growth.name) and not growth.data:
            return
        path.touch()
        with path.open("r+b") as file:
            file.truncate(growth.begin)
            file.seek(growth.begin)
            file.write(growth.data)
            file.flush()
            os.fsync(file.fileno())
        self.sizes[growth.name] = growth.begin + len(growth.data)

    def _tell(self, event: SearchEvent | ConfirmEvent, clock: float) -> None:
        """Pass an event on, its time by our clock, which is ``clock`` seconds ahead."""
        started = event.progress.started + clock
        if isinstance(event, ConfirmEvent):
            self._observer.on_confirmation(dataclasses.replace(event.progress, started=started), event.ended)
            return
        trials = [self._trials[trial] if isinstance(trial, str) else trial for trial in event.trials]
        self._trials = {trial.trial_id: trial for trial in trials}
        progress = dataclasses.replace(event.progress, started=started, trials=tuple(trials))
        self._observer.on_progress(progress, event.ended)


def _write(content: bytes, file: Any) -> None:
    file.write(content)
