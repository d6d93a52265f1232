"""Starts a private Ray on this machine, or joins a cluster, and describes how to watch it.

Ray is imported inside the functions, because parts of it read the environment on import.
"""

import contextlib
import dataclasses
import errno
import http.client
import json
import os
import secrets
import socket
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from tune_amp.cluster import ray_patches
from tune_amp.cluster.cpus import count_cpus
from tune_amp.cluster.mps import provide_mps
from tune_amp.cluster.private_home import HOME_PREFIX, private_home
from tune_amp.trial.config import InputError
from tune_amp.trial.text import describe_error, hide_credentials

# Turn off Tune's own reporter, per-trial log files and change of folder: tune_amp replaces them, or they interfere.
QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # its snapshots are for Tuner.restore; a search resumes from its own journal
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # the number of slots decides how many are submitted
    # Tune imports MLflow and Weights & Biases if they are installed, and both would send usage data to their makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "WANDB_ERROR_REPORTING": "false",
}

JOB_EXAMPLE = "ray job submit --address http://HEAD:8265 -- tune-amp search --address auto"
"""A command that submits a search to a cluster; ``HEAD`` is the host of its head node."""
DASHBOARD_DELAY = 2.0
"""Seconds that the dashboard of a private Ray waits for the first trials: its start takes 2 s of CPU time."""
REPLY_SECONDS = 5.0
"""Seconds for a server of Ray to answer whether it requires a token."""
ROOM_BYTES = 8 * 2**20
"""Free bytes that a private Ray needs in the temporary folder: its logs and dashboards take 1 MiB during the start."""
PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Maximum length of the path of a Unix socket, in bytes."""
MOST_PARENT_BYTES = PATH_BYTES - len(f"/{HOME_PREFIX}12345678/ray/12345678/sockets/dash_MetricsHead")
"""Maximum length in bytes of a temporary folder's path that leaves room for Ray's longest socket path."""


class StartError(OSError):
    """A private Ray does not start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaySession:
    """Properties of a running Ray that the search and its user need."""

    dashboard_url: str | None
    """Address of Ray's dashboard; None if there is none, or ``dashboard`` has not started it yet."""
    token_path: Path | None
    """File with the token that the dashboard requires; None if tune_amp did not start this Ray."""
    authenticated: bool
    """Whether Ray refused a test request without a token, and no server accepted one.

    A private Ray has a token, so that it is enough if no server that runs accepts a request without it.
    """
    mps: str | None = None
    """How processes that share a GPU use it; None if tune_amp did not start this Ray, or it has no GPU."""
    late_dashboard: ray_patches.LateDashboard | None = None
    """The dashboard of a private Ray; None if tune_amp did not start this Ray."""

    @contextlib.contextmanager
    def dashboard(self, notify: Callable[["RaySession"], None], *, wanted: bool = True) -> Iterator[None]:
        """In the ``with`` block, call ``notify`` with the session once its dashboard has started, or failed to.

        If Ray ran before, that is at once. The dashboard of a private Ray starts after ``DASHBOARD_DELAY`` seconds, and
        a thread calls ``notify``; it never starts if it is not wanted, or if the block ends earlier.
        """
        if self.late_dashboard is None:
            notify(self)
            yield
        elif not wanted:
            yield
        else:
            with self.late_dashboard.starting(DASHBOARD_DELAY, lambda: notify(_find_dashboard(self))):
                yield

    @property
    def exposure(self) -> str | None:
        """One-line warning of what a Ray without a token exposes; None if Ray requires a token."""
        if self.authenticated:
            return None
        where = f" (dashboard {self.dashboard_url})" if self.dashboard_url else ""
        return (
            f"this Ray cluster{where} requires no token: anyone who reaches its ports can run code as the user it runs "
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
    workers: int = 0,
    mps: str = "off",
    announce: Callable[[str], None] = lambda _: None,
) -> Iterator[RaySession]:
    """Provide Ray for a ``with`` block: the one already started in this process, a cluster's, or a private one.

    A private Ray listens on loopback only, requires a token, and leaves nothing behind when it ends.

    Args:
        address: ``auto`` or ``host:port`` to join a cluster; None for a private Ray.
        run: name shown in the dashboard's list of jobs.
        modules: packages that the workers of a joined cluster need and may not have.
        num_cpus: CPUs that a private Ray offers; None for those that this process may use.
        num_gpus: GPUs that a private Ray offers; None for those that Ray finds.
        preload: modules that the workers of a private Ray import as they start.
        workers: number of workers that a private Ray starts before any are needed.
        mps: whether the workers of a private Ray share GPUs by MPS: ``auto``, ``on`` or ``off``; see ``provide_mps``.
        announce: receives a line if a private Ray starts differently than the user may expect.

    Raises:
        InputError: ``address`` cannot be joined, Ray would find no home folder, or MPS is wanted and cannot be had.
        StartError: a private Ray does not start.
    """
    try:
        Path.home()  # Ray Tune reads it on import
    except RuntimeError:
        text = f"HOME: must name a folder: it is not set, and the user id {os.getuid()} has no home folder"
        raise InputError(text) from None
    is_running = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if mps == "on" and (is_running or address is not None):
        raise InputError(
            "--mps: on is not allowed in a Ray that runs already (--address): MPS is started on its nodes, before it"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(QUIET_TUNE))
        if is_running:
            yield _describe_session()
        elif address is None:
            yield stack.enter_context(_private_ray(run, num_cpus, num_gpus, preload, workers, mps, announce))
        else:
            stack.enter_context(_joined_ray(address, run, modules))
            yield _describe_session()


@contextlib.contextmanager
def _private_ray(
    run: str,
    num_cpus: int | None,
    num_gpus: int | None,
    preload: Sequence[str],
    workers: int,
    mps: str,
    announce: Callable[[str], None],
) -> Iterator[RaySession]:
    """Start a private Ray."""
    with contextlib.ExitStack() as stack:
        parent = None
        try:
            parent = _choose_parent(announce)
            home = stack.enter_context(private_home(parent))
            token_path = home / "token"
            token_path.touch(mode=0o600)
            token_path.write_text(secrets.token_hex(32))
            _check_room(home)
        except OSError as error:
            raise _start_error(error, parent) from error
        has_gpu = ray_patches.count_gpus_of_ray() if num_gpus is None else num_gpus
        if mps == "on" and not has_gpu:
            raise InputError("--mps: on needs a GPU, and Ray finds none here")
        sharing = stack.enter_context(provide_mps(mps, home)) if has_gpu else None
        secured: dict[str, str | None] = {
            **ray_patches.LOOPBACK_ONLY,
            **{name: os.environ.get(name, value) for name, value in ray_patches.FAST_START.items()},
            **ray_patches.preloading(preload),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_path),
            "RAY_AUTH_TOKEN": None,  # would take precedence over the file
            "PYTHONPATH": _extend_python_path(),
            **(sharing.variables if sharing else {}),
            # Ray would send usage data to its makers for every run longer than a minute.
            "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0"),
        }
        stack.enter_context(_ray_environment(secured))
        stack.enter_context(_shutting_down())
        cpus = count_cpus() if num_cpus is None else num_cpus
        session_name = home.name.removeprefix(HOME_PREFIX)
        try:
            with ray_patches.private_start(
                home, session_name, workers=min(workers, cpus), announce=announce
            ) as dashboard:
                # Without an address Ray would follow a stale ray_current_cluster file, and may hang on it.
                ray_patches.init_ray("local", run, temp_dir=home / "ray", num_cpus=cpus, num_gpus=num_gpus)
        except Exception as error:
            try:  # Ray's own files may have taken the room
                _check_room(home)
            except OSError as full:
                raise _start_error(full, parent) from error
            raise _start_error(error, parent) from error
        yield _describe_session(token_path, sharing.description if sharing else None, late_dashboard=dashboard)


@contextlib.contextmanager
def _shutting_down() -> Iterator[None]:
    """Shut Ray down after a ``with`` block, and keep it from printing its logs until then."""
    import ray

    with ray_patches.quiet_logs():
        try:
            yield
        finally:
            with ray_patches.reaped_processes():
                ray.shutdown()


def _choose_parent(announce: Callable[[str], None]) -> Path:
    """Return the user's temporary folder, or /tmp if the paths of Ray's sockets would be too long there."""
    parent, wanted = tempfile.gettempdir(), os.environ.get("TMPDIR")
    if wanted and os.path.abspath(wanted) != parent:  # noqa: PTH100 - as tempfile does it
        announce(f"Ray's files go to {parent}: TMPDIR ({wanted}) is full, or no folder that you may write to")
    length = len(os.fsencode(parent))
    if length > MOST_PARENT_BYTES:
        announce(
            f"Ray's files go to /tmp: the path of the temporary folder {parent} is too long for Ray's sockets "
            f"({length} bytes, at most {MOST_PARENT_BYTES}); a shorter TMPDIR moves them"
        )
        parent = "/tmp"  # noqa: S108 - a private folder is made in it
    return Path(parent)


def _check_room(home: Path) -> None:
    """Raise OSError if Ray's files have no room: Ray would write pages of log, and fail after half a minute."""
    probe = home / "room"
    try:
        probe.write_bytes(bytes(ROOM_BYTES))  # only a write reveals the user's quota
    finally:
        probe.unlink(missing_ok=True)


def _start_error(error: Exception, parent: Path | None) -> StartError:
    reason = describe_error(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f"{ROOM_BYTES // 2**20} MiB"
        reason = f"the temporary folder {parent} is full; free {needed} there, or set TMPDIR to another"
    return StartError(f"Ray did not start: {reason}")


def _extend_python_path() -> str | None:
    """Return a ``PYTHONPATH`` from which workers can import this package even if it is not installed."""
    before, folder = os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2])
    if folder in (*sysconfig.get_paths().values(), *(before or "").split(os.pathsep)):
        return before
    return f"{before}{os.pathsep}{folder}" if before else folder


@contextlib.contextmanager
def _joined_ray(address: str, run: str, modules: tuple[ModuleType, ...]) -> Iterator[None]:
    """Join a cluster that is already running."""
    import tune_amp

    address = resolve_address(address)
    runtime_env = {"py_modules": [_find_source(module) for module in (tune_amp, *modules)]}
    settings: dict[str, str | None] = {**ray_patches.ONE_CONNECTION_ATTEMPT}
    if "RAY_AUTH_MODE" not in os.environ and (Path.home() / ".ray" / "auth_token").exists():
        # Joining by address never turns authentication on: Ray would wait, then fail without a reason.
        settings["RAY_AUTH_MODE"] = "token"
    with _ray_environment(settings), _shutting_down():
        import ray

        try:
            host, _, port = address.rpartition(":")
            if port.isdecimal():  # not "auto"; if nothing listens there, Ray would retry for a quarter of an hour
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray_patches.init_ray(address, run, runtime_env=runtime_env)
        except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = hide_credentials(describe_error(error))
            raise InputError(
                f"--address: {hide_credentials(address)} cannot be joined ({reason}); a cluster that requires a token "
                "needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; it is joined from a node of "
                "the cluster, and from elsewhere a search is submitted to it (ray job submit)"
            ) from error
        yield


def resolve_address(address: str) -> str:
    """Return the address that Ray will join. For ``auto``, the variable ``RAY_ADDRESS`` takes precedence.

    Raises:
        InputError: the address is neither ``auto`` nor ``host:port``. With ``local``, Ray would start a cluster that is
            open to all.
    """
    joined = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if joined.startswith("ray://"):  # Tune would run in a process of the cluster, and the recorder would stay here
        raise InputError(
            f"--address: {hide_credentials(joined)} is not supported, because a search runs on a node of the cluster; "
            f"submit it there: {JOB_EXAMPLE}"
        )
    host, _, port = joined.rpartition(":")
    if joined != "auto" and (not host or not port.isdecimal() or "://" in host):
        raise InputError(f"--address: must be auto or host:port, got {hide_credentials(joined)}")
    return joined


def _find_source(module: ModuleType) -> str:
    """Return the folder of a package, or the file of a single module."""
    if hasattr(module, "__path__"):
        return str(module.__path__[0])
    assert module.__file__ is not None
    return module.__file__


def _describe_session(
    token_path: Path | None = None, mps: str | None = None, late_dashboard: ray_patches.LateDashboard | None = None
) -> RaySession:
    import ray

    url, address = ray_patches.find_dashboard(), ray.get_runtime_context().gcs_address
    is_private = late_dashboard is not None
    return RaySession(
        dashboard_url=url,
        token_path=token_path,
        authenticated=_is_refused_by_server(address) is not False if is_private else _requires_token(address, url),
        mps=mps,
        late_dashboard=late_dashboard,
    )


def _find_dashboard(session: RaySession) -> RaySession:
    """Return the session with the dashboard that has started since."""
    url = ray_patches.find_dashboard()
    is_open = url is not None and _is_refused_by_dashboard(url) is False
    return dataclasses.replace(session, dashboard_url=url, authenticated=session.authenticated and not is_open)


def _requires_token(address: str, dashboard_url: str | None) -> bool:
    """Whether Ray refuses requests without a token. Send real requests: local settings do not show what a cluster does.

    A cluster with TLS but without tokens still has an open dashboard. If no server answers, nothing is known: False.
    """
    refusals = [_is_refused_by_server(address), _is_refused_by_dashboard(dashboard_url) if dashboard_url else None]
    return True in refusals and False not in refusals


def _is_refused_by_dashboard(url: str) -> bool | None:
    """Whether the dashboard requires a token; None if its answer does not show it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/version", timeout=REPLY_SECONDS) as answer:
            return None if "ray_version" not in json.load(answer) else False
    except urllib.error.HTTPError as error:
        return True if error.code in (401, 403) else None
    except (OSError, ValueError, TypeError, http.client.HTTPException):  # not reachable, or something other than Ray
        return None


def _is_refused_by_server(address: str) -> bool | None:
    """Whether Ray's GCS requires a token; None if its answer does not show it."""
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(ray_patches.LIST_KEYS)(b"", timeout=REPLY_SECONDS)
        except grpc.RpcError as error:
            return True if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return False


@contextlib.contextmanager
def _ray_environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables for a ``with`` block, such that Ray sees them even if it was imported before."""
    try:
        with _environment(settings):
            ray_patches.read_environment_again()
            yield
    finally:
        ray_patches.read_environment_again()  # otherwise the next session of this process would still use this token


@contextlib.contextmanager
def _environment(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables for a ``with`` block; None removes a variable."""
    before = dict(os.environ)
    _set_environment(settings)
    try:
        yield
    finally:
        # Restore all variables, because Ray leaves some of its own behind: one would redirect breakpoint().
        _set_environment({name: before.get(name) for name in {*before, *os.environ}})


def _set_environment(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value
