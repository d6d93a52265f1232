"""Trains the runs of a confirmation as Ray tasks: retries them as trials are retried, and ends those that hang."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.util.queue import Queue

from tune_amp.cluster.failures import count_free_retries, describe_limit, find_reason, find_status
from tune_amp.cluster.resources import SlotCounter, TrialResources, beside_this_process, double_share
from tune_amp.cluster.trainable import (
    WORKER_RETRIES,
    WorkerSetup,
    build_worker_setup,
    failure_report,
    prepare_worker,
)
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.progress import ConfirmJob
from tune_amp.training.amp import name_device
from tune_amp.training.data import Dataset, Split
from tune_amp.training.memory import release_memory
from tune_amp.training.runs import NoData, place_data, start_run
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialStatus, one_line
from tune_amp.trial.objectives import metric_of

CHECK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a job, the first or a retry."""

    job: ConfirmJob
    share: float
    """Share of a GPU; 0 on the CPU."""
    deaths: int = 0
    """Number of workers that died during the job."""
    losses: int = 0
    """Number of attempts that ended because a node was lost, or its memory was held by other programs."""
    earlier: ConfirmedRun | None = None
    """Result of the previous attempt, if the job is retried for another reason than a worker's death."""
    started: float | None = None
    """``time.monotonic()`` when the report of the worker's start was read; None if it may still wait in Ray's queue."""

    @property
    def seconds(self) -> float:
        """Seconds since this attempt started; 0 while it waits."""
        return 0.0 if self.started is None else time.monotonic() - self.started

    def time_out(self, time_limit: float) -> ConfirmedRun:
        """Return the run of a job that took too long."""
        return self.conclude(_end(self.job, status=TrialStatus.FAILED, error=describe_limit(time_limit)))

    def plan_retry(self, run: ConfirmedRun, *, died: bool) -> "Attempt | None":
        """Return the next attempt, or None if ``run`` is final: a configuration gets as many retries as a trial.

        A worker's death allows up to two more attempts and any other exception one, because the settings may not be the
        cause. Running out of memory is final, because the settings are the cause, unless a larger share of the GPU is
        available. The settings never cause the loss of a node, nor a node's memory being held by other programs.
        """
        if died and self.losses < count_free_retries(run.error or ""):
            return dataclasses.replace(self, losses=self.losses + 1)
        if died:
            return dataclasses.replace(self, deaths=self.deaths + 1) if self.deaths < WORKER_RETRIES else None
        if self.earlier is not None:
            return None
        if run.status is TrialStatus.OUT_OF_MEMORY and 0 < self.share < 1:
            return dataclasses.replace(self, share=double_share(self.share), earlier=run)
        return dataclasses.replace(self, earlier=run) if run.status is TrialStatus.FAILED else None

    def conclude(self, run: ConfirmedRun) -> ConfirmedRun:
        """Return ``run`` as the final one, with the error of the previous attempt added if it differs."""
        if run.error is None or self.earlier is None or self.earlier.error in (None, run.error):
            return run
        return dataclasses.replace(run, error=one_line(f"{run.error}; before that, {self.earlier.error}"))


def train_on_slots(
    jobs: Sequence[ConfirmJob],
    dataset: Dataset,
    resources: TrialResources,
    *,
    objectives: tuple[str, ...] = (),
    time_limit: float = math.inf,
) -> Generator[tuple[ConfirmJob, ConfirmedRun]]:
    """Train ``jobs`` as Ray tasks with the resources and concurrency of trials; yield each job as it ends.

    A job that takes longer than ``time_limit`` seconds from its start is ended as failed. Closing the generator cancels
    running jobs.
    """
    if not jobs:
        return
    sent = ray.put((build_worker_setup(dataset, resources, objectives=objectives), dataset.test))
    waiting = collections.deque(Attempt(job=job, share=resources.gpus) for job in jobs)
    count_slots = SlotCounter(resources.cpus, resources.gpus, max_concurrent=resources.max_concurrent)
    running: dict[ray.ObjectRef[ConfirmedRun], Attempt] = {}
    with reported_starts(time_limit) as starts:
        try:
            while waiting or running:
                while waiting and len(running) < max(1, count_slots()):
                    attempt = dataclasses.replace(waiting.popleft(), started=None)
                    running[_start(attempt, resources.cpus, sent, starts)] = attempt
                ended = _wait_for_one(running, time_limit, starts)
                if ended is None:
                    yield _end_latest(running, time_limit)
                    continue
                attempt = running.pop(ended)
                run, died = _fetch(ended, attempt.job)
                again = attempt.plan_retry(run, died=died)
                if again is not None:
                    waiting.appendleft(again)
                else:
                    yield attempt.job, attempt.conclude(run)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


@contextlib.contextmanager
def reported_starts(time_limit: float) -> Iterator[Queue | None]:
    """Provide a queue for the ids of tasks that have started: before that they wait, perhaps for other jobs.

    It is an actor on the driver's node, and None if time is not limited.
    """
    if time_limit == math.inf:
        yield None
        return
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": beside_this_process()})
    try:
        yield queue
    finally:
        queue.shutdown(force=True)


def _wait_for_one(
    running: "dict[ray.ObjectRef[ConfirmedRun], Attempt]", time_limit: float, starts: Queue | None
) -> "ray.ObjectRef[ConfirmedRun] | None":
    """Return the first task that has ended, or None if one has taken too long before that."""
    while True:
        ended, _ = ray.wait(list(running), num_returns=1, timeout=CHECK_SECONDS)
        if ended:
            first: ray.ObjectRef[ConfirmedRun] = ended[0]
            return first
        if starts is not None:
            started = starts.get_nowait_batch(starts.qsize())
            for reference, attempt in running.items():
                if reference.task_id().hex() in started:
                    running[reference] = dataclasses.replace(attempt, started=time.monotonic())
        if any(attempt.seconds > time_limit for attempt in running.values()):
            return None


def _end_latest(
    running: "dict[ray.ObjectRef[ConfirmedRun], Attempt]", time_limit: float
) -> tuple[ConfirmJob, ConfirmedRun]:
    """End the attempt that has taken the longest: it hangs."""
    latest = max(running, key=lambda reference: running[reference].seconds)
    attempt = running.pop(latest)
    ray.cancel(latest, force=True)
    return attempt.job, attempt.time_out(time_limit)


def _start(attempt: Attempt, cpus: int, sent: Any, starts: Queue | None) -> "ray.ObjectRef[ConfirmedRun]":
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=attempt.share,
        # A process keeps the GPU, the context and the memory cap that it started with.
        max_calls=1 if attempt.share else 0,
        max_retries=0,  # `Attempt` counts retries: Ray would retry forever if the memory monitor kills the worker
    )(_train_in_worker)
    name = f"confirm {attempt.job.trial_ids[0]} on seed {attempt.job.config.seed}"
    reference: ray.ObjectRef[ConfirmedRun] = task.options(name=name).remote(sent, attempt.job, starts)
    return reference


def _fetch(reference: "ray.ObjectRef[ConfirmedRun]", job: ConfirmJob) -> tuple[ConfirmedRun, bool]:
    """Return a run's result, and whether its worker died."""
    try:
        return ray.get(reference), False
    except ray.exceptions.RayError as error:
        cause = find_reason(str(error))
        status = find_status(None, error=True, cause=cause)
        return _end(job, status=status, error=cause), True


def _train_in_worker(sent: tuple[WorkerSetup, Split], job: ConfirmJob, starts: Queue | None) -> ConfirmedRun:
    """Train a job in the process that Ray gave it. Any exception becomes a row."""
    if starts is not None:
        starts.put(ray.get_runtime_context().get_task_id())
    worker_setup, test = sent
    device = torch.device("cpu")
    try:
        device = prepare_worker(worker_setup)
        data = place_data(worker_setup.train, worker_setup.validation, worker_setup.num_classes, device)
        return train_and_test(job, data, test, worker_setup.objectives)
    except Exception as error:
        report = failure_report(error)
        status = TrialStatus(report["status"])
        return _end(job, status=status, error=report["error"], device=name_device(device))
    finally:
        with contextlib.suppress(RuntimeError):  # the CUDA context is broken for good; the row says so
            release_memory(device)


def _end(job: ConfirmJob, **fields: Any) -> ConfirmedRun:
    return ConfirmedRun(trial_id=job.trial_ids[0], seed=job.config.seed, **fields)


def train_and_test(
    job: ConfirmJob, data: TrainingData | NoData, test: Split, objectives: Sequence[str] = ()
) -> ConfirmedRun:
    """Train a job to its end as its trial was trained, then read the test set once, unless the run is past saving.

    Raises:
        Exception: any exception of the model or the device.
    """
    run = start_run(job.config, data, objectives=tuple(map(metric_of, objectives)), confirming=True)
    [last] = collections.deque(run.epochs(), maxlen=1)
    ending: dict[str, Any] = {"status": TrialStatus.DIVERGED, "error": f"{last.state}: {run.hopeless}"}
    if run.hopeless is None:
        ending = {"status": TrialStatus.COMPLETED, "val_loss": last.val_loss, "val_accuracy": last.val_accuracy}
        tested = run.test(test)
        own = {"train_loss": last.train_loss} if "train_loss" in map(metric_of, objectives) else {}
        ending |= tested | {"metrics": {**last.metrics, **own, **tested["metrics"]}}
    return _end(job, train_seconds=last.train_seconds, device=name_device(data.device), **ending)
