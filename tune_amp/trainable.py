"""The Ray Tune trainable: what runs in a worker process, one actor for many trials.

A trial that fails is a row with a status: exceptions are reported, not raised, so that the worker lives on for the next
trial. Only the death of the process itself, and a CUDA context that is broken for good, are left to Ray.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.result import SHOULD_CHECKPOINT

from tune_amp.config import OBJECTIVES, EpochMetrics, InputError, TrialConfig, TrialStatus, describe_error, one_line
from tune_amp.data import Split
from tune_amp.training import TrainingData, TrainingRun, release_memory

CHECKPOINT_FILE = "trial.pt"

RUNNING = "running"
"""``status`` in the reports of a trial that goes on. Every other value is a ``TrialStatus``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What every trial of a search shares, sent to each worker once. The test set is not in it."""

    train: Split
    """The training split, read from Ray's object store without a copy."""
    validation: Split
    num_classes: int
    num_threads: int
    """CPU threads of a trial. Sums are split among threads, so that a bit-identical replay needs the same number."""
    search_path: tuple[str, ...]
    """The driver's ``sys.path``: where it found a user's own functions, workers on the same machine find them too."""


class AmpTrainable(tune.Trainable):
    """One trial: an epoch a ``step``. ``config`` holds ``TrialConfig`` fields; ``worker_setup`` what trials share."""

    def setup(self, config: dict[str, Any], worker_setup: WorkerSetup | None = None) -> None:
        """Place the data on this worker's device, once a process."""
        assert worker_setup is not None  # bound by tune.with_parameters
        sys.path.extend(folder for folder in worker_setup.search_path if folder not in sys.path)
        torch.set_num_threads(worker_setup.num_threads)
        self._num_threads = worker_setup.num_threads
        # Ray hands out the GPUs that it was told of, whether or not torch can use them.
        device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
        self._device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._data = TrainingData(worker_setup.train, worker_setup.validation, worker_setup.num_classes, device)
        self._run: TrainingRun | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make this actor ready for another trial, data and process kept."""
        if self._run is not None:  # the scheduler stopped it, and no step of its own was the last
            self._release()
        self._settings = dict(new_config)
        self._first_failure: str | None = None
        self._started = time.time()
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch and report it, or report how the trial ended.

        Raises:
            torch.AcceleratorError: the GPU can no longer be used from this process.
        """
        try:
            report = self._train_epoch_or_try_again()
        except Exception as error:  # a trial that fails is a row with a status, never a stop of the search
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                # After a device assert or an illegal access every later CUDA call of the process fails as well, and so
                # would every later trial. Ray ends a worker whose step raises, and tries again in a new one.
                raise
            report = failure_report(error)
            if self._first_failure is not None and self._first_failure != report["error"]:
                report["error"] = one_line(f"{report['error']}; before that, {self._first_failure}")
        if report["done"]:
            self._release()
        return report | {
            "started": self._started,
            "wall_seconds": time.time() - self._started,
            "device": self._device_name,
            "num_threads": self._num_threads,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the whole state of the run. A trial that has ended has none left to save."""
        if self._run is not None:
            torch.save(self._run.state_dict(), Path(checkpoint_dir) / CHECKPOINT_FILE)

    def load_checkpoint(self, checkpoint: str | None) -> None:  # type: ignore[override]
        """Continue from ``save_checkpoint``; from the beginning where it saved nothing."""
        assert checkpoint is not None
        path = Path(checkpoint) / CHECKPOINT_FILE
        if path.exists():
            self._start_run().load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _train_epoch_or_try_again(self) -> dict[str, Any]:
        """An epoch; once in a trial, a failure that need not be the settings' fault starts it anew.

        A full disk, a flaky driver or file system may be over a moment later; what fails twice is reported.
        """
        try:
            return self._train_epoch()
        except Exception as error:
            final = isinstance(error, InputError | torch.AcceleratorError) or is_out_of_memory(error)
            if final or self._first_failure is not None:
                raise
            self._first_failure = describe_error(error)
        self._release()
        return self._train_epoch()

    def _train_epoch(self) -> dict[str, Any]:
        run = self._run or self._start_run()
        metrics = run.train_epoch()
        if run.hopeless is not None:
            return progress_report(metrics, TrialStatus.DIVERGED, f"{metrics.state}: {run.hopeless}")
        finished = metrics.epoch >= self._max_epochs
        return progress_report(metrics, TrialStatus.COMPLETED if finished else RUNNING)

    def _start_run(self) -> TrainingRun:
        config = TrialConfig(**self._settings)
        self._max_epochs = config.max_epochs
        self._run = TrainingRun(config, self._data)
        return self._run

    def _release(self) -> None:
        """Give the memory of a trial back: the next one may need all of it, and other workers share the GPU."""
        self._run = None
        with contextlib.suppress(RuntimeError):  # the trial's report counts; a broken context fails the next step too
            release_memory(self._data.device)


def progress_report(metrics: EpochMetrics, status: str, error: str | None = None) -> dict[str, Any]:
    """What a trial tells Tune after an epoch: its metrics, its status, whether it is over; if not, to save it now."""
    running = status == RUNNING
    return {**vars(metrics), "status": str(status), "error": error, "done": not running, SHOULD_CHECKPOINT: running}


def failure_report(error: Exception) -> dict[str, Any]:
    """What a trial tells Tune when an exception ended it. Tune insists on the objective, so it gets NaN.

    ``config_fault`` says that our own check refused the settings, which would fail again wherever they are tried.
    """
    status = TrialStatus.OUT_OF_MEMORY if is_out_of_memory(error) else TrialStatus.FAILED
    refused = isinstance(error, InputError) and error.__cause__ is None  # not where a module of the user's failed
    text = one_line(str(error)) if isinstance(error, InputError) else describe_error(error)
    ending = {"status": str(status), "error": text, "config_fault": refused, "done": True}
    return {**dict.fromkeys(OBJECTIVES, math.nan), **ending}


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: CUDA's error, Python's, or the CPU allocator's, which is a bare RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = (
        "can't allocate memory",
        "CUDA out of memory",
        "CUDA error: out of memory",  # a torch.AcceleratorError, from outside PyTorch's own allocator
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def metrics_of(result: Mapping[str, Any]) -> EpochMetrics | None:
    """The ``EpochMetrics`` in a result, None where an exception ended the trial before the epoch did."""
    names = [field.name for field in dataclasses.fields(EpochMetrics)]
    return EpochMetrics(**{name: result[name] for name in names}) if "epoch" in result else None
