"""What ``load`` measured of each search: the row, the file and the table."""

import dataclasses
from pathlib import Path

from benchmarks.load.load_search import CUT_OFF
from benchmarks.machine import render_versions
from benchmarks.markdown import render_table
from benchmarks.rows import describe_measurement, write_rows
from tune_amp.trial.config import described

PARTS = ("trials", "slots", "rate", "resume")
LAST_SUGGESTIONS = 20
"""Of a search, of which the median is shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadRow:
    """A search under load."""

    part: str = described("what was tried: " + ", ".join(PARTS))
    trials: int = described("trials of the search")
    epochs: int = described("most epochs, and so reports, of each trial", unit="epochs")
    slots: int = described("places for trials")
    at_a_time: int = described("most trials that were under way at a time, by the journal")
    workers: int = described("worker processes that trials ran in")
    sessions: int = described("times that the search began or went on")
    reports: int = described("epochs that trials reported")
    lost: int = described("reports that are not in epochs.parquet as they were made")
    doubled: int = described("rows of the Parquet files that stand for nothing, or for what another row says")
    unended: int = described("trials that did not end, or of whose end the study was not told once")
    wall_seconds: float = described(
        "wall time of the search, without what lies between its processes; of one that is made up, of what came after",
        unit="s",
    )
    driver_seconds: float = described("CPU time of the driver's last process, until its last trial ended", unit="s")
    work_share: float | None = described(
        "share of the slot time in training, validation and probes, and in trials that were hopeless or failed; null "
        "where trials are made up"
    )
    memory_trials: tuple[int, ...] = described("trials over when the driver's memory was read")
    memory_bytes: tuple[int, ...] = described("the driver's resident memory then; empty but on Linux", unit="B")
    peak_memory_bytes: int | None = described("the largest of the driver's last process; null but on Linux", unit="B")
    read_seconds: float | None = described("of a resume: reading the journal", unit="s")
    replay_seconds: float | None = described("of a resume: making records of its events", unit="s")
    rungs_seconds: float | None = described("of a resume: the scheduler's replay", unit="s")
    study_seconds: float | None = described("of a resume: opening the study and finding each trial in it", unit="s")
    first_seconds: float | None = described(
        "of a resume: from its beginning, Ray's start included, until its first new trial", unit="s"
    )
    suggest_seconds: float | None = described(
        f"median of the last {LAST_SUGGESTIONS} suggestions of Optuna's", unit="s"
    )
    write_seconds: float = described("longest write of the Parquet files", unit="s")
    writes: int = described("writes of the Parquet files by the last process")
    journal_bytes: int = described("size of the journal of the run", unit="B")
    study_bytes: int = described("size of the study's journal", unit="B")
    parquet_bytes: int = described("size of trials.parquet and epochs.parquet", unit="B")
    load_average: float = described("mean of the system's load average over a minute, while it ran")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadResult:
    """The result of the benchmark."""

    rows: tuple[LoadRow, ...]
    machine: dict[str, str]
    versions: dict[str, str]

    @property
    def nothing_lost(self) -> bool:
        """Whether every search kept every report once, and ended every trial."""
        return not any(row.lost or row.doubled or row.unended for row in self.rows)


KEPT_TITLES = (
    "search",
    "sessions",
    "at a time",
    "reports",
    "lost",
    "doubled",
    "trials without an end",
    "wall",
    "slots at work",
    "driver's memory",
    "load average",
)
COST_TITLES = (
    "search",
    "driver's CPU",
    "suggest",
    "Parquet: longest write",
    "writes",
    "journal",
    "study",
    "Parquet files",
)
RESUME_TITLES = ("resumed", "read the journal", "records", "rungs", "study", "first new trial")


def render_load(result: LoadResult) -> str:
    """Markdown: what was kept, and what it took."""
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    lines = [
        f"Searches under load; {machine}; {render_versions(result.versions)}. The machine's load average stands beside "
        "each search. At a time: in the last session, as are the driver's CPU and the writes. Workers of many slots "
        "are forked from one process and sleep in each training step, on simulated GPUs. The trials that are resumed "
        "were made up by the code of a search, but for their training.",
        "",
        render_table(KEPT_TITLES, map(_render_kept, result.rows)),
        "",
        render_table(COST_TITLES, map(_render_costs, result.rows)),
        "",
        render_table(RESUME_TITLES, (_render_resume(row) for row in result.rows if row.read_seconds is not None)),
    ]
    return "\n".join(lines) + "\n"


def name_search(row: LoadRow) -> str:
    """What was tried, in a few words."""
    if row.part == "trials":
        return f"{row.trials:,} trials, killed halfway"
    if row.part == "slots":
        return f"{row.slots} slots, {row.trials} trials"
    if row.part == "rate":
        return f"{row.slots} slots, {row.trials:,} trials of a second"
    return f"{row.trials - CUT_OFF:,} trials resumed"


def _render_kept(row: LoadRow) -> list[str]:
    memory = ", ".join(
        f"{size / 2**20:.0f} MiB at {ended:,}" for ended, size in zip(row.memory_trials, row.memory_bytes, strict=False)
    )
    peak = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f} MiB"
    return [
        name_search(row),
        str(row.sessions),
        f"{row.at_a_time} of {row.slots}",
        f"{row.reports:,}",
        str(row.lost),
        str(row.doubled),
        str(row.unended),
        f"{row.wall_seconds:.0f} s",
        "-" if row.work_share is None else f"{row.work_share:.0%}",
        (f"{memory}; most {peak}" if row.part == "trials" and memory else peak) or "-",
        f"{row.load_average:.0f}",
    ]


def _render_costs(row: LoadRow) -> list[str]:
    return [
        name_search(row),
        f"{row.driver_seconds:.0f} s",
        _seconds(row.suggest_seconds),
        _seconds(row.write_seconds),
        str(row.writes),
        *(f"{size / 1e6:.1f} MB" for size in (row.journal_bytes, row.study_bytes, row.parquet_bytes)),
    ]


def _render_resume(row: LoadRow) -> list[str]:
    times = (row.read_seconds, row.replay_seconds, row.rungs_seconds, row.study_seconds, row.first_seconds)
    return [name_search(row), *map(_seconds, times)]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def write_load(path: Path, result: LoadResult) -> None:
    """Write one row a search."""
    write_rows(path, "load", LoadRow, result.rows, describe_measurement(result.machine, result.versions))
