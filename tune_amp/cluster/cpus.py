"""Counts the CPUs that this process may use."""

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def count_cpus(cgroup: Path = _CGROUP) -> int:
    """Return the number of CPUs that this process may use, at least one.

    They are fewer than the machine's if the process is pinned to some (``taskset``, SLURM; Ray ignores that) or if a
    container, whose control group the system shows in ``cgroup``, has a quota. 1.5 CPUs count as one.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max" instead of a number
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        return max(1, min(allowed, quota // period))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return max(1, min(allowed, quota // period)) if quota > 0 else allowed
    return allowed
