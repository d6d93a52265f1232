import os
from pathlib import Path

import pytest

from tune_amp.cluster.cpus import count_cpus


def write_quota(folder: Path, version: int, quota: str) -> None:
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota.replace('-1', 'max')} 100000\n")
        return
    (folder / "cpu").mkdir()
    (folder / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu" / "cpu.cfs_period_us").write_text("100000\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "count"), [("-1", 8), ("1000000", 8), ("300000", 3), ("150000", 1), ("50000", 1), ("100", 1)]
)
def test_quota_of_a_container_is_rounded_down_to_one_at_least(
    quota: str, count: int, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write_quota(tmp_path, version, quota)
    assert count_cpus(tmp_path) == count


def test_pinned_process_counts_the_cpus_it_is_pinned_to(tmp_path: Path) -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no process is pinned on this system")
    allowed = os.sched_getaffinity(0)
    assert count_cpus(tmp_path) == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert count_cpus(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, allowed)
