"""Tells Prometheus of a search, through Ray: trials by status, best value, epochs, loss scales, slot time.

Ray collects what processes set every 10 s, and each node offers it on its metrics port with ``ray_`` before the name.
A gauge that is not set again vanishes there after two collections. So the driver sets all of them once a second from a
thread: a report costs the search an assignment, however many trials there are, and a trial that has ended leaves no
series behind. With 10,000 trials and 64 slots, what the thread does in a second takes it under 1 ms.

No label grows with the number of trials: what belongs to a running trial is told by slot, the place that it runs in,
and a series says which trial that is. Prometheus would keep a series for every trial of every run.
"""

import collections
import contextlib
import dataclasses
import string
import sys
import threading
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tune_amp import __version__
from tune_amp.monitor.safe_observer import Untroubled
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.progress import ConfirmObserver, ConfirmProgress, Observer, SearchProgress
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import EpochMetrics, TrialStatus, describe_error

if TYPE_CHECKING:
    from types import TracebackType

EVERY_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A metric that a search keeps."""

    name: str
    """By Prometheus' conventions, https://prometheus.io/docs/practices/naming/; Ray puts ``ray_`` before it."""
    kind: Literal["gauge", "counter"]
    meaning: str
    labels: tuple[str, ...] = ()
    """Besides ``run``, which all have."""


ALL_SERIES = (
    Series(
        name="tune_amp_run_info",
        kind="gauge",
        labels=("model", "dataset", "objectives", "version"),
        meaning="always 1; its labels say what is searched",
    ),
    Series(
        name="tune_amp_trials",
        kind="gauge",
        labels=("status",),
        meaning="trials by status, waiting and running ones too",
    ),
    Series(
        name="tune_amp_best",
        kind="gauge",
        labels=("objective",),
        meaning="best value of an objective among the trials that have ended",
    ),
    Series(
        name="tune_amp_epochs_total",
        kind="counter",
        meaning="epochs that trials reported; its rate is epochs per second",
    ),
    Series(
        name="tune_amp_steps_total",
        kind="counter",
        meaning="training steps in these epochs, skipped ones included",
    ),
    Series(
        name="tune_amp_skipped_steps_total",
        kind="counter",
        meaning="steps of these that GradScaler skipped because a gradient overflowed",
    ),
    Series(
        name="tune_amp_slots",
        kind="gauge",
        meaning="slots: places in which trials run at a time",
    ),
    Series(
        name="tune_amp_slot_seconds_total",
        kind="counter",
        labels=("kind",),
        meaning="slot time in training, validation and probes, as trials reported it, however they ended",
    ),
    Series(
        name="tune_amp_slot_trial",
        kind="gauge",
        labels=("slot",),
        meaning="number of the trial that runs in the slot",
    ),
    Series(
        name="tune_amp_slot_epoch",
        kind="gauge",
        labels=("slot",),
        meaning="epochs that this trial has reported",
    ),
    Series(
        name="tune_amp_loss_scale",
        kind="gauge",
        labels=("slot",),
        meaning="loss scale of this trial; none where it has no scaler",
    ),
    Series(
        name="tune_amp_gpu_memory_peak_bytes",
        kind="gauge",
        labels=("slot",),
        meaning="peak of CUDA memory allocated by this trial; 0 on the CPU",
    ),
    Series(
        name="tune_amp_confirm_runs",
        kind="gauge",
        labels=("state",),
        meaning="runs of the confirmation that have ended or are left; 0 before it begins",
    ),
)


SECONDS = {"training": "train_seconds", "validation": "val_seconds", "probe": "probe_seconds"}
"""Kinds of slot time that are counted -> their columns."""


class SearchObserver(Observer, ConfirmObserver, Protocol):
    """Shows a search, and then its confirmation, to its user."""


class Gauges:
    """Passes all that it is told on to another observer, and keeps the metrics meanwhile.

    Use it as a context manager around the search, and again around what else it is to watch. Metrics never make a
    search fail: what goes wrong with them is said once, and ends them.

    Args:
        observer: shows the search to its user.
        slots: places in which trials run at a time.
        registry: has ``Gauge`` and ``Counter`` as ``ray.util.metrics`` has them, which is meant by None.
    """

    def __init__(self, observer: SearchObserver, *, slots: int, registry: Any = None) -> None:
        self._observer = Untroubled(observer)
        self._slots = slots
        self._registry = registry
        self._metrics: dict[str, Any] | None = None
        self._progress: SearchProgress | None = None
        self._confirmation: ConfirmProgress | None = None
        self._ended: collections.deque[TrialRecord] = collections.deque()
        self._tally = Tally()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._broken = False

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """Remember this for the next publication, and pass it on."""
        if self._progress is None:
            self._tally.begin(progress, ended)
        if ended is not None:
            self._ended.append(ended)
        self._progress = progress
        self._observer.on_progress(progress, ended)

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """Remember this for the next publication, and pass it on."""
        self._confirmation = progress
        self._observer.on_confirmation(progress, ended)

    def __enter__(self) -> "Gauges":
        self._stop.clear()
        self._thread = threading.Thread(target=self._publish_often, name="tune_amp_gauges", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: "TracebackType | None"
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.publish()

    def publish(self) -> None:
        """Set all metrics to how the search stands."""
        if self._broken or self._progress is None:
            return
        try:
            if self._metrics is None:
                self._metrics = _register(self._registry, self._progress.run)
            # In this order: a trial that ends in between has its last epochs counted the next time.
            ended = [self._ended.popleft() for _ in range(len(self._ended))]
            self._set(self._tally.count(self._progress, ended, self._confirmation, self._slots))
        except Exception as error:
            self._broken = True
            with contextlib.suppress(OSError):
                print(f"metrics ended, the search goes on: {describe_error(error)}", file=sys.stderr)  # noqa: T201

    def _publish_often(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.publish()

    def _set(self, samples: "Iterable[Sample]") -> None:
        assert self._metrics is not None
        for sample in samples:
            metric = self._metrics[sample.name]
            if hasattr(metric, "set"):
                metric.set(sample.value, tags=spell_labels(sample.labels))
            elif sample.value > 0:  # what Ray takes; a counter of 0 need not exist
                metric.inc(sample.value, tags=spell_labels(sample.labels))


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A gauge's value, or what is added to a counter."""

    name: str
    value: float
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


class Tally:
    """Turns a search as it stands into samples, and remembers what counters were told."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[EpochMetrics, ...]] = {}
        self._best: dict[str, TrialRecord] = {}
        self._slots: dict[str, int] = {}

    def begin(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """What an earlier run of the same search left: its best values count, its epochs were counted then."""
        left = [trial for trial in progress.trials if trial is not ended]
        self._seen = {trial.trial_id: tuple(trial.epochs) for trial in left if trial.epochs}
        for objective in progress.objectives:
            self._improve(objective, [trial for trial in left if trial.trial_id not in progress.running])

    def count(
        self,
        progress: SearchProgress,
        ended: Sequence[TrialRecord],
        confirmation: ConfirmProgress | None,
        slots: int,
    ) -> list[Sample]:
        """All samples of now.

        Args:
            progress: of the search.
            ended: trials that ended since the last call.
            confirmation: where it has begun.
            slots: places in which trials run at a time.
        """
        about = {"model": progress.model, "dataset": progress.dataset, "version": __version__}
        running = find_running(progress)
        self._assign_slots(running)
        return [
            Sample("tune_amp_run_info", 1, {**about, "objectives": ",".join(progress.objectives)}),
            Sample("tune_amp_slots", slots),
            *_count_trials(progress),
            *self._find_best(progress.objectives, ended),
            *self._count_epochs([*ended, *running]),
            *(sample for trial in running for sample in _describe_slot(trial, str(self._slots[trial.trial_id]))),
            *_count_confirmation(confirmation),
        ]

    def _find_best(self, objectives: Sequence[str], ended: Sequence[TrialRecord]) -> list[Sample]:
        for objective in objectives if ended else ():
            self._improve(objective, ended)
        found = [(objective, self._best[objective]) for objective in objectives if objective in self._best]
        return [Sample("tune_amp_best", getattr(best.last, name), {"objective": name}) for name, best in found]

    def _improve(self, objective: str, trials: Sequence[TrialRecord]) -> None:
        before = [self._best[objective]] if objective in self._best else []
        best = choose_best([*before, *trials], (objective,), 1)
        if best:
            self._best[objective] = best[0]

    def _count_epochs(self, trials: Sequence[TrialRecord]) -> list[Sample]:
        epochs = 0
        sums = dict.fromkeys(("steps", "skipped_steps", *SECONDS.values()), 0.0)
        for trial in trials:
            after = tuple(trial.epochs)
            for before, new in find_new_epochs(self._seen.get(trial.trial_id, ()), after):
                epochs += 1
                for name in sums:
                    sums[name] += getattr(new, name) - (getattr(before, name) if before else 0)
            self._seen[trial.trial_id] = after
        return [
            Sample("tune_amp_epochs_total", epochs),
            *(Sample(f"tune_amp_{name}_total", sums[name]) for name in ("steps", "skipped_steps")),
            *(Sample("tune_amp_slot_seconds_total", sums[name], {"kind": kind}) for kind, name in SECONDS.items()),
        ]

    def _assign_slots(self, running: Sequence[TrialRecord]) -> None:
        """Whoever runs keeps its slot; a new one gets the lowest that is free."""
        ids = [trial.trial_id for trial in running]
        self._slots = {trial_id: self._slots[trial_id] for trial_id in ids if trial_id in self._slots}
        taken = set(self._slots.values())
        free = (slot for slot in range(1, len(ids) + len(taken) + 1) if slot not in taken)
        for trial_id in ids:
            if trial_id not in self._slots:
                self._slots[trial_id] = next(free)


def find_running(progress: SearchProgress) -> list[TrialRecord]:
    """The running trials in their order. They are among the last: of thousands, few are looked at."""
    found: list[TrialRecord] = []
    for trial in reversed(progress.trials):
        if len(found) == len(progress.running):
            break
        if trial.trial_id in progress.running:
            found.append(trial)
    return found[::-1]


def find_new_epochs(
    before: Sequence[EpochMetrics], after: Sequence[EpochMetrics]
) -> list[tuple[EpochMetrics | None, EpochMetrics]]:
    """Epochs that were reported in between, each with the one that it goes on from.

    A trial whose worker died goes on from a checkpoint: it reports epochs again that it had reported before.
    """
    known = {id(epoch) for epoch in before}
    earlier = [None, *after[:-1]]
    return [(last, epoch) for last, epoch in zip(earlier, after, strict=False) if id(epoch) not in known]


def _count_trials(progress: SearchProgress) -> list[Sample]:
    counts = collections.Counter(trial.status for trial in progress.trials)
    # A running trial bears the status that it would end with if all stopped now.
    counts[TrialStatus.INTERRUPTED] -= len(progress.running)
    waiting = max(0, progress.num_samples - len(progress.trials))
    named = {
        "waiting": waiting,
        "running": len(progress.running),
        **{str(status): counts[status] for status in TrialStatus},
    }
    return [Sample("tune_amp_trials", count, {"status": status}) for status, count in named.items()]


def _describe_slot(trial: TrialRecord, slot: str) -> list[Sample]:
    number = trial.trial_name.partition("-")[0]
    samples = [Sample("tune_amp_slot_trial", int(number), {"slot": slot})] if number.isdecimal() else []
    samples.append(Sample("tune_amp_slot_epoch", 0 if trial.last is None else trial.last.epoch, {"slot": slot}))
    if trial.last is not None:
        samples.append(Sample("tune_amp_gpu_memory_peak_bytes", trial.last.peak_memory_bytes or 0, {"slot": slot}))
        if trial.last.loss_scale is not None:
            samples.append(Sample("tune_amp_loss_scale", trial.last.loss_scale, {"slot": slot}))
    return samples


def _count_confirmation(progress: ConfirmProgress | None) -> list[Sample]:
    ended, total = (0, 0) if progress is None else (progress.done, progress.total)
    states = {"ended": ended, "left": total - ended}
    return [Sample("tune_amp_confirm_runs", count, {"state": state}) for state, count in states.items()]


def spell_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return labels as Ray takes them, ASCII only: ``läuf`` becomes ``l%C3%A4uf``, as in a URL."""
    plain = string.punctuation + " "
    return {key: urllib.parse.quote(value, safe=plain, errors="surrogateescape") for key, value in labels.items()}


def _register(registry: Any, run: str) -> dict[str, Any]:
    """The metrics by name, each with the run as its label."""
    if registry is None:
        from ray.util import metrics as registry
    classes = {"gauge": registry.Gauge, "counter": registry.Counter}
    return {
        series.name: classes[series.kind](
            series.name, description=series.meaning, tag_keys=("run", *series.labels)
        ).set_default_tags(spell_labels({"run": run}))
        for series in ALL_SERIES
    }
