"""A Ray cluster whose nodes are all on this machine, in a process of its own: nodes can be added and lost.

It listens on loopback, asks for a token, and keeps its files in a folder of its own.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HOST = """
import json, os, sys, signal
from ray.cluster_utils import Cluster

def tell(**told):
    print(json.dumps(told), file=answers, flush=True)

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray prints
nodes = {}
cluster = Cluster(shutdown_at_exit=True)

def add(head, **settings):
    node = cluster.add_node(wait=True, **settings)
    nodes[node.node_id] = node
    raylet = [info.process.pid for kind, infos in node.all_processes.items() if kind == "raylet" for info in infos]
    tell(node=node.node_id, raylet=raylet[0], gcs=cluster.address, dashboard=node.webui_url if head else None)

for line in sys.stdin:
    request = json.loads(line)
    order = request.pop("order")
    if order == "add":
        add(cluster.head_node is None, **request)
    elif order == "remove":
        cluster.remove_node(nodes.pop(request["node"]), allow_graceful=True)
        tell(removed=request["node"])
cluster.shutdown()
tell(ended=True)
"""


class SimulatedCluster:
    """A cluster for the length of a ``with`` block.

    Args:
        head: what the first node offers, and other arguments of ``ray.cluster_utils.Cluster.add_node``.
        search_path: entries of ``PYTHONPATH`` of the nodes' workers; empty for what this process was given.
    """

    def __init__(self, *, search_path: str | None = None, **head: Any) -> None:
        # Unix sockets below this folder must stay under 107 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="sim", dir="/tmp", ignore_cleanup_errors=True)
        home = Path(self._folder.name)
        (home / "token").touch(mode=0o600)
        (home / "token").write_text(secrets.token_hex(32))
        (home / "home").mkdir()
        self.environment: Mapping[str, str] = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": str(home),
            "HOME": str(home / "home"),
        }
        """What a process that joins must have in its environment."""
        # The nodes share two cores with whatever is tested: one that is only slow must not count as lost,
        # but neither should each test wait half a minute for a lost one.
        patience = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "10"}
        outside = {} if search_path is None else {"PYTHONPATH": search_path}
        self.log = home / "cluster.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", HOST],
                env=os.environ | self.environment | patience | outside,
                cwd=home,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._raylets: dict[str, int] = {}
        self._started = 0
        try:
            first = self._add(
                {"dashboard_port": find_free_port(), "dashboard_agent_listen_port": find_free_port(), **head}
            )
        except AssertionError:
            self.close()
            raise
        self.head: str = first["node"]
        self.address: str = first["gcs"]
        """host:port, for ``--address``."""
        self.dashboard: str = first["dashboard"]

    def add_node(self, **settings: Any) -> str:
        """Add a node; returns its id."""
        return str(self._add(settings)["node"])

    def remove_node(self, node: str) -> None:
        """Take a node away that had time to say so."""
        del self._raylets[node]
        self._ask(order="remove", node=node)

    def kill_part(self, name: str) -> None:
        """SIGKILL to a process of the first node: ``raylet`` or ``gcs_server``."""
        if name == "raylet":
            os.kill(self._raylets[self.head], signal.SIGKILL)
            return
        listed = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        [pid] = [pid for pid in listed if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]]
        os.kill(int(pid), signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """SIGKILL to the node's raylet and its workers: nobody is told, but their connections break at once."""
        raylet = self._raylets.pop(node)
        workers = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        for process in (raylet, *map(int, workers)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        """End all nodes."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        # Nodes that share a folder unpack the same packages over each other.
        self._started += 1
        own = {} if self._started == 1 else {"temp_dir": f"{self._folder.name}/n{self._started}"}
        smallest = {**own, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        told = self._ask(order="add", **{**smallest, **settings})
        self._raylets[told["node"]] = told["raylet"]
        return told

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        told: dict[str, Any] = json.loads(line)
        return told


def find_free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
