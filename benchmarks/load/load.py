"""What a search bears: thousands of trials, killed halfway; 64 at a time; 10,000 of a second; a study resumed.

Each search is a real ``run_search`` in a process of its own, which keeps how long its own steps took. What it left is
counted from its files alone: every report of the journal must be in ``epochs.parquet`` once, and every trial over.
"""

import collections
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from benchmarks.load.instant import Sample
from benchmarks.load.load_search import CUT_OFF, RUN, SAMPLES_FILE, TIMES_FILE, Plan
from benchmarks.load.load_table import LAST_SUGGESTIONS, LoadResult, LoadRow
from benchmarks.machine import describe_machine, describe_versions
from tune_amp.results.journal import read_journal
from tune_amp.results.records import load_trials_file
from tune_amp.results.rows import build_from
from tune_amp.results.run_folder import RunFolder
from tune_amp.results.utilisation import SlotUse, find_shares, utilisation
from tune_amp.trial.config import EpochMetrics, TrialStatus

LOOK_SECONDS = 0.5
BUSY_MACHINE = {"RAY_worker_niceness": "0", "RAY_worker_register_timeout_seconds": "600"}
"""Ray has its workers 15 steps nicer than the driver, and wants them within a minute: beside other work they starve."""


PLANS: Mapping[str, Plan] = types.MappingProxyType(
    {
        "trials": Plan(part="trials", trials=2_000, epochs=1, slots=2),
        "slots": Plan(
            part="slots",
            trials=256,
            epochs=2,
            slots=64,
            gpus_per_slot=0.25,
            model="benchmarks.load.load_search:sleepy_net",
            forked=True,
        ),
        # As many as Ray publishes a time for: 715 s on 16 slots. Settings are drawn at random.
        "rate": Plan(
            part="rate",
            trials=10_000,
            epochs=1,
            slots=16,
            model="benchmarks.load.load_search:second_net",
            sampler="random",
            forked=True,
        ),
        # As many trials more as were cut off.
        "resume": Plan(part="resume", trials=10_000, epochs=8, slots=2),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What a run kept of what its journal says that happened."""

    reports: int
    """Epochs that were reported, each counted once."""
    lost: int
    """Those of them that ``epochs.parquet`` does not hold as they were last reported."""
    doubled: int
    """Rows of ``epochs.parquet`` beyond them, and rows of ``trials.parquet`` beyond one a trial."""
    unended: int
    """Trials that are not over: without an end in ``trials.parquet``, or that the study was not told of once."""


def measure_load(plans: Sequence[Plan], *, report: Callable[[LoadRow], None] = lambda _: None) -> LoadResult:
    """Run each plan.

    Args:
        plans: of ``PLANS``, or smaller ones.
        report: told of each search as it ends.
    """
    rows = []
    for plan in plans:
        with tempfile.TemporaryDirectory() as name:
            rows.append(measure_plan(plan, Path(name)))
        report(rows[-1])
    return LoadResult(rows=tuple(rows), machine=describe_machine(), versions=describe_versions())


def measure_plan(plan: Plan, folder: Path) -> LoadRow:
    """Run a search as its part says, and look at what it left in ``folder``."""
    (folder / RUN).mkdir()
    loads: list[float] = []
    if plan.part == "resume":
        with tempfile.TemporaryDirectory(dir=_find_fast_folder()) as fast:
            (Path(fast) / RUN).mkdir()
            subprocess.run(_command("fabricate", plan, Path(fast)), check=True)  # noqa: S603
            shutil.copytree(fast, folder, dirs_exist_ok=True)
        plan = dataclasses.replace(plan, trials=plan.trials + CUT_OFF)
    elif plan.part == "trials":
        _run_process(plan, folder, loads, kill_after=plan.trials // 2)
    _run_process(plan, folder, loads)
    return describe_run(plan, folder, load_average=statistics.fmean(loads))


def _find_fast_folder() -> Path | None:
    """Where 60,000 events are kept within seconds: each is waited for until it is on disk."""
    memory = Path("/dev/shm")  # noqa: S108 - a private folder is made in it
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None


def _command(action: str, plan: Plan, folder: Path) -> list[str]:
    text = json.dumps(dataclasses.asdict(plan))
    return [sys.executable, "-m", "benchmarks.load.load_search", action, text, str(folder)]


def _run_process(plan: Plan, folder: Path, loads: list[float], kill_after: int | None = None) -> None:
    """Begin the search, or go on with it, and wait for its end, or kill it after so many trials."""
    with subprocess.Popen(_command("search", plan, folder), env=os.environ | BUSY_MACHINE) as process:  # noqa: S603
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            loads.append(os.getloadavg()[0])
            if kill_after is not None and len(load_samples(folder)) >= kill_after:
                process.kill()
                process.wait()
                return
    if process.returncode or kill_after is not None:
        raise RuntimeError(f"the search of {plan.part} ended with exit code {process.returncode}")


def load_samples(folder: Path) -> list[Sample]:
    """All samples that processes left, but for a line that one was writing."""
    path = folder / SAMPLES_FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [Sample(**json.loads(line)) for line in lines]


# ---- what a run left ----


def describe_run(plan: Plan, folder: Path, *, load_average: float) -> LoadRow:
    """A row from the files of a run that is over, and from what its last process said of itself."""
    run = folder / RUN
    events = read_journal(RunFolder(run).journal)
    samples = load_samples(folder)
    said = json.loads((folder / TIMES_FILE).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = said["times"]
    ended = load_trials_file(run)
    assert ended.slot_time is not None  # the search is over
    shares = find_shares(utilisation(ended.trials, ended.slot_time))
    resumed = sum(event["event"] == "session" for event in events) > 1
    at = _choose_samples(samples, plan.trials)
    made_up = plan.part == "resume"

    def took(name: str) -> float | None:
        return sum(times[name]) if times.get(name) else None

    return LoadRow(
        part=plan.part,
        trials=plan.trials,
        epochs=plan.epochs,
        slots=plan.slots,
        at_a_time=count_at_a_time(events),
        workers=len({event["worker"] for event in events if event["event"] == "start"}),
        sessions=sum(event["event"] == "session" for event in events),
        **dataclasses.asdict(check_run(run, plan.trials)),
        wall_seconds=ended.slot_time.wall_seconds - (events[_find_last_session(events)]["at"] if made_up else 0.0),
        driver_seconds=samples[-1].driver,
        work_share=None if made_up else 1 - shares.get(SlotUse.REST, 0.0),
        memory_trials=tuple(sample.ended for sample in at),
        memory_bytes=tuple(sample.memory_bytes for sample in at if sample.memory_bytes is not None),
        peak_memory_bytes=said["peak_memory_bytes"],
        read_seconds=took("read"),
        replay_seconds=took("replay"),
        rungs_seconds=took("rungs"),
        study_seconds=took("study") if resumed else None,
        first_seconds=find_first_new(events) if resumed else None,
        suggest_seconds=statistics.median(times["suggest"][-LAST_SUGGESTIONS:]) if times.get("suggest") else None,
        write_seconds=max(times["write"]),
        writes=len(times["write"]),
        journal_bytes=RunFolder(run).journal.stat().st_size,
        study_bytes=RunFolder(run).study.stat().st_size,
        parquet_bytes=sum((run / f"{kind}.parquet").stat().st_size for kind in ("trials", "epochs")),
        load_average=load_average,
    )


def check_run(run: Path, trials: int) -> Kept:
    """Compare the Parquet files and the study of a run that is over with its journal.

    Args:
        run: the run folder.
        trials: that the search was to make.
    """
    reported: dict[tuple[str, int], str] = {}
    for event in read_journal(RunFolder(run).journal):
        if event["event"] == "report" and event["metrics"]:
            metrics = build_from(EpochMetrics, event["metrics"])
            reported[event["trial_id"], metrics.epoch] = repr(metrics)
    rows = pq.read_table(RunFolder(run).epochs).to_pylist()
    kept = {(row["trial_id"], row["epoch"]): repr(build_from(EpochMetrics, row)) for row in rows}
    records = pq.read_table(RunFolder(run).trials, columns=["trial_id", "status"]).to_pylist()
    over = {row["trial_id"] for row in records if row["status"] != TrialStatus.INTERRUPTED}
    told = count_told(run)
    # One that nobody has heard of is neither in the files: it is missing from the number of trials.
    missing = max(0, trials - len(over))
    return Kept(
        reports=len(reported),
        lost=sum(kept.get(key) != report for key, report in reported.items()),
        doubled=len(rows) - len(kept.keys() & reported.keys()) + len(records) - len({r["trial_id"] for r in records}),
        unended=missing + sum(told[trial_id] != 1 for trial_id in over | told.keys()),
    )


def count_told(run: Path) -> collections.Counter[str]:
    """How often the study holds each trial id as that of a trial with an end; trials without one under their number."""
    import optuna
    from optuna.trial import TrialState

    from tune_amp.search.study import open_storage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name=None, storage=open_storage(RunFolder(run).study))
    told: collections.Counter[str] = collections.Counter()
    for trial in study.get_trials(deepcopy=False):
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            told[trial.user_attrs["trial_id"]] += 1
        elif trial.state in (TrialState.RUNNING, TrialState.WAITING):
            told[f"number {trial.number}"] = 2  # not once, and so no end
    return told


def count_at_a_time(events: Sequence[Mapping[str, Any]]) -> int:
    """The most trials that had a worker and no end, since the search last went on."""
    most, under_way = 0, set[str]()
    for event in events[_find_last_session(events) :]:
        if event["event"] == "start":
            under_way.add(event["trial_id"])
        elif event["event"] in ("end", "lost"):
            under_way.discard(event["trial_id"])
        most = max(most, len(under_way))
    return most


def find_first_new(events: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds from the last beginning of a process until a trial got its worker that no earlier process had heard of.

    The clock of the journal begins with the process, and stands still between two.
    """
    last = _find_last_session(events)
    known = {event["trial_id"] for event in events[:last] if event["event"] == "trial"}
    new = (event for event in events[last:] if event["event"] == "start" and event["trial_id"] not in known)
    first = next(new, None)
    return None if first is None else float(first["at"] - events[last]["at"])


def _find_last_session(events: Sequence[Mapping[str, Any]]) -> int:
    return max(place for place, event in enumerate(events) if event["event"] == "session")


def _choose_samples(samples: Sequence[Sample], trials: int) -> list[Sample]:
    """Those after a quarter of the trials, half and all, where there are."""
    wanted = (trials // 4, trials // 2, trials)
    return [next(s for s in samples if s.ended >= count) for count in wanted if samples and samples[-1].ended >= count]
