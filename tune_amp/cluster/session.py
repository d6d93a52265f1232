"""Starts a private Ray on this machine, or joins a cluster, and says how to watch it.

Knows nothing of trials. Ray is imported inside the functions, because parts of it read the environment on import.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tune_amp.cluster.cpus import count_cpus
from tune_amp.cluster.private_home import HOME_PREFIX, private_home
from tune_amp.trial.config import InputError, describe_error
from tune_amp.trial.text import hide_credentials

# Tune's own reporter, per-trial log files and change of folder: all replaced by, or in the way of, ours.
QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # its snapshots are for Tuner.restore; a search goes on from its own journal
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # how many are submitted is decided by the slots there are
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a traceback for each failed attempt, over the live table
    # Tune imports MLflow and Weights & Biases wherever they are installed, and both would tell their makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "WANDB_ERROR_REPORTING": "false",
}


JOB_EXAMPLE = "ray job submit --address http://HEAD:8265 -- tune-amp search --address auto"
"""A command that submits a search to a cluster; ``HEAD`` is the host of its head node."""

REAP_SECONDS = 10.0
"""For a process of Ray's that was killed: more only where a system call cannot be interrupted."""
START_SECONDS = 300
"""How long the node of a Ray of our own may take to start. Ray's own limit is a constant of 30 s."""
SLOW_START_SECONDS = 30.0
"""After which the user is informed that it takes long."""
ROOM_BYTES = 8 * 2**20
"""Free space that a Ray of our own needs in the temporary folder: its logs and dashboards take 1 MiB as it starts."""
PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket."""
MOST_PLACES_BYTES = PATH_BYTES - len(f"/{HOME_PREFIX}12345678/ray/12345678/sockets/dash_MetricsHead")
"""Longest path of a temporary folder below which Ray's longest socket has room."""


class StartError(OSError):
    """A Ray of our own does not start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaySession:
    """A running Ray, as the search and its user need to know it."""

    resources: Mapping[str, float]
    """What the cluster can schedule: ``CPU``, ``GPU`` and others."""
    dashboard_url: str | None
    token_path: Path | None
    """File with the token that the dashboard asks for; None where we did not start Ray."""
    authenticated: bool
    """Whether Ray refused us when we asked without a token, and let us in nowhere."""

    @property
    def exposure(self) -> str | None:
        """What it means that Ray asks for no token, on one line; None where it asks for one."""
        if self.authenticated:
            return None
        where = f" (dashboard {self.dashboard_url})" if self.dashboard_url else ""
        return (
            f"this Ray cluster{where} asks for no token: anyone who reaches its ports can run code as the user it runs "
            "under, read your data and model, and change this search's results; start it with RAY_AUTH_MODE=token"
        )


@contextlib.contextmanager
def ray_session(
    address: str | None = None,
    *,
    run: str = "tune_amp",
    modules: tuple[ModuleType, ...] = (),
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    preload: Sequence[str] = (),
    announce: Callable[[str], None] = lambda _: None,
) -> Iterator[RaySession]:
    """Ray for the length of a ``with`` block: the one already started in this process, a cluster's, or a private one.

    A private Ray listens on loopback only, asks for a token, and at its end leaves nothing behind.

    Args:
        address: ``auto`` or ``host:port`` to join a cluster; None for a private Ray.
        run: name shown in the dashboard's list of jobs.
        modules: packages that the workers of a joined cluster need and may not have.
        num_cpus: what a private Ray offers; None for the CPUs that this process may use.
        num_gpus: what a private Ray offers; None for what it finds.
        preload: modules that the workers of a private Ray import as they start, while Ray itself is still starting.
        announce: receives a line where a private Ray starts otherwise than the user may expect.

    Raises:
        InputError: ``address`` cannot be joined, or Ray would find no home folder.
        StartError: a private Ray does not start.
    """
    _check_home()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(QUIET_TUNE))
        if "ray" in sys.modules and _ray_is_initialized():
            yield _describe_session(token_path=None)
        elif address is None:
            token_path = stack.enter_context(_private_ray(run, num_cpus, num_gpus, preload, announce))
            yield _describe_session(token_path)
        else:
            stack.enter_context(_joined_ray(address, run, modules))
            yield _describe_session(token_path=None)


@contextlib.contextmanager
def _private_ray(
    run: str, num_cpus: int | None, num_gpus: int | None, preload: Sequence[str], announce: Callable[[str], None]
) -> Iterator[Path]:
    """Start Ray for us alone; yields the token's path."""
    with contextlib.ExitStack() as stack:
        places = None
        try:
            places = _choose_places(announce)
            home = stack.enter_context(private_home(places))
            token_path = home / "token"
            token_path.touch(mode=0o600)
            token_path.write_text(secrets.token_hex(32))
            _check_room(home)
        except OSError as error:
            raise _start_error(error, places) from error
        stack.enter_context(_secured_ray(home, token_path, run, num_cpus, num_gpus, preload, announce))
        yield token_path


@contextlib.contextmanager
def _secured_ray(
    home: Path,
    token_path: Path,
    run: str,
    num_cpus: int | None,
    num_gpus: int | None,
    preload: Sequence[str],
    announce: Callable[[str], None],
) -> Iterator[None]:
    secured: dict[str, str | None] = {
        # On Linux this makes the node's own address the loopback one: GCS, raylet and workers listen nowhere else.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_AUTH_TOKEN": None,  # would come before the file
        "RAY_preload_python_modules": ",".join(preload) or None,
        # Ray would start as many workers as there are CPUs, and Tune's actors then others, all importing at once.
        "RAY_prestart_worker_first_driver": "0",
        "PYTHONPATH": _extend_python_path(),
        # Ray would tell its makers of every run that is longer than a minute.
        "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0"),
    }
    with _ray_environment(secured):
        import ray

        try:
            try:
                with _adapted_start(home), _patient_start(announce):
                    cpus = count_cpus() if num_cpus is None else num_cpus
                    # Without an address Ray would obey a stale ray_current_cluster file, and can hang on it.
                    _init_ray("local", run, num_cpus=cpus, num_gpus=num_gpus, _temp_dir=str(home / "ray"))
            except Exception as error:
                try:
                    _check_room(home)
                except OSError as full:
                    raise _start_error(full, home.parent) from error
                raise _start_error(error, home.parent) from error
            yield
        finally:
            node: Any = ray._private.worker._global_node  # noqa: SLF001 - None where Ray did not start
            with reaping(
                [] if node is None else [info.process for kind in node.all_processes.values() for info in kind]
            ):
                ray.shutdown()
            _print_ray_logs(True)


@contextlib.contextmanager
def reaping(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """In the ``with`` block, Ray ends ``processes``; then wait for them, which Ray itself does for a second only."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=REAP_SECONDS)


def _choose_places(announce: Callable[[str], None]) -> Path:
    """The user's temporary folder, or /tmp where the paths of Ray's sockets would be too long there."""
    places, wanted = tempfile.gettempdir(), os.environ.get("TMPDIR")
    if wanted and os.path.abspath(wanted) != places:  # noqa: PTH100 - as tempfile does it
        announce(f"Ray's files go to {places}: TMPDIR ({wanted}) is full, or no folder that you may write to")
    length = len(os.fsencode(places))
    if length > MOST_PLACES_BYTES:
        announce(
            f"Ray's files go to /tmp: the path of the temporary folder {places} is too long for Ray's sockets "
            f"({length} bytes, at most {MOST_PLACES_BYTES}); a shorter TMPDIR moves them"
        )
        places = "/tmp"  # noqa: S108 - a private folder is made in it
    return Path(places)


def _check_room(home: Path) -> None:
    """Raise OSError where Ray's files have no room: it would write pages of log, and fail after half a minute."""
    probe = home / "room"
    try:
        probe.write_bytes(bytes(ROOM_BYTES))  # a quota of the user's is met by writing only
    finally:
        probe.unlink(missing_ok=True)


def _start_error(error: Exception, places: Path | None) -> StartError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f"{ROOM_BYTES // 2**20} MiB"
        return StartError(
            f"Ray did not start: the temporary folder {places} is full; free {needed} there, or set TMPDIR to another"
        )
    return StartError(f"Ray did not start: {describe_error(error)}")


def _check_home() -> None:
    """Raise InputError where nobody knows the user's home folder: Ray Tune asks for it on import."""
    try:
        Path.home()
    except RuntimeError:
        raise InputError(
            f"HOME: must name a folder: it is not set, and the user id {os.getuid()} has no home folder"
        ) from None


def _extend_python_path() -> str | None:
    """``PYTHONPATH``, from which workers can import this package where it is not installed."""
    before, folder = os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2])
    if folder in (*sysconfig.get_paths().values(), *(before or "").split(os.pathsep)):
        return before
    return f"{before}{os.pathsep}{folder}" if before else folder


@contextlib.contextmanager
def _adapted_start(home: Path) -> Iterator[None]:
    """Change what Ray has no setting for in how it starts its processes."""
    from unittest.mock import patch

    from ray._private import parameter, ray_constants, services

    start = services.start_ray_process

    def start_process(command: list[str], process_type: str, *arguments: Any, **options: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_DASHBOARD:
            # Its servers are started by "python -c", which looks for modules in the current folder first, and the
            # folder of their socket stays behind: it has to be below ours, where its path is short too.
            options["env_updates"] = {"TMPDIR": str(home), "PYTHONSAFEPATH": "1"}
        return start(command, process_type, *arguments, **options)

    params = functools.partial(
        parameter.RayParams,
        dashboard_agent_listen_port=0,  # else 52365: beside another Ray it retries for 6 s, then does without HTTP
        session_name=home.name.removeprefix(HOME_PREFIX),  # a third as long as Ray's: sockets are below it
    )
    with patch.object(parameter, "RayParams", params), patch.object(services, "start_ray_process", start_process):
        yield


@contextlib.contextmanager
def _patient_start(announce: Callable[[str], None]) -> Iterator[None]:
    """Let Ray's node take its time to start on a busy machine, and end at once where it has died."""
    from unittest.mock import patch

    from ray._private import node

    start: Any = node.Node.start_ray_processes

    def start_and_wait(self: Any) -> None:
        try:
            start(self)
            _wait_for_node(self)
        except BaseException:
            self.kill_all_processes(check_alive=False)  # nobody else knows them yet
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
        RuntimeError: a part of it that it cannot do without has ended.
        TimeoutError: it takes too long.
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
def _joined_ray(address: str, run: str, modules: tuple[ModuleType, ...]) -> Iterator[None]:
    """Join a cluster that somebody else started."""
    import tune_amp

    address = resolve_address(address)
    runtime_env = {"py_modules": [_find_source(module) for module in (tune_amp, *modules)]}
    # One attempt of Ray's is 40 s long where something else than Ray listens, and it would make twenty.
    settings: dict[str, str | None] = {"RAY_gcs_server_port_wait_time_s": "1"}
    if "RAY_AUTH_MODE" not in os.environ and _default_token().exists():
        # Joining by address never turns authentication on by itself: it would wait, then fail without a reason.
        settings["RAY_AUTH_MODE"] = "token"
    with _ray_environment(settings):
        import ray

        try:
            _check_answers(address)
            _init_ray(address, run, runtime_env=runtime_env)
        except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = hide_credentials(describe_error(error))
            raise InputError(
                f"--address: {hide_credentials(address)} cannot be joined ({reason}); a cluster that asks for a token "
                "needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; it is joined from a node of "
                "the cluster, and from elsewhere a search is submitted to it (ray job submit)"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
            _print_ray_logs(True)


def resolve_address(address: str) -> str:
    """Return the address that Ray will join: the variable comes before ``auto``.

    Raises:
        InputError: it is none of these, such as ``local``, with which Ray would start one that is open to all.
    """
    joined = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if joined.startswith("ray://"):  # Tune would run in a process of the cluster's, and leave our recorder here
        raise InputError(
            f"--address: {hide_credentials(joined)} is not supported, because a search runs on a node of the cluster; "
            f"submit it there: {JOB_EXAMPLE}"
        )
    host, _, port = joined.rpartition(":")
    if joined != "auto" and (not host or not port.isdecimal() or "://" in host):
        raise InputError(f"--address: must be auto or host:port, got {hide_credentials(joined)}")
    return joined


def _check_answers(address: str) -> None:
    """Raise OSError at once where nobody listens: Ray would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():  # else it is "auto", or Ray will say what is wrong
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _find_source(module: ModuleType) -> str:
    """The folder of a package, or the file of a single module."""
    if hasattr(module, "__path__"):
        return str(module.__path__[0])
    assert module.__file__ is not None  # a user's own code, not a built-in
    return module.__file__


def _init_ray(address: str, run: str, **options: Any) -> None:
    import ray
    from ray.job_config import JobConfig

    _print_ray_logs(False)

    class Job(JobConfig):
        """Without the folders that Ray would let workers search before all others: the script's and the current one."""

        def _serialize(self) -> Any:
            self._py_driver_sys_path.clear()
            return super()._serialize()

    job = Job(metadata={"tune_amp": run, "job_name": run})  # the list of jobs shows job_name
    ray.init(address, job_config=job, log_to_driver=False, logging_level=logging.ERROR, **options)


def _print_ray_logs(enabled: bool) -> None:
    """Whether Ray prints pages of its own log where one of its processes dies; what it means for trials we tell."""
    import ray

    ray._private.worker._worker_logs_enabled = enabled  # noqa: SLF001 - log_to_driver=False does not do it


def _describe_session(token_path: Path | None) -> RaySession:
    import ray

    address = ray._private.worker.get_dashboard_url()  # noqa: SLF001 - ray.init's context is not ours where Ray ran before
    dashboard_url = f"http://{address}" if address else None
    return RaySession(
        resources=ray.cluster_resources(),
        dashboard_url=dashboard_url,
        token_path=token_path,
        authenticated=_asks_for_token(ray.get_runtime_context().gcs_address, dashboard_url),
    )


ASKING_SECONDS = 5.0
LIST_KEYS = "/ray.rpc.InternalKVGcsService/InternalKVKeys"
"""Lists the keys of the default namespace: it reads, and changes nothing."""


def _asks_for_token(address: str, dashboard_url: str | None) -> bool:
    """Whether somebody without a token is refused: asked for real, as no setting of ours tells what a cluster does.

    A cluster with TLS but without tokens has an open dashboard still; where nothing answers, nothing is promised.
    """
    refusals = [_is_refused_by_server(address)]
    if dashboard_url is not None:
        refusals.append(_is_refused_by_dashboard(dashboard_url))
    return True in refusals and False not in refusals


def _is_refused_by_dashboard(url: str) -> bool | None:
    """Whether it asks for a token; None where it says neither yes nor no."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/version", timeout=ASKING_SECONDS) as answer:
            return None if "ray_version" not in json.load(answer) else False
    except urllib.error.HTTPError as error:
        return True if error.code in (401, 403) else None
    except (OSError, ValueError, TypeError):  # not reachable from here, or something else than Ray
        return None


def _is_refused_by_server(address: str) -> bool | None:
    """Whether Ray's GCS asks for a token; None where it says neither yes nor no."""
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(LIST_KEYS)(b"", timeout=ASKING_SECONDS)
        except grpc.RpcError as error:
            return True if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return False


def _ray_is_initialized() -> bool:
    import ray

    return bool(ray.is_initialized())


@contextlib.contextmanager
def _ray_environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables for the length of a ``with`` block, that Ray sees wherever it was imported."""
    try:
        with _environment(settings):
            _read_environment_again()
            yield
    finally:
        _read_environment_again()  # else the next session of this process would still use this one's token


def _read_environment_again() -> None:
    """Make Ray forget what it read of the environment on import and in an earlier session."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    clusters = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    ray_constants.ENABLE_RAY_CLUSTER = clusters != "0" and (sys.platform == "linux" or clusters is not None)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _default_token() -> Path:
    return Path.home() / ".ray" / "auth_token"


@contextlib.contextmanager
def _environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables for the length of a ``with`` block; None for one that must not be set."""
    before = dict(os.environ)
    _set_environment(settings)
    try:
        yield
    finally:
        # All that changed, because Ray leaves variables of its own behind: one would take over breakpoint().
        _set_environment({name: before.get(name) for name in {*before, *os.environ}})


def _set_environment(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value
