"""How trials share a GPU is measured once, and read from the user's cache folder the next time."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from tune_amp.cluster import resources, share_cache
from tune_amp.cluster.gpu_sharing import MeasurementError, SharedGpu, ShareMeasurement
from tune_amp.cluster.resources import TrialResources
from tune_amp.search import plan
from tune_amp.search.options import SearchOptions
from tune_amp.space.space import SearchSpace
from tune_amp.training.data import Dataset, Split
from tune_amp.trial.config import TrialConfig

MEASURED = (
    ShareMeasurement(trials=1, samples_per_second=100.0, trial_memory_bytes=2**30),
    ShareMeasurement(trials=2, samples_per_second=190.0, trial_memory_bytes=2**30),
)
H200 = "NVIDIA H200, 143771 MiB, 570.86.15"


@dataclasses.dataclass
class Meter:
    """A stand-in for the measurement, which counts its calls."""

    calls: int = 0

    def __call__(self, *arguments: Any, **options: Any) -> tuple[ShareMeasurement, ...]:
        self.calls += 1
        return MEASURED


class Machine:
    """A machine with a GPU, as ``nvidia-smi`` and torch describe it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder / "cache" / "tune_amp", monkeypatch
        self._program = folder / "nvidia-smi"
        self.meter = Meter()
        self.describe(f"{H200}, Disabled")
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        monkeypatch.setattr(resources, "measure_shares", self.meter)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        device = type("Properties", (), {"total_memory": 139 * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
        monkeypatch.setattr(share_cache, "list_servers", lambda: None)

    def describe(self, *lines: str) -> None:
        text = "\n".join(lines)
        self._program.write_text(f"#!/bin/sh\ncat <<END\n{text}\nEND\n")
        self._program.chmod(0o755)

    def measure(
        self, *, images: int = 64, counts: Sequence[int] = (1, 2, 4), keep: bool = True, **settings: Any
    ) -> SharedGpu:
        split = Split(images=np.zeros((images, 1, 4, 4), np.uint8), labels=np.zeros(images, np.int64))
        config = TrialConfig(**{"batch_size": 32, **settings})
        return resources._measure_here(split, config, 2, counts, (), (), keep)

    @property
    def file(self) -> Path:
        [path] = self.folder.iterdir()
        return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_second_search_does_not_measure_and_says_when_it_was_measured_and_how_to_measure_again(
    machine: Machine,
) -> None:
    first, second = machine.measure(), machine.measure()
    assert machine.meter.calls == 1
    assert (first.trials, second.trials) == (2, 2)
    assert first.reason == "2 trials on a GPU train 1.9 times as fast as one; the largest needs 1 of 139 GiB"
    note = rf"; measured on \d{{4}}-\d\d-\d\d: delete {re.escape(str(machine.file))} to measure again"
    assert re.fullmatch(re.escape(first.reason) + note, second.reason)
    assert machine.file.stat().st_mode & 0o777 == 0o600
    machine.file.unlink()
    assert machine.measure() == first
    assert machine.meter.calls == 2


def test_seed_does_not_matter(machine: Machine) -> None:
    machine.measure(seed=1)
    machine.measure(seed=2)
    assert machine.meter.calls == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 64},
        {"model": "vit"},
        {"dataset": "kmnist"},
        {"max_epochs": 9},
        {"images": 65},
        {"counts": (1, 2)},
    ],
    ids=str,
)
def test_what_else_is_trained_is_measured_again(machine: Machine, changed: dict[str, Any]) -> None:
    machine.measure()
    machine.measure(**changed)
    assert machine.meter.calls == 2


@pytest.mark.parametrize("gpu", [H200.replace("200", "100"), H200.replace("143", "80"), H200.replace("570", "580")])
def test_another_gpu_or_driver_is_measured_again(machine: Machine, gpu: str) -> None:
    machine.measure()
    machine.describe(f"{gpu}, [N/A]")
    machine.measure()
    assert machine.meter.calls == 2
    machine.describe(f"{H200}, Disabled")
    machine.measure()
    assert machine.meter.calls == 2


def test_another_torch_and_mps_are_measured_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.measure()
    monkeypatch.setattr(share_cache, "list_servers", list[int])
    machine.measure()
    monkeypatch.setattr(torch, "__version__", "99.0")
    machine.measure()
    assert machine.meter.calls == 3


def test_another_cpu_or_version_of_ours_and_another_gpu_beside_it_are_measured_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.measure()
    monkeypatch.setattr("os.cpu_count", lambda: 1234)
    machine.measure()
    monkeypatch.setattr(share_cache, "__version__", "99.0")
    machine.measure()
    other = H200.replace("200", "100")
    for lines in ([f"{H200}, Disabled", f"{other}, Disabled"], [f"{other}, Disabled", f"{H200}, Disabled"]):
        machine.describe(*lines)  # in either order
        machine.measure()
    assert machine.meter.calls == 4


@pytest.mark.parametrize(
    "lines", [["NVIDIA H200, 143771 MiB, 570.86.15, Enabled"], [f"{H200}, Disabled", f"{H200}, Enabled"], [""]]
)
def test_gpu_that_is_not_known_for_sure_is_always_measured(machine: Machine, lines: list[str]) -> None:
    machine.describe(*lines)
    for _ in range(2):
        machine.measure()
    assert machine.meter.calls == 2
    assert not machine.folder.exists()


def test_without_nvidia_smi_it_is_always_measured(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "cache"))
    for _ in range(2):
        machine.measure()
    assert machine.meter.calls == 2


def test_failed_measurement_is_not_kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise MeasurementError("its process died")

    with monkeypatch.context() as patch:
        patch.setattr(resources, "measure_shares", fail)
        assert machine.measure().reason == "not measured (its process died)"
    assert not machine.folder.exists()
    assert machine.measure().trials == 2


Damage = Callable[[dict[str, Any]], Any]


def change(row: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    return kept | {"measurements": [kept["measurements"][0], kept["measurements"][1] | row]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: [],
        lambda kept: None,
        lambda kept: kept | {"key": {}},
        lambda kept: kept | {"date": "\x1b[2J"},
        lambda kept: kept | {"date": 1},
        lambda kept: kept | {"measurements": []},
        lambda kept: kept | {"measurements": kept["measurements"][1:]},
        lambda kept: kept | {"measurements": [1]},
        lambda kept: {"key": kept["key"], "date": kept["date"]},
        functools.partial(change, {"samples_per_second": float("nan")}),
        functools.partial(change, {"samples_per_second": 10**400}),
        functools.partial(change, {"samples_per_second": -1.0}),
        functools.partial(change, {"samples_per_second": "fast"}),
        functools.partial(change, {"trials": 3}),
        functools.partial(change, {"trial_memory_bytes": "all"}),
        functools.partial(change, {"other": 1}),
    ],
)
def test_file_that_was_changed_is_ignored_and_left_alone(machine: Machine, damage: Damage) -> None:
    first = machine.measure()
    machine.file.write_text(json.dumps(damage(json.loads(machine.file.read_text()))))
    before = machine.file.read_bytes()
    assert machine.measure() == first
    assert machine.meter.calls == 2
    assert machine.file.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"{", b"[" * 60_000, b" " * 70_000])
def test_file_that_is_no_json_of_ours_is_ignored(machine: Machine, content: bytes) -> None:
    first = machine.measure()
    machine.file.write_bytes(content)
    assert machine.measure() == first
    assert machine.meter.calls == 2


def test_pipe_in_its_place_is_not_waited_for(machine: Machine) -> None:
    machine.measure()
    path = machine.file
    path.unlink()
    os.mkfifo(path)
    machine.measure()
    assert machine.meter.calls == 2


def test_folder_that_cannot_be_written_is_no_error(machine: Machine) -> None:
    machine.folder.parent.write_text("a file")
    for _ in range(2):
        assert machine.measure().trials == 2
    assert machine.meter.calls == 2


def test_user_without_a_home_folder_keeps_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert machine.measure().trials == 2


def no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_nothing_is_kept_unless_asked_for_or_without_cuda(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.measure(keep=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine.measure()
    assert not machine.folder.exists()


@pytest.mark.parametrize(
    ("options", "keep"),
    [({}, True), ({"model": "vit"}, True), ({"model": "mine:net"}, False), ({"task": "mine:Task"}, False)],
)
def test_what_is_the_users_own_is_always_measured(
    options: dict[str, Any],
    keep: bool,
    digits: Dataset,
    make_space: Callable[[str], SearchSpace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def allocate(nodes: object, *, choose_shared: Any, **more: Any) -> TrialResources:
        seen.append(choose_shared.keywords["keep"])
        return TrialResources(cpus=1, gpus=1.0, max_concurrent=1, reason="")

    seen: list[bool] = []
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0, "GPU": 1.0})
    monkeypatch.setattr(plan, "list_nodes", list[object])
    monkeypatch.setattr(plan, "allocate_resources", allocate)
    space = make_space("parameters:\n  lr: {low: 1.0e-4, high: 1.0e-2}\n")
    plan.plan_resources(SearchOptions(**options), space, digits)
    assert seen == [keep]
