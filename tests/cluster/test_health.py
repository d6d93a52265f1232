import socket
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tune_amp.cluster.health import RayHealth


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, socket.socket]]:
    """The raylet and the GCS of a cluster, as far as one sees of them that they live."""
    raylet, gcs = socket.socket(socket.AF_UNIX), socket.socket()
    raylet.bind(str(tmp_path / "raylet"))
    gcs.bind(("127.0.0.1", 0))
    node = types.SimpleNamespace(
        all_processes={},
        raylet_socket_name=str(tmp_path / "raylet"),
        gcs_address=f"127.0.0.1:{gcs.getsockname()[1]}",
    )
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    with raylet, gcs:
        raylet.listen()
        gcs.listen()
        yield {"raylet": raylet, "gcs_server": gcs}


@pytest.mark.parametrize("dies", ["raylet", "gcs_server"])
def test_death_of_what_a_cluster_offers_is_noticed(joined: dict[str, socket.socket], dies: str) -> None:
    health = RayHealth()
    assert health.find_dead_process() is None
    joined[dies].close()
    assert health.find_dead_process() == dies


@pytest.mark.parametrize("dies", ["raylet", "gcs_server"])
def test_death_of_a_process_of_a_private_ray_is_noticed(dies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = {"raylet": None, "gcs_server": None, "dashboard": 1}  # exit codes
    node = ray._private.node.Node.__new__(ray._private.node.Node)
    processes = {name: types.SimpleNamespace(poll=lambda name=name: ended[name]) for name in ended}
    node.all_processes = {name: [types.SimpleNamespace(process=process)] for name, process in processes.items()}
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    health = RayHealth()
    assert health.find_dead_process() is None
    ended[dies] = 1
    assert health.find_dead_process() == dies


def test_raylet_that_cannot_be_seen_from_here_is_not_dead(joined: dict[str, socket.socket]) -> None:
    joined["raylet"].close()
    assert RayHealth().find_dead_process() is None
