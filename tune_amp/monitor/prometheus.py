"""Exports metrics of a search to Prometheus through Ray: trials by status, best value, epochs, loss scales, slot time.

Ray collects the metrics of processes every 10 s, and each node serves them on its metrics port with the prefix
``ray_``. A gauge that is not set again vanishes there after two collections, so a thread of the driver sets all of them
once a second. A report thus costs the search one assignment, however many trials there are, and a trial that has ended
leaves no series behind. With 10,000 trials and 64 slots, the thread's work takes under 1 ms per second.

No label grows with the number of trials. Metrics of a running trial are labelled with its slot, the place in which it
runs, and one series maps slots to trials. Otherwise Prometheus would keep a series for every trial of every run.
"""

import collections
import contextlib
import dataclasses
import string
import sys
import threading
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from tune_amp import __version__
from tune_amp.monitor.safe_observer import SafeObserver
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.progress import ConfirmObserver, ConfirmProgress, Observer, SearchProgress
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import EpochMetrics, TrialStatus, describe_error
from tune_amp.trial.objectives import metric_of

if TYPE_CHECKING:
    from types import TracebackType

EVERY_SECONDS = 1.0


class Series(NamedTuple):
    """A metric of a search."""

    name: str
    """Name by Prometheus' conventions, https://prometheus.io/docs/practices/naming/; Ray adds the prefix ``ray_``."""
    kind: Literal["gauge", "counter"]
    meaning: str
    labels: tuple[str, ...] = ()
    """Labels in addition to ``run``, which all series have."""


ALL_SERIES = (
    Series(
        "tune_amp_run_info",
        "gauge",
        "always 1; its labels say what is searched",
        ("model", "dataset", "objectives", "version"),
    ),
    Series("tune_amp_trials", "gauge", "trials by status, waiting and running ones too", ("status",)),
    Series("tune_amp_best", "gauge", "best value of an objective among the trials that have ended", ("objective",)),
    Series("tune_amp_epochs_total", "counter", "epochs that trials reported; its rate is epochs per second"),
    Series("tune_amp_steps_total", "counter", "training steps in these epochs, skipped ones included"),
    Series(
        "tune_amp_skipped_steps_total",
        "counter",
        "steps of these that GradScaler skipped because a gradient overflowed",
    ),
    Series("tune_amp_slots", "gauge", "slots: places in which trials run at a time"),
    Series(
        "tune_amp_slot_seconds_total",
        "counter",
        "slot time in training, validation and probes, as trials reported it, however they ended",
        ("kind",),
    ),
    Series("tune_amp_slot_trial", "gauge", "number of the trial that runs in the slot", ("slot",)),
    Series("tune_amp_slot_epoch", "gauge", "epochs that this trial has reported", ("slot",)),
    Series("tune_amp_loss_scale", "gauge", "loss scale of this trial; none if it has no scaler", ("slot",)),
    Series(
        "tune_amp_gpu_memory_peak_bytes",
        "gauge",
        "peak of CUDA memory allocated by this trial; 0 on the CPU",
        ("slot",),
    ),
    Series(
        "tune_amp_confirm_runs",
        "gauge",
        "runs of the confirmation that have ended or are left; 0 before it begins",
        ("state",),
    ),
)

SECONDS = {"training": "train_seconds", "validation": "val_seconds", "probe": "probe_seconds"}
"""Map from each counted kind of slot time to its column."""


class SearchObserver(Observer, ConfirmObserver, Protocol):
    """Shows a search and then its confirmation to the user."""


class Gauges:
    """Forwards all events to another observer, and keeps the metrics up to date.

    Use it as a context manager around the search, and again around any later work that it observes. Metrics never make
    a search fail: their first error is printed, and ends them.

    Args:
        observer: shows the search to the user.
        slots: number of places in which trials run at a time.
        registry: provides ``Gauge`` and ``Counter`` with the interface of ``ray.util.metrics``, which None stands for.
    """

    def __init__(self, observer: SearchObserver, *, slots: int, registry: Any = None) -> None:
        self._observer = SafeObserver(observer)
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
        """Store the progress for the next publication, and forward it."""
        if self._progress is None:
            self._tally.include_earlier(progress, ended)
        if ended is not None:
            self._ended.append(ended)
        self._progress = progress
        self._observer.on_progress(progress, ended)

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """Store the progress for the next publication, and forward it."""
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
        """Set all metrics to the current state of the search."""
        if self._broken or self._progress is None:
            return
        try:
            if self._metrics is None:
                self._metrics = _register(self._registry, self._progress.run)
            # In this order, so that the last epochs of a trial that ends in between are counted the next time.
            ended = [self._ended.popleft() for _ in range(len(self._ended))]
            self._set(self._tally.count(self._progress, ended, self._confirmation, self._slots))
        except Exception as error:
            self._broken = True
            with contextlib.suppress(OSError):
                print(f"metrics ended, the search continues: {describe_error(error)}", file=sys.stderr)  # noqa: T201

    def _publish_often(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.publish()

    def _set(self, samples: "Iterable[Sample]") -> None:
        assert self._metrics is not None
        for sample in samples:
            metric = self._metrics[sample.name]
            if hasattr(metric, "set"):
                metric.set(sample.value, tags=spell_labels(sample.labels))
            elif sample.value > 0:  # Ray accepts positive increments only; a counter of 0 need not exist
                metric.inc(sample.value, tags=spell_labels(sample.labels))


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A gauge's value, or a counter's increment."""

    name: str
    value: float
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


class Tally:
    """Converts the state of a search into samples, and stores what counters have already counted."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[EpochMetrics, ...]] = {}
        self._best: dict[str, TrialRecord] = {}
        self._slots: dict[str, int] = {}

    def include_earlier(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """Include an earlier run of the same search: its best values count, its epochs are not counted again."""
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
        """Return all samples of the current state.

        Args:
            progress: progress of the search.
            ended: trials that ended since the last call.
            confirmation: progress of the confirmation; None before it starts.
            slots: number of places in which trials run at a time.
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
        values = [(metric_of(name), best.last.find_value(name)) for name, best in found if best.last]
        return [Sample("tune_amp_best", value, {"objective": name}) for name, value in values if value is not None]

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
        """Keep the slots of running trials, and assign the lowest free slot to each new one."""
        ids = [trial.trial_id for trial in running]
        self._slots = {trial_id: self._slots[trial_id] for trial_id in ids if trial_id in self._slots}
        taken = set(self._slots.values())
        free = (slot for slot in range(1, len(ids) + len(taken) + 1) if slot not in taken)
        for trial_id in ids:
            if trial_id not in self._slots:
                self._slots[trial_id] = next(free)


def find_running(progress: SearchProgress) -> list[TrialRecord]:
    """Return the running trials in order. They are among the last, so few of thousands are examined."""
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
    """Return the epochs reported between two calls, each with the epoch before it.

    A trial whose worker died resumes from a checkpoint, so it reports some epochs again.
    """
    known = {id(epoch) for epoch in before}
    earlier = [None, *after[:-1]]
    return [(last, epoch) for last, epoch in zip(earlier, after, strict=False) if id(epoch) not in known]


def _count_trials(progress: SearchProgress) -> list[Sample]:
    counts = collections.Counter(trial.status for trial in progress.trials)
    # A running trial has the status that it would end with if the search stopped now.
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
    """Return labels in ASCII, as Ray requires: ``läuf`` becomes ``l%C3%A4uf``, as in a URL."""
    plain = string.punctuation + " "
    return {key: urllib.parse.quote(value, safe=plain, errors="surrogateescape") for key, value in labels.items()}


def _register(registry: Any, run: str) -> dict[str, Any]:
    """Register the metrics and return them by name, each with the run as its label."""
    if registry is None:
        from ray.util import metrics as registry
    classes = {"gauge": registry.Gauge, "counter": registry.Counter}
    return {
        series.name: classes[series.kind](
            series.name, description=series.meaning, tag_keys=("run", *series.labels)
        ).set_default_tags(spell_labels({"run": run}))
        for series in ALL_SERIES
    }
