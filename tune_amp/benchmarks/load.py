"""What a search bears: thousands of trials in one run that is killed halfway, 64 at a time, a study of 10,000 resumed.

Each search is a real ``run_search`` in a process of its own (``python -m tune_amp.benchmarks.load``), which keeps how
long its own steps took. What it left is counted from its files alone: every report of the journal must be in
``epochs.parquet`` once, and every trial over.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tune_amp.benchmarks.instant import DATASET, Sample, Sampler, load_small_space, read_peak_memory
from tune_amp.benchmarks.machine import describe_machine, describe_versions, render_versions
from tune_amp.config import EpochMetrics, TrialConfig, TrialStatus, described
from tune_amp.journal import read_journal
from tune_amp.ledger import Ledger, TimeKind, read_process_age
from tune_amp.options import SearchOptions
from tune_amp.parquet import build_columns, build_table, write_parquet
from tune_amp.results import build_from, load_ledger
from tune_amp.run_files import EPOCHS_FILE, JOURNAL_FILE, STUDY_FILE, TRIALS_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tune_amp.data import Dataset
    from tune_amp.recorder import TrialRecorder
    from tune_amp.searcher import AmpSearch
    from tune_amp.space import SearchSpace

PARTS = ("trials", "slots", "resume")
LOOK_SECONDS = 0.5
LAST_SUGGESTIONS = 20
"""Of a search, of which the median is shown."""
SLEEP_SECONDS = 10.0
"""Of each training step of a trial that is to last without computing: 64 end no faster than a driver hears of them."""
NAP_SECONDS = 0.5
"""The same, where a few are to."""
BUSY_MACHINE = {"RAY_worker_niceness": "0", "RAY_worker_register_timeout_seconds": "600"}
"""Ray has its workers 15 steps nicer than the driver, and wants them within a minute: beside other work they starve."""
SAMPLES_FILE = "samples.jsonl"
TIMES_FILE = "times.json"
RUN = "load"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A search, as a process is told of it."""

    part: str
    trials: int
    epochs: int
    slots: int
    gpus_per_slot: float = 0.0
    """Simulated."""
    model: str = "simple_net"
    sampler: str = "tpe"
    forked: bool = False
    """Whether workers are forked from one process, and so share what they have imported."""

    @property
    def options(self) -> SearchOptions:
        """Of the search."""
        return SearchOptions(
            model=self.model,
            num_samples=self.trials,
            max_epochs=self.epochs,
            sampler=self.sampler,
            max_concurrent=self.slots,
            gpus_per_trial=self.gpus_per_slot,
            confirm_seeds=0,
        )


PLANS: Mapping[str, Plan] = types.MappingProxyType(
    {
        "trials": Plan(part="trials", trials=2_000, epochs=1, slots=2),
        "slots": Plan(
            part="slots",
            trials=256,
            epochs=2,
            slots=64,
            gpus_per_slot=0.25,
            model="tune_amp.benchmarks.load:sleepy_net",
            forked=True,
        ),
        # As many trials more as were cut off.
        "resume": Plan(part="resume", trials=10_000, epochs=8, slots=2),
    }
)
CUT_OFF = 10
"""Trials of the last part that ran when its search was cut off, and as many come after them."""


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
        "share of the slot time in trials' own work: training, validation, probes; null where trials are made up"
    )
    idle_share: float | None = described("share of it in which a worker waited for the driver, or was not there")
    start_share: float | None = described("share of it in starting up the search, workers and trials")
    memory_trials: tuple[int, ...] = described("trials over when the driver's memory was read")
    memory_bytes: tuple[int, ...] = described("the driver's resident memory then; empty but on Linux", unit="B")
    peak_memory_bytes: int | None = described("the largest of the driver's last process; null but on Linux", unit="B")
    read_seconds: float | None = described("of a resume: reading the journal", unit="s")
    replay_seconds: float | None = described("of a resume: making records of its events", unit="s")
    rungs_seconds: float | None = described("of a resume: the scheduler's replay", unit="s")
    study_seconds: float | None = described("of a resume: opening the study and finding each trial in it", unit="s")
    first_seconds: float | None = described(
        "of a resume: from the beginning of its process, Ray's start included, until its first new trial", unit="s"
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


SCHEMA = pa.schema(build_columns(LoadRow))


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
    return [sys.executable, "-m", "tune_amp.benchmarks.load", action, text, str(folder)]


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
    events = read_journal(run / JOURNAL_FILE)
    samples = load_samples(folder)
    said = json.loads((folder / TIMES_FILE).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = said["times"]
    ledger = load_ledger(run)
    assert ledger is not None  # the search is over
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
        wall_seconds=ledger.wall_seconds - (events[_find_last_session(events)]["at"] if made_up else 0.0),
        driver_seconds=samples[-1].driver,
        **_find_shares(ledger, made_up=made_up),
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
        journal_bytes=(run / JOURNAL_FILE).stat().st_size,
        study_bytes=(run / STUDY_FILE).stat().st_size,
        parquet_bytes=sum((run / f"{kind}.parquet").stat().st_size for kind in ("trials", "epochs")),
        load_average=load_average,
    )


def _find_shares(ledger: Ledger, *, made_up: bool) -> dict[str, Any]:
    if made_up:
        return dict.fromkeys(("work_share", "idle_share", "start_share"))
    around = (TimeKind.DATA, TimeKind.START_UP, TimeKind.CHECKPOINT, TimeKind.IDLE, TimeKind.OTHER)
    return {
        "work_share": sum(share for kind, share in ledger.shares.items() if kind not in around),
        "idle_share": ledger.shares.get(TimeKind.IDLE, 0.0),
        "start_share": ledger.shares.get(TimeKind.START_UP, 0.0),
    }


def check_run(run: Path, trials: int) -> Kept:
    """Compare the Parquet files and the study of a run that is over with its journal.

    Args:
        run: the run folder.
        trials: that the search was to make.
    """
    reported: dict[tuple[str, int], str] = {}
    for event in read_journal(run / JOURNAL_FILE):
        if event["event"] == "report" and event["metrics"]:
            metrics = build_from(EpochMetrics, event["metrics"])
            reported[event["trial_id"], metrics.epoch] = repr(metrics)
    rows = pq.read_table(run / EPOCHS_FILE).to_pylist()
    kept = {(row["trial_id"], row["epoch"]): repr(build_from(EpochMetrics, row)) for row in rows}
    records = pq.read_table(run / TRIALS_FILE, columns=["trial_id", "status"]).to_pylist()
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

    from tune_amp.searcher import open_storage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name=None, storage=open_storage(run / STUDY_FILE))
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


# ---- the search itself, in its own process ----


def search(plan: Plan, folder: Path) -> None:
    """Begin the search in ``folder``, or go on with it where it has begun."""
    begun = time.monotonic() - read_process_age()
    times: dict[str, list[float]] = collections.defaultdict(list)
    run = folder / RUN
    with contextlib.ExitStack() as stack, (folder / SAMPLES_FILE).open("a", encoding="utf-8") as samples:

        def keep(sample: Sample) -> None:
            samples.write(json.dumps(dataclasses.asdict(sample)) + "\n")
            samples.flush()

        from tune_amp.past import open_past

        past = None
        if (run / JOURNAL_FILE).exists():
            started = time.perf_counter()
            past = stack.enter_context(open_past(run))
            times["read"].append(time.perf_counter() - started)
        space, dataset = _load_inputs(folder)
        stack.enter_context(_start_ray(plan))
        from tune_amp import search as searching

        stack.enter_context(timing(times))
        searching.run_search(space, dataset, plan.options, folder=run, observer=Sampler(keep), past=past, started=begun)
        said = {"times": times, "peak_memory_bytes": read_peak_memory()}
        (folder / TIMES_FILE).write_text(json.dumps(said), encoding="utf-8")


@contextlib.contextmanager
def _start_ray(plan: Plan) -> Iterator[None]:
    from tune_amp.session import ray_session

    with contextlib.ExitStack() as stack:
        if plan.forked:
            from tune_amp.benchmarks.forked_workers import forking_workers

            stack.enter_context(forking_workers(("tune_amp.trainable",)))
        gpus = round(plan.slots * plan.gpus_per_slot)
        stack.enter_context(ray_session(num_cpus=plan.slots, num_gpus=gpus))
        yield


@contextlib.contextmanager
def timing(times: dict[str, list[float]]) -> Iterator[None]:
    """In the ``with`` block, each call of the steps of a search adds its seconds to ``times``."""
    from tune_amp import search as searching
    from tune_amp.recorder import TrialRecorder
    from tune_amp.searcher import AmpSearch

    steps: Mapping[str, tuple[Any, str]] = {
        "replay": (TrialRecorder, "replay"),
        "write": (TrialRecorder, "write"),
        "rungs": (searching, "replay"),
        "study": (AmpSearch, "__init__"),
        "suggest": (AmpSearch, "suggest"),
    }
    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in steps.items():
            stack.enter_context(_timing_one(owner, attribute, times[name]))
        yield


@contextlib.contextmanager
def _timing_one(owner: Any, attribute: str, seconds: list[float]) -> Iterator[None]:
    plain = getattr(owner, attribute)

    @functools.wraps(plain)
    def timed(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(*arguments, **settings)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, attribute, timed)
    try:
        yield
    finally:
        setattr(owner, attribute, plain)


def _load_inputs(folder: Path) -> "tuple[SearchSpace, Dataset]":
    from tune_amp.data import load_dataset

    return load_small_space(folder), load_dataset(DATASET)


def sleepy_net(input_shape: tuple[int, int, int], num_classes: int) -> "nn.Module":
    """A linear model whose training steps last without computing: one core carries many of them."""
    return _build_sleepy(input_shape, num_classes, SLEEP_SECONDS)


def napping_net(input_shape: tuple[int, int, int], num_classes: int) -> "nn.Module":
    """The same with steps that are over soon."""
    return _build_sleepy(input_shape, num_classes, NAP_SECONDS)


def _build_sleepy(input_shape: tuple[int, int, int], num_classes: int, seconds: float) -> "nn.Module":
    from torch import nn

    class Sleepy(nn.Linear):
        def forward(self, images: "Tensor") -> "Tensor":
            if self.training:
                time.sleep(seconds)
            return super().forward(images.flatten(1))

    return Sleepy(math.prod(input_shape), num_classes)


# ---- a run that was cut off, without Ray ----


class FabricatedTrial:
    """What a recorder reads of Ray's trial."""

    def __init__(self, place: int, settings: dict[str, Any]) -> None:
        self.trial_id = f"{place:08x}"
        self.config = settings
        self.experiment_tag = f"{place}_"
        self.last_result: dict[str, Any] = {}
        self.run_metadata = types.SimpleNamespace(metric_analysis={}, metric_n_steps={})
        self.temporary_state = types.SimpleNamespace(ray_actor=f"Actor {place % CUT_OFF}")

    def __str__(self) -> str:
        from tune_amp.tuning import name_trial

        return name_trial(self)


def fabricate(plan: Plan, folder: Path, *, cut_off: int = CUT_OFF) -> None:
    """Write what a search leaves that is killed while its last trials run, by the code that a search uses.

    What the trials report is what one real trial did, but for the values, which are drawn. Their settings are drawn
    too: a search by TPE leaves the same files, and takes long for it.

    Args:
        plan: of the search.
        folder: for its run folder, which is there.
        cut_off: trials that run when it is killed, and come on top when it goes on; 0: it ends in peace.
    """
    from tune_amp.planning import describe_run as describe
    from tune_amp.planning import list_shared
    from tune_amp.recorder import SearchProgress, TrialRecorder
    from tune_amp.resources import TrialResources
    from tune_amp.search import begin_run
    from tune_amp.searcher import AmpSearch, find_cause
    from tune_amp.stopping import build_scheduler

    run, options = folder / RUN, dataclasses.replace(plan, trials=plan.trials + cut_off).options
    space, dataset = _load_inputs(folder)
    resources = TrialResources(cpus=1, gpus=0.0, max_concurrent=CUT_OFF, reason="")
    provenance = describe(space, dataset, options, run.name, (), resources)
    reports = _train_one(TrialConfig(**list_shared(dataset, options)), dataset)
    with begin_run(run, space, provenance, {}) as journal:
        progress = SearchProgress(
            run=run.name,
            model=options.model,
            dataset=dataset.name,
            objectives=options.objectives,
            num_samples=options.num_samples,
            time_budget=None,
            started=time.monotonic(),
        )
        recorder = TrialRecorder(
            run,
            provenance,
            progress,
            Sampler(lambda _: None),
            journal=journal,
            storage_root=str(run),
            slots=resources.max_concurrent,
            begin=time.monotonic(),
            explain_death=find_cause,
            on_fault=_refuse_fault,
        )
        searcher = AmpSearch(
            space,
            list_shared(dataset, options),
            train_images=len(dataset.train),
            objectives=options.objectives,
            seed=options.seed,
            folder=run,
            study_name=run.name,
            sampler="random",
            num_samples=options.num_samples,
        )
        scheduler = build_scheduler(
            options.scheduler,
            objective=options.objectives[0],
            max_epochs=options.max_epochs,
            grace_period=options.grace_period,
            reduction_factor=options.reduction_factor,
            on_worker_death=lambda _: None,
        )
        about: dict[str, Any] = {"command": [], "arguments": {}}
        recorder.open_session(num_samples=options.num_samples, slots=resources.max_concurrent, **about)
        random = np.random.default_rng(0)
        for place in range(1, plan.trials + 1):
            told = reports[:1] if place > plan.trials - cut_off else reports
            _fabricate_trial(place, told, random.random(), searcher, scheduler, recorder)
        if cut_off == 0:
            recorder.finish()


def _fabricate_trial(
    place: int,
    reports: Sequence[EpochMetrics],
    value: float,
    searcher: "AmpSearch",
    scheduler: Any,
    recorder: "TrialRecorder",
) -> None:
    """Tell everyone of a trial; one with as many reports as it has epochs ends, or where the scheduler stops it."""
    from ray.tune.schedulers import TrialScheduler

    from tune_amp.trainable import progress_report

    trial_id = f"{place:08x}"
    trial = FabricatedTrial(place, searcher.suggest(trial_id))
    recorder.add_trial(trial, searcher.find_number(trial_id))
    scheduler.on_trial_add(None, trial)
    recorder.on_trial_start(0, [], trial)
    max_epochs = trial.config["max_epochs"]
    for epoch in reports:
        metrics = dataclasses.replace(epoch, val_accuracy=value, val_loss=1.0 - value)
        is_last = epoch.epoch == max_epochs
        result = progress_report(metrics, TrialStatus.COMPLETED if is_last else "running")
        is_cut_off = len(reports) < max_epochs
        if not is_last and not is_cut_off and scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
            result["done"] = True
        spent = {"training": epoch.train_seconds, "idle": 0.001}
        own = {"device": "cpu", "num_threads": 1, "setup_seconds": 0.01, "checkpoint_seconds": 0.0, "spent": spent}
        recorder.on_trial_result(0, [], trial, result | own)
        if result["done"]:
            trial.last_result = result
            scheduler.on_trial_complete(None, trial, result)
            searcher.on_trial_complete(trial_id, result)
            recorder.on_trial_complete(0, [], trial)
            return
        searcher.on_trial_result(trial_id, result)


def _train_one(config: TrialConfig, dataset: "Dataset") -> list[EpochMetrics]:
    import torch

    from tune_amp.training import TrainingData, TrainingRun

    data = TrainingData(dataset.train, dataset.validation, dataset.num_classes, torch.device("cpu"))
    training = TrainingRun(config, data)
    return [training.train_epoch() for _ in range(config.max_epochs)]


def _refuse_fault(line: str) -> None:
    raise RuntimeError(line)


# ---- the table ----


def render_load(result: LoadResult) -> str:
    """Markdown: what was kept, and what it took."""
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    lines = [
        f"Searches under load; {machine}; {render_versions(result.versions)}. The machine had other work: its load "
        "average stands beside each search. At a time: in the last session, as are the driver's CPU and the writes. "
        "Workers of many slots are forked from one process and sleep in each training step, on simulated GPUs. The "
        "trials that are resumed were made up by the code of a search, but for their training.",
        "",
        "| search | sessions | at a time | reports | lost | doubled | trials without an end | wall | slots at work "
        "| waiting | driver's memory | load average |",
        "|---" * 12 + "|",
        *map(_render_kept, result.rows),
        "",
        "| search | driver's CPU | suggest | Parquet: longest write | writes | journal | study | Parquet files |",
        "|---" * 8 + "|",
        *map(_render_costs, result.rows),
        "",
        "| resumed | read the journal | records | rungs | study | first new trial |",
        "|---" * 6 + "|",
        *(_render_resume(row) for row in result.rows if row.read_seconds is not None),
    ]
    return "\n".join(lines) + "\n"


def name_search(row: LoadRow) -> str:
    """What was tried, in a few words."""
    if row.part == "trials":
        return f"{row.trials:,} trials, killed halfway"
    if row.part == "slots":
        return f"{row.slots} slots, {row.trials} trials"
    return f"{row.trials - CUT_OFF:,} trials resumed"


def _render_kept(row: LoadRow) -> str:
    memory = ", ".join(
        f"{size / 2**20:.0f} MiB at {ended:,}" for ended, size in zip(row.memory_trials, row.memory_bytes, strict=False)
    )
    peak = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f} MiB"
    cells = [
        name_search(row),
        str(row.sessions),
        f"{row.at_a_time} of {row.slots}",
        f"{row.reports:,}",
        str(row.lost),
        str(row.doubled),
        str(row.unended),
        f"{row.wall_seconds:.0f} s",
        *("-" if share is None else f"{share:.0%}" for share in (row.work_share, row.idle_share)),
        (f"{memory}; most {peak}" if row.part == "trials" and memory else peak) or "-",
        f"{row.load_average:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _render_costs(row: LoadRow) -> str:
    cells = [
        name_search(row),
        f"{row.driver_seconds:.0f} s",
        _seconds(row.suggest_seconds),
        _seconds(row.write_seconds),
        str(row.writes),
        *(f"{size / 1e6:.1f} MB" for size in (row.journal_bytes, row.study_bytes, row.parquet_bytes)),
    ]
    return f"| {' | '.join(cells)} |"


def _render_resume(row: LoadRow) -> str:
    times = (row.read_seconds, row.replay_seconds, row.rungs_seconds, row.study_seconds, row.first_seconds)
    return f"| {' | '.join([name_search(row), *map(_seconds, times)])} |"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def write_load(path: Path, result: LoadResult) -> None:
    """Write one row a search; machine and versions stand in the metadata."""
    origin = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": result.machine,
        "versions": result.versions,
    }
    write_parquet(build_table("load", SCHEMA, [vars(row) for row in result.rows], origin), path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one search, or fabricate one, in a folder."""
    actions = {"search": search, "fabricate": fabricate}
    parser = argparse.ArgumentParser(prog="python -m tune_amp.benchmarks.load")
    parser.add_argument("action", choices=actions)
    parser.add_argument("plan", type=json.loads)
    parser.add_argument("folder", type=Path)
    parsed = parser.parse_args(arguments)
    actions[parsed.action](Plan(**parsed.plan), parsed.folder)


if __name__ == "__main__":
    main()
