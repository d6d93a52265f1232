"""Exports metrics of a search to Prometheus through Ray: trials by status, best value, epochs, loss scales, slot time.

Ray collects the metrics of processes every 10 s, and each node serves them on its metrics port with the prefix
``ray_``. A gauge that is not set again vanishes there after two collections, so a thread of the driver sets all of them
once a second. A report thus costs the search one assignment, however many trials there are, and a trial that has ended
leaves no series behind. With 10,000 trials and 64 slots, the thread's work takes 2 ms per second.

No label grows with the number of trials. Metrics of a running trial are labelled with its slot, the place in which it
runs, and one series maps slots to trials. Otherwise Prometheus would keep a series for every trial of every run.
"""

import collections
import contextlib
import string
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tune_amp import __version__
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.progress import ConfirmProgress, Observer, SearchProgress
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import EpochMetrics, TrialStatus
from tune_amp.trial.objectives import metric_of
from tune_amp.trial.text import describe_error

EVERY_SECONDS = 1.0


class Series(NamedTuple):
    """A metric of a search."""

    name: str
    """Name by Prometheus' conventions, https://prometheus.io/docs/practices/naming/; Ray adds the prefix ``ray_``."""
    meaning: str
    labels: tuple[str, ...] = ()
    """Labels in addition to ``run``, which all series have."""

    @property
    def kind(self) -> str:
        """``counter`` or ``gauge``."""
        return "counter" if self.name.endswith("_total") else "gauge"


ABOUT = ("model", "dataset", "objectives", "version")
ALL_SERIES = (
    Series("tune_amp_run_info", "always 1; its labels say what is searched", ABOUT),
    Series("tune_amp_trials", "trials by status, waiting and running ones too", ("status",)),
    Series("tune_amp_best", "best value of an objective among the trials that have ended", ("objective",)),
    Series("tune_amp_epochs_total", "epochs that trials reported; its rate is epochs per second"),
    Series("tune_amp_steps_total", "training steps in these epochs, skipped ones included"),
    Series("tune_amp_skipped_steps_total", "steps of these that GradScaler skipped because a gradient overflowed"),
    Series("tune_amp_slots", "slots: places in which trials run at a time"),
    Series(
        "tune_amp_slot_seconds_total",
        "slot time in training, validation and probes, as trials reported it, however they ended",
        ("kind",),
    ),
    Series("tune_amp_slot_trial", "number of the trial that runs in the slot", ("slot",)),
    Series("tune_amp_slot_epoch", "epochs that this trial has reported", ("slot",)),
    Series("tune_amp_loss_scale", "loss scale of this trial; none if it has no scaler", ("slot",)),
    Series("tune_amp_gpu_memory_peak_bytes", "peak of CUDA memory allocated by this trial; 0 on the CPU", ("slot",)),
    Series(
        "tune_amp_confirm_runs", "runs of the confirmation that have ended or are left; 0 before it begins", ("state",)
    ),
)

SECONDS = {"training": "train_seconds", "validation": "val_seconds", "probe": "probe_seconds"}
"""Map from each counted kind of slot time to its column."""


Sample = tuple[str, float, dict[str, str]]
"""Name, a gauge's value or a counter's increment, and labels."""


class Gauges(Observer):
    """Forwards all events to another observer, and keeps the metrics up to date.

    Use it as a context manager around the search, and again around any later work that it observes. Neither metrics
    nor the other observer (the reader of a pipe is gone, the disk of a log is full) make a search fail: the first error
    is printed, and ends them. Tune would take it for a fault of the trial, and train it again, three times.

    Args:
        observer: shows the search to the user.
        slots: number of places in which trials run at a time.
        registry: provides ``Gauge`` and ``Counter`` with the interface of ``ray.util.metrics``, which None stands for.
    """

    def __init__(self, observer: Observer, *, slots: int, registry: Any = None) -> None:
        self._observer: Observer | None = observer
        self._slots = slots
        self._registry = registry
        self._metrics: dict[str, Any] = {}
        self._progress: SearchProgress | None = None
        self._confirmation: ConfirmProgress | None = None
        self._ended: collections.deque[TrialRecord] = collections.deque()
        self._seen: dict[str, tuple[EpochMetrics, ...]] = {}  # epochs that counters have counted
        self._best: dict[str, TrialRecord] = {}
        self._slot_of: dict[str, int] = {}
        self._is_broken = False

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """Store the progress for the next publication, and forward it."""
        if self._progress is None:  # of an earlier run of the same search, best values count, but not its epochs
            left = [trial for trial in progress.trials if trial is not ended]
            self._seen = {trial.trial_id: tuple(trial.epochs) for trial in left if trial.epochs}
            self._improve(progress.objectives, [trial for trial in left if trial.trial_id not in progress.running])
        if ended is not None:
            self._ended.append(ended)
        self._progress = progress
        self._forward("on_progress", progress, ended)

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """Store the progress for the next publication, and forward it."""
        self._confirmation = progress
        self._forward("on_confirmation", progress, ended)

    def _forward(self, event: str, *values: object) -> None:
        if self._observer is None:
            return
        try:
            getattr(self._observer, event)(*values)
        except Exception as error:
            self._observer = None
            if not isinstance(error, BrokenPipeError):  # the reader is gone
                _warn(f"the search continues, but is no longer shown: {describe_error(error)}")

    def __enter__(self) -> "Gauges":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish_often, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.publish()

    def _publish_often(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.publish()

    def publish(self) -> None:
        """Set all metrics to the current state of the search."""
        if self._is_broken or self._progress is None:
            return
        try:
            if not self._metrics:
                self._metrics = _register(self._registry, self._progress.run)
            # In this order, so that the last epochs of a trial that ends in between are counted the next time.
            ended = [self._ended.popleft() for _ in range(len(self._ended))]
            for name, value, labels in self._list_samples(self._progress, ended):
                metric = self._metrics[name]
                if hasattr(metric, "set"):
                    metric.set(value, tags=spell_labels(labels))
                elif value > 0:  # Ray accepts positive increments only; a counter of 0 need not exist
                    metric.inc(value, tags=spell_labels(labels))
        except Exception as error:
            self._is_broken = True
            _warn(f"metrics ended, the search continues: {describe_error(error)}")

    def _list_samples(self, progress: SearchProgress, ended: Sequence[TrialRecord]) -> Iterator[Sample]:
        """Yield the current state; ``ended`` are the trials that ended since the last call."""
        about = (progress.model, progress.dataset, ",".join(progress.objectives), __version__)
        yield "tune_amp_run_info", 1, dict(zip(ABOUT, about, strict=True))
        yield "tune_amp_slots", self._slots, {}
        running = progress.running_trials
        yield from _count_trials(progress)
        self._improve(progress.objectives, ended)
        for objective, best in self._best.items():
            metric = metric_of(objective)
            value = best.last.find_value(metric) if best.last else None
            if value is not None:
                yield "tune_amp_best", value, {"objective": metric}
        yield from self._count_epochs([*ended, *running])
        self._assign_slots(running)
        for trial in running:
            yield from _describe_slot(trial, {"slot": str(self._slot_of[trial.trial_id])})
        confirmation = self._confirmation  # another thread replaces it
        done, total = (confirmation.done, confirmation.total) if confirmation else (0, 0)
        yield "tune_amp_confirm_runs", done, {"state": "ended"}
        yield "tune_amp_confirm_runs", total - done, {"state": "left"}

    def _improve(self, objectives: Sequence[str], trials: Sequence[TrialRecord]) -> None:
        for objective in objectives if trials else ():
            before = [self._best[objective]] if objective in self._best else []
            for best in choose_best([*before, *trials], (objective,), 1):
                self._best[objective] = best

    def _count_epochs(self, trials: Sequence[TrialRecord]) -> Iterator[Sample]:
        epochs = 0
        sums = dict.fromkeys(("steps", "skipped_steps", *SECONDS.values()), 0.0)
        for trial in trials:
            after = tuple(trial.epochs)
            for before, new in find_new_epochs(self._seen.get(trial.trial_id, ()), after):
                epochs += 1
                for name in sums:
                    sums[name] += getattr(new, name) - (getattr(before, name) if before else 0)
            self._seen[trial.trial_id] = after
        yield "tune_amp_epochs_total", epochs, {}
        for name in ("steps", "skipped_steps"):
            yield f"tune_amp_{name}_total", sums[name], {}
        for kind, name in SECONDS.items():
            yield "tune_amp_slot_seconds_total", sums[name], {"kind": kind}

    def _assign_slots(self, running: Sequence[TrialRecord]) -> None:
        """Keep the slots of running trials, and assign the lowest free slot to each new one."""
        ids = [trial.trial_id for trial in running]
        self._slot_of = {trial_id: self._slot_of[trial_id] for trial_id in ids if trial_id in self._slot_of}
        free = iter(sorted({*range(1, len(ids) + 1)} - {*self._slot_of.values()}))
        for trial_id in ids:
            if trial_id not in self._slot_of:
                self._slot_of[trial_id] = next(free)


def find_new_epochs(
    before: Sequence[EpochMetrics], after: Sequence[EpochMetrics]
) -> list[tuple[EpochMetrics | None, EpochMetrics]]:
    """Return the epochs reported between two calls, each with the epoch before it.

    A trial whose worker died resumes from a checkpoint, so it reports some epochs again.
    """
    known = {id(epoch) for epoch in before}
    earlier = [None, *after[:-1]]
    return [(last, epoch) for last, epoch in zip(earlier, after, strict=False) if id(epoch) not in known]


def _count_trials(progress: SearchProgress) -> Iterator[Sample]:
    counts = collections.Counter(trial.status for trial in progress.trials)
    # A running trial has the status that it would end with if the search stopped now.
    counts[TrialStatus.INTERRUPTED] -= len(progress.running)
    waiting = max(0, progress.num_samples - len(progress.trials))
    named = {"waiting": waiting, "running": len(progress.running)}
    for status, count in (named | {str(status): counts[status] for status in TrialStatus}).items():
        yield "tune_amp_trials", count, {"status": status}


def _describe_slot(trial: TrialRecord, labels: dict[str, str]) -> Iterator[Sample]:
    number = trial.trial_name.partition("-")[0]
    if number.isdecimal():
        yield "tune_amp_slot_trial", int(number), labels
    yield "tune_amp_slot_epoch", trial.last.epoch if trial.last else 0, labels
    if trial.last:
        yield "tune_amp_gpu_memory_peak_bytes", trial.last.peak_memory_bytes or 0, labels
        if trial.last.loss_scale is not None:
            yield "tune_amp_loss_scale", trial.last.loss_scale, labels


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


def _warn(line: str) -> None:
    with contextlib.suppress(OSError):  # standard error has no reader
        print(line, file=sys.stderr)  # noqa: T201
