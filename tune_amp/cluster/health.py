"""Looks whether the processes of Ray still live without which a search would wait for ever."""

import socket
from pathlib import Path
from typing import Any


class Vitals:
    """Looks whether the Ray that a search needs still lives.

    Nothing would be told of its death: without its own raylet Ray waits for ever, without a cluster's it ends this
    process after ten seconds, and without the GCS after a minute.
    """

    def __init__(self) -> None:
        self._heard_raylet = False

    def find_dead(self) -> str | None:
        """Which process has died without being asked to, such as ``raylet``; None where all live."""
        import ray

        node: Any = ray._private.worker._global_node  # noqa: SLF001 - nothing public tells
        if node is None:
            return None
        if not node.all_processes:
            return self._find_dead_of_cluster(node)
        vital = ("gcs_server", "raylet")
        return next((name for name, _ in node.dead_processes() if name in vital), None)

    def _find_dead_of_cluster(self, node: Any) -> str | None:
        # The kernel's list, where there is one, tells of the raylet without disturbing it.
        sockets = Path("/proc/net/unix")
        listens = sockets.exists() and node.raylet_socket_name in sockets.read_text()
        self._heard_raylet = self._heard_raylet or listens
        if self._heard_raylet and not listens:
            return "raylet"
        host, _, port = node.gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        except ConnectionRefusedError:
            return "gcs_server"
        except OSError:  # a network that fails for a moment is Ray's to judge
            return None
        return None
