"""Measures how many trials train best side by side on one device: it trains for real, in processes outside Ray."""

import contextlib
import dataclasses
import math
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tune_amp.training.cuda_graph import WARM_UP_STEPS
from tune_amp.training.data import Split
from tune_amp.training.evaluation import EVALUATION_BATCH
from tune_amp.training.memory import is_out_of_memory
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import InputError, TrialConfig
from tune_amp.trial.consent import consent_to, list_consented
from tune_amp.trial.text import describe_error

if TYPE_CHECKING:
    from tune_amp.space.space import SearchSpace  # which needs Optuna; measuring does not

# Memory of a CUDA context with its kernels and library handles, which PyTorch's allocator does not count: 400 to
# 600 MiB on recent GPUs.
CONTEXT_BYTES = 600 * 2**20
# A tenth of a device is reserved for fragmentation, the driver, and occasional peaks of the largest configuration.
USABLE_MEMORY = 0.9
# Trials that share a device slow each other down. A search of stopped and resumed trials gains nothing from the last
# tenth of throughput, and pays for it with later results, to which neither the sampler nor the scheduler can react.
KNEE = 0.9
MOST_TRIALS = 16
"""Upper limit on concurrent trials. A sampler learns only from trials that ended before others started: with more
trials at a time, much of a search is random."""
# Added to the time of the measurements: 16 processes import torch and place their data at the same time.
START_SECONDS = 30.0
TIMED_STEPS = 4
EPOCHS_A_MEASUREMENT = 10
# In descending order of memory. tf32 stores numbers in fp32; fp16 and bf16 keep fp32 weights and halve activations.
PRECISIONS_BY_MEMORY = ("fp32", "tf32", "fp16", "bf16")
OPTIMIZERS_BY_MEMORY = ("adamw", "adam", "sgd")  # two buffers a weight, two, one


class MeasurementError(RuntimeError):
    """Not even one trial could be measured, perhaps because it does not fit the device alone (``out_of_memory``)."""

    def __init__(self, text: str, *, out_of_memory: bool = False) -> None:
        super().__init__(text)
        self.out_of_memory = out_of_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareMeasurement:
    """Throughput and memory of a number of trials side by side."""

    trials: int
    samples_per_second: float
    """Training images per second, of all trials together."""
    trial_memory_bytes: int | None
    """Peak device memory of one process in bytes, context and data included; None on the CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedGpu:
    """Number of trials that share a GPU."""

    trials: int
    reason: str
    """Explanation for the user, to follow a colon."""


def find_largest(space: "SearchSpace", **shared: Any) -> TrialConfig:
    """Return a configuration that needs at least as much memory as any that ``space`` suggests.

    It combines the largest batch with the precision and the optimizer that take most memory. If conditions of the space
    exclude this combination, every trial is smaller. All trials have the fields ``shared`` in common.
    """
    sizes = [*space.list_possible("batch_size")]
    sizes += [bound for bound in space.bounds("batch_size") or () if bound not in sizes]
    precisions, optimizers = space.list_possible("precision"), space.list_possible("optimizer")
    return TrialConfig(
        **shared,
        batch_size=int(max(sizes)),
        precision=min(precisions, key=PRECISIONS_BY_MEMORY.index),
        optimizer=next((name for name in OPTIMIZERS_BY_MEMORY if name in optimizers), optimizers[0]),
    )


def list_counts(most: int) -> tuple[int, ...]:
    """Return the numbers of trials to measure, up to ``most``: powers of two, and ``most`` itself."""
    most = min(most, MOST_TRIALS)
    return tuple(sorted({count for count in (1, 2, 4, 8, 16) if count <= most} | {most}))


def find_knee(measurements: Sequence[ShareMeasurement]) -> int:
    """Return the smallest number of trials that reaches ``KNEE`` of the best throughput."""
    best = max(measurement.samples_per_second for measurement in measurements)
    return min(m.trials for m in measurements if m.samples_per_second >= KNEE * best)


def count_fitting(trial_bytes: int, device_bytes: int) -> int:
    """Return how many trials fit ``USABLE_MEMORY`` of a device side by side; at least one, which is always tried."""
    return max(1, int(USABLE_MEMORY * device_bytes / trial_bytes))


def choose_trials(measurements: Sequence[ShareMeasurement], device_bytes: int | None) -> SharedGpu:
    """Choose how many trials share a GPU, from measurements on it that include one of a single trial."""
    rates = {measurement.trials: measurement.samples_per_second for measurement in measurements}
    knee, most = find_knee(measurements), max(rates)
    gains = {trials: f"{rate / rates[1]:.2g}" for trials, rate in rates.items()}
    if most == 1:
        text = "no more of the largest could be trained on a GPU"
    elif knee == 1:
        best = max((trials for trials in rates if trials > 1), key=rates.__getitem__)
        text = f"{best} trials on a GPU train only {gains[best]} times as fast as one"
    else:
        text = f"{knee} trials on a GPU train {gains[knee]} times as fast as one"
        text += f", {most} only {gains[most]}" if most > knee else ""
    memory = max((m.trial_memory_bytes for m in measurements if m.trial_memory_bytes is not None), default=None)
    if memory is not None and device_bytes is not None:
        text += f"; the largest needs {memory / 2**30:.2g} of {device_bytes / 2**30:.4g} GiB"
    return SharedGpu(trials=knee, reason=text)


def measure_shares(
    config: TrialConfig,
    train: Split,
    num_classes: int,
    device_type: str,
    *,
    counts: Sequence[int],
    seconds: float,
    repeats: int = 1,
) -> tuple[ShareMeasurement, ...]:
    """Train ``config`` in 1, 2, ... processes at the same time, each with one CPU thread.

    The first process measures its memory. Numbers of trials that would not fit the device are skipped. If a process
    fails or is late, the remaining measurements are skipped too.

    Args:
        config: the configuration that each process trains.
        train: the training split; a process uses as much of it as fits the time.
        num_classes: labels are 0 .. num_classes - 1.
        device_type: ``cuda`` for the current device, or ``cpu``.
        counts: numbers of processes.
        seconds: duration of the measurement of each number.
        repeats: how often the same processes measure the whole series.

    Returns:
        A measurement for each number that could be measured, in ascending order, once per repeat.

    Raises:
        MeasurementError: no number could be measured.
    """
    deadline = time.monotonic() + START_SECONDS + 2 * seconds * len(counts) * repeats
    with tempfile.TemporaryDirectory(prefix="tune_amp_shares_") as folder, contextlib.ExitStack() as stack:
        for name in ("images", "labels"):  # mapped by each process: no copy, and nothing large is pickled
            np.save(Path(folder) / f"{name}.npy", getattr(train, name))
        job = _Job(
            folder=folder,
            config=dataclasses.replace(config, class_weighting="none", curriculum="none"),  # the same work in a step
            num_classes=num_classes,
            device_type=device_type,
            seconds=seconds,
            search_path=tuple(sys.path),
            consented=list_consented(),
        )
        processes: list[_Process] = []
        for _ in range(max(counts)):
            processes.append(_Process(job, deadline))
            stack.callback(processes[-1].kill)
        return _measure_counts(processes, sorted(counts), repeats)


def _measure_counts(
    processes: "Sequence[_Process]", counts: Sequence[int], repeats: int
) -> tuple[ShareMeasurement, ...]:
    first = processes[0]
    first.send("prepare", None)
    steps, memory, fitting = first.receive()
    ready = [first, *_prepare(processes[1:fitting], steps)]
    measured: list[ShareMeasurement] = []
    for count in [count for count in counts if count <= len(ready)] * repeats:
        try:
            rate = _measure_together(ready[:count])
        except MeasurementError:
            if not measured:
                raise
            break
        measured.append(ShareMeasurement(trials=count, samples_per_second=rate, trial_memory_bytes=memory))
    if not measured:
        raise MeasurementError(f"only {len(ready)} of {counts[0]} trials fit the device", out_of_memory=True)
    return tuple(measured)


def _prepare(processes: "Iterable[_Process]", steps: int) -> "list[_Process]":
    """Prepare the processes for epochs of ``steps`` steps. Return those before the first that fails; kill the rest."""
    started = list(processes)
    for process in started:
        process.send("prepare", steps)
    ready: list[_Process] = []
    with contextlib.suppress(MeasurementError):
        for process in started:
            process.receive()
            ready.append(process)
    for process in started[len(ready) :]:
        process.kill()  # the ready processes need the memory that it holds
    return ready


def _measure_together(processes: "Sequence[_Process]") -> float:
    """Return the training images per second of all processes together."""
    start = time.monotonic() + 0.05  # one clock for all processes of a machine
    for process in processes:
        process.send("measure", start)
    return math.fsum(process.receive() for process in processes)


# The measuring processes: their job, their handle in this process, and the code that they run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """Input of a measuring process, small enough to be pickled."""

    folder: str
    config: TrialConfig
    num_classes: int
    device_type: str
    seconds: float
    search_path: tuple[str, ...]
    consented: tuple[str, ...]


class _Process:
    """Handle of a process that trains on command."""

    def __init__(self, job: _Job, deadline: float) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._deadline = deadline
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, job), daemon=True)
        self._process.start()
        other_end.close()  # so that the pipe ends when the process dies

    def send(self, command: str, *arguments: Any) -> None:
        """Send a command. ``receive`` detects a dead process."""
        with contextlib.suppress(OSError):
            self._pipe.send((command, arguments))

    def receive(self) -> Any:
        """Wait for the result of the command and return it.

        Raises:
            MeasurementError: the command failed, the process died, or time is up.
        """
        try:
            if not self._pipe.poll(max(0.0, self._deadline - time.monotonic())):
                raise MeasurementError("it took too long")
            value, failure, out_of_memory = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=1)
            raise MeasurementError(f"its process died, exit code {self._process.exitcode}") from None
        if failure is not None:
            raise MeasurementError(failure, out_of_memory=out_of_memory)
        return value

    def kill(self) -> None:
        """Kill the process at once: it has nothing to clean up."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, job: _Job) -> None:
    """Answer commands until the pipe ends: (value, None, False), or (None, error, whether memory ran out)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    sys.path.extend(folder for folder in job.search_path if folder not in sys.path)
    consent_to(*job.consented)
    torch.set_num_threads(1)
    commands = _Commands(job)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, str | None, bool] = (getattr(commands, name)(*arguments), None, False)
        except Exception as error:  # a user's model may raise anything
            text = str(error) if isinstance(error, InputError) else describe_error(error)
            answer = (None, text, is_out_of_memory(error))
        pipe.send(answer)


class _Commands:
    """Commands that a process accepts."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._device = torch.device(job.device_type)

    def prepare(self, steps: int | None) -> tuple[int, int | None, int | None]:
        """Train until the warm-up is complete.

        Args:
            steps: steps per epoch; None to choose them.

        Returns:
            The steps per epoch, and on a GPU the peak memory of a trial in bytes and how many trials fit; else None.
        """
        batch_size = self._job.config.batch_size
        folder = Path(self._job.folder)
        images, labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels"))
        train = Split(images=images, labels=labels)
        if steps is None:
            per_step = self._time_step(train)
            most = max(1, len(train) // batch_size)
            steps = min(most, max(1, int(self._job.seconds / EPOCHS_A_MEASUREMENT / per_step)))
        self._images = steps * batch_size
        placed = _take(train, self._images)
        # The same total number of steps as a trial: it decides whether they are captured as a CUDA graph.
        trial_steps = self._job.config.max_epochs * (len(train) // batch_size)
        self._run = self._start_run(placed, None, max_epochs=math.ceil(trial_steps / steps))
        for _ in range(math.ceil((WARM_UP_STEPS + 1) / steps)):
            self._run.train_epoch()
        if self._device.type != "cuda":
            return steps, None, None
        left_out = train.images.nbytes - placed.images.nbytes  # a trial would hold them too
        memory = torch.cuda.max_memory_reserved(self._device) + left_out + CONTEXT_BYTES
        return steps, memory, count_fitting(memory, torch.cuda.mem_get_info(self._device)[1])

    def measure(self, start: float) -> float:
        """Train from ``start`` (``time.monotonic``) for the job's seconds. Return the training images per second."""
        time.sleep(max(0.0, start - time.monotonic()))
        started, images = time.perf_counter(), 0
        while images == 0 or time.perf_counter() - started < self._job.seconds:
            self._run.train_epoch()
            images += self._images
        return images / (time.perf_counter() - started)

    def _time_step(self, train: Split) -> float:
        """Return the seconds of a training step. Train as trials do: validation may take the most memory."""
        few = _take(train, TIMED_STEPS * self._job.config.batch_size)
        run = self._start_run(few, _take(train, EVALUATION_BATCH))
        first, second = run.train_epoch(), run.train_epoch()  # seconds and steps are cumulative
        return max(1e-6, second.train_seconds - first.train_seconds) / (second.steps - first.steps)

    def _start_run(self, train: Split, validation: Split | None, *, max_epochs: int = 2) -> TrainingRun:
        data = TrainingData(train, validation, self._job.num_classes, self._device)
        return TrainingRun(dataclasses.replace(self._job.config, max_epochs=max_epochs), data)


def _take(split: Split, count: int) -> Split:
    """Return the first ``count`` images, or all if there are fewer."""
    return Split(images=split.images[:count], labels=split.labels[:count])
