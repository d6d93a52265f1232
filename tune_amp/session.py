"""Starts a private Ray on this machine, or joins a cluster, and says how to watch it.

Knows nothing of trials. Ray is imported inside the functions, because parts of it read the environment on import.
"""

import contextlib
import dataclasses
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tune_amp.config import InputError

# Tune's own reporter, per-trial log files and change of folder: all replaced by, or in the way of, ours.
QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaySession:
    """A running Ray, as the search and its user need to know it."""

    resources: Mapping[str, float]
    """What the cluster can schedule: ``CPU``, ``GPU`` and others."""
    dashboard_url: str | None
    token_path: Path | None
    """File with the token that the dashboard asks for; None where we did not start Ray."""


@contextlib.contextmanager
def ray_session(
    address: str | None = None,
    *,
    run: str = "tune_amp",
    modules: tuple[ModuleType, ...] = (),
    num_cpus: int | None = None,
    num_gpus: int | None = None,
) -> Iterator[RaySession]:
    """Ray for the length of a ``with`` block: the one already started in this process, a cluster's, or a private one.

    A private Ray listens on loopback only, asks for a token, and leaves nothing behind.

    Args:
        address: ``auto``, ``host:port`` or ``ray://host:port`` to join a cluster; None for a private Ray.
        run: name shown in the dashboard's list of jobs.
        modules: packages that the workers of a joined cluster need and may not have.
        num_cpus: what a private Ray is to offer instead of what it finds; so ``num_gpus``.
        num_gpus: see ``num_cpus``.

    Raises:
        InputError: ``address`` cannot be joined.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(QUIET_TUNE))
        if "ray" in sys.modules and _ray_is_initialized():
            yield _describe_session(token_path=None)
        elif address is None:
            token_path = stack.enter_context(_private_ray(run, num_cpus, num_gpus))
            yield _describe_session(token_path)
        else:
            stack.enter_context(_joined_ray(address, run, modules))
            yield _describe_session(token_path=None)


@contextlib.contextmanager
def _private_ray(run: str, num_cpus: int | None, num_gpus: int | None) -> Iterator[Path]:
    """Start Ray for us alone; yields the token's path."""
    # Unix sockets below this folder must stay under 107 characters, so it is short; mkdtemp makes it 0700.
    home = Path(tempfile.mkdtemp(prefix="tune_amp_", dir=_short_temporary_folder()))
    token_path = home / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32))
    secured = {
        # On Linux this makes the node's own address the loopback one: GCS, raylet and workers listen nowhere else.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
    }
    with _environment(secured):
        imported_before = "ray" in sys.modules
        import ray

        if imported_before:
            _read_environment_again()
        try:
            # Without an address Ray would obey a stale ray_current_cluster file, and can hang on it.
            _init_ray("local", run, num_cpus=num_cpus, num_gpus=num_gpus, _temp_dir=str(home / "ray"))
            yield token_path
        finally:
            ray.shutdown()
            shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _joined_ray(address: str, run: str, modules: tuple[ModuleType, ...]) -> Iterator[None]:
    """Join a cluster that somebody else started."""
    import ray

    import tune_amp

    if "RAY_AUTH_MODE" not in os.environ and _default_token().exists():
        # Joining by address never turns authentication on by itself: it would wait, then fail without a reason.
        os.environ["RAY_AUTH_MODE"] = "token"
        _read_environment_again()
    try:
        _init_ray(address, run, runtime_env={"py_modules": [tune_amp, *modules]})
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"--address: {address} cannot be joined ({reason}); a cluster that asks for a token needs "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _init_ray(address: str, run: str, **options: Any) -> None:
    import ray
    from ray.job_config import JobConfig

    job = JobConfig(metadata={"tune_amp": run})
    ray.init(address, job_config=job, log_to_driver=False, logging_level=logging.ERROR, **options)


def _describe_session(token_path: Path | None) -> RaySession:
    import ray

    address = ray._private.worker.get_dashboard_url()  # noqa: SLF001 - ray.init's context is not ours where Ray ran before
    dashboard_url = f"http://{address}" if address else None
    return RaySession(resources=ray.cluster_resources(), dashboard_url=dashboard_url, token_path=token_path)


def _ray_is_initialized() -> bool:
    import ray

    return bool(ray.is_initialized())


def _read_environment_again() -> None:
    """Where Ray was imported before the environment was set: what it read on import is read again."""
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    if os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR) == "0":
        ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")


def _default_token() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _short_temporary_folder() -> str:
    """The user's temporary folder where its path is short enough for sockets, /tmp elsewhere."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= len("/var/folders") else "/tmp"  # noqa: S108 - mkdtemp makes a private folder in it


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the length of a ``with`` block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
