"""Sets up Ray Tune for a search: the trainable, the handling of workers' deaths, and the end."""

import sys
from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from tune_amp.cluster.checkpoints import RunStorage
from tune_amp.cluster.failures import LARGER_SHARE_SIGN, count_free_retries, find_cause, find_reason
from tune_amp.cluster.interrupt import StopRequest
from tune_amp.cluster.memory_holders import MEMORY_HELD_SIGN, MEMORY_WAIT_SECONDS
from tune_amp.cluster.ray_patches import (
    kept_starting_workers,
    patched_worker_deaths,
    quiet_tune,
    workers_of_private_ray,
)
from tune_amp.cluster.resources import TrialResources, double_share
from tune_amp.cluster.trainable import WORKER_RETRIES, AmpTrainable, build_worker_setup
from tune_amp.search.history import RecordedTrial
from tune_amp.search.schedulers import DivergenceAware
from tune_amp.search.source import KeptWorkers, TrialSource
from tune_amp.training.data import Dataset
from tune_amp.trial.text import format_scale


def bind_trainable(
    dataset: Dataset,
    resources: TrialResources,
    storage: RunStorage,
    unfinished: Sequence[RecordedTrial],
    objectives: tuple[str, ...],
) -> type[AmpTrainable]:
    """Return the trainable with its share of the machine, and the data in Ray's object store: one copy a node."""
    checkpoints = {trial.trial_id: [f"{storage.path}/{path}" for path in trial.checkpoints] for trial in unfinished}
    worker_setup = build_worker_setup(
        dataset, resources, checkpoints=checkpoints, filesystem=storage.filesystem, objectives=objectives
    )
    with_data = tune.with_parameters(AmpTrainable, worker_setup=worker_setup)
    trainable: type[AmpTrainable] = tune.with_resources(with_data, _request(resources.cpus, resources.gpus))
    # Ray's dashboard lists actors by their qualified name, which the wrappers above hide.
    trainable.__qualname__ = AmpTrainable.__qualname__
    return trainable


def name_trial(trial: Any) -> str:
    """Return a readable name of a trial: ``07-fp16-lr0.0031-b256-scale2^12``, the number first."""
    settings = trial.config
    name = f"{int(trial.experiment_tag):02d}-{settings['precision']}-lr{settings['lr']:.2g}-b{settings['batch_size']}"
    return name if settings["init_scale"] is None else f"{name}-scale{format_scale(settings['init_scale'])}"


def _request(cpus: int, gpus: float) -> tune.PlacementGroupFactory:
    return tune.PlacementGroupFactory([{"CPU": cpus, **({"GPU": gpus} if gpus else {})}])


def prepare_next_attempt(resources: TrialResources, announced: set[str], workers: KeptWorkers, trial: Any) -> float:
    """Prepare a trial whose worker died for its retry. The scheduler calls this before Tune requests the resources.

    A trial that ran out of its share of a GPU gets twice the share. A trial whose node has memory held by others waits,
    and a message says so once. A trial whose retries are used up has ended, and nothing is changed.

    Returns:
        Seconds until the trial may be retried.
    """
    workers.drop()
    cause = find_cause(trial)
    if trial.status != Trial.ERROR:
        return 0.0
    if LARGER_SHARE_SIGN in cause:
        trial.update_resources(_request(resources.cpus, double_share(resources.gpus)))
    if MEMORY_HELD_SIGN not in cause:
        return 0.0
    if trial.trial_id not in announced:
        announced.add(trial.trial_id)
        print(f"waiting  {trial}: {cause}", file=sys.stderr)  # noqa: T201
    return MEMORY_WAIT_SECONDS


def run_tuner(
    trainable: type[AmpTrainable],
    source: TrialSource,
    scheduler: DivergenceAware,
    *,
    storage: RunStorage,
    stop: StopRequest,
    callbacks: Sequence[tune.Callback],
    num_samples: int,
    time_left: float | None,
) -> None:
    """Run the trials. An error of Tune that follows from a fault already reported to ``stop`` is not raised again.

    Args:
        trainable: from ``bind_trainable``.
        source: the trials, past ones first.
        scheduler: from ``build_scheduler``.
        storage: where checkpoints go.
        stop: ends all trials once the search is to end.
        callbacks: in the order in which they are called.
        num_samples: number of trials, past ones included.
        time_left: seconds until Tune ends all trials; None: never.
    """
    tune_config = tune.TuneConfig(
        num_samples=num_samples,
        search_alg=source,
        scheduler=scheduler,
        time_budget_s=time_left,
        reuse_actors=True,
        trial_name_creator=name_trial,
        trial_dirname_creator=name_trial,
    )
    run_config = tune.RunConfig(
        name=storage.name,
        storage_path=storage.path,
        storage_filesystem=storage.filesystem,
        stop=StopWhenAsked(stop),
        callbacks=list(callbacks),
        failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
        verbose=0,
    )
    tuner = tune.Tuner(trainable, tune_config=tune_config, run_config=run_config)
    try:
        with (
            quiet_tune(),
            workers_of_private_ray(),
            kept_starting_workers(),
            patched_worker_deaths(stop.ask, UncountedDeaths()),
        ):
            tuner.fit()
    except Exception:
        if stop.reason is None:
            raise


class StopWhenAsked(tune.Stopper):
    """Ends all trials once a search is to end."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: no trial is ended by its result."""
        return False

    def stop_all(self) -> bool:
        """Return whether Tune should end."""
        return self._stop.reason is not None


class UncountedDeaths:
    """Decides which deaths of workers cost a trial none of its ``WORKER_RETRIES``.

    These are the deaths of a trial that needs a larger share of a GPU, and of one whose node is lost or full of other
    programs. The latter cost a retry once they happen more often than ``count_free_retries`` says without one more
    epoch, as behind a network that keeps breaking.
    """

    def __init__(self) -> None:
        self._lost: dict[str, tuple[int, int]] = {}

    def __call__(self, trial: Any, error: Exception) -> bool:
        """Return whether the death that has just ended the trial's worker is one of them."""
        cause = find_reason(str(error))
        most = count_free_retries(cause)
        if most == 0:
            return LARGER_SHARE_SIGN in cause
        epoch = (trial.run_metadata.last_result or {}).get("epoch", 0)
        furthest, times = self._lost.get(trial.trial_id, (epoch, 0))
        times = 1 if epoch > furthest else times + 1
        self._lost[trial.trial_id] = (max(epoch, furthest), times)
        return times <= most
