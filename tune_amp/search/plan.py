"""Decides what a search needs before it starts: its resources, the settings its trials share, and its provenance."""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from tune_amp.cluster.gpu_sharing import find_largest
from tune_amp.cluster.resources import TrialResources, allocate_resources, list_nodes, measure_with_ray
from tune_amp.results.records import Provenance, list_versions
from tune_amp.search.history import PastRun
from tune_amp.search.options import SearchOptions
from tune_amp.search.warm_start import Donor, WarmStart, plan_warm_start
from tune_amp.space.space import SearchSpace
from tune_amp.training.data import Dataset


def plan_resources(
    options: SearchOptions,
    space: SearchSpace | None = None,
    dataset: Dataset | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> TrialResources:
    """Return the resources of the running Ray that each trial gets.

    Args:
        options: if they leave the share of a GPU open, it is chosen here.
        space: with ``dataset``, a measurement chooses the share; without, a rule does.
        dataset: see ``space``.
        announce: is called with a line about what takes long.

    Raises:
        InputError: the options ask for more than Ray has.
    """
    free = ray.available_resources()
    measure = None
    if space is not None and dataset is not None:
        largest = find_largest(
            space, model=options.model, dataset=dataset.name, max_epochs=options.max_epochs, seed=options.seed
        )
        measure = functools.partial(measure_with_ray, largest, dataset.train, dataset.num_classes, announce=announce)
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
    return {"model": options.model, "max_epochs": options.max_epochs, "seed": options.seed, **data}


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


def describe_run(
    space: SearchSpace,
    dataset: Dataset,
    options: SearchOptions,
    run: str,
    command: Sequence[str],
    resources: TrialResources,
    warm_start: WarmStart | None = None,
) -> Provenance:
    """Return the provenance of this run's files."""
    return Provenance(
        run=run,
        command=tuple(command),
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
        device="cuda" if resources.gpus else "cpu",
        versions=list_versions("tune_amp", "torch", "torchvision", "ray", "optuna", "pyarrow", "numpy", "scikit-learn"),
        warm_start=None if warm_start is None else warm_start.donor.description,
    )


def find_time_left(options: SearchOptions, past: PastRun | None) -> float | None:
    """Return the seconds until the time budget is used up: 0 or less if it is, None if there is no budget."""
    if past is None or options.time_budget is None:
        return options.time_budget
    return options.time_budget - past.seconds
