import itertools
import math
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tune_amp.cluster.gpu_sharing import CONTEXT_BYTES, SharedGpu
from tune_amp.cluster.resources import (
    LIST_NODES_SECONDS,
    TRIALS_PER_GPU,
    allocate_resources,
    cap_memory,
    count_gpus,
    count_slots,
    count_slots_now,
    double_share,
    memory_fraction,
)
from tune_amp.trial.config import InputError


def machine(cpus: float, gpus: float = 0.0) -> dict[str, float]:
    """As Ray tells it: without a GPU there is no such key."""
    resources = {"CPU": float(cpus), "memory": 1e10, "node:127.0.0.1": 1.0}
    return resources | ({"GPU": float(gpus)} if gpus else {})


@pytest.mark.parametrize(
    ("cpus", "gpus", "options", "expected"),
    [
        (2, 0, {}, (1, 0, 2)),
        (1, 0, {}, (1, 0, 1)),
        (16, 0, {"cpus_per_trial": 3}, (3, 0, 5)),
        (16, 1, {}, (1, 0.25, 4)),  # the rule: four to a GPU
        (2, 1, {}, (1, 0.5, 2)),  # but no more than CPUs can feed
        (1, 1, {}, (1, 1, 1)),
        (16, 1, {"cpus_per_trial": 8}, (8, 0.5, 2)),
        (3, 1, {}, (1, 0.3333, 3)),  # thrice a third fits
        (64, 8, {}, (1, 0.25, 32)),
        (8, 8, {}, (1, 1, 8)),
        (4, 8, {}, (1, 1, 4)),  # fewer CPUs than GPUs
        (20, 8, {}, (1, 0.5, 16)),
        (16, 2, {"gpus_per_trial": 1 / 3}, (1, 0.3333, 6)),
        (16, 2, {"gpus_per_trial": 0.3333}, (1, 0.3333, 6)),
        (16, 2, {"gpus_per_trial": 1 / 6}, (1, 0.1666, 12)),
        (16, 2, {"gpus_per_trial": 0.6}, (1, 0.6, 2)),  # a share never spans two GPUs
        (16, 2, {"gpus_per_trial": 0.5}, (1, 0.5, 4)),
        (16, 8, {"gpus_per_trial": 1}, (1, 1, 8)),
        (16, 8, {"gpus_per_trial": 0}, (1, 0, 16)),  # the CPU, although there are GPUs
        (16, 1, {"max_concurrent": 3}, (1, 0.3333, 3)),  # a fourth part would lie idle
        (16, 1, {"max_concurrent": 1}, (1, 1, 1)),
        (16, 2, {"max_concurrent": 3}, (1, 0.5, 3)),
        (16, 2, {"max_concurrent": 2}, (1, 1, 2)),
        (16, 1, {"num_samples": 2}, (1, 0.5, 2)),
        (16, 1, {"num_samples": 3, "max_concurrent": 2}, (1, 0.5, 2)),
        (16, 1, {"num_samples": 99}, (1, 0.25, 4)),
        (16, 0, {"num_samples": 2}, (1, 0, 16)),  # on the CPU there is nothing to give more of
        (16, 1, {"max_concurrent": 1, "gpus_per_trial": 0.125}, (1, 0.125, 1)),
        (16, 1, {"max_concurrent": 99}, (1, 0.25, 4)),
        (16, 0, {"max_concurrent": 1}, (1, 0, 1)),
    ],
)
def test_machine_is_divided_among_trials(
    cpus: int, gpus: int, options: dict[str, Any], expected: tuple[int, float, int]
) -> None:
    resources = allocate_resources([machine(cpus, gpus)], **options)
    assert (resources.cpus, resources.gpus, resources.max_concurrent) == expected


@pytest.mark.parametrize(
    ("cpus", "gpus", "reason"),
    [
        (1, 0, "1 trial at a time, 1 CPU each, of 0 GPUs and 1 CPUs"),
        (2, 0, "2 trials at a time, 1 CPU each, of 0 GPUs and 2 CPUs"),
        (16, 1, "4 trials at a time, 0.25 GPU and 1 CPU each, of 1 GPUs and 16 CPUs"),
    ],
)
def test_reason_says_what_each_trial_gets_of_what_there_is(cpus: int, gpus: int, reason: str) -> None:
    assert allocate_resources([machine(cpus, gpus)]).reason == reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_trial": 5}, "--cpus-per-trial: must be at most the 4 CPUs that Ray has, got 5"),
        ({"gpus_per_trial": 0.5}, "--gpus-per-trial: must be at most the 0 GPUs that Ray has, got 0.5"),
    ],
)
def test_request_that_can_never_be_met_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        allocate_resources([machine(4)], **options)
    assert str(caught.value) == message


@given(
    cpus=st.integers(1, 256),
    gpus=st.integers(0, 16),
    cpus_per_trial=st.none() | st.integers(1, 64),
    gpus_per_trial=st.none()
    | st.sampled_from([0.0, 1.0])
    | st.floats(0.0001, 1)
    | st.integers(1, 40).map(lambda n: 1 / n),
    max_concurrent=st.none() | st.integers(1, 300),
)
def test_trials_at_a_time_never_ask_for_more_than_there_is(
    cpus: int, gpus: int, cpus_per_trial: int | None, gpus_per_trial: float | None, max_concurrent: int | None
) -> None:
    try:
        resources = allocate_resources(
            [machine(cpus, gpus)],
            cpus_per_trial=cpus_per_trial,
            gpus_per_trial=gpus_per_trial,
            max_concurrent=max_concurrent,
        )
    except InputError:
        assert (cpus_per_trial or 1) > cpus or (gpus_per_trial or 0) > gpus
        return
    slots = resources.max_concurrent
    assert 1 <= slots <= (max_concurrent or slots)
    assert slots * resources.cpus <= cpus
    assert fits(resources.gpus, slots, gpus)
    if slots != max_concurrent:  # no slot is wasted: for one more there is no room
        assert (slots + 1) * resources.cpus > cpus or not fits(resources.gpus, slots + 1, gpus)


def fits(share: float, slots: int, gpus: int) -> bool:
    """In Ray's own arithmetic: whole ten-thousandths, a share of a GPU never on two."""
    parts = round(share * 10_000)
    return parts == 0 or slots <= gpus * (10_000 // parts)


@given(cpus=st.integers(1, 256), gpus=st.integers(1, 16))
def test_chosen_share_fills_every_gpu_as_far_as_the_cpus_reach(cpus: int, gpus: int) -> None:
    resources = allocate_resources([machine(cpus, gpus)])
    assert resources.max_concurrent == min(TRIALS_PER_GPU * gpus, max(cpus // gpus * gpus, min(cpus, gpus)))
    assert 0 < resources.gpus <= 1


@pytest.mark.parametrize(
    ("cpus", "gpus", "cpus_each", "gpus_each", "slots"),
    [
        (4, 0, 1, 0, 4),
        (4, 0, 3, 0, 1),
        (9, 3, 1, 0.3333, 9),
        (99, 3, 1, 0.6, 3),
        (99, 7, 2, 1, 7),
        (2, 8, 1, 0.25, 2),
        (0, 1, 1, 0.5, 0),
        (4, 0, 1, 0.5, 0),
    ],
)
def test_slots_are_what_both_cpus_and_gpus_of_a_node_allow(
    cpus: int, gpus: float, cpus_each: int, gpus_each: float, slots: int
) -> None:
    assert count_slots(machine(cpus, gpus), cpus_each, gpus_each) == slots


# Several nodes: a trial never spans two


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([(4, 0)] * 4, {"cpus_per_trial": 4}, (4, 0, 4)),
        ([(4, 0)] * 4, {}, (1, 0, 16)),
        ([(3, 0), (3, 0)], {"cpus_per_trial": 2}, (2, 0, 2)),  # not three: a CPU is left on each
        ([(0, 0), (8, 2)], {}, (1, 0.25, 8)),  # a head node that takes no work
        ([(64, 0), (2, 1)], {}, (1, 0.5, 2)),  # CPUs elsewhere feed no GPU
        ([(8, 1), (8, 1)], {"gpus_per_trial": 0.6}, (1, 0.6, 2)),
        ([(8, 1), (1, 1)], {"gpus_per_trial": 0.25}, (1, 0.25, 5)),
        ([(64, 0), (8, 1)], {"gpus_per_trial": 0.0}, (1, 0, 72)),
        ([(16, 0), (0, 4)], {"gpus_per_trial": 0.0}, (1, 0, 16)),
    ],
)
def test_nodes_are_divided_one_by_one(
    nodes: list[tuple[int, int]], options: dict[str, Any], expected: tuple[int, float, int]
) -> None:
    resources = allocate_resources([machine(*node) for node in nodes], **options)
    assert (resources.cpus, resources.gpus, resources.max_concurrent) == expected


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        (
            [(2, 0), (2, 0)],
            {"cpus_per_trial": 3},
            "--cpus-per-trial: must be at most the 2 CPUs of the largest node, got 3",
        ),
        (
            [(16, 0), (0, 4)],
            {},
            "--cpus-per-trial: must be at most the 0 CPUs of a node with a GPU, or --gpus-per-trial 0, got 1",
        ),
        (
            [(16, 0), (2, 1)],
            {"gpus_per_trial": 0.5, "cpus_per_trial": 4},
            "--cpus-per-trial: must be at most the 2 CPUs of a node with a GPU, or --gpus-per-trial 0, got 4",
        ),
        ([(0, 0)], {}, "--cpus-per-trial: must be at most the 0 CPUs that Ray has, got 1"),
    ],
)
def test_what_no_node_can_hold_is_refused(nodes: list[tuple[int, int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        allocate_resources([machine(*node) for node in nodes], **options)
    assert str(caught.value) == message


NODES = st.lists(st.tuples(st.integers(0, 16), st.integers(0, 4)), min_size=1, max_size=4)


@given(nodes=NODES, cpus_each=st.integers(1, 4), share=st.none() | st.sampled_from([0.0, 0.25, 0.3333, 0.6, 1.0]))
def test_what_is_not_refused_has_a_slot_on_some_node(
    nodes: list[tuple[int, int]], cpus_each: int, share: float | None
) -> None:
    try:
        resources = allocate_resources(
            [machine(*node) for node in nodes], cpus_per_trial=cpus_each, gpus_per_trial=share
        )
    except InputError:
        return
    assert resources.max_concurrent >= 1
    assert any(cpus >= cpus_each and gpus >= resources.gpus for cpus, gpus in nodes)


# A choice that is measured


def test_measured_choice_is_asked_with_what_the_cpus_can_feed_and_its_reason_is_told() -> None:
    asked: list[int] = []

    def choose(most: int) -> SharedGpu:
        asked.append(most)
        return SharedGpu(trials=3, reason="because")

    resources = allocate_resources([machine(16, 2)], choose_shared=choose)
    assert asked == [8]
    assert (resources.gpus, resources.max_concurrent) == (0.3333, 6)
    assert resources.reason == "6 trials at a time, 0.3333 GPU and 1 CPU each, of 2 GPUs and 16 CPUs: because"


@pytest.mark.parametrize(
    ("cpus", "gpus", "options"),
    [
        (16, 0, {}),
        (1, 1, {}),
        (16, 1, {"gpus_per_trial": 0.5}),
        (16, 1, {"gpus_per_trial": 0.0}),
        (16, 1, {"max_concurrent": 1}),
        (16, 4, {"max_concurrent": 4}),
        (16, 1, {"num_samples": 1}),
    ],
)
def test_nothing_is_measured_where_there_is_nothing_to_choose(cpus: int, gpus: int, options: dict[str, Any]) -> None:
    def refuse(_: int) -> SharedGpu:
        raise AssertionError("measured")

    allocate_resources([machine(cpus, gpus)], choose_shared=refuse, **options)


def test_wrong_limit_is_refused_before_anything_is_measured() -> None:
    def refuse(_: int) -> SharedGpu:
        raise AssertionError("measured")

    with pytest.raises(InputError, match="--cpus-per-trial: must be at most the 16 CPUs that Ray has, got 17"):
        allocate_resources([machine(16, 1)], cpus_per_trial=17, choose_shared=refuse)


@pytest.mark.parametrize("limit", ["max_concurrent", "num_samples"])
@pytest.mark.parametrize(
    ("nodes", "trials", "most"),
    [
        ([machine(16, 2)], 3, 2),
        ([machine(16, 2)], 99, 8),
        ([machine(1, 1), machine(16, 1)], 4, 3),  # the first has a CPU for one only
        ([machine(16), machine(16, 1)], 5, 5),  # no trial of a search with GPUs runs without
    ],
)
def test_no_more_trials_share_a_gpu_than_run_at_a_time(
    limit: str, nodes: list[dict[str, float]], trials: int, most: int
) -> None:
    asked: list[int] = []

    def choose(most: int) -> SharedGpu:
        asked.append(most)
        return SharedGpu(trials=64, reason="")

    options: dict[str, Any] = {limit: trials}
    assert allocate_resources(nodes, choose_shared=choose, **options).gpus == math.floor(10_000 / most) / 10_000
    assert asked == [most]


def test_choice_that_the_cpus_cannot_feed_is_cut_to_what_they_can() -> None:
    resources = allocate_resources([machine(4, 1)], choose_shared=lambda _: SharedGpu(trials=9, reason=""))
    assert (resources.gpus, resources.max_concurrent) == (0.25, 4)


# GPUs of this machine, as CUDA_VISIBLE_DEVICES names them


@pytest.mark.parametrize(
    ("visible", "cuda_devices", "gpus"),
    [
        (None, 0, 0),
        (None, 4, 4),
        ("", 0, 0),
        ("-1", 0, 0),  # Ray would count one
        ("NoDevFiles", 0, 0),
        ("0,1", 2, 2),
        ("0,-1,1", 1, 1),  # CUDA stops at -1; Ray would count three
        ("GPU-8932f937,GPU-1", 2, 2),
        ("MIG-a", 1, 1),
        ("MIG-a,MIG-b,MIG-c", 1, 3),  # CUDA shows a process the first only, Ray gives each worker its own
        ("MIG-a,MIG-b", 0, 0),  # torch has no CUDA
        ("MIG-a,0", 1, 1),
    ],
)
def test_gpus_offered_are_those_that_torch_can_use(visible: str | None, cuda_devices: int, gpus: int) -> None:
    assert count_gpus(visible, cuda_devices) == gpus


# Memory


@pytest.mark.parametrize(
    ("share", "doubled"), [(0.25, 0.5), (0.3333, 0.6666), (0.5, 1.0), (0.6, 1.0), (0.0001, 0.0002)]
)
def test_doubled_share_is_larger_and_within_a_gpu(share: float, doubled: float) -> None:
    assert double_share(share) == doubled


def test_process_alone_on_its_gpu_is_not_limited() -> None:
    assert memory_fraction(1.0, 140 * 2**30) == 1.0


def test_fraction_leaves_room_for_the_context_within_the_share() -> None:
    total = 140 * 2**30
    assert memory_fraction(0.25, total) * total == pytest.approx(35 * 2**30 - CONTEXT_BYTES)


@given(share=st.floats(0.0001, 1), gigabytes=st.integers(1, 200))
def test_fraction_is_one_that_torch_takes_and_never_above_the_share(share: float, gigabytes: int) -> None:
    fraction = memory_fraction(share, gigabytes * 2**30)
    assert share / 2 <= fraction <= share


def test_cap_reaches_the_allocator_of_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    properties = types.SimpleNamespace(total_memory=100 * CONTEXT_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda fraction, device: told.append((fraction, device)), raising=False
    )
    cap_memory(0.25)
    assert told == [(0.24, 3)]


HOG = """
import sys, torch
from tune_amp.cluster.resources import cap_memory
cap_memory(0.25)
total = torch.cuda.get_device_properties(0).total_memory
try:
    torch.empty(int(total * 0.3), dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    sys.exit(0)
sys.exit(1)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_hog_runs_out_of_its_own_share_while_a_neighbour_computes_on() -> None:
    neighbour = torch.ones(1000, 1000, device="cuda")
    assert subprocess.run([sys.executable, "-c", HOG], check=False).returncode == 0
    assert (neighbour @ neighbour).sum().item() == 1e9


# Slots of a cluster that changes


@pytest.mark.parametrize(("most", "expected"), [(None, [3, 4, 2, 0]), (3, [3, 3, 2, 0])])
def test_slots_follow_the_nodes_that_live_now_up_to_the_users_limit(most: int | None, expected: list[int]) -> None:
    lists = [[2, 4], [2, 4, 3], [2, 3], []]  # CPUs of the nodes; the third holds one trial
    listed = iter(lists)
    now = itertools.count(0.0, LIST_NODES_SECONDS)
    count = count_slots_now(
        2,
        0.0,
        max_concurrent=most,
        find_nodes=lambda: [machine(cpus) for cpus in next(listed)],
        clock=lambda: next(now),
    )
    assert [count() for _ in lists] == expected


def test_slots_of_gpus_are_counted_node_by_node() -> None:
    nodes = [machine(16, 1), machine(1, 2), machine(8)]  # the second has one CPU, the third no GPU
    assert count_slots_now(1, 0.5, find_nodes=lambda: nodes)() == 3


def test_nodes_are_asked_for_once_a_second_at_most() -> None:
    asked, now = [], [0.0]

    def find_nodes() -> list[dict[str, float]]:
        asked.append(now[0])
        return [machine(1)]

    count = count_slots_now(1, 0.0, find_nodes=find_nodes, clock=lambda: now[0])
    for _ in range(25):
        assert count() == 1
        now[0] += 0.125
    assert asked == [0.0, 1.0, 2.0, 3.0]
