"""The ledger of a search: what every second of every slot was spent on. Plain values in, plain values out.

A slot is one of the places in which trials run at a time. Its time is measured by clocks where it is spent: a worker's
``SlotClock`` counts every moment of its process as one kind, and tells with each report what has passed since the last;
the driver's ``SlotTimes`` adds what a worker can no longer tell (it died, or was interrupted) and when it was told.
``build_ledger`` lays the workers into the slots. What no clock covers is shown as such: ``other``.

Only durations travel between processes: the clocks of two machines are never compared, and a clock that is set while
the search runs changes nothing.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from tune_amp.config import MOST_SECONDS, InputError, TrialStatus, checked_type, shown


class TimeKind(StrEnum):
    """What slot time is spent on. The training, validation and probes of a trial count as how that trial ended."""

    TRAINING = "training"
    """Training steps of trials that completed."""
    VALIDATION = "validation"
    """Validation of trials that completed."""
    PROBE = "probe"
    """Measuring the state of trials that completed."""
    STOPPED = "stopped"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    FAILED = "failed"
    """Trials that failed, and of any trial the work that was lost and done again: its worker died, or it raised."""
    INTERRUPTED = "interrupted"
    DATA = "data"
    """Placing the data on the device, and sorting them for a curriculum."""
    START_UP = "start-up"
    """Of the search, of worker processes, and of each trial: making its model, giving back the memory of the last."""
    CHECKPOINT = "checkpoint"
    """Writing checkpoints and reading them back."""
    IDLE = "idle"
    """Waiting: for the driver's answer, for a worker to be replaced, for the other slots at the end."""
    OTHER = "other"
    """Covered by no clock, or by the clock of a step and none within it."""


WORK = (TimeKind.TRAINING, TimeKind.VALIDATION, TimeKind.PROBE)

ENDS: Mapping[TrialStatus, TimeKind] = types.MappingProxyType(
    {
        TrialStatus.STOPPED: TimeKind.STOPPED,
        TrialStatus.DIVERGED: TimeKind.DIVERGED,
        TrialStatus.OUT_OF_MEMORY: TimeKind.OUT_OF_MEMORY,
        TrialStatus.FAILED: TimeKind.FAILED,
        TrialStatus.INTERRUPTED: TimeKind.INTERRUPTED,
    }
)
"""What the work of a trial counts as that did not complete."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """What the slots of a search spent their time on.

    Raises:
        InputError: a field has another type, a kind is unknown, or a number is negative or not finite.
    """

    slots: int
    wall_seconds: float
    """From the beginning of the command until the last trial was over; what comes after it has no slots."""
    seconds: Mapping[str, float]
    """Slot time by ``TimeKind``; kinds that are left out took none."""
    step_seconds: float
    """Slot time in training steps, of all trials however they ended."""

    def __post_init__(self) -> None:
        checked_type("slots", self.slots, int)
        if not isinstance(self.seconds, Mapping):
            raise InputError(f"seconds: must map kinds to seconds, got {shown(self.seconds)}")
        unknown = [name for name in self.seconds if name not in list(TimeKind)]
        if unknown:
            raise InputError(f"seconds: must be of {', '.join(TimeKind)}, got {shown(unknown[0])}")
        numbers = {"wall_seconds": self.wall_seconds, "step_seconds": self.step_seconds, **self.seconds}
        for name, value in numbers.items():
            if not 0 <= checked_type(name, value, float) <= MOST_SECONDS:
                raise InputError(f"{name}: must be between 0 and {MOST_SECONDS:g} seconds, got {shown(value)}")
        object.__setattr__(self, "seconds", {str(kind): float(value) for kind, value in self.seconds.items()})

    @property
    def slot_seconds(self) -> float:
        """Slots times wall time: what there was to spend."""
        return self.slots * self.wall_seconds

    @property
    def shares(self) -> dict[str, float]:
        """Each kind's share of the slot time, in the order of ``TimeKind``; kinds that took none are left out."""
        if self.slot_seconds == 0:
            return {}
        spent = {str(kind): self.seconds.get(kind, 0.0) / self.slot_seconds for kind in TimeKind}
        return {kind: share for kind, share in spent.items() if share > 0}

    @property
    def useful(self) -> float:
        """Share of the slot time in training steps of trials that completed."""
        return self.shares.get(TimeKind.TRAINING, 0.0)

    @property
    def efficiency(self) -> float:
        """Share of the slot time in training steps, of all trials."""
        return self.step_seconds / self.slot_seconds if self.slot_seconds else 0.0


# ---- in the worker ----


class SlotClock:
    """A worker's clock: every moment since its process began counts as one kind, at first as start-up.

    Args:
        age: seconds since the process began; they count as start-up.
        now: a clock that never goes back.
    """

    def __init__(self, age: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since = now()
        self._kind = TimeKind.START_UP
        self._spent: dict[TimeKind, float] = collections.defaultdict(float)
        self._spent[TimeKind.START_UP] += max(0.0, age)

    @contextlib.contextmanager
    def spending(self, kind: TimeKind) -> Iterator[None]:
        """Time in the ``with`` block counts as ``kind``, but for blocks within it."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, kind: TimeKind) -> TimeKind:
        """From now on time counts as ``kind``. Returns what it counted as until now."""
        before, now = self._kind, self._now()
        self._spent[before] += max(0.0, now - self._since)
        self._kind, self._since = kind, now
        return before

    def count(self, kind: TimeKind) -> float:
        """Seconds of ``kind`` since the last reading, up to now."""
        self.switch(self._kind)
        return self._spent[kind]

    def move(self, source: TimeKind, target: TimeKind, seconds: float) -> None:
        """Count ``seconds`` of ``source`` as ``target`` instead, or as many as there are since the last reading."""
        moved = min(max(0.0, seconds), self.count(source))
        self._spent[source] -= moved
        self._spent[target] += moved

    def read(self) -> dict[str, float]:
        """Seconds by kind since the last reading, or since the process began. They add up to the time passed."""
        self.switch(self._kind)
        spent = {str(kind): seconds for kind, seconds in self._spent.items() if seconds > 0}
        self._spent.clear()
        return spent


def read_process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell.

    Field 22 of ``/proc/self/stat`` (proc(5)) counts clock ticks since boot: no clock that anyone could have set.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, LookupError, AttributeError):
        return 0.0


# ---- in the driver ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerTime:
    """What one worker process told of itself, on the driver's clock."""

    began: float | None
    """When its process began; None where it never reported."""
    ready: float
    """When its first trial began."""
    end: float
    """The last that is known of it: a report, or its death."""
    spent: Mapping[TimeKind, float]
    """Seconds that are no trial's work, by kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialTime:
    """What one trial's work took, in all workers that tried it."""

    status: TrialStatus
    spent: Mapping[TimeKind, float]
    """Seconds of training, validation and probes; those lost with an exception or a worker (failed); those cut off
    by the end of the search (interrupted)."""
    kept: Mapping[TimeKind, float]
    """Seconds of training, validation and probes that its last report stands for; the rest was done again."""


class SlotTimes:
    """Collects what workers tell, and what becomes of those that tell nothing more."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._places: dict[str, str] = {}
        self._work: dict[str, dict[TimeKind, float]] = {}
        self._totals: dict[str, float] = {str(kind): 0.0 for kind in TimeKind}

    def start(self, trial_id: str, worker: str, now: float) -> None:
        """A trial got its worker, perhaps not for the first time."""
        if worker not in self._workers:
            self._workers[worker] = _Worker(number=len(self._workers) + 1, ready=now, covered=now)
        self._workers[worker].trial_started = now
        self._places[trial_id] = worker

    def report(self, trial_id: str, spent: Mapping[str, float], now: float) -> int:
        """A trial's worker told what it did since it last told. Returns the worker's number, from 1."""
        worker = self._workers[self._places[trial_id]]
        if worker.began is None:
            worker.began = now - sum(spent.values())
        work = self._work.setdefault(trial_id, collections.defaultdict(float))
        for kind, seconds in spent.items():
            of = work if kind in (*WORK, TimeKind.FAILED) else worker.spent
            of[TimeKind(kind)] += max(0.0, seconds)
            self._totals[kind] += max(0.0, seconds)
        worker.covered = max(worker.covered, now)
        return worker.number

    def lose(self, trial_id: str, now: float, kind: TimeKind = TimeKind.FAILED) -> None:
        """A trial's worker died, or (interrupted) was cut off: what it did since its last report counts as ``kind``."""
        name = self._places.pop(trial_id, None)
        if name is None:
            return  # it never got one
        worker = self._workers[name]
        worker.spent[TimeKind.IDLE] += max(0.0, worker.trial_started - worker.covered)
        lost = now - max(worker.covered, worker.trial_started)
        self._work.setdefault(trial_id, collections.defaultdict(float))[kind] += max(0.0, lost)
        self._totals[kind] += max(0.0, lost)
        worker.covered = max(worker.covered, now)

    def find_work(self, trial_id: str) -> dict[TimeKind, float]:
        """What a trial's work took so far."""
        return dict(self._work.get(trial_id, {}))

    @property
    def totals(self) -> dict[str, float]:
        """Seconds by kind that workers told of so far. None ever falls: work counts as such however its trial ends."""
        return dict(self._totals)

    @property
    def workers(self) -> list[WorkerTime]:
        """All workers that a trial began in."""
        return [
            WorkerTime(began=worker.began, ready=worker.ready, end=worker.covered, spent=dict(worker.spent))
            for worker in self._workers.values()
        ]


@dataclasses.dataclass(kw_only=True)
class _Worker:
    number: int
    ready: float
    covered: float
    """Until when it is known what the worker did."""
    began: float | None = None
    trial_started: float = math.nan
    spent: dict[TimeKind, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))


def build_ledger(
    workers: Iterable[WorkerTime],
    trials: Iterable[TrialTime],
    *,
    slots: int,
    begin: float,
    end: float,
    resumed: Iterable[float] = (),
) -> Ledger:
    """Lay workers into slots and trials into kinds.

    A slot starts up until its first worker's first trial, is idle between a worker's end and the beginning of the
    process that replaces it, and idle after its last worker. A slot that never got a worker starts up until the first
    worker of the search is ready, and is idle from then on.

    Args:
        workers: every worker that a trial began in.
        trials: every trial.
        slots: places in which trials run at a time. Where more workers lived at a time, nodes joined, and their slots
            count from the beginning, as starting up.
        begin: when the search began, on the driver's clock.
        end: when its last trial was over, on the same clock.
        resumed: when it went on after it had been cut off, on the same clock, which stands still in between. What was
            said of the beginning holds for each of these moments: no worker outlives one.
    """
    wall = max(0.0, end - begin)
    tried, told = list(trials), list(workers)
    slots = max(slots, _count_at_a_time(told))
    laid = []
    for since, until in itertools.pairwise([begin, *resumed, begin + wall]):
        last = until == begin + wall
        own = [worker for worker in told if since <= worker.ready and (last or worker.ready < until)]
        laid += _lay_into_slots(own, slots, since, until)
    seconds = _add_up([*laid, *map(_divide_work, tried)])
    uncovered = slots * wall - sum(seconds.values())
    seconds[TimeKind.OTHER] += max(0.0, uncovered)
    # A worker that waits for the driver counts the way of its report, which the driver has counted: milliseconds.
    seconds[TimeKind.IDLE] = max(0.0, seconds[TimeKind.IDLE] + min(0.0, uncovered))
    return Ledger(
        slots=slots,
        wall_seconds=wall,
        seconds={str(kind): seconds[kind] for kind in TimeKind if seconds[kind] > 0},
        step_seconds=sum(trial.spent.get(TimeKind.TRAINING, 0.0) for trial in tried),
    )


def _count_at_a_time(workers: Sequence[WorkerTime]) -> int:
    """The most workers that lived at a time."""
    # One that begins as another ends takes its place: -1 comes first.
    changes = sorted(change for worker in workers for change in ((worker.ready, 1), (worker.end, -1)))
    return max(itertools.accumulate(change for _, change in changes), default=0)


def _add_up(parts: Iterable[Mapping[TimeKind, float]]) -> dict[TimeKind, float]:
    seconds: dict[TimeKind, float] = collections.defaultdict(float)
    for part in parts:
        for kind, value in part.items():
            seconds[kind] += value
    return seconds


def _divide_work(trial: TrialTime) -> dict[TimeKind, float]:
    """A trial's seconds under the kinds of the ledger."""
    divided: dict[TimeKind, float] = collections.defaultdict(float)
    lost = trial.spent.get(TimeKind.FAILED, 0.0)
    for kind in WORK:
        kept = trial.kept.get(kind, 0.0)
        divided[ENDS.get(trial.status, kind)] += kept
        lost += max(0.0, trial.spent.get(kind, 0.0) - kept)
    divided[TimeKind.OUT_OF_MEMORY if trial.status is TrialStatus.OUT_OF_MEMORY else TimeKind.FAILED] += lost
    divided[TimeKind.INTERRUPTED] += trial.spent.get(TimeKind.INTERRUPTED, 0.0)
    return divided


def _lay_into_slots(workers: list[WorkerTime], slots: int, begin: float, end: float) -> list[dict[TimeKind, float]]:
    """What slots did around their workers, and the workers besides their trials' work."""
    free: list[float] = []
    laid = []
    for worker in sorted(workers, key=lambda worker: worker.ready):
        if len(free) < slots:
            laid.append(_fit_worker(worker, begin, TimeKind.START_UP))
            free.append(max(begin, worker.end))
        else:
            slot = free.index(min(free))
            laid.append(_fit_worker(worker, free[slot], TimeKind.IDLE))
            free[slot] = max(free[slot], worker.end)
    laid += [{TimeKind.IDLE: max(0.0, end - since)} for since in free]
    first = min([worker.ready for worker in workers], default=end)
    starting = min(max(0.0, first - begin), end - begin)
    laid += [{TimeKind.START_UP: starting, TimeKind.IDLE: end - begin - starting}] * (slots - len(free))
    return laid


def _fit_worker(worker: WorkerTime, free: float, before: TimeKind) -> dict[TimeKind, float]:
    """A worker's seconds from ``free`` on; the time before its process began counts as ``before``.

    Ray starts processes ahead of their use: what such a one did before its slot was free is another worker's time.
    """
    spent = collections.defaultdict(float, worker.spent)
    if worker.began is None:
        spent[TimeKind.START_UP] += max(0.0, worker.ready - free)
    elif worker.began >= free:
        spent[before] += worker.began - free
    else:
        spent[TimeKind.START_UP] = max(0.0, spent[TimeKind.START_UP] - (free - worker.began))
    return spent
