"""The Ray Tune trainable: the actor that runs in a worker process and trains many trials, one after another.

A trial that fails is a row with a status: exceptions are reported, not raised, so that the worker stays alive for the
next trial. Only the death of the process itself and a permanently broken CUDA context are left to Ray.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import io
import math
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa  # type: ignore[import-untyped]
import ray
import torch
from pyarrow import fs
from ray import tune
from ray.air.constants import TRAINING_ITERATION
from ray.tune.result import DONE, NODE_IP, PID, SHOULD_CHECKPOINT, TRIAL_ID

from tune_amp.cluster import ray_patches
from tune_amp.cluster.memory_holders import MEMORY_WAIT_SECONDS, MemoryHeldError, naming_memory_holders
from tune_amp.cluster.resources import TrialResources, cap_memory
from tune_amp.training.amp import name_device
from tune_amp.training.data import Dataset, Split
from tune_amp.training.memory import is_out_of_gpu_memory, is_out_of_memory, release_memory
from tune_amp.training.own_code import find_place
from tune_amp.training.own_loop import OwnRun
from tune_amp.training.runs import Run, start_run
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import OBJECTIVES, RUNNING, EpochMetrics, InputError, TrialConfig, TrialStatus
from tune_amp.trial.consent import consent_to, list_consented, list_provided, provide
from tune_amp.trial.objectives import metric_of
from tune_amp.trial.report import TrialReport
from tune_amp.trial.text import describe_error, generalize_error, one_line

CHECKPOINT_FILE = "trial.pt"
REPORT = "report"
"""Key of the ``TrialReport`` in a result."""
_TUNES_OWN = (DONE, NODE_IP, PID, SHOULD_CHECKPOINT, TRAINING_ITERATION, TRIAL_ID)
READ_BY_TUNE = frozenset((*OBJECTIVES, "epoch", "status", "config_fault", *_TUNES_OWN))
"""Other keys of a result: what Tune, the schedulers and the searcher read."""
# A worker's death (killed, a segmentation fault) need not be the settings' fault: the trial is retried.
WORKER_RETRIES = 2
# A lost node is never the settings' fault, and does not count as a retry. Neither does a broken connection, which looks
# the same. This many in a row without a new epoch do count: else a network that keeps breaking is retried forever.
NODE_RETRIES = 10
# A checkpoint is due after work that takes this many times its cost. Checkpoints then take at most 1 / 21 of a trial's
# time, under 5 %, and a worker that dies loses at most the work of 20 checkpoints plus its current epoch.
WORK_PER_CHECKPOINT = 20
# Assumed cost until a worker has saved once. simple_net takes 0.01 to 0.02 s on a local disk.
FIRST_CHECKPOINT_SECONDS = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Data and settings that all trials of a search share, sent to each worker once. The test set is not included."""

    train: Split
    """The training split, read from Ray's object store without a copy."""
    validation: Split
    num_classes: int
    num_threads: int
    """CPU threads of a trial. Sums are split among threads, so a bit-identical replay needs the same number."""
    search_path: tuple[str, ...]
    """The driver's ``sys.path``, so that workers on the same machine find the user's own functions too."""
    consented: tuple[str, ...] = ()
    """Names of the user's own functions that may be imported: see ``consent.consent_to``."""
    checkpoints: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Folders that may hold the checkpoints of interrupted trials, by trial id, newest first."""
    filesystem: fs.FileSystem = dataclasses.field(default_factory=fs.LocalFileSystem)
    """File system of these folders."""
    objectives: tuple[str, ...] = ()
    """Objectives of the search, which a user's own loop must report."""
    functions: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    """The user's functions that no module holds, by name: see ``consent.list_provided``."""
    gpu_share: float = 0.0
    """Share of a GPU with which a trial starts; 0 on the CPU. A trial that runs out of memory gets a larger share."""


Failure = tuple[int, str]
"""Number of epochs that a trial had trained when an exception ended its attempt, and that exception in one line."""


class LargerShareNeeded(RuntimeError):  # noqa: N818 - a request, not a fault
    """A trial ran out of its share of a GPU's memory. Ends the worker, so that Tune retries with a larger share."""


class AmpTrainable(tune.Trainable):
    """One trial, one epoch per ``step``.

    ``config`` holds ``TrialConfig`` fields, and ``worker_setup`` what all trials share.
    """

    def setup(self, config: dict[str, Any], worker_setup: WorkerSetup | None = None) -> None:
        """Prepare this worker's process, once."""
        assert worker_setup is not None  # bound by tune.with_parameters
        self._worker_setup = worker_setup
        self._metrics = tuple(map(metric_of, worker_setup.objectives))
        self._first_share, self.share = worker_setup.gpu_share, assigned_gpu_share()
        self.device = prepare_worker(worker_setup)
        self._run: Run | None = None
        self._content: bytes | None = None  # of a checkpoint that is being saved
        self._save_seconds: collections.deque[float] = collections.deque(maxlen=5)
        self.reset_config(config)
        gc.freeze()  # modules stay: collecting torch's costs 0.15 s a trial

    @functools.cached_property
    def data(self) -> TrainingData:
        """The data on this worker's device: placed there once, by the first trial, which reports if it has no room."""
        setup = self._worker_setup
        return TrainingData(setup.train, setup.validation, setup.num_classes, self.device)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save with Ray's ``save``, which stores the files of ``save_checkpoint``, and measure its cost.

        The cost decides when the next checkpoint is due.
        """
        started = time.monotonic()
        self._content = self._write_state()  # an exception here comes from the model or the device
        save = super().save

        def save_cleanly() -> Any:
            with tempfile.TemporaryDirectory() as folder:  # Ray's own is left behind if its copy fails
                return save(checkpoint_dir or folder)

        saved = ray_patches.save_if_possible(self, save_cleanly)
        self._content = None
        self._save_seconds.append(time.monotonic() - started)
        self._checkpoint_seconds += self._save_seconds[-1]
        self._unsaved_seconds = 0.0
        return saved

    def restore(self, checkpoint_path: Any) -> None:
        """Resume from a checkpoint of Ray's. If it is missing or damaged, the trial starts from the beginning."""
        found = checkpoint_path.checkpoint
        content = read_checkpoint(found.filesystem, found.path)
        if content is not None:
            try:
                self._continue_run(content)
            except Exception as error:
                self._request_larger_share(error)
                raise

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare this actor for another trial; keep data and process."""
        if self._run is not None:  # the scheduler stopped the trial, so no step released it
            self._release()
        self._settings = dict(new_config)
        self._first_failure: Failure | None = None
        self._setup_seconds = self._unsaved_seconds = 0.0
        self._checkpoint_seconds: float = 0.0
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch and report it, or report how the trial ended.

        Raises:
            torch.AcceleratorError: the GPU can no longer be used from this process.
            LargerShareNeeded: the trial's share of GPU memory ran out, and it may get a larger one.
        """
        try:
            report = self._train_epoch_or_retry()
        except Exception as error:  # a trial that fails is a row with a status, never a stop of the search
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                # After a device assert or an illegal access every later CUDA call of the process fails too, and so
                # would every later trial. Ray ends a worker whose step raises, and retries the trial in a new one.
                raise
            self._request_larger_share(error)
            report = dict.fromkeys(self._metrics, math.nan) | failure_report(error)
            if self._first_failure is not None:
                second = self._count_epochs(), report["error"]
                report["config_fault"] |= is_settings_fault(self._first_failure, second, error)
                if self._first_failure[1] != report["error"]:
                    report["error"] = one_line(f"{report['error']}; before that, {self._first_failure[1]}")
        if report["done"]:
            self._release()
        if 0 < self._first_share < self.share:
            again = f"out of memory with {self._first_share:g} GPU, tried again with {self.share:g}"
            report["error"] = again if report["error"] is None else one_line(f"{report['error']}; {again}")
        return report | {
            "device": name_device(self.device),
            "num_threads": self._worker_setup.num_threads,
            "setup_seconds": self._setup_seconds,
            "checkpoint_seconds": self._checkpoint_seconds,
            SHOULD_CHECKPOINT: not report["done"] and is_checkpoint_due(self._unsaved_seconds, self._save_seconds),
        }

    def train(self) -> dict[str, Any]:
        """Train an epoch with Ray's ``train``, and return only what the driver reads of the result.

        Tune keeps the last result of each trial, and running means of every number in it, of Ray's own and of the
        settings: 69 kB a trial that runs, and 19 kB so.
        """
        result: dict[str, Any] = super().train()  # type: ignore[no-untyped-call]
        names = READ_BY_TUNE | {*self._metrics}
        return {name: result[name] for name in names & result.keys()} | {REPORT: read_report(result)}

    def _setup_logdir(self) -> None:
        """Make no folder for a confirmation's worker: Ray makes it in ``~/ray_results``, open to everybody."""
        if self._storage is not None:
            super()._setup_logdir()  # type: ignore[no-untyped-call]
        else:
            self._logdir: Any = None

    def lend(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function`` with this worker and ``arguments``, when no trial runs, and return its result."""
        if self._run is not None:  # the scheduler stopped the trial, so no step released it
            self._release()
        return function(self, *arguments)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the whole state of the run. A trial that has ended has no state to save."""
        if self._content is not None:
            (Path(checkpoint_dir) / CHECKPOINT_FILE).write_bytes(self._content)

    def _write_state(self) -> bytes | None:
        state = None if self._run is None else self._run.state_dict()
        if state is None:  # the trial has ended, or the user's own loop keeps nothing
            return None
        content = io.BytesIO()  # torch does not raise OSError for a full disk
        torch.save(state, content)
        return content.getvalue()

    def _train_epoch_or_retry(self) -> dict[str, Any]:
        """Train an epoch. Once per trial, restart it after a failure that need not be the settings' fault.

        A full disk or a flaky driver or file system may recover a moment later. A second failure is reported.
        """
        try:
            return self._train_epoch()
        except Exception as error:
            final = isinstance(error, InputError | torch.AcceleratorError) or is_out_of_memory(error)
            if final or self._first_failure is not None:
                raise
            self._first_failure = self._count_epochs(), describe_failure(error)
            wait = MEMORY_WAIT_SECONDS if isinstance(error, MemoryHeldError) else 0.0
        self._release()
        time.sleep(wait)
        return self._train_epoch()

    def _count_epochs(self) -> int:
        return 0 if self._run is None else self._run.epoch

    def _train_epoch(self) -> dict[str, Any]:
        with naming_memory_holders(self.device, self.share):
            run = self._run or self._resume() or self._start_run()
            title = f"ray::{AmpTrainable.__qualname__} {self.trial_name}"
            ray_patches.set_process_title(f"{title} epoch {run.epoch + 1}/{self._max_epochs}")
            started = time.monotonic()
            metrics = run.train_epoch()
            self._unsaved_seconds += time.monotonic() - started
        if run.hopeless is not None:
            return progress_report(metrics, TrialStatus.DIVERGED, f"{metrics.state}: {run.hopeless}")
        finished = metrics.epoch >= self._max_epochs
        return progress_report(metrics, TrialStatus.COMPLETED if finished else RUNNING)

    def _resume(self) -> Run | None:
        """Resume an interrupted trial of a resumed search from its newest intact checkpoint; None if there is none."""
        if self._first_failure is not None:
            return None  # the checkpoint may be the cause: the model may have been changed since
        for folder in self._worker_setup.checkpoints.get(self.trial_id, ()):
            content = read_checkpoint(self._worker_setup.filesystem, folder)
            if content is not None:
                return self._continue_run(content)
        return None

    def _continue_run(self, content: IO[bytes]) -> Run:
        state = torch.load(content, map_location="cpu", weights_only=True)
        run = self._start_run()
        run.load_state_dict(state)
        return run

    def _start_run(self) -> Run:
        data, started = self.data, time.monotonic()
        config = TrialConfig(**self._settings)
        self._max_epochs = config.max_epochs
        self._unsaved_seconds = 0.0
        self._run = start_run(config, data, objectives=self._metrics)
        self._setup_seconds += time.monotonic() - started
        return self._run

    def _request_larger_share(self, error: Exception) -> None:
        """Raise LargerShareNeeded if the trial had less than a whole GPU and ran out of memory for the first time."""
        first = 0 < self.share < 1 and self.share <= self._first_share
        if first and is_out_of_gpu_memory(error):
            raise LargerShareNeeded(f"out of memory with {self.share:g} GPU: {describe_error(error)}") from error

    def _release(self) -> None:
        """Release a trial's memory: the next trial may need all of it, and other workers share the GPU."""
        if isinstance(self._run, OwnRun):
            self._run.close()
        self._run = None
        # The trial's report counts; a broken context fails the next step too.
        with contextlib.suppress(RuntimeError):
            release_memory(self.device)


def is_checkpoint_due(unsaved_seconds: float, save_seconds: Sequence[float]) -> bool:
    """Whether a checkpoint of so many seconds of work is worth its cost, judged by the last ones of this worker."""
    cost = statistics.median(save_seconds) if save_seconds else FIRST_CHECKPOINT_SECONDS
    return unsaved_seconds >= WORK_PER_CHECKPOINT * cost


def read_checkpoint(filesystem: fs.FileSystem, folder: str) -> io.BytesIO | None:
    """Return a checkpoint's content; None if it is missing, or if its checksums fail because its writer was killed."""
    try:
        with filesystem.open_input_stream(f"{folder}/{CHECKPOINT_FILE}") as file:
            content = io.BytesIO(file.read())
        with zipfile.ZipFile(content) as archive:
            whole = archive.testzip() is None
    except (OSError, pa.ArrowException, zipfile.BadZipFile):
        return None
    content.seek(0)
    return content if whole else None


def progress_report(metrics: EpochMetrics, status: str, error: str | None = None) -> dict[str, Any]:
    """Return the report of a trial to Tune after an epoch: its metrics, its status, and whether it has ended."""
    return {**vars(metrics), **metrics.metrics, "status": str(status), "error": error, "done": status != RUNNING}


def describe_failure(error: Exception) -> str:
    """Return an exception on one line, with the line of the user's own code that led to it."""
    return describe_error(error) + find_place(error)


def failure_report(error: Exception) -> dict[str, Any]:
    """Return the report of a trial that an exception ended. Tune requires the objectives, so they are NaN.

    ``config_fault`` marks the settings as the cause. For a first failure, only a check of tune_amp itself shows that.
    """
    status = TrialStatus.OUT_OF_MEMORY if is_out_of_memory(error) else TrialStatus.FAILED
    refused = isinstance(error, InputError) and error.__cause__ is None  # not if the user's module failed
    text = one_line(str(error)) if isinstance(error, InputError) else describe_failure(error)
    ending = {"status": str(status), "error": text, "config_fault": refused, "done": True}
    return {**dict.fromkeys(OBJECTIVES, math.nan), **ending}


def is_settings_fault(first: Failure, second: Failure, error: Exception) -> bool:
    """Whether a trial failed twice, the second time with ``error``, because of its settings and not by chance.

    A trial repeats bit by bit, so a fault of its settings is the same error in the same epoch. An OSError is the
    machine's fault, however often it occurs: a disk stays full.
    """
    is_same = first[0] == second[0] and generalize_error(first[1]) == generalize_error(second[1])
    return is_same and not isinstance(error, OSError)


def build_worker_setup(dataset: Dataset, resources: TrialResources, **left: Any) -> WorkerSetup:
    """Build the setup of a search's workers; ``left`` holds further fields of ``WorkerSetup``."""
    return WorkerSetup(
        **left,
        train=dataset.train,
        validation=dataset.validation,
        num_classes=dataset.num_classes,
        num_threads=resources.cpus,
        search_path=tuple(sys.path),
        consented=list_consented(),
        functions=list_provided(),
        gpu_share=resources.gpus,
    )


def prepare_worker(worker_setup: WorkerSetup) -> torch.device:
    """Let this process find the user's modules, limit it to its share of the machine, and return its device."""
    sys.path.extend(folder for folder in worker_setup.search_path if folder not in sys.path)
    consent_to(*worker_setup.consented)
    provide(worker_setup.functions)
    torch.set_num_threads(worker_setup.num_threads)
    # Ray assigns the GPUs that it was configured with, whether or not torch can use them.
    device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
    if device.type == "cuda":  # so that a trial that takes too much fails itself, not one beside it
        cap_memory(assigned_gpu_share())
    return device


def assigned_gpu_share() -> float:
    """Return the GPUs that Ray assigned to this worker: a fraction if it shares one, 0 without Ray."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)) if ray.is_initialized() else 0.0


def read_report(result: Mapping[str, Any]) -> TrialReport:
    """Return the report in what ``AmpTrainable.step`` returned."""
    names = [field.name for field in dataclasses.fields(EpochMetrics)]
    metrics = EpochMetrics(**{name: result[name] for name in names}) if "epoch" in result else None
    fields = [field.name for field in dataclasses.fields(TrialReport) if field.name not in ("metrics", "config_fault")]
    about = {name: result[name] for name in fields}
    return TrialReport(metrics=metrics, config_fault=result.get("config_fault", False), **about)
