"""Uses of Ray's private names and undocumented variables, each with its reason. Seen with Ray 2.60.

No other file names Ray's private parts (``tests/test_rooms.py``). For each use, ``tests/cluster/test_ray_patches.py``
has a test that fails once Ray no longer needs it. Ray is imported inside the functions, because parts of it read the
environment on import.
"""

import concurrent.futures
import contextlib
import functools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tune_amp.trial.config import describe_error

LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Variable that on Linux makes the node's own address the loopback one: GCS, raylet and workers listen nowhere else.
``ray.init`` has no public parameter for the address."""
ONE_CONNECTION_ATTEMPT = {"RAY_gcs_server_port_wait_time_s": "1"}
"""Variable that limits the attempts to join a cluster. If something other than Ray listens, one attempt takes 40 s, and
Ray would make twenty."""
START_SECONDS = 300
"""Seconds that the node of a private Ray may take to start."""
SLOW_START_SECONDS = 30.0
"""Seconds after which the user is informed that the start takes long."""
LIST_KEYS = "/ray.rpc.InternalKVGcsService/InternalKVKeys"
"""RPC of the GCS that lists the keys of the default namespace: it reads and changes nothing. Ray has no public way to
find out whether a cluster requires a token."""


# The environment

PRELOAD = "RAY_preload_python_modules"


def preloading(modules: Sequence[str]) -> dict[str, str | None]:
    """Return the variables that make the workers of a private Ray import ``modules`` as they start.

    Lightning may not fork in them (ray-project/ray#28197), which Tune sets otherwise: see ``prestarted_workers``.
    """
    return {PRELOAD: ",".join(modules) or None, "PL_DISABLE_FORK": "1"}


def read_environment_again() -> None:
    """Make Ray read the environment again, which it caches on import and in an earlier session of this process.

    Otherwise a session would use the token and the addresses of the one before.
    """
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    clusters = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    ray_constants.ENABLE_RAY_CLUSTER = clusters != "0" and (sys.platform == "linux" or clusters is not None)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


# The start and the end of a session


def init_ray(address: str, run: str, *, temp_dir: Path | None = None, **options: Any) -> None:
    """Call ``ray.init`` such that workers do not import from the script's and the current folder.

    Ray puts both folders first in the path of its workers (ray-project/ray#43182). A module there that has the name of
    a library would be imported instead.

    Args:
        address: see ``ray.init``.
        run: name shown in the dashboard's list of jobs.
        temp_dir: folder of all of Ray's files; None for a joined cluster.
        options: other arguments of ``ray.init``.
    """
    import ray
    from ray.job_config import JobConfig

    class Job(JobConfig):
        def _serialize(self) -> Any:
            self._py_driver_sys_path.clear()
            return super()._serialize()

    if temp_dir is not None:
        options["_temp_dir"] = str(temp_dir)
    job = Job(metadata={"tune_amp": run, "job_name": run})  # the list of jobs shows job_name
    ray.init(address, job_config=job, log_to_driver=False, logging_level=logging.ERROR, **options)


@contextlib.contextmanager
def private_start(
    home: Path, session_name: str, *, workers: int, beside: concurrent.futures.Executor
) -> Iterator[Callable[[], None]]:
    """In the ``with`` block, Ray starts a node whose processes keep to ``home`` and do not need a free port 52365.

    The dashboard starts its servers by ``python -c``, which searches the current folder for modules first, and leaves
    the folder of their socket in the temporary folder. The agent's default port, 52365, is taken if another Ray runs
    here: the agent retries for 6 s, then runs without HTTP (ray-project/ray#14763).

    Ray would wait for the dashboard, 2 s, before it starts the node's other processes: here it starts beside them, and
    the ``with`` block ends when it is ready. The log monitor is left out: it reads the logs that drivers print. Ray
    would start a worker for each CPU, and ``ray.init`` has no argument for their number.

    Args:
        home: private folder for the socket, with a short path.
        session_name: name of Ray's own folder. All sockets lie below it, and Ray's default name leaves little of the
            107 bytes that the path of a socket may have (ray-project/ray#7945).
        workers: number of workers that start with the node.
        beside: starts the dashboard, in a thread that must live as long as the session: Linux ends the dashboard with
            the thread that started it.

    Yields:
        A function that ends the start of the dashboard. Call it before the GCS is killed, whose death the start would
        wait out.
    """
    from ray._private import node, parameter, ray_constants, services

    start: Any = services.start_ray_process
    start_dashboard: Any = node.Node.start_api_server
    dashboards: list[Any] = []
    starts: list[concurrent.futures.Future[None]] = []
    is_over = threading.Event()

    def start_process(command: list[str], process_type: str, *arguments: Any, **options: Any) -> Any:
        if process_type != ray_constants.PROCESS_TYPE_DASHBOARD:
            # The last one of a flag counts.
            if process_type == ray_constants.PROCESS_TYPE_RAYLET:
                command = [*command, f"--num_prestart_python_workers={workers}"]
            return start(command, process_type, *arguments, **options)
        options["env_updates"] = {"TMPDIR": str(home), "PYTHONSAFEPATH": "1"}
        dashboards.append(start(command, process_type, *arguments, **options))
        if is_over.is_set():
            dashboards[0].process.kill()
        return dashboards[0]

    def start_beside(self: Any, **options: Any) -> None:
        starts.append(beside.submit(start_dashboard, self, **options))

    def end_dashboard() -> None:
        is_over.set()
        for info in dashboards:
            info.process.kill()
            info.process.wait()
        with patch.object(services.logger, "disabled", True):  # it would print the dashboard's log
            concurrent.futures.wait(starts)

    settings: dict[str, Any] = {"dashboard_agent_listen_port": 0, "include_log_monitor": False}
    params = functools.partial(parameter.RayParams, session_name=session_name, **settings)
    with (
        patch.object(parameter, "RayParams", params),
        patch.object(services, "start_ray_process", start_process),
        patch.object(node.Node, "start_api_server", start_beside),
    ):
        try:
            yield end_dashboard
        except BaseException:
            end_dashboard()
            raise
        for dashboard in starts:
            dashboard.result()


@contextlib.contextmanager
def patient_start(announce: Callable[[str], None], before_kill: Callable[[], None] = lambda: None) -> Iterator[None]:
    """In the ``with`` block, Ray's node may take ``START_SECONDS`` to start, but a node that has died fails at once.

    Ray waits for 30 s, which no setting changes (ray-project/ray#62883), also for a node that is dead.

    Args:
        announce: receives a line after ``SLOW_START_SECONDS``.
        before_kill: is called before the processes of a node that does not start are killed.
    """
    from ray._private import node

    start: Any = node.Node.start_ray_processes

    def start_and_wait(self: Any) -> None:
        try:
            start(self)
            _wait_for_node(self)
        except BaseException:
            before_kill()
            self.kill_all_processes(check_alive=False)  # no other code has a reference to them yet
            raise

    def inform() -> None:
        load = f"the machine's load is {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs"
        announce(f"Ray has not started within {SLOW_START_SECONDS:.0f} s ({load}); waiting up to {START_SECONDS} s")

    timer = threading.Timer(SLOW_START_SECONDS, inform)
    timer.daemon = True
    timer.start()
    try:
        with patch.object(node.Node, "start_ray_processes", start_and_wait):
            yield
    finally:
        timer.cancel()


def _wait_for_node(node: Any) -> None:
    """Wait until Ray's node is registered.

    Raises:
        RuntimeError: a process that the node requires has ended.
        TimeoutError: the start takes too long.
    """
    from ray._private import ray_constants, services

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for kind, process in node.dead_processes():
            if kind in (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET):
                raise RuntimeError(f"its {kind} ended with exit code {process.returncode}")
        with contextlib.suppress(RuntimeError):  # not found, or no answer yet
            services.get_node(node.gcs_address, node.node_id)
            return
        time.sleep(0.1)
    raise TimeoutError(f"its node was not ready after {START_SECONDS} s; try again when the machine is less busy")


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """In the ``with`` block, Ray prints no pages of its log if one of its processes dies: tune_amp reports the effect.

    ``log_to_driver=False`` does not cover these pages.
    """
    from ray._private import worker

    with patch.object(worker, "_worker_logs_enabled", False):
        yield


# A running Ray


def find_node() -> Any:
    """Return Ray's node object of this process, which has its processes and addresses; None if Ray does not run.

    ``ray.is_initialized`` stays True after the death of the raylet or the GCS.
    """
    from ray._private import worker

    return worker._global_node


def list_processes() -> list[subprocess.Popen[bytes]]:
    """Return the processes of Ray that this process started."""
    node = find_node()
    return [] if node is None else [info.process for kind in node.all_processes.values() for info in kind]


def end_monitor() -> None:
    """Kill the autoscaler's monitor of a private Ray: it has no state, and takes a second to end otherwise."""
    from ray._private import ray_constants

    node = find_node()
    for info in [] if node is None else node.all_processes.get(ray_constants.PROCESS_TYPE_MONITOR, []):
        info.process.kill()


def find_dashboard() -> str | None:
    """Return host and port of the dashboard; None if it does not run.

    ``ray.init`` returns them, but not if Ray was started before by other code of this process.
    """
    from ray._private import worker

    return worker.get_dashboard_url() or None


def count_gpus_of_ray() -> int:
    """Return how many GPUs Ray would offer on this machine. Importing torch to count them takes a second."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    return 0 if manager is None else int(manager.get_current_node_num_accelerators())


def set_process_title(title: str) -> None:
    """Set the title of this worker's process, as shown in ``ps``, ``nvidia-smi`` and on Ray's dashboard.

    An actor's name cannot change, but an actor serves one trial after another. Ray itself sets the title between calls.
    """
    import ray

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        ray._raylet.setproctitle(title)  # type: ignore[attr-defined]


# Tune


def save_if_possible(trainable: Any, save: Callable[[], Any]) -> Any:
    """Return Ray's result of ``save``; if nothing can be written, a result without a checkpoint.

    Ray counts an exception of ``save`` as the death of the worker. Usually the disk is full, or the place is gone, for
    which Ray raises RuntimeError; the trial is not affected as long as its worker lives.

    Args:
        trainable: the ``tune.Trainable`` that saves.
        save: Ray's own ``save``.
    """
    from ray.train._internal.session import _TrainingResult

    storage = trainable._storage
    index = storage.current_checkpoint_index if storage else -1
    try:
        return save()
    except (OSError, RuntimeError):
        if storage:  # else the driver, which receives none, lets another worker overwrite the last one
            storage.current_checkpoint_index = index
        return _TrainingResult(checkpoint=None, metrics={})


def pause_pending(controller: Any, trial: Any) -> None:
    """Pause a trial that has no worker yet, as Ray's own schedulers do. Tune's ``pause_trial`` ignores such a trial."""
    from ray.tune.experiment import Trial

    controller._set_trial_status(trial, Trial.PAUSED)


@contextlib.contextmanager
def prestarted_workers() -> Iterator[None]:
    """In the ``with`` block, Tune's actors use the workers that started with the node of a private Ray.

    Tune gives its actors a runtime environment that copies some of the driver's variables. For it Ray starts further
    workers, which import PyTorch anew: 2 s of CPU time each. The workers of a private Ray inherited these variables.
    """
    import ray
    from ray.tune.execution.class_cache import _ActorClassCache

    def get(self: Any, trainable: Any) -> Any:
        if trainable not in self._cache:
            self._cache[trainable] = ray.remote(trainable)
        return self._cache[trainable]

    if PRELOAD not in os.environ:  # a Ray that was started elsewhere, in another environment
        yield
        return
    with patch.object(_ActorClassCache, "get", get):
        yield


@contextlib.contextmanager
def quiet_tune() -> Iterator[None]:
    """In the ``with`` block, Tune logs no tracebacks that are no news, and leaves signals and callbacks alone.

    - Its snapshots are for ``Tuner.restore``, which is never called, so one that found no room is no fault. Neither is
      a checkpoint that was gone when it was to be replaced, nor a failed trial, which is a row.
    - It would handle SIGUSR1, and keep its handler after its end (ray-project/ray#37737): the signal would not end the
      confirmation.
    - It would count the classes of callbacks for usage statistics even if these are turned off. To recognize the
      classes, it imports MLflow and W&B if they are installed, used or not: a second of each search.
    """
    from ray._common.usage.usage_lib import usage_stats_enabled
    from ray.air._internal import usage
    from ray.tune import tune

    logger = logging.getLogger("ray.tune.execution.tune_controller")
    silenced = [logging.getLogger(name) for name in ("ray.tune.execution.experiment_state", "ray.tune.tune")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(tune, "_setup_signal_catching", threading.Event))
        if not usage_stats_enabled():
            stack.enter_context(patch.object(usage, "tag_callbacks", lambda callbacks: False))
        for other in silenced:
            stack.callback(other.setLevel, other.level)
            other.setLevel(logging.CRITICAL)
        logger.addFilter(_is_news)
        stack.callback(logger.removeFilter, _is_news)
        yield


def _is_news(record: logging.LogRecord) -> bool:
    return "Error handling checkpoint" not in str(record.msg)


@contextlib.contextmanager
def patched_worker_deaths(
    on_fault: Callable[[str], None], is_uncounted: Callable[[Any, Exception], bool]
) -> Iterator[None]:
    """In the ``with`` block, a worker's death costs its own trial the retries that it should, and no other trial any.

    Ray has two faults here. For a worker that the memory monitor killed in a task, it raises ``OutOfMemoryError``,
    which is not a ``RayActorError``, so that Tune ends with all trials: "Caught unexpected exception". And the death of
    a worker between two trials shows only when Tune resets it for the next one, which is still pending: Tune queues
    that trial again, and then ends it for good, because its task has failed too.

    Args:
        on_fault: is called with a line if Tune found no room to write the reason of a death: its own folder is in the
            temporary one.
        is_uncounted: returns whether a death, given the trial and the exception, costs the trial no retry.
    """
    from ray.air.execution._internal import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.tune.experiment import Trial

    take, count = RayActorManager._actor_task_failed, Trial.handle_error

    def take_corrected(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        if isinstance(exception, RayActorError):
            _spare_pending_trial(tracked_actor_task)
        take(self, tracked_actor_task, exception)

    def count_corrected(self: Trial, exc: Any = None) -> None:
        failures = self.run_metadata.num_failures
        try:
            count(self, exc)
        except OSError as error:
            on_fault(describe_error(error))
        # A trial whose retries the time limit has prevented has none to spare.
        if self.max_failures and is_uncounted(self, exc):
            self.run_metadata.num_failures = failures

    with (
        patch.object(RayActorManager, "_actor_task_failed", take_corrected),
        patch.object(Trial, "handle_error", count_corrected),
    ):
        yield


def _spare_pending_trial(task: Any) -> None:
    """If the worker of a task died before its trial began, only let the trial be queued again."""
    from ray.tune.execution.tune_controller import TuneController

    actor = task._tracked_actor
    controller = getattr(actor._on_error, "__self__", None)
    if isinstance(controller, TuneController):
        trial = controller._actor_to_trial.get(actor)
        if trial in controller._pending_trials:
            controller._resetting_trials.discard(trial)  # else it would wait for its reset forever
            task._on_error = None
