"""Plans a search before it starts: checks that everything fits, and decides the resources of its trials."""

import dataclasses
import datetime
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from tune_amp.cluster.gpu_sharing import find_largest
from tune_amp.cluster.resources import TrialResources, allocate_resources, list_nodes, measure_with_ray
from tune_amp.results.provenance import Provenance, list_versions
from tune_amp.search.history import RunHistory
from tune_amp.search.options import SearchOptions
from tune_amp.search.preflight import check_fit
from tune_amp.search.warm_start import Donor, WarmStart, plan_warm_start
from tune_amp.space.space import SearchSpace
from tune_amp.training.data import Dataset, StreamedSplit
from tune_amp.trial.config import MODELS, InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """Everything that a search depends on.

    Raises:
        InputError: GPU memory is an objective, and trials get no GPU.
    """

    space: SearchSpace
    dataset: Dataset
    """Its test split stays on the driver, unread until the winners are confirmed."""
    options: SearchOptions
    folder: Path
    """An empty folder from ``options.run_folder``, or that of ``history`` if there is one."""
    resources: TrialResources
    """Resources of each trial, from ``plan_resources``."""
    unfit: Mapping[str, str]
    """Precisions in which the model cannot be trained on this machine's CPU, with the reason, from ``check_fit``."""
    command: Sequence[str] = ()
    """The command line, for the record."""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The command line by ``argparse``'s names, recorded for resuming the run."""
    storage_path: str | None = None
    """Path or URL for Ray's checkpoints that all nodes can write; None for the run folder."""
    warm_start: WarmStart | None = None
    """What is reused of an earlier run, from ``adapt_donor``."""
    history: RunHistory | None = None
    """The run to resume, with the same space, data and options, from ``history.open_history``; None for a new run."""
    begun: float = dataclasses.field(default_factory=time.monotonic)
    """``time.monotonic()`` when the command began, from which slot time counts."""

    def __post_init__(self) -> None:
        if "peak_memory_bytes" in self.options.objectives and not self.resources.gpus:
            raise InputError("--objective: peak_memory_bytes is measured on GPUs only, and trials get none here")

    @property
    def time_left(self) -> float | None:
        """Seconds until the time budget is used up: 0 or less if it is, None if there is no budget."""
        if self.history is None or self.options.time_budget is None:
            return self.options.time_budget
        return self.options.time_budget - self.history.seconds


def plan_search(
    space: SearchSpace, dataset: Dataset, options: SearchOptions, *, folder: Path, **more: Any
) -> SearchPlan:
    """Return the plan of a search, checked to fit; ``more`` are further fields. Call it in ``session.ray_session``.

    Raises:
        InputError: space, data, model, options and Ray's resources do not fit together.
    """
    resources = plan_resources(options, space, dataset)
    unfit = check_fit(space, dataset, options, may_use_gpus=resources.gpus > 0)
    return SearchPlan(
        space=space, dataset=dataset, options=options, folder=folder, resources=resources, unfit=unfit, **more
    )


def plan_resources(
    options: SearchOptions, space: SearchSpace, dataset: Dataset, announce: Callable[[str], None] = lambda _: None
) -> TrialResources:
    """Return the resources of the running Ray that each trial gets.

    Args:
        options: if they leave the share of a GPU open, it is chosen here.
        space: what is searched.
        dataset: a measurement chooses the share; for a streamed or an empty data set, a rule does.
        announce: is called with a line about what takes long.

    Raises:
        InputError: the options ask for more than Ray has.
    """
    free = ray.available_resources()
    measure = None
    if len(dataset.train) > 0 and not isinstance(dataset.train, StreamedSplit):
        largest = find_largest(space, own=space.own_defaults, **list_shared(dataset, options))
        measure = functools.partial(
            measure_with_ray,
            largest,
            dataset.train,
            dataset.num_classes,
            keep=options.model in MODELS and not options.is_own,
            announce=announce,
        )
    resources = allocate_resources(
        list_nodes(),
        gpus_per_trial=options.gpus_per_trial,
        cpus_per_trial=options.cpus_per_trial,
        max_concurrent=options.max_concurrent,
        num_samples=options.num_samples,
        choose_shared=measure,
    )
    return dataclasses.replace(resources, reason=resources.reason + describe_wait(free, resources))


def describe_wait(free: Mapping[str, float], resources: TrialResources) -> str:
    """Return what to add to ``resources.reason`` if other jobs hold part of the cluster, for which trials must wait."""
    cpus, gpus = int(free.get("CPU", 0.0)), free.get("GPU", 0.0)
    now = min(cpus // resources.cpus, int(gpus / resources.gpus + 1e-6) if resources.gpus else cpus)
    if now >= resources.max_concurrent:
        return ""
    return f"; others hold part of the cluster: {now} can start now, the rest wait"


def list_shared(dataset: Dataset, options: SearchOptions) -> dict[str, Any]:
    """Return the ``TrialConfig`` fields that all trials of a search have in common."""
    data = {"dataset": dataset.name, "imbalance": dataset.imbalance}
    own = {"task": options.task, "train": options.train}
    return {"model": options.model, "max_epochs": options.max_epochs, "seed": options.seed, **data, **own}


def adapt_donor(donor: Donor, space: SearchSpace, dataset: Dataset, options: SearchOptions) -> WarmStart:
    """Return what a search with these arguments uses of an earlier run; see ``warm_start.load_donor``."""
    return plan_warm_start(
        donor,
        space,
        list_shared(dataset, options),
        data_hash=dataset.content_hash,
        train_images=len(dataset.train),
        objectives=options.objectives,
        sampler=options.sampler,
    )


def describe_run(plan: SearchPlan) -> Provenance:
    """Return the provenance of this run's files."""
    space, dataset, options = plan.space, plan.dataset, plan.options
    return Provenance(
        run=plan.folder.name,
        command=tuple(plan.command),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        space_source=space.source,
        space_text=space.text,
        dataset=dataset.name,
        data_hash=dataset.content_hash,
        train_images=len(dataset.train),
        validation_images=len(dataset.validation),
        objective=options.objective,
        sampler=options.sampler,
        scheduler=options.scheduler,
        seed=options.seed,
        device="cuda" if plan.resources.gpus else "cpu",
        versions=list_versions("tune_amp", "torch", "torchvision", "ray", "optuna", "pyarrow", "numpy", "scikit-learn"),
        warm_start=None if plan.warm_start is None else plan.warm_start.donor.description,
    )
