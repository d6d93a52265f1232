"""Uses of Ray's private names and undocumented variables, each with its reason. Seen with Ray 2.60.

For each use, ``tests/cluster/test_ray_patches.py`` has a test that fails once Ray no longer needs it. Ray is imported
inside the functions, because parts of it read the environment on import.
"""

import contextlib
import functools
import itertools
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

from tune_amp.trial.text import describe_error

LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Variable that on Linux makes the node's own address the loopback one: GCS, raylet and workers listen nowhere else.
``ray.init`` has no public parameter for the address."""
ONE_CONNECTION_ATTEMPT = {"RAY_gcs_server_port_wait_time_s": "1"}
"""Variable that limits the attempts to join a cluster. If something other than Ray listens, one attempt takes 40 s, and
Ray would make twenty."""
FAST_START = {
    "RAY_raylet_client_connect_timeout_milliseconds": "50",
    "RAY_raylet_client_num_connect_attempts": "200",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
"""Variables by which a private Ray starts earlier, unless the user has set them.

The raylet asks 20 times a second, for 10 s as ever, whether its object store listens. It starts it in a thread and asks
at once: in four of ten starts too early, and then again after 1 s. And it keeps workers that are idle for a minute
instead of a second, else it may start another one for the first trial: 2 to 3 s later, in three of 17 searches of the
digits, and in none of 15 with a minute.
"""
START_SECONDS = 300
"""Seconds that the node of a private Ray may take to start."""
SLOW_START_SECONDS = 30.0
"""Seconds after which the user is informed that the start takes long."""
COUNT_TOLERANCE = 1e-6
"""What a sum of shares may exceed a resource by. Ray itself counts ten-thousandths."""
REAP_SECONDS = 10.0
"""Seconds to wait for a process that was killed: it takes longer only if a system call cannot be interrupted."""
LIST_KEYS = "/ray.rpc.InternalKVGcsService/InternalKVKeys"
"""RPC of the GCS that lists the keys of the default namespace: it reads and changes nothing. Ray has no public way to
find out whether a cluster requires a token."""


# The environment

PRELOAD = "RAY_preload_python_modules"


def preloading(modules: Sequence[str]) -> dict[str, str | None]:
    """Return the variables that make the workers of a private Ray import ``modules`` as they start.

    Lightning may not fork in them (ray-project/ray#28197), which Tune sets otherwise: see ``workers_of_private_ray``.
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
    a library would be imported instead. The dashboard's list of jobs shows ``run``. All files of a private Ray go to
    ``temp_dir``.
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


class LateDashboard:
    """The dashboard of a private Ray, and the autoscaler's monitor that it shows: they start in a thread, after Ray."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._starts: list[Callable[[], None]] = []
        self._is_unwanted, self._is_over = threading.Event(), threading.Event()

    def postponing(self, start: Callable[..., None]) -> Callable[..., None]:
        """Return a method of Ray's node that, when called, leaves the call to ``starting``."""
        return lambda node, **options: self._starts.append(functools.partial(start, node, **options))

    @contextlib.contextmanager
    def starting(self, delay: float, notify: Callable[[], None]) -> Iterator[None]:
        """Start after ``delay`` seconds of the ``with`` block, then call ``notify``, whether the dashboard runs or not.

        ``ray.shutdown`` ends what has been started, also if it is not ready yet.
        """
        thread = threading.Thread(target=self._run, args=(delay, notify), daemon=True)
        try:
            thread.start()
            yield
        finally:
            self._is_unwanted.set()
            if thread.ident is not None:
                self._is_over.wait(REAP_SECONDS)

    def _run(self, delay: float, notify: Callable[[], None]) -> None:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            node = None if self._is_unwanted.wait(delay) else find_node()
            if node is not None and not find_dead(node):
                dashboard = self._start(node, processes)
                if dashboard is not None:
                    self._wait_for_address(node, dashboard)
                if not self._is_unwanted.is_set():
                    notify()
        finally:
            self._is_over.set()
            for process in processes:
                process.wait()  # Linux ends a process with the thread that started it

    def _start(self, node: Any, processes: list["subprocess.Popen[bytes]"]) -> "subprocess.Popen[bytes] | None":
        """Start the processes, and add them to the list. Return the dashboard's; None if it serves nothing.

        Ray would wait for the dashboard, with a client of the GCS that ends this process a minute after the GCS.
        """
        from ray._private import ray_constants, services

        start: Any = services.start_ray_process
        serving: list[subprocess.Popen[bytes]] = []

        def start_process(command: list[str], kind: str, *arguments: Any, **options: Any) -> Any:
            # The dashboard starts its servers by ``python -c``, which searches the current folder for modules first,
            # and leaves the folder of their socket in the temporary one.
            variables = {"TMPDIR": str(self._home), "PYTHONSAFEPATH": "1"}
            info = start(command, kind, *arguments, **options, env_updates=variables)
            processes.append(info.process)
            if kind == ray_constants.PROCESS_TYPE_DASHBOARD:
                node.all_processes[kind] = [info]
                if "--minimal" not in command:  # as where only ray[tune] is installed
                    serving.append(info.process)
                raise _StartedError
            return info

        quiet = patch.object(services.logger, "disabled", True)  # a search continues without a dashboard
        any_error = contextlib.suppress(Exception, _StartedError)
        with patch.object(services, "start_ray_process", start_process), quiet, any_error:
            for begin in self._starts:
                begin()
        return serving[0] if serving else None

    def _wait_for_address(self, node: Any, dashboard: "subprocess.Popen[bytes]") -> None:
        """Wait, as long as the dashboard lives and is wanted, until the GCS knows its address, and keep that."""
        from ray._private import ray_constants

        gcs = node.get_gcs_client()
        key, space = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
        while node._webui_url is None and dashboard.poll() is None and not self._is_unwanted.wait(0.1):
            with contextlib.suppress(Exception):  # no answer: a watch on Ray's processes reports their death
                address = gcs.internal_kv_get(key, space, timeout=1)
                if address is not None:
                    node._webui_url = address.decode()
                    gcs.internal_kv_put(b"webui:url", address, True, space, timeout=1)


class _StartedError(BaseException):
    """Leaves Ray's function that starts the dashboard once its process has started; not caught there."""


@contextlib.contextmanager
def private_start(
    home: Path, session_name: str, *, workers: int, announce: Callable[[str], None] = lambda _: None
) -> Iterator["LateDashboard"]:
    """In the ``with`` block, Ray starts a private node, faster and with more patience than by itself.

    - Ray would start the dashboard and the autoscaler's monitor first, and wait for the dashboard: 2 s of CPU time that
      the first trials need. They are left to the object that the block receives. The log monitor is left out: it reads
      the logs that drivers print.
    - The agent's default port, 52365, is taken if another Ray runs here: the agent would retry for 6 s, then run
      without HTTP (ray-project/ray#14763).
    - Ray would start a worker for each CPU, and ``ray.init`` has no argument for their number.
    - Ray asks once a second whether its node has registered, also if it is dead, and for 30 s, which no setting changes
      (ray-project/ray#62883). Here it is asked 20 times a second, a dead one fails at once, and a slow one has
      ``START_SECONDS``.

    Args:
        home: private folder for the socket, with a short path.
        session_name: name of Ray's own folder. All sockets lie below it, and Ray's default name leaves little of the
            107 bytes that the path of a socket may have (ray-project/ray#7945).
        workers: number of workers that start with the node.
        announce: receives a line after ``SLOW_START_SECONDS``.
    """
    from ray._private import node, parameter, ray_constants, services

    start: Any = services.start_ray_process
    find: Any = services.get_node
    started: dict[str, subprocess.Popen[bytes]] = {}
    dashboard, begun = LateDashboard(home), time.monotonic()

    def start_process(command: list[str], kind: str, *arguments: Any, **options: Any) -> Any:
        if kind == ray_constants.PROCESS_TYPE_RAYLET:
            command = [*command, f"--num_prestart_python_workers={workers}"]  # the last one of a flag counts
        info = start(command, kind, *arguments, **options)
        started[kind] = info.process
        return info

    def find_patiently(gcs_address: str, node_id: str) -> Any:
        is_announced = False
        while (waited := time.monotonic() - begun) < START_SECONDS:
            if waited >= SLOW_START_SECONDS and not is_announced:
                load, is_announced = f"the machine's load is {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs", True
                announce(f"Ray has not started within {waited:.0f} s ({load}); waiting up to {START_SECONDS} s")
            for kind in (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET):
                if started[kind].poll() is not None:
                    raise ChildProcessError(f"its {kind} ended with exit code {started[kind].returncode}")
            if _is_registered(gcs_address, node_id):
                return find(gcs_address, node_id)
            time.sleep(0.05)
        raise TimeoutError(f"its node was not ready after {START_SECONDS} s; try again when the machine is less busy")

    settings: dict[str, Any] = {"dashboard_agent_listen_port": 0, "include_log_monitor": False}
    params = functools.partial(parameter.RayParams, session_name=session_name, **settings)
    with (
        patch.object(parameter, "RayParams", params),
        patch.object(services, "start_ray_process", start_process),
        patch.object(services, "get_node", find_patiently),
        patch.object(node.Node, "start_monitor", dashboard.postponing(node.Node.start_monitor)),
        patch.object(node.Node, "start_api_server", dashboard.postponing(node.Node.start_api_server)),
    ):
        try:
            yield dashboard
        except BaseException:
            if find_node() is None:  # else ray.shutdown ends them, which would wait for a dead GCS
                for process in started.values():
                    process.kill()
            raise


def _is_registered(gcs_address: str, node_id: str) -> bool:
    from ray._private import services, state

    found = state.GlobalState()
    found._initialize_global_state(services._get_gcs_client_options(gcs_address))
    try:
        return any(node["NodeID"] == node_id and node["Alive"] for node in found.node_table())
    except RuntimeError:  # no answer yet
        return False


def quiet_logs() -> contextlib.AbstractContextManager[Any]:
    """In the ``with`` block, Ray prints no pages of its log if one of its processes dies: tune_amp reports the effect.

    ``log_to_driver=False`` does not cover these pages.
    """
    from ray._private import worker

    return patch.object(worker, "_worker_logs_enabled", False)


# A running Ray


def find_node() -> Any:
    """Return Ray's node object of this process, which has its processes and addresses; None if Ray does not run.

    ``ray.is_initialized`` stays True after the death of the raylet or the GCS.
    """
    from ray._private import worker

    return worker._global_node


@contextlib.contextmanager
def reaped_processes() -> Iterator[None]:
    """Wait for the processes of Ray that end in the ``with`` block. Ray itself waits for a second only.

    The autoscaler's monitor is killed: it has no state, and ignores the signal to end for that second.
    """
    from ray._private import ray_constants

    node = find_node()
    started = {} if node is None else {kind: [info.process for info in of] for kind, of in node.all_processes.items()}
    for monitor in started.get(ray_constants.PROCESS_TYPE_MONITOR, []):
        monitor.kill()
    try:
        yield
    finally:
        for process in itertools.chain(*started.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REAP_SECONDS)


def find_dead(node: Any) -> str | None:
    """Return ``gcs_server`` or ``raylet`` if this process has started it and it is dead; None otherwise.

    Ray's own ``dead_processes`` goes through all processes, while another thread may start one.
    """
    for kind in ("gcs_server", "raylet"):
        if any(info.process.poll() is not None for info in node.all_processes.get(kind, ())):
            return kind
    return None


def find_dashboard() -> str | None:
    """Return the URL of the dashboard; None if it does not run. ``ray.init`` returns it only when Ray starts."""
    from ray._private import worker

    address = worker.get_dashboard_url()
    return f"http://{address}" if address else None


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

    Ray counts an exception of the trainable's ``save`` as the death of the worker. Usually the disk is full, or the
    place is gone, for which Ray raises RuntimeError; the trial is not affected as long as its worker lives.
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


def is_private() -> bool:
    """Return whether this process has started Ray, with workers that import before they are used."""
    node = find_node()  # a driver that has joined a cluster may have the variable from a worker there
    return node is not None and node.head and PRELOAD in os.environ


@contextlib.contextmanager
def workers_of_private_ray() -> Iterator[None]:
    """In the ``with`` block, Tune's actors use the workers that started with a private Ray, and can outlive Tune.

    - Tune gives its actors a runtime environment that copies some of the driver's variables. For it Ray starts further
      workers, which import PyTorch anew: 2 s of CPU time each. The workers of a private Ray inherited these variables.
    - Tune gives each actor a placement group, and removes both at its end. On one node that nothing else uses, it can
      as well count its resources. An actor without a placement group lives as long as somebody holds its handle.
      Ray's count is in binary fractions, by which the 40th share of 0.2 of eight GPUs would seem too large: hence
      ``COUNT_TOLERANCE``.
    """
    import ray
    from ray.air.execution import FixedResourceManager
    from ray.tune.execution import tune_controller
    from ray.tune.execution.class_cache import _ActorClassCache

    if not is_private():  # a Ray that was started elsewhere, in another environment
        yield
        return
    remote = functools.cache(ray.remote)

    def count_resources() -> FixedResourceManager:
        total = {name: amount + COUNT_TOLERANCE for name, amount in ray.cluster_resources().items()}
        return FixedResourceManager(total)

    with (
        patch.object(_ActorClassCache, "get", lambda _, trainable: remote(trainable)),
        patch.object(tune_controller, "PlacementGroupResourceManager", count_resources),
    ):
        yield


@contextlib.contextmanager
def kept_starting_workers() -> Iterator[None]:
    """In the ``with`` block, a worker that is starting for a trial is not ended because another trial's is free.

    Tune gives the free worker to the waiting trial and kills the one that starts, again for each trial that ends in
    the meantime. With trials shorter than the start of a worker, a search stays on one slot.

    Tune calls a worker started once its resources are reserved, or in a private Ray once they are counted: on several
    GPUs, one with a larger share may then wait until a single GPU has it, and Tune ends those that are free.
    """
    from ray.tune.execution.tune_controller import TuneController

    reuse = TuneController._maybe_reuse_cached_actor

    def reuse_unless_starting(self: TuneController, trial: Any) -> bool:
        own = self._trial_to_actor.get(trial)
        if own is not None and trial not in self._resetting_trials and self._actor_manager.is_actor_started(own):
            return False
        return reuse(self, trial)

    with patch.object(TuneController, "_maybe_reuse_cached_actor", reuse_unless_starting):
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

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(tune, "_setup_signal_catching", threading.Event))
        if not usage_stats_enabled():
            stack.enter_context(patch.object(usage, "tag_callbacks", lambda callbacks: False))
        for name in ("execution.experiment_state", "execution.tune_controller", "tune"):
            logger = logging.getLogger(f"ray.tune.{name}")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield


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
