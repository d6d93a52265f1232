"""How much CPU and GPU a trial gets, and why."""

import dataclasses
import math
from collections.abc import Mapping

from tune_amp.config import InputError

# Small models launch more than they compute: several fill a GPU that one leaves idle. A rule until it is measured.
TRIALS_PER_GPU = 4

# Ray counts in ten-thousandths and drops what is smaller: such a trial would silently train on the CPU.
SMALLEST_GPU_SHARE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResources:
    """What one trial is given, and how many run side by side."""

    cpus: int
    gpus: float
    """A fraction shares a GPU with other trials; 0 trains on the CPU."""
    max_concurrent: int
    reason: str
    """One line for the user."""


def allocate_resources(
    available: Mapping[str, float],
    *,
    gpus_per_trial: float | None = None,
    cpus_per_trial: int | None = None,
    max_concurrent: int | None = None,
    largest_node_cpus: int | None = None,
) -> TrialResources:
    """Divide what Ray offers among trials.

    Args:
        available: Ray's cluster resources, by name.
        gpus_per_trial: a share of one, up to 1; None chooses.
        cpus_per_trial: None chooses 1.
        max_concurrent: an upper limit on trials at a time; None for as many as fit.
        largest_node_cpus: CPUs of the node that has most of them; None where all of ``available`` is one node's.

    Raises:
        InputError: a request can never be met, so that trials would wait for ever.
    """
    cpus, gpus = int(available.get("CPU", 0)), available.get("GPU", 0.0)
    cpus_each = 1 if cpus_per_trial is None else cpus_per_trial
    most_cpus = cpus if largest_node_cpus is None else largest_node_cpus
    whose = "that Ray has" if largest_node_cpus is None else "of the largest node"  # a trial never spans two
    in_range = 1 <= cpus_each <= most_cpus
    _check("--cpus-per-trial", cpus_each, in_range, f"must be between 1 and the {most_cpus} CPUs {whose}")
    gpus_each = _choose_gpu_share(cpus // cpus_each, gpus) if gpus_per_trial is None else float(gpus_per_trial)
    _check("--gpus-per-trial", gpus_each, 0 <= gpus_each <= 1, "must be between 0 and 1: a trial uses one GPU")
    _check("--gpus-per-trial", gpus_each, gpus_each <= gpus, f"must be between 0 and the {gpus:g} GPUs that Ray has")
    known = gpus_each == 0 or gpus_each >= SMALLEST_GPU_SHARE
    _check("--gpus-per-trial", gpus_each, known, f"must be 0 or at least {SMALLEST_GPU_SHARE:g}, Ray's smallest")
    gpus_each = _round_down(gpus_each)
    if max_concurrent is not None:
        _check("--max-concurrent", max_concurrent, max_concurrent >= 1, "must be at least 1")
    slots = count_slots(cpus, gpus, cpus_each, gpus_each)
    at_a_time = min(slots, max_concurrent or slots)
    share = f"{gpus_each:g} GPU and {cpus_each} CPU" if gpus_each else f"{cpus_each} CPU"
    trials = "trial" if at_a_time == 1 else "trials"
    return TrialResources(
        cpus=cpus_each,
        gpus=gpus_each,
        max_concurrent=at_a_time,
        reason=f"{at_a_time} {trials} at a time, {share} each, of {gpus:g} GPUs and {cpus} CPUs",
    )


def count_slots(cpus: int, gpus: float, cpus_each: int, gpus_each: float) -> int:
    """Trials that fit side by side. A share of a GPU never spans two: Ray places it on one."""
    by_cpu = cpus // cpus_each
    if gpus_each == 0:
        return by_cpu
    by_gpu = int(gpus) * int(1 / gpus_each + 1e-9)
    return max(1, min(by_cpu, by_gpu))


def _choose_gpu_share(cpu_slots: int, gpus: float) -> float:
    """Up to ``TRIALS_PER_GPU`` trials on each GPU, fewer where the CPUs cannot feed them."""
    if gpus < 1:
        return gpus
    trials_per_gpu = max(1, min(TRIALS_PER_GPU, int(cpu_slots // gpus)))
    return 1 / trials_per_gpu


def _round_down(share: float) -> float:
    """To the four decimals that Ray keeps: three thirds fit on a GPU."""
    return math.floor(share * 10_000 + 1e-6) / 10_000


def _check(flag: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise InputError(f"{flag}: {rule}, got {value:g}")
