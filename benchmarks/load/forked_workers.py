"""Workers of a private Ray that are forked from one process, and so share the memory of what it has imported.

A worker that imports torch for itself has 400 MB to itself: 64 of them do not fit a small machine, whatever resources
Ray is told of. Forked ones share the modules until they write to them, and have 50 MB each. For measuring a search
under load alone: only how workers of Ray come to life is changed.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER_FILE = "setup_worker.py"
READY = b"ready"
HEAD_BYTES = 8
DRAWS_APART = 64
"""Random ids by which the workers' are apart: each draws one as it starts."""

# Runs instead of Python wherever Ray starts one. A worker it asks for, and lives as long as that.
STUB = """\
#!{python} -IS
import json, os, socket, sys
if not any(name.endswith("{worker_file}") for name in sys.argv[1:2]):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
request = json.dumps({{"arguments": sys.argv[2:], "environment": dict(os.environ)}}).encode()
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
    server.connect("{address}")
    socket.send_fds(server, [len(request).to_bytes({head}, "big")], [0, 1, 2])
    server.sendall(request)
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""


@contextlib.contextmanager
def forking_workers(modules: Sequence[str]) -> Iterator[None]:
    """In the ``with`` block, a private Ray gets its workers from a process that imports torch and ``modules`` once."""
    with tempfile.TemporaryDirectory(prefix="workers_") as name:
        stub, address = Path(name) / "python", Path(name) / "socket"
        python = sys.executable
        text = STUB.format(python=python, worker_file=WORKER_FILE, address=address, head=HEAD_BYTES)
        stub.write_text(text, encoding="utf-8")
        stub.chmod(0o700)
        command = [python, "-m", "benchmarks.load.forked_workers", str(address), *modules]
        # Threads would not be there in a fork: numpy's would start with its import.
        alone = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=alone) as server:  # noqa: S603
            assert server.stdin is not None
            assert server.stdout is not None
            if server.stdout.readline().strip() != READY:
                raise RuntimeError("the process that forks workers has not started")
            sys.executable = str(stub)  # what Ray's node starts its processes with
            try:
                yield
            finally:
                sys.executable = python
                server.stdin.close()  # at which it ends


def serve(address: str, modules: Sequence[str]) -> None:
    """Fork a worker for each request, and answer with its exit code, until standard input is closed."""
    waiting: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(address)
        server.listen(256)
        sys.stdout.buffer.write(READY + b"\n")
        sys.stdout.flush()
        number = 0
        while True:
            readable, _, _ = select.select([server, sys.stdin], [], [], 0.1)
            if sys.stdin in readable:
                return
            if server in readable:
                client, _ = server.accept()
                request, descriptors = _receive(client)
                if number == 0:
                    _prepare(request, modules)
                pid = os.fork()
                if pid == 0:
                    server.close()
                    _become_worker(request, descriptors, number)
                number += 1
                for descriptor in descriptors:
                    os.close(descriptor)
                waiting[pid] = client
            _answer_ended(waiting)


def _prepare(request: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Import what all workers share, now that the environment of the first is known: Ray reads parts of it only once.

    These are the job and the raylet, which all have in common.
    """
    _take_environment(request)
    for module in ("ray", *modules):
        importlib.import_module(module)
    import ray

    # Its first call moves the environment, and would look for it where it was when the process began.
    ray._raylet.setproctitle("tune_amp: forks workers")  # type: ignore[attr-defined]  # noqa: SLF001
    ray.ObjectRef.from_random()  # seeds Ray's generator
    gc.collect()
    gc.freeze()  # else the first collection in each worker would write to every object


def _take_environment(request: Mapping[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])


def _answer_ended(waiting: dict[int, socket.socket]) -> None:
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with waiting.pop(pid) as client, contextlib.suppress(OSError):  # whoever waited may be gone
            client.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))


def _become_worker(request: Mapping[str, Any], descriptors: Sequence[int], number: int) -> None:
    """Do in the fork of this number what ``setup_worker.py`` does in a new process; does not return."""
    code = 1
    try:
        for place, descriptor in enumerate(descriptors):
            os.dup2(descriptor, place)
            os.close(descriptor)
        os.setsid()
        _take_environment(request)
        _draw_apart(number)
        _run_worker(request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _draw_apart(number: int) -> None:
    """Let forks draw different random ids: of 64, two gave an object the same, and Ray ended one of them."""
    import ray

    for _ in range(number * DRAWS_APART):
        ray.ObjectRef.from_random()


def _run_worker(arguments: Sequence[str]) -> None:
    from ray._private.runtime_env.context import RuntimeEnvContext

    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context")
    parser.add_argument("--language")
    known, rest = parser.parse_known_args(arguments)
    os.environ.update(RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}").env_vars)
    sys.argv = rest
    runpy.run_path(rest[0], run_name="__main__")


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, and the three standard streams of whoever asks."""
    head, descriptors, _, _ = socket.recv_fds(client, HEAD_BYTES, 3)
    size, received = int.from_bytes(head, "big"), b""
    while len(received) < size:
        part = client.recv(size - len(received))
        if not part:
            raise EOFError("the request was cut off")
        received += part
    return json.loads(received), descriptors


if __name__ == "__main__":
    import torch  # noqa: F401 - what takes longest: ahead of the first request

    serve(sys.argv[1], sys.argv[2:])
