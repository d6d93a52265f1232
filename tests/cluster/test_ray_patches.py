"""Each use of Ray's private parts: what it changes, and that stock Ray still needs it.

If a test named ``test_stock_...`` fails, Ray has changed: remove what is no longer needed from ``ray_patches.py``.
"""

import contextlib
import dataclasses
import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from ray._private import node as node_module
from ray._private import parameter, ray_constants, services, state, worker
from ray.air._internal import usage
from ray.air.execution import FixedResourceManager, PlacementGroupResourceManager, ResourceRequest
from ray.air.execution._internal import RayActorManager, TrackedActor
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.job_config import JobConfig
from ray.runtime_context import RuntimeContext
from ray.tune import Callback
from ray.tune import tune as tune_module
from ray.tune.execution import tune_controller
from ray.tune.execution.class_cache import _ActorClassCache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.utils.object_cache import _ObjectCache

from tune_amp.cluster import ray_patches
from tune_amp.trial.config import SIGNALS

RAY_OPTIONS = "\n".join(inspect.signature(ray.init).parameters)
"""Public arguments of ``ray.init``; the private ones are in ``**kwargs``."""


def test_the_version_of_ray_is_the_one_that_the_reasons_name() -> None:
    """Read the reasons again before this number is changed."""
    assert ray.__version__.startswith("2.60.")
    assert "Seen with Ray 2.60." in (ray_patches.__doc__ or "")


# The environment


def test_stock_ray_has_no_option_for_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.findall(r".*(?:host|ip_address|interface).*", RAY_OPTIONS) == ["dashboard_host"]
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "192.0.2.7")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)  # as Linux has it
    assert services.get_node_ip_address() == "192.0.2.7"
    for name, value in ray_patches.LOOPBACK_ONLY.items():
        monkeypatch.setenv(name, value)
    assert services.get_node_ip_address() == "192.0.2.7"  # the variable was read on import
    ray_patches.read_environment_again()
    assert services.get_node_ip_address() == "127.0.0.1"


def test_environment_is_as_before_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ray_constants.ENABLE_RAY_CLUSTER
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", not before)
    ray_patches.read_environment_again()
    assert before == ray_constants.ENABLE_RAY_CLUSTER


def test_stock_ray_has_no_option_for_what_workers_import_and_how_many_start_at_once() -> None:
    assert re.findall(r".*(?:preload|prestart|import).*", RAY_OPTIONS) == []
    assert ray_patches.preloading(["a", "b"])["RAY_preload_python_modules"] == "a,b"
    assert ray_patches.preloading([])["RAY_preload_python_modules"] is None


def test_stock_raylet_knows_the_variables_of_its_start() -> None:
    """Ray has no other list of its variables than the program itself."""
    known = Path(services.RAYLET_EXECUTABLE).read_bytes()
    assert [name.removeprefix("RAY_").encode() in known for name in ray_patches.FAST_START] == [True] * 3


def test_stock_ray_makes_twenty_attempts_to_join_unless_the_variable_says_otherwise() -> None:
    assert ray_constants.NUM_REDIS_GET_RETRIES == 20
    assert re.findall(r".*(?:timeout|wait|retr).*", RAY_OPTIONS) == []
    [name] = ray_patches.ONE_CONNECTION_ATTEMPT
    assert f'environ.get("{name}")' in inspect.getsource(node_module.Node)


# The start and the end of a session


def test_stock_ray_sends_folders_of_the_driver_to_the_workers_and_has_no_option_against_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "job_config._py_driver_sys_path.extend(code_paths)" in inspect.getsource(worker.connect)
    paths = re.findall(r".*path.*", "\n".join(inspect.signature(JobConfig).parameters))
    assert paths == ["code_search_path", "_py_driver_sys_path"]  # the first only adds folders
    jobs: list[Any] = []
    monkeypatch.setattr(ray, "init", lambda *_, job_config, **options: jobs.append((job_config, options)))
    ray_patches.init_ray("local", "a run", temp_dir=tmp_path, num_cpus=1)
    [(job, options)] = jobs
    job._py_driver_sys_path.append("/somewhere")
    assert b"somewhere" not in job._serialize()
    assert job.metadata == {"tune_amp": "a run", "job_name": "a run"}
    assert (options["_temp_dir"], options["num_cpus"]) == (str(tmp_path), 1)


def test_stock_ray_has_no_option_for_the_agents_port_the_session_its_folder_and_processes(tmp_path: Path) -> None:
    assert re.findall(r".*(?:agent|session|temp|dir|worker|prestart).*", RAY_OPTIONS) == []
    stock = parameter.RayParams()
    assert (stock.dashboard_agent_listen_port, stock.session_name) == (52365, None)
    with ray_patches.private_start(tmp_path, "short", workers=3):
        ours = parameter.RayParams()
        assert (ours.dashboard_agent_listen_port, ours.session_name) == (0, "short")
        assert not ours.include_log_monitor
    assert parameter.RayParams().session_name is None


MONITOR, DASHBOARD, GCS, RAYLET = (
    ray_constants.PROCESS_TYPE_MONITOR,
    ray_constants.PROCESS_TYPE_DASHBOARD,
    ray_constants.PROCESS_TYPE_GCS_SERVER,
    ray_constants.PROCESS_TYPE_RAYLET,
)


class StartedProcess:
    """Stands in for a process of Ray that was started."""

    def __init__(self, returncode: int | None = None) -> None:
        self.process = self
        self.returncode = returncode
        self.killed = threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> None:
        self.killed.wait(20)

    def kill(self) -> None:
        self.killed.set()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, StartedProcess]]:
    """The processes that Ray would start; they live unless the test puts a dead one here before."""
    parts = {kind: StartedProcess() for kind in (MONITOR, DASHBOARD, GCS, RAYLET)}
    monkeypatch.setattr(services, "start_ray_process", lambda command, kind, **_: parts[kind])
    monkeypatch.setattr(ray_patches, "find_node", lambda: None)
    yield parts
    for part in parts.values():  # ends the thread that waits for the dashboard
        part.kill()


def test_stock_ray_starts_no_number_of_workers_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[str, list[str], Any]] = []

    def start(command: list[str], kind: str, **options: Any) -> StartedProcess:
        started.append((kind, command, options))
        return StartedProcess()

    monkeypatch.setattr(services, "start_ray_process", start)
    stock: Any = services.start_ray_process
    with ray_patches.private_start(tmp_path, "short", workers=3):
        services.start_ray_process([], RAYLET, fate_share=True)
    assert services.start_ray_process is stock
    assert started == [(RAYLET, ["--num_prestart_python_workers=3"], {"fate_share": True})]


def test_stock_ray_waits_for_the_dashboard_before_it_starts_the_node() -> None:
    source = inspect.getsource(node_module.Node.start_head_processes)
    assert source.index("self.start_monitor()") < source.index("self.start_api_server(")
    assert source.rstrip().endswith("raise_on_failure=raise_on_api_server_failure,\n        )")
    assert "_internal_kv_get" in inspect.getsource(services.start_api_server)


def test_stock_dashboard_imports_from_the_current_folder() -> None:
    assert "PYTHONSAFEPATH" not in inspect.getsource(services)


class Gcs:
    """Stands in for a client of the GCS, which the dashboard tells its address once ``has_told`` is set."""

    def __init__(self) -> None:
        self.has_told = threading.Event()
        self.kept: dict[bytes, bytes] = {}

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes, timeout: float) -> None:
        assert (overwrite, namespace, timeout) == (True, b"dashboard", 1)
        self.kept[key] = value

    def internal_kv_get(self, key: bytes, namespace: bytes, *, timeout: float) -> bytes | None:
        assert (key, namespace, timeout) == (b"dashboard", b"dashboard", 1)
        if not self.has_told.wait(0.05):
            raise TimeoutError
        return b"127.0.0.1:8265"


@dataclasses.dataclass(kw_only=True)
class Begun:
    """A node that has started without its dashboard, and what happened since."""

    dashboard: ray_patches.LateDashboard
    node: Any
    gcs: Gcs = dataclasses.field(default_factory=Gcs)
    told: threading.Event = dataclasses.field(default_factory=threading.Event)
    events: list[Any] = dataclasses.field(default_factory=list)
    threads: list[threading.Thread] = dataclasses.field(default_factory=list)

    def starting(self, delay: float = 0.0) -> contextlib.AbstractContextManager[None]:
        return self.dashboard.starting(delay, self.told.set)


@pytest.fixture
def begin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: dict[str, StartedProcess]
) -> Callable[..., Begun]:
    """A function that starts a node, whose dashboard then starts; or fails to, as the argument says."""

    def begin(error: Exception | None = None, *flags: str) -> Begun:
        begun: Begun

        def start_process(command: list[str], kind: str, **options: Any) -> StartedProcess:
            begun.events.append((kind, options))
            begun.threads.append(threading.current_thread())
            return processes[kind]

        def start_dashboard(self: Any, **options: Any) -> None:
            assert (self is node, options) == (True, {"include_dashboard": None, "raise_on_failure": False})
            services.logger.error("a page of the dashboard's log")
            if error is not None:
                raise error
            services.start_ray_process([*flags], DASHBOARD, fate_share=True)
            pytest.fail("stock Ray now waits for the dashboard, with a client of its own")

        def start_monitor(self: Any) -> None:
            services.start_ray_process([], MONITOR, fate_share=True)

        monkeypatch.setattr(services, "start_ray_process", start_process)
        monkeypatch.setattr(node_module.Node, "start_api_server", start_dashboard)
        monkeypatch.setattr(node_module.Node, "start_monitor", start_monitor)
        monkeypatch.setattr(node_module.Node, "get_gcs_client", lambda self: begun.gcs)
        node: Any = object.__new__(node_module.Node)
        node.all_processes = {GCS: [processes[GCS]], RAYLET: [processes[RAYLET]]}
        node._webui_url = None
        with ray_patches.private_start(tmp_path, "short", workers=3) as dashboard:
            begun = Begun(dashboard=dashboard, node=node)
            node.start_monitor()
            node.start_api_server(include_dashboard=None, raise_on_failure=False)
        assert begun.events == []
        monkeypatch.setattr(ray_patches, "find_node", lambda: node)
        return begun

    return begin


def wait_for(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_dashboard_and_monitor_start_after_the_node_with_variables_of_their_own(
    begin: Callable[..., Begun], tmp_path: Path, processes: dict[str, StartedProcess]
) -> None:
    begun = begin()
    with begun.starting():
        wait_for(lambda: len(begun.events) == 2)
        assert not begun.told.wait(0.2)  # its address is not known yet
        begun.gcs.has_told.set()
        assert begun.told.wait(20)
        assert begun.node.webui_url == "127.0.0.1:8265"
        assert begun.gcs.kept == {b"webui:url": b"127.0.0.1:8265"}  # for whoever joins this Ray
    own = {"env_updates": {"TMPDIR": str(tmp_path), "PYTHONSAFEPATH": "1"}, "fate_share": True}
    assert begun.events == [(MONITOR, own), (DASHBOARD, own)]
    assert begun.node.all_processes[DASHBOARD] == [processes[DASHBOARD]]  # so that Ray ends it
    assert begun.threads[0].is_alive()  # as long as the dashboard
    for part in processes.values():
        part.kill()
    begun.threads[0].join(20)
    assert not begun.threads[0].is_alive()


def test_dashboard_of_a_block_that_ends_before_never_starts(begin: Callable[..., Begun]) -> None:
    begun = begin()
    with begun.starting(delay=60):
        pass
    assert begun.events == []
    assert not begun.told.is_set()


def test_dashboard_that_is_starting_as_its_block_ends_is_left_to_rays_end(
    begin: Callable[..., Begun], processes: dict[str, StartedProcess], capfd: pytest.CaptureFixture[str]
) -> None:
    begun = begin()
    stock: Any = services.start_ray_process
    with begun.starting():
        wait_for(lambda: DASHBOARD in begun.node.all_processes)
        wait_for(lambda: services.start_ray_process is stock)  # not only after the block
    assert not begun.told.is_set()
    assert begun.node.all_processes[DASHBOARD] == [processes[DASHBOARD]]
    assert services.logger.disabled is False
    assert capfd.readouterr() == ("", "")


def test_dashboard_that_does_not_start_or_dies_is_told_without_a_page_of_its_log(
    begin: Callable[..., Begun], processes: dict[str, StartedProcess], capfd: pytest.CaptureFixture[str]
) -> None:
    for error, flag, code in ((RuntimeError("no dashboard"), "", None), (None, "", 1), (None, "--minimal", None)):
        processes[DASHBOARD].returncode = code
        begun = begin(error, flag)
        with begun.starting():
            assert begun.told.wait(20)
        assert begun.node.webui_url is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", [GCS, RAYLET])
def test_dashboard_of_a_ray_that_has_died_never_starts(
    part: str, begin: Callable[..., Begun], processes: dict[str, StartedProcess]
) -> None:
    begun = begin()
    processes[part].returncode = 1
    with begun.starting():
        assert begun.dashboard._is_over.wait(20)
    assert begun.events == []
    assert not begun.told.is_set()


def test_dashboard_outlives_an_error_of_what_is_told(
    begin: Callable[..., Begun], processes: dict[str, StartedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end with its thread."""
    begun, errors = begin(), list[Any]()
    monkeypatch.setattr(threading, "excepthook", errors.append)
    begun.gcs.has_told.set()

    def tell() -> None:
        raise ValueError("I/O operation on closed file")

    with begun.dashboard.starting(0.0, tell):
        assert begun.dashboard._is_over.wait(20)
    assert begun.threads[0].is_alive()
    assert errors == []
    for part in processes.values():
        part.kill()
    begun.threads[0].join(20)
    assert len(errors) == 1


@pytest.mark.parametrize("is_connected", [False, True])
def test_node_that_does_not_start_is_killed_unless_ray_shuts_it_down(
    is_connected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: dict[str, StartedProcess]
) -> None:
    def begin() -> None:
        with ray_patches.private_start(tmp_path, "short", workers=3):
            services.start_ray_process([], GCS, fate_share=True)
            if is_connected:
                monkeypatch.setattr(ray_patches, "find_node", object)
            raise RuntimeError("does not start")

    with pytest.raises(RuntimeError, match="does not start"):
        begin()
    assert processes[GCS].killed.is_set() is not is_connected


def test_stock_ray_asks_once_a_second_whether_the_object_store_listens() -> None:
    from ray._raylet import Config  # type: ignore[attr-defined]

    for name in ray_patches.FAST_START:
        os.environ.pop(name, None)
    Config.initialize("")
    pause, attempts = Config.raylet_client_connect_timeout_milliseconds, Config.raylet_client_num_connect_attempts
    assert (pause(), attempts()) == (1000, 10)
    our_pause, our_attempts, _ = map(int, ray_patches.FAST_START.values())
    assert our_pause * our_attempts == pause() * attempts()


def test_stock_ray_waits_for_its_node_for_a_fixed_time() -> None:
    assert "raylet_start_wait_time_s = 30\n" in inspect.getsource(node_module.Node.__init__)


def start_patiently(registers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Start a node that is found at the ``registers``-th question; return what was announced."""
    lines: list[str] = []
    asked: list[str] = []

    def node_table(self: Any) -> list[dict[str, Any]]:
        asked.append("table")
        if len(asked) == 1:
            raise RuntimeError("no answer yet")
        other = {"NodeID": "other", "Alive": True}
        return [other, {"NodeID": "id", "Alive": len(asked) >= registers}]

    def get_node(gcs_address: str, node_id: str) -> dict[str, str]:
        assert len(asked) >= registers  # else it would wait for a second
        return {"node": node_id}

    monkeypatch.setattr(state.GlobalState, "node_table", node_table)
    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr("tune_amp.cluster.ray_patches.SLOW_START_SECONDS", 0.05)
    with ray_patches.private_start(folder, "short", workers=3, announce=lines.append):
        for kind in (DASHBOARD, GCS, RAYLET):
            services.start_ray_process([], kind, fate_share=True)
        assert services.get_node("127.0.0.1:1", "id") == {"node": "id"}
    assert len(asked) == registers
    return lines


def test_node_that_is_slow_to_start_is_waited_for_and_the_user_informed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: dict[str, StartedProcess]
) -> None:
    """Another part that has died, such as the dashboard, is no reason to give up."""
    processes[DASHBOARD].returncode = 1
    [line] = start_patiently(4, tmp_path, monkeypatch)
    assert not processes[RAYLET].killed.is_set()
    assert line.startswith("Ray has not started within 0 s (the machine's load is ")
    assert line.endswith("CPUs); waiting up to 300 s")


def test_node_that_never_starts_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: dict[str, StartedProcess]
) -> None:
    monkeypatch.setattr("tune_amp.cluster.ray_patches.START_SECONDS", 0)
    with pytest.raises(TimeoutError, match="its node was not ready after 0 s"):
        start_patiently(10**9, tmp_path, monkeypatch)
    assert all(processes[kind].killed.is_set() for kind in (GCS, RAYLET))


@pytest.mark.parametrize("part", [RAYLET, GCS])
def test_node_that_dies_as_it_starts_is_not_waited_for(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: dict[str, StartedProcess]
) -> None:
    processes[part].returncode = 1
    with pytest.raises(ChildProcessError, match=f"^its {part} ended with exit code 1$"):
        start_patiently(4, tmp_path, monkeypatch)
    assert processes[RAYLET].killed.is_set()


def test_stock_tune_gives_its_actors_an_environment_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def remote(*classes: Any, **options: Any) -> Any:
        given.append(options)
        return classes[0] if classes else lambda trainable: trainable

    monkeypatch.setattr(ray, "remote", remote)
    for is_private in (False, True):
        monkeypatch.setattr(ray_patches, "is_private", lambda is_private=is_private: is_private)
        with ray_patches.workers_of_private_ray():
            assert _ActorClassCache().get(Trial) is Trial
    assert [options.get("runtime_env", {}).get("env_vars", {}).get("PL_DISABLE_FORK") for options in given] == [
        "1",  # a Ray of somebody else's: its workers may have another environment
        None,
    ]
    assert ray_patches.preloading(["some.module"])["PL_DISABLE_FORK"] == "1"


def test_stock_ray_prints_logs_of_processes_that_died_even_if_no_logs_go_to_the_driver(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``log_to_driver`` ends the subscription to workers' logs; these come with the error that a process died."""
    assert "log_to_driver" not in inspect.getsource(worker.print_worker_logs)
    lines = {"pid": "raylet", "lines": ["a page of log"], "ip": "", "job": "", "is_err": True}
    with ray_patches.quiet_logs():
        worker.print_worker_logs(lines, sys.stderr)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    worker.print_worker_logs(lines, sys.stderr)  # type: ignore[arg-type]
    assert "a page of log" in capsys.readouterr().err


# A running Ray


def test_stock_ray_says_that_it_runs_whatever_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = SimpleNamespace()
    monkeypatch.setattr(worker, "_global_node", dead)
    assert "return ray._private.worker.global_worker.connected\n" in inspect.getsource(worker.is_initialized)
    assert ray_patches.find_node() is dead


def test_stock_ray_waits_for_its_processes_for_a_second_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was not waited for is a zombie, and Python warns of it when the object is collected."""
    assert "wait_timeout_seconds = 1\n" in inspect.getsource(node_module.Node._kill_process_impl)
    monkeypatch.setattr(worker, "_global_node", None)
    with ray_patches.reaped_processes():
        pass
    with subprocess.Popen(["sleep", "1.5"]) as process, subprocess.Popen(["sleep", "60"]) as monitor:
        kinds = {RAYLET: process, ray_constants.PROCESS_TYPE_MONITOR: monitor}
        node = SimpleNamespace(all_processes={kind: [SimpleNamespace(process=one)] for kind, one in kinds.items()})
        monkeypatch.setattr(worker, "_global_node", node)
        with ray_patches.reaped_processes():
            pass
        assert (process.returncode, monitor.returncode) == (0, -signal.SIGKILL)


def test_stock_ray_gives_the_dashboards_address_only_to_whoever_started_it() -> None:
    assert "get_dashboard_url" not in dir(ray)
    assert [name for name in dir(RuntimeContext) if "dashboard" in name or "url" in name] == []


def test_stock_ray_has_no_public_count_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import accelerators
    from ray.util import accelerators as public

    assert [name for name in dir(public) if "count" in name or "num" in name] == []
    manager = SimpleNamespace(get_current_node_num_accelerators=lambda: 3)
    monkeypatch.setattr(accelerators, "get_accelerator_manager_for_resource", lambda name: manager)
    assert ray_patches.count_gpus_of_ray() == 3
    monkeypatch.setattr(accelerators, "get_accelerator_manager_for_resource", lambda name: None)
    assert ray_patches.count_gpus_of_ray() == 0


def test_stock_ray_has_no_public_title_of_a_process_and_only_a_workers_is_changed() -> None:
    assert [name for name in (*dir(ray), *dir(RuntimeContext)) if "title" in name] == []
    if sys.platform.startswith("linux"):
        before = Path("/proc/self/cmdline").read_bytes()
        ray_patches.set_process_title("01-fp16 epoch 1/2")
        assert Path("/proc/self/cmdline").read_bytes() == before


# Tune


def act_as_driver(monkeypatch: pytest.MonkeyPatch, resources: dict[str, float]) -> None:
    """As if Ray ran, which a resource manager would start."""
    context = SimpleNamespace(worker=SimpleNamespace(mode=ray.SCRIPT_MODE))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "cluster_resources", lambda: dict(resources))
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: None)


def test_stock_tune_gives_each_actor_a_placement_group_and_has_no_option_against_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "resource_manager_factory" not in inspect.getsource(tune_module)
    names: Any = tune_controller
    made = []
    act_as_driver(monkeypatch, {"CPU": 2.0})
    for is_private in (False, True):
        monkeypatch.setattr(ray_patches, "is_private", lambda is_private=is_private: is_private)
        with ray_patches.workers_of_private_ray():
            made.append(type(names.PlacementGroupResourceManager()))
    assert made == [PlacementGroupResourceManager, FixedResourceManager]
    assert names.PlacementGroupResourceManager is PlacementGroupResourceManager


@pytest.mark.parametrize(
    ("head", "preload", "expected"),
    [
        (True, "some.module", True),
        (True, None, False),  # a Ray that the user has started in this process
        (False, "some.module", False),  # a cluster, joined by a process that a worker of a private Ray has started
        (None, "some.module", False),  # no Ray
    ],
)
def test_only_a_ray_of_this_process_whose_workers_import_early_is_private(
    head: bool | None, preload: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_global_node", None if head is None else SimpleNamespace(head=head))
    monkeypatch.delenv(ray_patches.PRELOAD, raising=False)
    if preload:
        monkeypatch.setenv(ray_patches.PRELOAD, preload)
    assert ray_patches.is_private() is expected


@pytest.mark.parametrize(
    ("gpus", "share", "slots"), [(8, 0.2, 40), (5, 0.2, 25), (4, 0.1, 40), (1, 0.025, 40), (2, 0.3, 6)]
)
def test_stock_tune_loses_shares_to_binary_fractions_where_it_counts_resources(
    gpus: int, share: float, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, request = {"CPU": 64.0, "GPU": float(gpus)}, ResourceRequest([{"CPU": 1, "GPU": share}])

    def fill(manager: FixedResourceManager) -> int:
        for _ in range(slots + 1):
            manager.request_resources(request)
        return sum(manager.acquire_resources(request) is not None for _ in range(slots + 1))

    names: Any = tune_controller
    act_as_driver(monkeypatch, total)
    monkeypatch.setattr(ray_patches, "is_private", lambda: True)
    if (gpus, share) == (8, 0.2):
        assert fill(FixedResourceManager(dict(total))) < slots
    with ray_patches.workers_of_private_ray():
        assert fill(names.PlacementGroupResourceManager()) == slots


def test_stock_tune_has_a_trials_worker_in_a_private_state(trial: Trial) -> None:
    worker = MagicMock()
    trial.set_ray_actor(worker)
    assert not [name for name, value in vars(trial).items() if value is worker]
    assert trial.temporary_state.ray_actor is worker


def test_stock_tune_ends_a_worker_whose_save_raises() -> None:
    """Tests of saving itself are in ``test_trainable.py``."""
    assert "on_error=self._trial_task_failure" in inspect.getsource(TuneController._schedule_trial_save)


def test_stock_tune_pauses_no_trial_that_has_no_worker() -> None:
    changed: list[Any] = []
    controller: Any = SimpleNamespace(_trial_to_actor={}, _set_trial_status=lambda *status: changed.append(status))
    TuneController._schedule_trial_pause(controller, "trial", should_checkpoint=False)  # type: ignore[arg-type]
    assert changed == []
    ray_patches.pause_pending(controller, "trial")
    assert changed == [("trial", Trial.PAUSED)]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("own", ["starting", "waiting for resources", "failed", None])
def test_stock_tune_ends_a_worker_that_starts_if_another_is_free(trial: Trial, own: str | None, patched: bool) -> None:
    """One that waits for resources has to go: the free one may hold them."""
    free, asked_for = TrackedActor(1), TrackedActor(2)
    controller: Any = object.__new__(TuneController)
    manager: Any = object.__new__(RayActorManager)
    controller._actor_manager = manager
    manager._live_actors_to_ray_actors_resources = {free: (None, None)}
    if own != "waiting for resources":
        manager._live_actors_to_ray_actors_resources[asked_for] = (None, None)
    manager._failed_actor_ids = {2} if own == "failed" else set()
    removed: list[TrackedActor] = []
    controller._resetting_trials = set()
    controller._trial_to_actor = {trial: asked_for} if own else {}
    controller._actor_to_trial = {asked_for: trial} if own else {}
    controller._actor_cache = _ObjectCache()
    controller._actor_cache.cache_object(trial.placement_group_factory, free)
    controller._remove_actor = lambda *, tracked_actor: removed.append(tracked_actor)
    controller._schedule_trial_reset = lambda *_: None
    with ray_patches.kept_starting_workers() if patched else contextlib.nullcontext():
        is_kept = patched and own == "starting"
        assert controller._maybe_reuse_cached_actor(trial) is not is_kept
    assert controller._trial_to_actor[trial] is (asked_for if is_kept else free)
    assert removed == ([asked_for] if own and not is_kept else [])


def test_stock_tune_handles_signals_and_keeps_its_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take SIGUSR1 while winners are confirmed."""
    monkeypatch.delenv("TUNE_DISABLE_SIGINT_HANDLER", raising=False)
    before = [signal.getsignal(number) for number in SIGNALS]

    def list_taken() -> set[int]:
        return {number for number, was in zip(SIGNALS, before, strict=True) if signal.getsignal(number) != was}

    try:
        with ray_patches.quiet_tune():
            assert not tune_module._setup_signal_catching().is_set()
            assert list_taken() == set()
        tune_module._setup_signal_catching()
        assert signal.SIGUSR1 in list_taken()
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    monkeypatch.setenv("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ray's own switch
    tune_module._setup_signal_catching()
    try:
        assert list_taken() == {signal.SIGUSR1}
    finally:
        signal.signal(signal.SIGUSR1, before[SIGNALS.index(signal.SIGUSR1)])


@pytest.mark.parametrize("enabled", [True, False])
def test_stock_tune_counts_callbacks_whether_or_not_usage_statistics_are_on(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "usage_stats_enabled" not in inspect.getsource(usage.tag_callbacks)
    counted, first = list[Any](), Callback()
    monkeypatch.setattr(usage, "tag_callbacks", counted.append)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", str(int(enabled)))
    with ray_patches.quiet_tune():
        usage.tag_callbacks([first])
    assert counted == [[first]] * enabled
    usage.tag_callbacks([])
    assert counted[-1] == []


def test_tracebacks_that_are_no_news_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    loggers = [logging.getLogger(f"ray.tune.{name}") for name in ("execution.tune_controller", "trainable", "tune")]
    levels = [logger.level for logger in loggers]
    with ray_patches.quiet_tune():
        for logger in loggers:
            logger.error("of %s", logger.name)
    assert caplog.messages == ["of ray.tune.trainable"]
    assert [logger.level for logger in loggers] == levels


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Trial:
    """One that runs, of Tune's own class, and keeps no files."""
    monkeypatch.setattr(Trial, "local_path", None)
    return Trial("trainable", stub=True, max_failures=2)


def refuse(text: str) -> None:
    pytest.fail(f"no fault was made: {text}")


def test_deaths_cost_a_retry_unless_they_are_uncounted_and_rays_own_way_is_back_after_the_block(trial: Trial) -> None:
    stock = Trial.handle_error, RayActorManager._actor_task_failed
    with ray_patches.patched_worker_deaths(refuse, lambda trial, error: "lost" in str(error)):
        trial.handle_error(RayActorError(error_msg="lost"))
        assert trial.run_metadata.num_failures == 0
        trial.handle_error(RayActorError(error_msg="died"))
        assert trial.run_metadata.num_failures == 1
    assert (Trial.handle_error, RayActorManager._actor_task_failed) == stock
    trial.handle_error(RayActorError(error_msg="lost"))  # stock Tune counts every death
    assert trial.run_metadata.num_failures == 2


def make_task(actor: Any, on_error: Any) -> Any:
    return SimpleNamespace(_tracked_actor=actor, _on_error=on_error)


def test_stock_tune_ends_with_all_trials_if_the_memory_monitor_kills_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    task, manager = make_task(SimpleNamespace(_on_error=None), None), SimpleNamespace()
    killed = OutOfMemoryError("Task was killed")
    assert not isinstance(killed, RayActorError)
    with pytest.raises(RuntimeError, match="Caught unexpected exception"):
        RayActorManager._actor_task_failed(manager, task, killed)  # type: ignore[arg-type]
    taken: list[Exception] = []
    monkeypatch.setattr(RayActorManager, "_actor_task_failed", lambda _, task, exception: taken.append(exception))
    with ray_patches.patched_worker_deaths(refuse, lambda *_: False):
        RayActorManager._actor_task_failed(manager, task, killed)  # type: ignore[arg-type]
    assert [(type(exception), str(exception)) for exception in taken] == [(RayActorError, "Task was killed")]


@pytest.mark.parametrize("patched", [False, True])
def test_stock_tune_ends_a_pending_trial_whose_worker_died_before_its_reset(patched: bool) -> None:
    """It first queues the trial again, by the actor's handler, and then fails it, by that of the task."""
    controller: Any = object.__new__(TuneController)
    events: list[str] = []
    actor = SimpleNamespace(actor_id=1, _on_error=types.MethodType(lambda *_: events.append("queued"), controller))
    controller._actor_to_trial, controller._pending_trials, controller._resetting_trials = {1: "t"}, {"t"}, {"t"}
    controller._actor_to_trial = SimpleNamespace(get=lambda actor: "t")
    manager: Any = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    task = make_task(actor, lambda *_: events.append("failed"))
    died = RayActorError(error_msg="died")
    if patched:
        with ray_patches.patched_worker_deaths(refuse, lambda *_: False):
            RayActorManager._actor_task_failed(manager, task, died)
        assert events == ["queued"]
        assert controller._resetting_trials == set()
    else:
        RayActorManager._actor_task_failed(manager, task, died)
        assert events == ["queued", "failed"]


def test_stock_tune_raises_if_there_is_no_room_for_the_reason_of_a_death(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes the reason into a folder of its own, below the temporary one."""
    monkeypatch.setattr(Trial, "local_path", os.devnull)
    died = RayActorError(error_msg="died")
    with pytest.raises(OSError, match="Not a directory"):
        trial.handle_error(died)
    faults: list[str] = []
    with ray_patches.patched_worker_deaths(faults.append, lambda *_: False):
        trial.handle_error(died)
    assert len(faults) == 1
    assert trial.run_metadata.num_failures == 2
