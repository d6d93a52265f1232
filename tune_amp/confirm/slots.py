"""Trains the runs of a confirmation in Ray actors: retries them as trials are retried, and ends those that hang."""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import ray

from tune_amp.cluster.failures import count_free_retries, describe_limit, find_reason, find_status
from tune_amp.cluster.memory_holders import naming_memory_holders
from tune_amp.cluster.resources import TrialResources, count_slots_now, double_share
from tune_amp.cluster.trainable import WORKER_RETRIES, AmpTrainable, failure_report
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.progress import ConfirmJob
from tune_amp.training.amp import name_device
from tune_amp.training.data import Split
from tune_amp.training.memory import release_memory
from tune_amp.training.runs import start_run
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialStatus
from tune_amp.trial.objectives import metric_of
from tune_amp.trial.text import one_line

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


class ConfirmSlots(contextlib.AbstractContextManager["ConfirmSlots"]):
    """The slots of a confirmation, with the resources and the concurrency of trials.

    A slot has one worker process for all of its jobs: one of the search's, or a new one, which imports PyTorch and
    places the data once. After a job that failed or ran out of memory it gets a new one. Use it in a ``with`` block,
    which ends all workers.

    Args:
        trainable: class of new workers: that of the search, from ``bind_trainable``.
        test: the test set.
        resources: resources of a slot, and how many slots there are.
        workers: workers of the search with these resources, which are idle: handles of ``AmpTrainable`` actors.
        objectives: objectives of the search.
        time_limit: seconds from its start after which a job is ended as failed.
        check: is called about every second, and raises an exception to end the jobs.
    """

    def __init__(
        self,
        trainable: type[AmpTrainable],
        test: Split,
        resources: TrialResources,
        *,
        workers: Sequence[Any] = (),
        objectives: tuple[str, ...] = (),
        time_limit: float = math.inf,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._check = check
        self._trainable, self._test_split, self._resources = trainable, test, resources
        self._objectives, self._time_limit = objectives, time_limit
        self._count_slots = count_slots_now(resources.cpus, resources.gpus, max_concurrent=resources.max_concurrent)
        self._idle = [_Worker(worker, resources.gpus) for worker in workers]
        self._running: dict[ray.ObjectRef[ConfirmedRun], tuple[Attempt, _Worker]] = {}

    @functools.cached_property
    def _test(self) -> "ray.ObjectRef[Split]":
        return ray.put(self._test_split)

    def __exit__(self, *_: object) -> None:
        """End all workers."""
        self._end_running()
        self._end_idle()

    def train(self, jobs: Sequence[ConfirmJob]) -> Generator[tuple[ConfirmJob, ConfirmedRun]]:
        """Train ``jobs``; yield each job as it ends. Closing the generator cancels running jobs."""
        waiting = collections.deque(Attempt(job=job, share=self._resources.gpus) for job in jobs)
        try:
            while waiting or self._running:
                self._check()
                while waiting and len(self._running) < max(1, self._count_slots()):
                    self._start(waiting.popleft())
                ended, _ = ray.wait(list(self._running), num_returns=1, timeout=CHECK_SECONDS)
                for reference in ended:
                    attempt, worker = self._running.pop(reference)
                    run, died = _fetch(reference, attempt.job)
                    self._release(worker, run)
                    if died:  # so may all that are idle, on a node that is lost
                        self._end_idle()
                    again = attempt.plan_retry(run, died=died)
                    if again is not None:
                        waiting.appendleft(again)
                    else:
                        yield attempt.job, attempt.conclude(run)
                for reference, (attempt, worker) in list(self._running.items()):
                    if not ended and worker.count_seconds() > self._time_limit:  # it hangs
                        del self._running[reference]
                        worker.end()
                        run = _end(attempt.job, status=TrialStatus.FAILED, error=describe_limit(self._time_limit))
                        yield attempt.job, attempt.conclude(run)
        finally:
            self._end_running()

    def _start(self, attempt: Attempt) -> None:
        worker = next((worker for worker in self._idle if worker.share == attempt.share), None)
        if worker is None:
            self._end_idle()  # they may hold what the new one needs
            # `Attempt` counts retries: an actor that restarts would lose them.
            remote = ray.remote(num_cpus=self._resources.cpus, num_gpus=attempt.share, max_restarts=0)
            worker = _Worker(remote(self._trainable).remote(), attempt.share)
        else:
            self._idle.remove(worker)
        self._running[worker.train(attempt.job, self._test, self._objectives)] = attempt, worker

    def _release(self, worker: "_Worker", run: ConfirmedRun) -> None:
        """Keep a worker for the next job, unless its process may be why the last one failed.

        Nor is it kept while a larger share is asked for, which may wait for what this worker holds.
        """
        is_sound = run.status in (TrialStatus.COMPLETED, TrialStatus.DIVERGED)
        if is_sound and all(other.share == worker.share for _, other in self._running.values()):
            self._idle.append(worker)
        else:
            worker.end()

    def _end_running(self) -> None:
        for _, worker in self._running.values():
            worker.end()
        self._running = {}

    def _end_idle(self) -> None:
        for worker in self._idle:
            worker.end()
        self._idle = []


class _Worker:
    """An ``AmpTrainable`` actor that trains jobs.

    Args:
        actor: its handle.
        share: its share of a GPU; 0 on the CPU.
    """

    def __init__(self, actor: Any, share: float) -> None:
        self._actor, self.share = actor, share
        self._is_ready = actor.__ray_ready__.remote()
        self._started: float | None = None

    def train(
        self, job: ConfirmJob, test: "ray.ObjectRef[Split]", objectives: tuple[str, ...]
    ) -> "ray.ObjectRef[ConfirmedRun]":
        """Start a job."""
        self._started = None
        called = self._actor.lend.options(name=f"confirm {job.trial_ids[0]} on seed {job.config.seed}")
        reference: ray.ObjectRef[ConfirmedRun] = called.remote(run_job, job, test, objectives)
        return reference

    def count_seconds(self) -> float:
        """Return the seconds since the job was found to have started; 0 while the process waits for resources."""
        if self._started is None and ray.wait([self._is_ready], timeout=0)[0]:
            self._started = time.monotonic()
        return 0.0 if self._started is None else time.monotonic() - self._started

    def end(self) -> None:
        """End the process at once: it has nothing to clean up."""
        ray.kill(self._actor)


def _fetch(reference: "ray.ObjectRef[ConfirmedRun]", job: ConfirmJob) -> tuple[ConfirmedRun, bool]:
    """Return a run's result, and whether its worker died."""
    try:
        return ray.get(reference), False
    except ray.exceptions.RayError as error:
        cause = find_reason(str(error))
        status = find_status(None, error=True, cause=cause)
        return _end(job, status=status, error=cause), True


def run_job(worker: AmpTrainable, job: ConfirmJob, test: Split, objectives: tuple[str, ...] = ()) -> ConfirmedRun:
    """Train and test a job with ``train_and_test``. Any exception becomes a row."""
    try:
        with naming_memory_holders(worker.device, worker.share):
            return train_and_test(job, worker.data, test, objectives)
    except Exception as error:
        report = failure_report(error)
        status = TrialStatus(report["status"])
        return _end(job, status=status, error=report["error"], device=name_device(worker.device))
    finally:
        with contextlib.suppress(RuntimeError):  # the CUDA context is broken for good; the row says so
            release_memory(worker.device)


def _end(job: ConfirmJob, **fields: Any) -> ConfirmedRun:
    return ConfirmedRun(trial_id=job.trial_ids[0], seed=job.config.seed, **fields)


def train_and_test(job: ConfirmJob, data: TrainingData, test: Split, objectives: Sequence[str] = ()) -> ConfirmedRun:
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
