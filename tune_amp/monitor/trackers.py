"""Sends the reports of trials to TensorBoard, MLflow and Weights & Biases through Ray Tune's callbacks for them.

Each tracker works in its own thread, on copies: a server that does not answer or a full disk neither stops nor delays
the search. Nothing leaves this machine unless ``MLFLOW_TRACKING_URI`` or ``WANDB_MODE`` says so.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import queue
import shlex
import signal
import sys
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.air.constants import TRAINING_ITERATION
from ray.tune.logger import LoggerCallback

from tune_amp.cluster.failures import find_cause, find_status
from tune_amp.cluster.trainable import REPORT
from tune_amp.trial.config import EpochMetrics, TrialStatus, describe_error
from tune_amp.trial.text import hide_credentials

_Event = Callable[[Any], None]
"""Function that calls one of Tune's callbacks, with a ``TrackedTrial`` instead of Ray's trial."""

PROJECT = "tune_amp"
"""Project name in Weights & Biases, unless ``WANDB_PROJECT`` names another."""

LONGEST_SILENCE_SECONDS = 15.0
"""Seconds without progress at the end of a search, after which a tracker is switched off: one that takes longer for
one report will not finish the others either."""

MOST_WAITING = 50_000
"""Maximum number of reports that wait for a tracker, about 1 kB each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackedTrial:
    """Copy of what Tune's callbacks read of a trial, because the search changes the trial while they run."""

    trial_id: str
    name: str = dataclasses.field(compare=False)
    config: Mapping[str, Any] = dataclasses.field(compare=False)
    """Fields of its ``TrialConfig`` that are not None."""
    local_path: str = dataclasses.field(compare=False)
    """Folder in which a callback may write files of this trial."""
    status: TrialStatus | None = dataclasses.field(default=None, compare=False)
    """Status with which the trial ended; None before."""

    @property
    def evaluated_params(self) -> dict[str, Any]:
        """Content of TensorBoard's page of hyperparameters: the settings, and how the trial ended."""
        return {**self.config, "status": str(self.status)}

    def init_local_path(self) -> None:
        """Create the folder."""
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.name


class Tracker(tune.Callback):
    """Forwards events to one of Tune's own callbacks.

    The start and the end of each trial and each epoch are forwarded once. An epoch that a trial reports again, because
    its worker died, is skipped.

    Args:
        name: one of ``options.TRACKERS``.
        build: builds Tune's callback; called in the thread in which the callback then works.
        folder: parent of the folders of trials, which have the trials' names.
        past: last reported epoch of each trial that is resumed after the search was interrupted, by trial id.
        warn: receives one line when the tracker is switched off because it failed.
        service: program that Tune's callback starts beside this process. When the tracker is switched off, child
            processes that run it are killed, except those that ran before the tracker was created.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], LoggerCallback],
        folder: Path,
        *,
        past: Mapping[str, int] = types.MappingProxyType({}),
        warn: Callable[[str], None] | None = None,
        service: Path | None = None,
    ) -> None:
        self.name = name
        self._service = service
        self._services_before = find_children(service)
        self._build = build
        self._folder = folder
        self._warn = warn or _print_warning
        self._running: dict[str, TrackedTrial] = {}
        self._begun: set[str] = set()
        self._epochs = dict(past)  # last forwarded epoch of every trial
        self._failed = False
        self._handled = 0
        self._events: queue.Queue[_Event | None] | None = None
        self._thread: threading.Thread | None = None

    def setup(self, *args: Any, **info: Any) -> None:
        """Start the thread at the beginning of the search."""
        self._events = queue.Queue(MOST_WAITING)
        # A daemon: a thread that waits for a server must not keep the program from ending.
        self._thread = threading.Thread(
            target=self._work, args=(self._events,), name=f"{self.name}-tracker", daemon=True
        )
        self._thread.start()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Forward the start of a trial, which may get its worker not for the first time."""
        self._begin(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Forward the report of an epoch. A report of an exception has no epoch and is skipped."""
        told = self._begin(trial)
        metrics = result[REPORT].metrics
        if metrics is None or metrics.epoch <= self._epochs[trial.trial_id]:
            return
        self._epochs[trial.trial_id] = metrics.epoch
        values = select_values(metrics)
        self._put(lambda callback: callback.log_trial_result(metrics.epoch, told, values))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Forward the end of a trial by its own report, or by the scheduler."""
        self._end(self._begin(trial), find_status(trial.last_result, error=False))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Forward the failure of a trial whose worker died more often than it is retried."""
        # The worker may have died before the trial started.
        self._end(self._begin(trial), find_status(None, error=True, cause=find_cause(trial)))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Wait after the search until all reports are written, as long as there is progress."""
        if self._thread is None:
            return
        for told in list(self._running.values()):
            self._end(told, TrialStatus.INTERRUPTED)
        self._put(None)
        while self._thread.is_alive() and not self._failed:
            handled = self._handled
            self._thread.join(LONGEST_SILENCE_SECONDS)
            if self._thread.is_alive() and self._handled == handled:
                self._give_up(f"no answer within {LONGEST_SILENCE_SECONDS:g} s")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the thread: Tune pickles its callbacks, and a thread cannot be pickled."""
        return {**self.__dict__, "_events": None, "_thread": None, "_warn": _print_warning}

    def _begin(self, trial: Any) -> TrackedTrial:
        if trial.trial_id not in self._running:
            told = self._running[trial.trial_id] = self._describe(trial)
            self._epochs.setdefault(trial.trial_id, 0)
            if trial.trial_id not in self._begun:
                self._begun.add(trial.trial_id)
                self._put(lambda callback: callback.log_trial_start(told))
        return self._running[trial.trial_id]

    def _end(self, told: TrackedTrial, status: TrialStatus) -> None:
        del self._running[told.trial_id]
        ended = dataclasses.replace(told, status=status)
        failed = status in (TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY)
        self._put(lambda callback: callback.log_trial_end(ended, failed=failed))

    def _describe(self, trial: Any) -> TrackedTrial:
        return TrackedTrial(
            trial_id=trial.trial_id,
            name=str(trial),
            config={name: value for name, value in trial.config.items() if value is not None},
            local_path=str(self._folder / str(trial)),
        )

    def _put(self, event: _Event | None) -> None:
        if self._events is None or self._failed:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._give_up(f"{MOST_WAITING:,} reports wait for it")

    def _work(self, events: queue.Queue[_Event | None]) -> None:
        try:
            callback = self._build()
            callback.setup()
            while (event := events.get()) is not None and not self._failed:
                event(callback)
                self._handled += 1
        except (Exception, SystemExit) as error:  # no error of a tracker stops the search
            self._give_up(hide_credentials(describe_error(error)))

    def _give_up(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            for service in find_children(self._service) - self._services_before:
                # The service would try to reach its server for minutes after the search's end.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(service, signal.SIGKILL)
            self._warn(f"tracker {self.name} is switched off ({reason}); the search goes on")


def find_children(program: Path | None) -> set[int]:
    """Return the process ids of this process's children that run the file ``program``, if the system lists them."""
    if program is None:
        return set()
    found = set()
    for listed in Path("/proc/self/task").glob("*/children"):
        for pid in listed.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/exe").samefile(program):
                    found.add(int(pid))
    return found


def find_wandb_service() -> Path | None:
    """Return the program that W&B starts beside a process, without importing W&B."""
    package = importlib.util.find_spec("wandb")
    return Path(package.origin).parent / "bin" / "wandb-core" if package and package.origin else None


def build_trackers(
    names: Sequence[str],
    folder: Path,
    *,
    past: Mapping[str, int] = types.MappingProxyType({}),
    warn: Callable[[str], None] | None = None,
) -> list[Tracker]:
    """Build Tune callbacks that send a search to the named trackers. Call it inside ``session.ray_session``.

    Args:
        names: from ``options.check_trackers``.
        folder: the run folder; trackers on this machine write into it, and its name is the run's name.
        past: last reported epoch of each trial that is resumed after the search was interrupted, by trial id. In MLflow
            and W&B such a trial continues as a second run of the same name.
        warn: receives one line when a tracker is switched off because it failed; None prints to standard error.
    """
    builders = {"tensorboard": _build_tensorboard, "mlflow": _build_mlflow, "wandb": _build_wandb}
    folder = folder.resolve()
    services = {"wandb": find_wandb_service()}
    return [
        Tracker(
            name,
            functools.partial(builders[name], folder),
            folder / name,
            past=past,
            warn=warn,
            service=services.get(name),
        )
        for name in names
    ]


def describe_tracker(name: str, folder: Path) -> str:
    """Return the command that shows a tracker's data of a run, or the place where the data is."""
    if name == "tensorboard":
        return shlex.join(["tensorboard", "--logdir", str(folder / name)])
    if name == "mlflow":
        store = find_mlflow_store(folder)
        shown = hide_credentials(store) if "MLFLOW_TRACKING_URI" in os.environ else store
        return shlex.join(["mlflow", "ui", "--backend-store-uri", shown])
    mode = find_wandb_mode()
    return f"wandb sync {shlex.quote(str(folder / name))}/offline-run-*" if mode == "offline" else f"wandb, {mode}"


def find_mlflow_store(folder: Path) -> str:
    """Return the user's own MLflow store, or else a SQLite file in the run folder."""
    # MLflow parses a URL: a "?" in a folder's name would start its parameters.
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{urllib.parse.quote(str(folder / 'mlflow.db'))}"


def find_wandb_mode() -> str:
    """Return the user's own ``WANDB_MODE``, or else offline: nothing is uploaded before ``wandb sync``."""
    return os.environ.get("WANDB_MODE") or "offline"


def select_values(metrics: EpochMetrics) -> dict[str, Any]:
    """Return an epoch's numbers under the names of ``epochs.parquet``, and the epoch as the step of Tune's callbacks.

    Numbers that are not finite are skipped, because trackers treat them differently.
    """
    values = {
        name: value
        for name, value in vars(metrics).items()
        if name != "epoch" and isinstance(value, int | float) and math.isfinite(value)
    }
    return {**values, TRAINING_ITERATION: metrics.epoch}


def _print_warning(text: str) -> None:
    with contextlib.suppress(OSError):  # standard error is closed
        print(text, file=sys.stderr)  # noqa: T201


def _build_tensorboard(folder: Path) -> LoggerCallback:
    from ray.tune.logger import TBXLoggerCallback
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

    prefix = "ray/tune/"  # of all names that Tune writes

    class PlainNames(SummaryWriter):  # type: ignore[misc]
        def add_scalar(self, tag: str, *arguments: Any, **options: Any) -> None:
            super().add_scalar(tag.removeprefix(prefix), *arguments, **options)

    class TensorBoard(TBXLoggerCallback):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self._summary_writer_cls = PlainNames

        def _try_log_hparams(self, trial: Any, result: dict[str, Any]) -> None:
            super()._try_log_hparams(trial, {name.removeprefix(prefix): value for name, value in result.items()})

    return TensorBoard()


def _build_mlflow(folder: Path) -> LoggerCallback:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    store = find_mlflow_store(folder)

    class MLflow(MLflowLoggerCallback):
        def setup(self, *arguments: Any, **info: Any) -> None:
            before = os.environ.get("MLFLOW_TRACKING_URI")
            try:
                super().setup(*arguments, **info)  # type: ignore[no-untyped-call]
            finally:
                if before is None:  # MLflow sets it: the next search would take this store for the user's
                    os.environ.pop("MLFLOW_TRACKING_URI", None)

        def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
            # Tune's own callback sends one number at a time, and checks each time whether the run exists.
            now = time.time_ns() // 1_000_000
            metrics = [Metric(name, result[name], now, iteration) for name in result if name != TRAINING_ITERATION]
            MlflowClient(store).log_batch(self._trial_runs[trial], metrics)

        def log_trial_end(self, trial: Any, failed: bool = False) -> None:
            MlflowClient(store).set_tag(self._trial_runs[trial], "status", str(trial.status))
            super().log_trial_end(trial, failed)

    return MLflow(tracking_uri=store, experiment_name=folder.name)


def _build_wandb(folder: Path) -> LoggerCallback:
    import wandb
    from ray.air.integrations.wandb import WandbLoggerCallback

    mode = find_wandb_mode()
    os.environ["WANDB_MODE"] = mode  # Tune's callback requires a key unless this variable says that none is needed

    class WandB(WandbLoggerCallback):
        """Tune's callback with its runs in this process. Tune's own starts two actors, that is processes, per trial."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._runs: dict[TrackedTrial, wandb.Run] = {}

        def _start_logging_actor(self, trial: Any, exclude_results: list[str], **options: Any) -> None:
            self._runs[trial] = wandb.init(**options)

        def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
            self._runs[trial].log({name: result[name] for name in result if name != TRAINING_ITERATION}, step=iteration)

        def log_trial_end(self, trial: Any, failed: bool = False) -> None:
            run = self._runs.pop(trial)
            run.summary["status"] = str(trial.status)
            run.finish(exit_code=int(failed))

    # Neither the console nor the processor's figures belong to one trial.
    settings = wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True, x_disable_stats=True)
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    run = {"mode": mode, "dir": str(folder), "reinit": "create_new", "settings": settings}
    return WandB(project=project, group=folder.name, **run)
