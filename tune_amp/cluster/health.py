"""Checks that the Ray processes that a search depends on are still alive."""

import socket
from pathlib import Path

from tune_amp.cluster import ray_patches


class RayHealth:
    """Checks that the Ray processes that a search depends on are still alive.

    Ray does not report their death. If a private raylet dies, Ray waits forever. If a cluster's raylet dies, Ray ends
    this process after ten seconds; if the GCS dies, after a minute.
    """

    def __init__(self) -> None:
        self._has_seen_raylet = False

    def find_dead_process(self) -> str | None:
        """Return the name of a process that died unexpectedly, such as ``raylet``; None if all are alive."""
        node = ray_patches.find_node()
        if node is None:
            return None
        if node.all_processes:
            return ray_patches.find_dead(node)
        # The kernel's list of sockets, if there is one, shows whether the raylet listens, without disturbing it.
        sockets = Path("/proc/net/unix")
        listens = sockets.exists() and node.raylet_socket_name in sockets.read_text()
        self._has_seen_raylet = self._has_seen_raylet or listens
        if self._has_seen_raylet and not listens:
            return "raylet"
        host, _, port = node.gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        except ConnectionRefusedError:
            return "gcs_server"
        except OSError:  # Ray itself handles a network that fails for a moment
            pass
        return None
