"""Provides CUDA MPS to the trials that share a GPU: by the daemon that already runs, or by a private one.

Without MPS, kernels of different processes never run at the same time: a GPU switches from process to process.

``CUDA_MPS_PINNED_DEVICE_MEM_LIMIT`` is not set: a trial's share of the memory is chosen after Ray has started, and
``resources.cap_memory`` limits it in PyTorch.

Source: https://docs.nvidia.com/deploy/mps/
"""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tune_amp.trial.config import InputError
from tune_amp.trial.text import one_line

PROGRAM = "nvidia-cuda-mps-control"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"
LOGS = "CUDA_MPS_LOG_DIRECTORY"
ANSWER_SECONDS = 5.0
"""Seconds for a daemon to answer a question."""
START_SECONDS = 30.0
"""Seconds for a daemon to start, and for the first CUDA program under it, which starts its server."""
QUIT_SECONDS = 10.0
"""Seconds for a daemon to end."""

# The CUDA driver alone makes a context within a second; importing torch takes longer.
CLIENT = """
import ctypes, sys
cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
calls = cuda.cuInit, cuda.cuDeviceGet, cuda.cuDevicePrimaryCtxRetain
arguments = (0,), (ctypes.byref(device), 0), (ctypes.byref(context), device)
for call, values in zip(calls, arguments):
    if error := call(*values):
        sys.exit(f"{call.__name__}: CUDA error {error}")
"""
"""A program that uses a GPU, in a process of its own: this process never makes a CUDA context."""

# Standard input ends with the block, and with this process, even if it is killed.
QUIT_AT_THE_END = f"cat >/dev/null; exec {PROGRAM} <<END\nquit\nEND\n"


class MpsError(RuntimeError):
    """MPS cannot be had; the text is the reason, in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mps:
    """How processes that share a GPU use it."""

    variables: Mapping[str, str]
    """Environment variables that lead them to a private daemon; empty if there is none."""
    description: str
    """Explanation for the user, in one line."""


@contextlib.contextmanager
def provide_mps(wanted: str, home: Path) -> Iterator[Mps]:
    """Provide MPS for a ``with`` block. A daemon that already runs is used as it is, and never ended.

    Args:
        wanted: ``on``; ``auto``, which continues without MPS if it cannot be had; or ``off``.
        home: a private folder with a short path, for the files and sockets of a private daemon.

    Raises:
        InputError: it is wanted ``on``, and cannot be had.
    """
    with contextlib.ExitStack() as stack:
        variables: Mapping[str, str] = {}
        try:
            if wanted == "off":
                description = "--mps off: no MPS daemon was started, or looked for"
            elif list_servers() is not None:
                description = "the MPS daemon that already runs is used as it is"
            else:
                variables = stack.enter_context(_private_daemon(home))
                description = "private MPS: trials that share a GPU compute at the same time"
        except MpsError as error:
            if wanted == "on":
                raise InputError(f"--mps: on needs MPS, which cannot be had ({error}); auto searches without") from None
            description = f"no MPS ({error}): GPU processes take turns, so sharing gains little"
        yield Mps(variables=variables, description=description)


def list_servers(environment: Mapping[str, str] | None = None) -> list[int] | None:
    """Return the process ids of the servers of the daemon in ``environment``; None if no daemon answers."""
    try:
        done = _ask("get_server_list", environment, ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.split()
    return [int(word) for word in words] if done.returncode == 0 and all(map(bytes.isdigit, words)) else None


def _ask(question: str, environment: Mapping[str, str] | None, timeout: float) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # noqa: S603 - NVIDIA's program, as the user's PATH finds it
        [PROGRAM],
        input=f"{question}\n".encode(),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        check=False,
    )


@contextlib.contextmanager
def _private_daemon(home: Path) -> Iterator[dict[str, str]]:
    """Run a daemon of this process's own for a ``with`` block; yield the variables that lead to it.

    It serves the GPUs that ``CUDA_VISIBLE_DEVICES`` names by UUID. Indices are not passed on, because a daemon
    renumbers its GPUs from 0, while Ray gives the original indices to its workers: the daemon serves all GPUs then.

    Raises:
        MpsError: it does not start, or CUDA programs do not reach it.
    """
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if shutil.which(PROGRAM) is None:
        raise MpsError(f"{PROGRAM} is not on PATH")
    if PIPES in os.environ:
        raise MpsError(f"no daemon answers at {PIPES}, which is set")
    if len(visible) > 1 and visible[0].startswith("MIG-"):
        raise MpsError("a daemon serves one MIG slice only")
    variables = {PIPES: str(home / "mps"), LOGS: str(home / "mps-logs")}
    for folder in variables.values():
        os.mkdir(folder, mode=0o700)  # noqa: PTH102 - a text
    environment = {**os.environ, **variables}
    with _quitting(environment):
        by_uuid = all(name.startswith(("GPU-", "MIG-")) for name in visible)
        served = {name: value for name, value in environment.items() if by_uuid or name != "CUDA_VISIBLE_DEVICES"}
        _run("the daemon", [PROGRAM, "-d"], served, home / "mps-start")
        deadline = time.monotonic() + ANSWER_SECONDS
        while list_servers(environment) is None:  # it starts in the background
            if time.monotonic() > deadline:
                raise MpsError("the daemon does not answer")
            time.sleep(0.1)
        _run("a CUDA program", [sys.executable, "-c", CLIENT], environment, home / "mps-client")
        if not list_servers(environment):  # CUDA does without MPS if it does not reach the daemon
            raise MpsError("a CUDA program did not reach the daemon")
        yield variables


def _run(name: str, command: list[str], environment: Mapping[str, str], output: Path) -> None:
    """Run a command to its end. Its output goes to a file: a daemon may keep a pipe open.

    Raises:
        MpsError: it fails, or takes too long.
    """
    with output.open("xb") as file:
        try:
            done = subprocess.run(  # noqa: S603 - a constant of this module
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=START_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MpsError(f"{name} took longer than {START_SECONDS:g} s") from None
    if done.returncode:
        said = output.read_text(errors="replace").strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise MpsError(f"{name} failed: {one_line(said)}")


@contextlib.contextmanager
def _quitting(environment: Mapping[str, str]) -> Iterator[None]:
    """Send ``quit`` to the daemon in ``environment`` after a ``with`` block, and if this process is killed in it."""
    quitter = subprocess.Popen(  # noqa: S603 - a constant of this module
        ["/bin/sh", "-c", QUIT_AT_THE_END],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process
    )
    with quitter, contextlib.ExitStack() as stack:
        stack.callback(quitter.kill)  # what waits to send quit; never the daemon
        try:
            yield
        finally:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                _ask("quit", environment, QUIT_SECONDS)
