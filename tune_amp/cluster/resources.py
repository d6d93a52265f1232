"""Decides how much CPU and GPU a trial gets, and states the reason.

Ray places a trial's share on one node, and a share of a GPU on one GPU. A share that no node can ever hold is refused,
because Ray would let the trial wait forever. If other jobs of a cluster hold the share for now, trials wait for them.

A MIG slice counts as a GPU: torch sees only the slice and its memory. Slices are named in ``CUDA_VISIBLE_DEVICES``.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch

from tune_amp.cluster.gpu_sharing import (
    CONTEXT_BYTES,
    MeasurementError,
    SharedGpu,
    choose_trials,
    list_counts,
    measure_shares,
)
from tune_amp.cluster.share_cache import describe_measurement, recall_shares
from tune_amp.training.data import Split
from tune_amp.trial.config import TrialConfig, check
from tune_amp.trial.consent import consent_to, list_consented
from tune_amp.trial.text import one_line

# Small models spend more time on launches than on computing: several fill a GPU that one leaves idle. Used if nothing
# is measured.
TRIALS_PER_GPU = 4

DEVICE_BUSY = "busy or unavailable"
"""Part of CUDA's error if a GPU in compute mode EXCLUSIVE_PROCESS has a process already."""
MEASURED_SECONDS = 1.0
"""Seconds of measurement for each number of trials: ten or more of the measured epochs."""
LIST_NODES_SECONDS = 1.0
"""Seconds between two looks at the nodes: a look takes milliseconds, and Tune requests new trials at every event."""
WAIT_SECONDS = 60.0
"""Seconds for a joined cluster to free a whole GPU, start the worker there and measure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResources:
    """Resources of one trial, and the number of trials that run side by side."""

    cpus: int
    gpus: float
    """Number of GPUs. A fraction shares a GPU with other trials; 0 trains on the CPU."""
    max_concurrent: int
    reason: str
    """Explanation for the user, in one line."""


def allocate_resources(
    nodes: Sequence[Mapping[str, float]],
    *,
    gpus_per_trial: float | None = None,
    cpus_per_trial: int | None = None,
    max_concurrent: int | None = None,
    num_samples: int | None = None,
    choose_shared: Callable[[int], SharedGpu] | None = None,
) -> TrialResources:
    """Divide the resources of Ray's nodes among trials.

    Args:
        nodes: resources of each node, by Ray's names.
        gpus_per_trial: share of one GPU, up to 1, or a whole number of GPUs of one node; None to choose it here.
        cpus_per_trial: CPUs of a trial; None for 1.
        max_concurrent: upper limit on concurrent trials; None for as many as fit.
        num_samples: total number of trials; if fewer than would fit, each may get more of a GPU.
        choose_shared: returns how many trials share a GPU, given the maximum: the trials that the CPUs beside the GPU
            can feed and that run at a time. None for ``TRIALS_PER_GPU``. Not called if there is nothing to choose.

    Raises:
        InputError: a request can never be met, so trials would wait forever.
    """
    cpus, gpus = (sum(int(node.get(name, 0.0)) for node in nodes) for name in ("CPU", "GPU"))
    cpus_each = 1 if cpus_per_trial is None else cpus_per_trial
    most_cpus = int(max(node.get("CPU", 0.0) for node in nodes))
    whose = "that Ray has" if len(nodes) == 1 else "of the largest node"  # a trial never spans two
    check("--cpus-per-trial", cpus_each, cpus_each <= most_cpus, f"must be at most the {most_cpus} CPUs {whose}")
    most_gpus = int(max(node.get("GPU", 0.0) for node in nodes))
    rule = f"must be at most the {most_gpus} GPUs {whose}"
    check("--gpus-per-trial", gpus_per_trial, (gpus_per_trial or 0) <= most_gpus, rule)
    if gpus_per_trial != 0 and gpus > 0:
        beside = int(max(node.get("CPU", 0.0) for node in nodes if node.get("GPU", 0.0) >= 1))
        rule = f"must be at most the {beside} CPUs of a node with a GPU, or --gpus-per-trial 0"
        check("--cpus-per-trial", cpus_each, cpus_each <= beside, rule)
    shared = None
    if gpus_per_trial is None:
        wanted = min((limit for limit in (max_concurrent, num_samples) if limit is not None), default=None)
        shared = _share_gpu(nodes, cpus_each, wanted, choose_shared) if gpus else None
        gpus_each = _round_down(1 / shared.trials) if shared else 0.0
    else:
        gpus_each = _round_down(float(gpus_per_trial))
    slots = sum(count_slots(node, cpus_each, gpus_each) for node in nodes)
    at_a_time = min(slots, max_concurrent or slots)
    share = f"{gpus_each:g} GPU and {cpus_each} CPU" if gpus_each else f"{cpus_each} CPU"
    trials = "trial" if at_a_time == 1 else "trials"
    why = f": {shared.reason}" if shared and shared.reason else ""
    return TrialResources(
        cpus=cpus_each,
        gpus=gpus_each,
        max_concurrent=at_a_time,
        reason=f"{at_a_time} {trials} at a time, {share} each, of {gpus} GPUs and {cpus} CPUs{why}",
    )


def count_slots(node: Mapping[str, float], cpus_each: int, gpus_each: float) -> int:
    """Return how many trials fit a node side by side. A share of a GPU never spans two: Ray places it on one."""
    by_cpu = int(node.get("CPU", 0.0)) // cpus_each
    if gpus_each == 0:
        return by_cpu
    gpus = int(node.get("GPU", 0.0))
    return min(by_cpu, gpus // int(gpus_each) if gpus_each >= 1 else gpus * int(1 / gpus_each + 1e-9))


def list_nodes() -> list[dict[str, float]]:
    """Return the resources of each living node of the running Ray."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def count_slots_now(
    cpus: int,
    gpus: float,
    *,
    max_concurrent: int | None = None,
    find_nodes: Callable[[], Sequence[Mapping[str, float]]] = list_nodes,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], int]:
    """Return a function that counts how many trials may run side by side, while nodes join and leave.

    Its result is at most ``max_concurrent``, and 0 if no node that lives can hold a trial of ``cpus`` and ``gpus``. It
    lists the nodes at most once in ``LIST_NODES_SECONDS`` of the ``clock``.
    """
    slots, counted = 0, -math.inf

    def count() -> int:
        nonlocal slots, counted
        if clock() - counted >= LIST_NODES_SECONDS:
            slots = sum(count_slots(node, cpus, gpus) for node in find_nodes())
            counted = clock()
        return slots if max_concurrent is None else min(slots, max_concurrent)

    return count


def count_gpus(visible: str | None, cuda_devices: int) -> int:
    """Return the number of GPUs that a private Ray is to offer: those that torch can use.

    Ray itself counts the entries of ``CUDA_VISIBLE_DEVICES``, also those that CUDA ignores, and at most the number of
    boards, although one board may hold seven MIG slices. A process sees only the first slice: Ray assigns each worker
    its own.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``; None if it is not set.
        cuda_devices: number of devices that torch counts; 0 if it cannot use any.
    """
    names = (visible or "").split(",")
    slices = len(set(names)) if all(name.startswith("MIG-") for name in names) else 0
    return max(cuda_devices, slices) if cuda_devices else 0


def double_share(share: float) -> float:
    """Return the share of a GPU for the retry of a trial that ran out of memory."""
    return share if share >= 1 else _round_down(min(1.0, 2 * share))


def memory_fraction(share: float, device_bytes: int) -> float:
    """Return the fraction of a GPU that PyTorch's allocator may hold so that a process keeps to its memory ``share``.

    That is the share minus the CUDA context, which the allocator does not count, but at least half the share. A process
    that has a GPU to itself is not limited.
    """
    if share >= 1:
        return 1.0
    return max(share - CONTEXT_BYTES / device_bytes, share / 2)


def cap_memory(share: float) -> None:
    """Limit this process to its ``share`` of the current GPU's memory."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    # No device argument: it would need an index, torch.device("cuda") is refused here.
    torch.cuda.set_per_process_memory_fraction(memory_fraction(share, total))


def measure_with_ray(
    config: TrialConfig,
    train: Split,
    num_classes: int,
    most: int,
    *,
    keep: bool = False,
    announce: Callable[[str], None],
) -> SharedGpu:
    """Measure on one of Ray's GPUs how many trials share it best, up to ``most``. The GPU is free again afterwards.

    Args:
        config: the largest configuration that will be trained.
        train: the training split.
        num_classes: labels are 0 .. num_classes - 1.
        most: maximum number of trials on a GPU.
        keep: whether to use an earlier measurement on such a GPU, and to keep this one for later searches.
        announce: receives one line that explains the delay.
    """
    counts = list_counts(most)
    before = ", unless it was measured before" if keep else ""
    announce(f"measuring how many trials share a GPU best (half a minute{before}; --gpus-per-trial X chooses without)")
    # The worker ends after its only task: its CUDA context would keep memory otherwise.
    task: Any = ray.remote(num_gpus=1, num_cpus=counts[-1], max_calls=1, max_retries=0)(_measure_here)
    result = task.remote(ray.put(train), config, num_classes, counts, tuple(sys.path), list_consented(), keep)
    fallback = min(TRIALS_PER_GPU, most)
    try:
        shared: SharedGpu = ray.get(result, timeout=WAIT_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(result, force=True)
        return SharedGpu(trials=fallback, reason=f"not measured, no GPU was free within {WAIT_SECONDS:g} s")
    except ray.exceptions.RayError as error:  # a worker that cannot be started, or is killed
        reason = one_line(str(error).strip().splitlines()[-1])
        return SharedGpu(trials=fallback, reason=f"not measured ({reason})")
    return shared


def _measure_here(
    train: Split,
    config: TrialConfig,
    num_classes: int,
    counts: Sequence[int],
    search_path: Sequence[str],
    consented: Sequence[str],
    keep: bool = False,
) -> SharedGpu:
    """Measure in a worker to which Ray assigned a GPU; on the CPU if torch cannot use the GPU, as trials will."""
    sys.path.extend(folder for folder in search_path if folder not in sys.path)
    consent_to(*consented)
    cuda = torch.cuda.is_available()
    device_type = "cuda" if cuda else "cpu"
    measure = functools.partial(
        measure_shares, config, train, num_classes, device_type, counts=counts, seconds=MEASURED_SECONDS
    )
    try:
        key = describe_measurement(config, train, num_classes, counts) if cuda and keep else None
        measured, note = recall_shares(key, measure)
    except MeasurementError as error:
        if error.out_of_memory:
            return SharedGpu(trials=1, reason=f"the largest does not fit a GPU alone ({error})")
        if DEVICE_BUSY in str(error):
            return SharedGpu(trials=1, reason=f"a GPU takes one process (compute mode EXCLUSIVE_PROCESS): {error}")
        return SharedGpu(trials=min(TRIALS_PER_GPU, counts[-1]), reason=f"not measured ({error})")
    chosen = choose_trials(measured, torch.cuda.get_device_properties(0).total_memory if cuda else None)
    return dataclasses.replace(chosen, reason=chosen.reason + note)


def _share_gpu(
    nodes: Sequence[Mapping[str, float]],
    cpus_each: int,
    wanted: int | None,
    choose_shared: Callable[[int], SharedGpu] | None,
) -> SharedGpu:
    """Return how many trials share each GPU: at most what the CPUs of GPU nodes can feed, and what ``wanted`` needs."""
    equipped = [node for node in nodes if node.get("GPU", 0.0) >= 1]
    gpus = sum(int(node["GPU"]) for node in equipped)
    most = max(1, sum(int(node.get("CPU", 0.0)) // cpus_each for node in equipped) // gpus)
    if wanted is not None:

        def count_with(trials: int) -> int:
            return sum(count_slots(node, cpus_each, _round_down(1 / trials)) for node in nodes)

        most = next((trials for trials in range(1, most) if count_with(trials) >= wanted), most)
    if most == 1:
        return SharedGpu(trials=1, reason="")
    shared = choose_shared(most) if choose_shared else SharedGpu(trials=TRIALS_PER_GPU, reason="")
    return dataclasses.replace(shared, trials=min(most, shared.trials))


def _round_down(share: float) -> float:
    """Round down to the four decimals that Ray keeps, so that three thirds fit on a GPU."""
    return math.floor(share * 10_000 + 1e-6) / 10_000
