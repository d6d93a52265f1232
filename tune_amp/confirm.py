"""Trains the best of a search again on fresh seeds, and the tutorial's default configuration beside them.

The best of many on one seed is best partly by luck; how much, the search cannot tell. So the configurations are frozen,
and trained at full budget on seeds that had no part in choosing them. Validation alone ranks them again; of a run that
is over, the test set is read, once, and decides nothing.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
import torch

from tune_amp.batches import place_split
from tune_amp.config import TrialConfig, TrialStatus, one_line
from tune_amp.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.data import Dataset, Split
from tune_amp.inert import find_inert
from tune_amp.options import SearchOptions
from tune_amp.ranking import rank_confirmed, without_seed
from tune_amp.resources import SlotCounter, TrialResources, double_share
from tune_amp.results import BestRow, Provenance, TrialRecord, write_best, write_confirmed
from tune_amp.searcher import find_reason, find_status, is_node_lost
from tune_amp.space import SearchSpace
from tune_amp.time_limit import describe_limit
from tune_amp.trainable import (
    WORKER_RETRIES,
    WorkerSetup,
    build_worker_setup,
    failure_report,
    name_device,
    prepare_worker,
)
from tune_amp.training import TrainingData, TrainingRun, release_memory

LOOK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmJob:
    """A configuration to be trained on one seed."""

    trial_ids: tuple[str, ...]
    """Whose it is: of several where they differ in nothing, which then share its run."""
    config: TrialConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmPlan:
    """What will be trained again."""

    ranked: Sequence[TrialRecord]
    """The search's ranking, best first."""
    top_k: int
    """How many of them are confirmed, from the top."""
    default: TrialConfig | None
    """The tutorial's configuration, or None where it does not fit the data set."""
    left_out: str | None
    """Why there is none."""
    seeds: tuple[int, ...]

    @property
    def names(self) -> dict[str, str]:
        """Trial id -> what to call it."""
        named = {trial.trial_id: trial.trial_name for trial in self._confirmed}
        return named | ({DEFAULT_ID: DEFAULT_ID} if self.default else {})

    @property
    def jobs(self) -> list[ConfirmJob]:
        """All on one seed before any on the next: an interrupted confirmation leaves whole comparisons."""
        owners: dict[TrialConfig, tuple[str, ...]] = {}
        configs = {trial.trial_id: trial.config for trial in self._confirmed}
        for trial_id, config in (configs | ({DEFAULT_ID: self.default} if self.default else {})).items():
            owners[without_seed(config)] = (*owners.get(without_seed(config), ()), trial_id)
        return [
            ConfirmJob(trial_ids=trial_ids, config=dataclasses.replace(config, seed=seed))
            for seed in self.seeds
            for config, trial_ids in owners.items()
        ]

    @property
    def _confirmed(self) -> Sequence[TrialRecord]:
        return self.ranked[: self.top_k]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmProgress:
    """A confirmation as it stands, for whoever shows it."""

    run: str
    """Name of the search's run."""
    seeds: tuple[int, ...]
    names: Mapping[str, str]
    """Trial id -> what to call it, best first."""
    total: int
    """Trainings that will be made; configurations that are alike share theirs."""
    done: int = 0
    runs: Sequence[ConfirmedRun] = ()
    """Those that have ended."""
    started: float
    """``time.monotonic()`` when the confirmation began."""


class ConfirmObserver(Protocol):
    """Shows a confirmation to its user."""

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """The confirmation begins, or a run (``ended``) came to its end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmResult:
    """What a confirmation left behind."""

    rows: Sequence[BestRow]
    """As in ``best.parquet``; empty where it was interrupted, and ``best.parquet`` is as the search wrote it."""
    runs: Sequence[ConfirmedRun]
    """As in ``confirm.parquet``."""
    progress: ConfirmProgress
    """As it ended."""
    left_out: str | None
    """Why the default configuration was not trained, or None."""
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return not self.rows


def plan_confirmation(
    ranked: Sequence[TrialRecord], space: SearchSpace, dataset: Dataset, options: SearchOptions
) -> ConfirmPlan:
    """The best ``top_k`` and the default configuration, on the same fresh seeds."""
    default = build_default(space, dataset, options)
    left_out = None
    if default.batch_size > len(dataset.train):
        images = f"{len(dataset.train):,} training images"
        left_out = f"the default configuration is left out: its batch of {default.batch_size} exceeds the {images}"
    return ConfirmPlan(
        ranked=ranked,
        top_k=options.top_k,
        default=None if left_out else default,
        left_out=left_out,
        seeds=choose_seeds(options.seed, options.confirm_seeds),
    )


def build_default(space: SearchSpace, dataset: Dataset, options: SearchOptions) -> TrialConfig:
    """PyTorch's AMP tutorial: lr 1e-3, batch 64, and GradScaler's own defaults where the space has fp16.

    Elsewhere the precision is the space's own: TrialConfig's default if that is among several.
    """
    known = space.precisions
    own = TrialConfig.precision if TrialConfig.precision in known else known[0]
    return TrialConfig(
        precision="fp16" if "fp16" in known else own,
        model=options.model,
        dataset=dataset.name,
        imbalance=dataset.imbalance,
        max_epochs=options.max_epochs,
        seed=options.seed,
    )


def choose_seeds(seed: int, count: int) -> tuple[int, ...]:
    """``count`` seeds that neither this search nor one of a seed near by has used: from 1000 on for seed 0."""
    first = 1_000 * (seed % 10**9 + 1)
    return tuple(itertools.islice((fresh for fresh in itertools.count(first) if fresh != seed), count))


def select_done(plan: ConfirmPlan, runs: Sequence[ConfirmedRun]) -> list[ConfirmedRun]:
    """Those of an earlier confirmation that was cut off which this plan asks for too."""
    asked = {(trial_id, job.config.seed) for job in plan.jobs for trial_id in job.trial_ids}
    return [run for run in runs if (run.trial_id, run.seed) in asked]


def list_left(plan: ConfirmPlan, done: Sequence[ConfirmedRun]) -> list[ConfirmJob]:
    """The jobs of a plan of which some run is not done yet."""
    known = {(run.trial_id, run.seed) for run in done}
    return [job for job in plan.jobs if {(name, job.config.seed) for name in job.trial_ids} - known]


def confirm(
    plan: ConfirmPlan,
    finished: Generator[tuple[ConfirmJob, ConfirmedRun]],
    *,
    done: Sequence[ConfirmedRun] = (),
    folder: Path,
    provenance: Provenance,
    num_threads: int,
    observer: ConfirmObserver,
) -> ConfirmResult:
    """Follow the runs of a plan, then rank its configurations again and rewrite ``best.parquet``.

    ``confirm.parquet`` is rewritten after each run. At Ctrl-C, what has finished stays there, and ``best.parquet`` is
    left as the search wrote it.

    Args:
        plan: from ``plan_confirmation``.
        finished: trains the jobs that are left, from ``train_on_slots``; gives each as it ends, and stops what runs
            when closed.
        done: runs of this plan from before it was cut off.
        folder: of the run.
        provenance: goes into the files.
        num_threads: CPU threads of a run.
        observer: is told of everything that happens.
    """
    begun = time.monotonic()
    total, left = len(plan.jobs), len(list_left(plan, done))
    progress = ConfirmProgress(
        run=folder.name,
        seeds=plan.seeds,
        names=plan.names,
        total=total,
        done=total - left,
        runs=_put_in_order(done, plan),
        started=begun,
    )
    rows: Sequence[BestRow] = ()
    try:
        _tell(observer, progress, None)
        with contextlib.closing(finished):
            for job, run in finished:
                copies = [dataclasses.replace(run, trial_id=trial_id) for trial_id in job.trial_ids]
                known = {(run.trial_id, run.seed): run for run in (*progress.runs, *copies)}
                runs = _put_in_order(list(known.values()), plan)
                progress = dataclasses.replace(progress, runs=runs, done=progress.done + 1)
                write_confirmed(folder, runs, provenance)
                _tell(observer, progress, copies[0])
    except KeyboardInterrupt:
        if progress.runs:  # the last may not have been written
            write_confirmed(folder, progress.runs, provenance)
    if progress.done == total:
        default = (
            None if plan.default is None else _record_default(plan.default, progress.runs, provenance, num_threads)
        )
        rows = rank_confirmed(plan.ranked, default, progress.runs, provenance.objectives)
        write_best(folder, rows, provenance)
    return ConfirmResult(
        rows=rows,
        runs=progress.runs,
        progress=progress,
        left_out=plan.left_out,
        seconds=time.monotonic() - begun,
    )


def _tell(observer: ConfirmObserver, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever watched is gone; the confirmation goes on
        observer.on_confirmation(progress, ended)


def _put_in_order(runs: Sequence[ConfirmedRun], plan: ConfirmPlan) -> list[ConfirmedRun]:
    """By configuration, as the search ranked them, and seed; not as slots happened to become free."""
    places = list(plan.names)
    return sorted(runs, key=lambda run: (places.index(run.trial_id), run.seed))


def _record_default(
    config: TrialConfig, runs: Sequence[ConfirmedRun], provenance: Provenance, num_threads: int
) -> TrialRecord:
    """The default configuration as a row of ``best.parquet``: no trial, so that it has no epochs."""
    own = [run for run in runs if run.trial_id == DEFAULT_ID]
    failed = next((run for run in own if run.status is not TrialStatus.COMPLETED), None)
    return TrialRecord(
        trial_id=DEFAULT_ID,
        trial_name=DEFAULT_ID,
        status=failed.status if failed else TrialStatus.COMPLETED,
        error=failed.error if failed else None,
        config=config,
        epochs=(),
        inert=find_inert(config, provenance.train_images),
        wall_seconds=0.0,
        device=own[0].device,
        num_threads=num_threads,
    )


# ---- on Ray's slots ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A job as it is tried, perhaps not for the first time."""

    job: ConfirmJob
    share: float
    """Of a GPU; 0 on the CPU."""
    deaths: int = 0
    """Workers that died of it."""
    earlier: ConfirmedRun | None = None
    """How it ended before, where it is tried again for another reason than a worker's death."""
    begun: float = math.nan
    """``time.monotonic()`` when this attempt was sent to a slot."""

    @property
    def seconds(self) -> float:
        """What this attempt has taken."""
        return time.monotonic() - self.begun

    def give_up(self, time_limit: float) -> ConfirmedRun:
        """The run of a job that took too long."""
        run = ConfirmedRun(
            trial_id=self.job.trial_ids[0],
            seed=self.job.config.seed,
            status=TrialStatus.FAILED,
            error=describe_limit(time_limit),
        )
        return self.conclude(run)

    def try_again(self, run: ConfirmedRun, *, died: bool) -> "Attempt | None":
        """The next attempt, or None where ``run`` is final: a configuration gets the chances that a trial had.

        A worker that dies costs up to two more attempts, any other exception one, since it may not be the settings'
        fault. Out of memory is, unless there is a larger share of the GPU to be had.
        """
        if died:
            return dataclasses.replace(self, deaths=self.deaths + 1) if self.deaths < WORKER_RETRIES else None
        if self.earlier is not None:
            return None
        if run.status is TrialStatus.OUT_OF_MEMORY and 0 < self.share < 1:
            return dataclasses.replace(self, share=double_share(self.share), earlier=run)
        return dataclasses.replace(self, earlier=run) if run.status is TrialStatus.FAILED else None

    def conclude(self, run: ConfirmedRun) -> ConfirmedRun:
        """``run`` as the final one, saying what went before where that is something else."""
        if run.error is None or self.earlier is None or self.earlier.error in (None, run.error):
            return run
        return dataclasses.replace(run, error=one_line(f"{run.error}; before that, {self.earlier.error}"))


def train_on_slots(
    jobs: Sequence[ConfirmJob], dataset: Dataset, resources: TrialResources, *, time_limit: float = math.inf
) -> Generator[tuple[ConfirmJob, ConfirmedRun]]:
    """Train ``jobs`` as Ray's tasks, each with what a trial had, as many at a time; gives each as it ends.

    One that takes longer than ``time_limit`` seconds is ended as failed. Closing the generator cancels what runs.
    """
    sent = ray.put((build_worker_setup(dataset, resources), dataset.test))
    waiting = collections.deque(Attempt(job=job, share=resources.gpus) for job in jobs)
    # No more than fit now: an attempt that waits in Ray's queue would count as one that hangs.
    count_slots = SlotCounter(resources.cpus, resources.gpus, max_concurrent=resources.max_concurrent)
    running: dict[ray.ObjectRef[ConfirmedRun], Attempt] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max(1, count_slots()):
                attempt = dataclasses.replace(waiting.popleft(), begun=time.monotonic())
                running[_start(attempt, resources.cpus, sent)] = attempt
            ended = _wait_for_one(running, time_limit)
            if ended is None:
                yield _end_latest(running, time_limit)
                continue
            attempt = running.pop(ended)
            run, died = _fetch(ended, attempt.job)
            if died and is_node_lost(run.error or ""):  # no fault of the run's
                waiting.appendleft(attempt)
                continue
            again = attempt.try_again(run, died=died)
            if again is not None:
                waiting.appendleft(again)
            else:
                yield attempt.job, attempt.conclude(run)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _wait_for_one(running: "Mapping[ray.ObjectRef[ConfirmedRun], Attempt]", time_limit: float) -> Any:
    """The first that has ended; None where one has taken too long before that."""
    while True:
        ended, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)
        if ended:
            return ended[0]
        if any(attempt.seconds > time_limit for attempt in running.values()):
            return None


def _end_latest(
    running: "dict[ray.ObjectRef[ConfirmedRun], Attempt]", time_limit: float
) -> tuple[ConfirmJob, ConfirmedRun]:
    """End the one that has taken the longest: it hangs."""
    latest = max(running, key=lambda reference: running[reference].seconds)
    attempt = running.pop(latest)
    ray.cancel(latest, force=True)
    return attempt.job, attempt.give_up(time_limit)


def _start(attempt: Attempt, cpus: int, sent: Any) -> "ray.ObjectRef[ConfirmedRun]":
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=attempt.share,
        # A process keeps the GPU, the context and the cap of memory that it began with.
        max_calls=1 if attempt.share else 0,
        max_retries=0,  # `Attempt` counts: Ray would try for ever where the memory monitor kills
    )(_train_in_worker)
    name = f"confirm {attempt.job.trial_ids[0]} on seed {attempt.job.config.seed}"
    reference: ray.ObjectRef[ConfirmedRun] = task.options(name=name).remote(sent, attempt.job)
    return reference


def _fetch(reference: "ray.ObjectRef[ConfirmedRun]", job: ConfirmJob) -> tuple[ConfirmedRun, bool]:
    """A run's result, and whether its worker died instead."""
    try:
        return ray.get(reference), False
    except ray.exceptions.RayError as error:
        cause = find_reason(str(error))
        status = find_status(None, error=True, cause=cause)
        run = ConfirmedRun(trial_id=job.trial_ids[0], seed=job.config.seed, status=status, error=cause)
        return run, True


def _train_in_worker(sent: tuple[WorkerSetup, Split], job: ConfirmJob) -> ConfirmedRun:
    """Train a job in the process that Ray gave it. Whatever is raised is a row."""
    worker_setup, test = sent
    device = torch.device("cpu")
    try:
        device = prepare_worker(worker_setup)
        data = TrainingData(worker_setup.train, worker_setup.validation, worker_setup.num_classes, device)
        return train_and_test(job, data, test)
    except Exception as error:
        return _record_failure(job, error, device)
    finally:
        with contextlib.suppress(RuntimeError):  # a context that is broken for good; the row says so
            release_memory(device)


def _record_failure(job: ConfirmJob, error: Exception, device: torch.device) -> ConfirmedRun:
    report = failure_report(error)
    return ConfirmedRun(
        trial_id=job.trial_ids[0],
        seed=job.config.seed,
        status=TrialStatus(report["status"]),
        error=report["error"],
        device=name_device(device),
    )


def train_and_test(job: ConfirmJob, data: TrainingData, test: Split) -> ConfirmedRun:
    """Train a job to its end as its trial was trained, then read the test set, once; not that of one past saving.

    Raises:
        Exception: whatever the model or the device raise.
    """
    run = TrainingRun(job.config, data)
    [last] = collections.deque(run.epochs(), maxlen=1)
    ending: dict[str, Any] = {"status": TrialStatus.DIVERGED, "error": f"{last.state}: {run.hopeless}"}
    if run.hopeless is None:
        ending = {"status": TrialStatus.COMPLETED, "val_loss": last.val_loss, "val_accuracy": last.val_accuracy}
        tested = run.evaluate(place_split(test, data.device))
        ending |= {f"test_{name}": value for name, value in vars(tested).items()}
    return ConfirmedRun(
        trial_id=job.trial_ids[0],
        seed=job.config.seed,
        train_seconds=last.train_seconds,
        device=name_device(data.device),
        **ending,
    )
