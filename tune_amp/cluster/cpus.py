"""How many CPUs this process may use."""

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def count_cpus(cgroup: Path = _CGROUP) -> int:
    """CPUs that this process may use, at least one.

    Fewer than the machine has where the process is pinned to some (``taskset``, SLURM), or where a container has a
    quota. One and a half CPUs are one. Ray itself ignores the pinning.

    Args:
        cgroup: where the system shows the control group of a container, of version 1 or 2.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file; or "max", which is no number
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        return max(1, min(allowed, quota // period))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return max(1, min(allowed, quota // period)) if quota > 0 else allowed
    return allowed
