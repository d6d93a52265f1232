"""Sends the reports of trials to TensorBoard, MLflow and Weights & Biases.

Each tracker works in its own thread, on copies: a server that does not answer or a full disk neither stops nor delays
the search. Nothing leaves this machine unless ``MLFLOW_TRACKING_URI`` or ``WANDB_MODE`` says so.

Ray Tune's own callbacks for them are not used: the one for W&B starts two processes a trial, the one for MLflow sends
one number at a time, and both are changed only through their private methods.
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
from typing import Any, Protocol

from ray import tune

from tune_amp.cluster.failures import find_cause, find_status
from tune_amp.cluster.trainable import REPORT
from tune_amp.trial.config import EpochMetrics, TrialConfig, TrialStatus, list_values
from tune_amp.trial.text import describe_error, hide_credentials

PROJECT = "tune_amp"
"""Project name in Weights & Biases, unless ``WANDB_PROJECT`` names another."""

LONGEST_SILENCE_SECONDS = 15.0
"""Seconds without progress at the end of a search, after which a tracker is switched off: one that takes longer for
one report will not finish the others either."""

MOST_WAITING = 50_000
"""Maximum number of reports that wait for a tracker, about 1 kB each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackedTrial:
    """Copy of what a tracker needs of a trial, because the search changes the trial in the meantime."""

    trial_id: str
    name: str
    settings: Mapping[str, Any]
    """Fields of its ``TrialConfig`` that are not None."""
    status: TrialStatus | None = None
    """Status with which the trial ended; None before."""

    @property
    def has_failed(self) -> bool:
        """Whether the trial ended through an error."""
        return self.status in (TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY)


class Writer(Protocol):
    """Writes to a tracker. Its methods may raise any exception."""

    def start(self, trial: TrackedTrial) -> None:
        """Record the settings of a trial."""

    def report(self, trial: TrackedTrial, epoch: int, values: Mapping[str, float]) -> None:
        """Record the numbers of an epoch."""

    def end(self, trial: TrackedTrial) -> None:
        """Record how a trial ended."""


_Event = Callable[[Writer], None]
"""Call of one of a writer's methods."""


class Tracker(tune.Callback):
    """Forwards events to a writer.

    The start and the end of each trial and each epoch are forwarded once. An epoch that a trial reports again, because
    its worker died, is skipped.

    Args:
        name: one of ``options.TRACKERS``.
        build: builds the writer; called in the thread in which the writer then works.
        past: last reported epoch of each resumed trial, by trial id.
        service: program that the writer starts beside this process. When the tracker is switched off, child processes
            that run it are killed, except those that ran before the tracker was created.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Writer],
        *,
        past: Mapping[str, int] = types.MappingProxyType({}),
        service: Path | None = None,
    ) -> None:
        self._name = name
        self._build = build
        self._service = service
        self._services_before = find_children(service)
        self._running: dict[str, TrackedTrial] = {}
        self._epochs = dict(past)  # last forwarded epoch of every trial
        self._failed = False
        self._handled = 0
        self._events: queue.Queue[_Event | None] | None = None
        self._thread: threading.Thread | None = None

    def setup(self, *args: Any, **info: Any) -> None:
        """Start the thread at the beginning of the search."""
        self._events = queue.Queue(MOST_WAITING)
        # A daemon: a thread that waits for a server must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, args=(self._events,), daemon=True)
        self._thread.start()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Forward the start of a trial, which may get its worker not for the first time."""
        self._start(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Forward the report of an epoch. A report of an exception has no epoch and is skipped."""
        tracked = self._start(trial)
        metrics = result[REPORT].metrics
        if metrics is None or metrics.epoch <= self._epochs.get(trial.trial_id, 0):
            return
        self._epochs[trial.trial_id] = metrics.epoch
        values = select_values(metrics)
        self._put(lambda writer: writer.report(tracked, metrics.epoch, values))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Forward the end of a trial by its own report, or by the scheduler."""
        self._end(self._start(trial), find_status(trial.last_result, error=False))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Forward the failure of a trial whose worker died more often than it is retried."""
        # The worker may have died before the trial started.
        self._end(self._start(trial), find_status(None, error=True, cause=find_cause(trial)))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Wait after the search until all reports are written, as long as there is progress."""
        if self._thread is None:
            return
        for tracked in list(self._running.values()):
            self._end(tracked, TrialStatus.INTERRUPTED)
        self._put(None)
        while self._thread.is_alive() and not self._failed:
            handled = self._handled
            self._thread.join(LONGEST_SILENCE_SECONDS)
            if self._thread.is_alive() and self._handled == handled:
                self._switch_off(f"no answer within {LONGEST_SILENCE_SECONDS:g} s")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the thread: Tune pickles its callbacks, and a thread cannot be pickled."""
        return {**self.__dict__, "_events": None, "_thread": None}

    def _start(self, trial: Any) -> TrackedTrial:
        if trial.trial_id not in self._running:
            values = list_values(TrialConfig(**trial.config))
            settings = {name: value for name, value in values.items() if value is not None}
            tracked = TrackedTrial(trial_id=trial.trial_id, name=str(trial), settings=settings)
            self._running[trial.trial_id] = tracked
            self._put(lambda writer: writer.start(tracked))
        return self._running[trial.trial_id]

    def _end(self, tracked: TrackedTrial, status: TrialStatus) -> None:
        ended = dataclasses.replace(self._running.pop(tracked.trial_id), status=status)
        self._put(lambda writer: writer.end(ended))

    def _put(self, event: _Event | None) -> None:
        if self._events is None or self._failed:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._switch_off(f"{MOST_WAITING:,} reports wait for it")

    def _work(self, events: queue.Queue[_Event | None]) -> None:
        try:
            writer = self._build()
            while (event := events.get()) is not None and not self._failed:
                event(writer)
                self._handled += 1
        except (Exception, SystemExit) as error:  # no error of a tracker stops the search
            self._switch_off(hide_credentials(describe_error(error)))

    def _switch_off(self, reason: str) -> None:
        if self._failed:
            return
        self._failed = True
        for service in find_children(self._service) - self._services_before:
            # The service would try to reach its server for minutes after the search's end.
            with contextlib.suppress(ProcessLookupError):
                os.kill(service, signal.SIGKILL)
        with contextlib.suppress(OSError):  # standard error is closed
            line = f"tracker {self._name} is switched off ({reason}); the search continues"
            print(line, file=sys.stderr)  # noqa: T201


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
    names: Sequence[str], folder: Path, past: Mapping[str, int] = types.MappingProxyType({})
) -> list[Tracker]:
    """Build Tune callbacks that send a search to the named trackers. Call it inside ``session.ray_session``.

    Trackers on this machine write into the run's ``folder``, whose name is the run's name. ``past`` is the last
    reported epoch of each resumed trial, by trial id: in MLflow and W&B it continues as a second run of the same name.
    """
    writers: dict[str, Callable[[Path], Writer]] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _WandB}
    services = {"wandb": find_wandb_service()}
    return [
        Tracker(name, functools.partial(writers[name], folder.resolve()), past=past, service=services.get(name))
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


def select_values(metrics: EpochMetrics) -> dict[str, float]:
    """Return an epoch's numbers under the names of ``epochs.parquet``.

    Numbers that are not finite are skipped, because trackers treat them differently.
    """
    return {
        name: value
        for name, value in list_values(metrics).items()
        if name != "epoch" and isinstance(value, int | float) and math.isfinite(value)
    }


class _TensorBoard:
    """Writes a folder of event files for each trial. Settings and status follow at its end, on the page HParams."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._files: dict[str, Any] = {}
        self._last: dict[str, Mapping[str, float]] = {}

    def start(self, trial: TrackedTrial) -> None:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        self._files[trial.trial_id] = SummaryWriter(str(self._folder / trial.name))

    def report(self, trial: TrackedTrial, epoch: int, values: Mapping[str, float]) -> None:
        self._last[trial.trial_id] = values
        file = self._files[trial.trial_id]
        for name, value in values.items():
            file.add_scalar(name, value, epoch)
        file.flush()

    def end(self, trial: TrackedTrial) -> None:
        from tensorboardX.summary import hparams  # type: ignore[import-untyped]

        file = self._files.pop(trial.trial_id)
        last = self._last.pop(trial.trial_id, None)
        if last is not None:
            # add_hparams would write a folder of its own, which the page shows as another run.
            settings = {name: value for name, value in trial.settings.items() if isinstance(value, str | int | float)}
            for summary in hparams({**settings, "status": str(trial.status)}, dict(last)):
                file.file_writer.add_summary(summary)
        file.close()


class _MLflow:
    """Writes a run for each trial into an experiment that is named after the search."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(find_mlflow_store(folder))
        self._runs: dict[str, str] = {}
        experiment = self._client.get_experiment_by_name(folder.name)
        self._experiment = experiment.experiment_id if experiment else self._client.create_experiment(folder.name)

    def start(self, trial: TrackedTrial) -> None:
        from mlflow.entities import Param

        run = self._client.create_run(self._experiment, run_name=trial.name, tags={"trial_name": trial.name})
        self._runs[trial.trial_id] = run.info.run_id
        settings = [Param(name, str(value)) for name, value in trial.settings.items()]
        self._client.log_batch(run.info.run_id, params=settings)

    def report(self, trial: TrackedTrial, epoch: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, epoch) for name, value in values.items()]
        self._client.log_batch(self._runs[trial.trial_id], metrics)

    def end(self, trial: TrackedTrial) -> None:
        run = self._runs.pop(trial.trial_id)
        self._client.set_tag(run, "status", str(trial.status))
        self._client.set_terminated(run, "FAILED" if trial.has_failed else "FINISHED")


class _WandB:
    """Writes a run for each trial, all in this process, into a group that is named after the search."""

    def __init__(self, folder: Path) -> None:
        import wandb

        mode: Any = find_wandb_mode()
        if mode not in ("offline", "disabled") and not wandb.login(prompt=False, verify=False):
            # wandb.init would ask for the key in the terminal.
            raise ValueError("no API key was found: set WANDB_API_KEY, or run: wandb login")
        # Neither the console nor the processor's figures belong to one trial.
        settings = wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True, x_disable_stats=True)
        self._init: Callable[..., wandb.Run] = functools.partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            group=folder.name,
            mode=mode,
            dir=str(folder),
            reinit="create_new",
            settings=settings,
        )
        self._runs: dict[str, wandb.Run] = {}

    def start(self, trial: TrackedTrial) -> None:
        self._runs[trial.trial_id] = self._init(id=trial.trial_id, name=trial.name, config=dict(trial.settings))

    def report(self, trial: TrackedTrial, epoch: int, values: Mapping[str, float]) -> None:
        self._runs[trial.trial_id].log(dict(values), step=epoch)

    def end(self, trial: TrackedTrial) -> None:
        run = self._runs.pop(trial.trial_id)
        run.summary["status"] = str(trial.status)
        run.finish(exit_code=int(trial.has_failed))
