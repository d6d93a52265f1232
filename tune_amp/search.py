"""Puts the parts together: one call searches a space on a data set and leaves a run folder behind."""

import contextlib
import dataclasses
import datetime
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import ConcurrencyLimiter

from tune_amp.config import TrialConfig, TrialStatus, format_scale
from tune_amp.confirm import ConfirmObserver, ConfirmResult, confirm, plan_confirmation, train_on_slots
from tune_amp.data import Dataset
from tune_amp.importance import ImportanceResult, measure_importance, write_importance
from tune_amp.ledger import Ledger
from tune_amp.options import SearchOptions
from tune_amp.preflight import check_fit, check_objectives
from tune_amp.ranking import choose_best
from tune_amp.recorder import Observer, SearchProgress, TrialRecorder
from tune_amp.resources import (
    SlotCounter,
    TrialResources,
    allocate_resources,
    double_share,
    list_nodes,
    measure_with_ray,
)
from tune_amp.results import Provenance, TrialRecord, list_versions, rank_trials, write_best
from tune_amp.searcher import AmpSearch, find_cause, is_node_lost
from tune_amp.shares import find_largest
from tune_amp.space import SearchSpace
from tune_amp.stopping import build_scheduler
from tune_amp.storage import check_from_nodes, prepare_storage
from tune_amp.trainable import WORKER_RETRIES, AmpTrainable, LargerShareNeeded, build_worker_setup
from tune_amp.warm_start import Donor, WarmStart, plan_warm_start

SPACE_FILE = "space.yaml"


class SearchObserver(Observer, ConfirmObserver, Protocol):
    """Shows a search, and then its confirmation, to its user."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search left behind."""

    folder: Path
    """The run folder: ``trials.parquet``, ``epochs.parquet``, ``space.yaml``, ``best.parquet`` if any trial counts."""
    trials: Sequence[TrialRecord]
    ranked: Sequence[TrialRecord]
    """The best first, as in ``best.parquet``: at most ``top_k``, or the Pareto set; empty where none has a result."""
    importance: ImportanceResult
    """Which parameters mattered for the first objective, as written to ``importance.parquet``, or why none is told."""
    provenance: Provenance
    interrupted: bool
    """Whether a signal ended the search before its trials did."""
    ledger: Ledger
    """What the slots spent their time on, until the last trial was over."""
    wrap_up_seconds: float
    """From then until everything was written and the importance of the parameters measured."""
    confirmation: ConfirmResult | None = None
    """What fresh seeds say of the best, or None where they were not asked."""

    @property
    def best_path(self) -> Path:
        """``best.parquet``; it exists where ``ranked`` is not empty."""
        return self.folder / "best.parquet"


def run_search(
    space: SearchSpace,
    dataset: Dataset,
    options: SearchOptions,
    *,
    folder: Path,
    observer: SearchObserver,
    command: Sequence[str] = (),
    storage_path: str | None = None,
    started: float | None = None,
    resources: TrialResources | None = None,
    warm_start: WarmStart | None = None,
) -> SearchResult:
    """Search ``space`` for the settings under which ``options.model`` trains best on ``dataset``.

    Call it inside ``session.ray_session``. Trials see the training and validation split only. Unless it was
    interrupted, the best are then confirmed on fresh seeds: see ``confirm``.

    Args:
        space: what is searched.
        dataset: its test split stays here, unread. Trials record how imbalanced ``data.make_long_tail`` made it.
        options: how much is searched, and with what.
        folder: an empty folder from ``options.run_folder``.
        observer: is told of everything that happens.
        command: the command line, for the record.
        storage_path: where Ray keeps checkpoints, a path or URL that all nodes can write; None for the run folder.
        started: ``time.monotonic()`` when the command began, from which slot time counts; None: it counts from now.
        resources: from ``plan_resources``; None to plan them here.
        warm_start: from ``adapt_donor``; None to start from nothing.

    Raises:
        InputError: space, data, model and options do not fit together; nothing has been trained.
    """
    check_fit(space, dataset, options)
    resources = resources or plan_resources(options, space, dataset)
    check_objectives(options, resources)
    nodes = len(list_nodes())
    storage = prepare_storage(storage_path, folder, nodes=nodes)
    if nodes > 1:
        check_from_nodes(storage, resources)
    (folder / SPACE_FILE).write_text(space.text, encoding="utf-8")
    provenance = describe_run(space, dataset, options, folder.name, command, resources)
    if warm_start is not None:
        provenance = dataclasses.replace(provenance, warm_start=warm_start.donor.description)
    progress = SearchProgress(
        run=folder.name,
        model=options.model,
        dataset=dataset.name,
        objectives=options.objectives,
        num_samples=options.num_samples,
        time_budget=options.time_budget,
        started=time.monotonic(),
    )
    begin = progress.started if started is None else started
    recorder = TrialRecorder(folder, provenance, progress, observer, slots=resources.max_concurrent, begin=begin)
    searcher = AmpSearch(
        space,
        list_shared(dataset, options),
        train_images=len(dataset.train),
        objectives=options.objectives,
        seed=options.seed,
        folder=folder,
        study_name=folder.name,
        sampler=options.sampler,
        num_samples=options.num_samples,
        warm_start=warm_start,
    )
    scheduler = build_scheduler(
        options.scheduler,
        objective=options.objectives[0],
        max_epochs=options.max_epochs,
        grace_period=options.grace_period,
        reduction_factor=options.reduction_factor,
        on_worker_death=functools.partial(_prepare_next_attempt, searcher, resources),
    )
    tuner = tune.Tuner(
        bind_trainable(dataset, resources),
        tune_config=tune.TuneConfig(
            num_samples=options.num_samples,
            search_alg=SlotLimiter(
                searcher, SlotCounter(resources.cpus, resources.gpus, max_concurrent=options.max_concurrent)
            ),
            scheduler=scheduler,
            time_budget_s=options.time_budget,
            reuse_actors=True,
            trial_name_creator=name_trial,
            trial_dirname_creator=name_trial,
        ),
        run_config=tune.RunConfig(
            name=storage.name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
            verbose=0,
        ),
    )
    with _written_at_the_end(searcher, recorder), _keeping_ctrl_c():
        tuner.fit()
    storage.remove_checkpoints()
    ranked = choose_best(recorder.trials, options.objectives, options.top_k)
    if ranked:
        write_best(folder, rank_trials(ranked), provenance)
    importance = measure_importance(
        space, recorder.trials, options.objectives[0], train_images=len(dataset.train), seed=options.seed
    )
    if importance.rows:
        write_importance(folder, importance, provenance)
    ledger = recorder.ledger
    assert ledger is not None  # the search is over
    result = SearchResult(
        folder=folder,
        trials=recorder.trials,
        ranked=ranked,
        importance=importance,
        provenance=provenance,
        interrupted=was_interrupted(recorder.trials, options, time.monotonic() - progress.started),
        ledger=ledger,
        wrap_up_seconds=time.monotonic() - begin - ledger.wall_seconds,
    )
    if not options.confirm_seeds or not ranked or result.interrupted:
        return result
    return _confirm(result, space, dataset, options, resources, observer)


def _confirm(
    result: SearchResult,
    space: SearchSpace,
    dataset: Dataset,
    options: SearchOptions,
    resources: TrialResources,
    observer: ConfirmObserver,
) -> SearchResult:
    plan = plan_confirmation(result.ranked, space, dataset, options)
    confirmation = confirm(
        plan,
        train_on_slots(plan.jobs, dataset, resources),
        folder=result.folder,
        provenance=result.provenance,
        num_threads=resources.cpus,
        observer=observer,
    )
    ranked = [row.trial for row in confirmation.rows if row.rank is not None]
    return dataclasses.replace(result, ranked=ranked or result.ranked, confirmation=confirmation)


def list_shared(dataset: Dataset, options: SearchOptions) -> dict[str, Any]:
    """The ``TrialConfig`` fields that all trials of a search have in common."""
    data = {"dataset": dataset.name, "imbalance": dataset.imbalance}
    return {"model": options.model, "max_epochs": options.max_epochs, "seed": options.seed, **data}


def adapt_donor(donor: Donor, space: SearchSpace, dataset: Dataset, options: SearchOptions) -> WarmStart:
    """What a search with these arguments takes over from an earlier run; see ``warm_start.load_donor``."""
    return plan_warm_start(
        donor,
        space,
        list_shared(dataset, options),
        data_hash=dataset.content_hash,
        train_images=len(dataset.train),
        objectives=options.objectives,
        sampler=options.sampler,
    )


def plan_resources(
    options: SearchOptions,
    space: SearchSpace | None = None,
    dataset: Dataset | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> TrialResources:
    """What each trial gets of the running Ray.

    Args:
        options: where they leave the share of a GPU open, it is chosen.
        space: with ``dataset``, the choice is measured; without, it is a rule's.
        dataset: see ``space``.
        announce: is told, in a line, what takes long.

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
    """What to add to ``resources.reason`` where other jobs of a cluster hold some of it: trials wait for them."""
    cpus, gpus = int(free.get("CPU", 0.0)), free.get("GPU", 0.0)
    now = min(cpus // resources.cpus, int(gpus / resources.gpus + 1e-6) if resources.gpus else cpus)
    if now >= resources.max_concurrent:
        return ""
    return f"; others hold part of the cluster: {now} can start now, the rest wait"


def bind_trainable(dataset: Dataset, resources: TrialResources) -> type[AmpTrainable]:
    """The trainable with its share of the machine, and the data in Ray's object store: one copy a node."""
    with_data = tune.with_parameters(AmpTrainable, worker_setup=build_worker_setup(dataset, resources))
    trainable: type[AmpTrainable] = tune.with_resources(with_data, _request(resources.cpus, resources.gpus))
    # Ray's dashboard lists actors by their qualified name, which the wrappers above hide.
    trainable.__qualname__ = AmpTrainable.__qualname__
    return trainable


def name_trial(trial: Any) -> str:
    """A name people can read: ``07-fp16-lr0.0031-b256-scale2^12``, the number first."""
    config = TrialConfig(**trial.config)
    number = int(trial.experiment_tag.split("_")[0])
    name = f"{number:02d}-{config.precision}-lr{config.lr:.2g}-b{config.batch_size}"
    return f"{name}-scale{format_scale(config.init_scale)}" if config.init_scale is not None else name


def describe_run(
    space: SearchSpace,
    dataset: Dataset,
    options: SearchOptions,
    run: str,
    command: Sequence[str],
    resources: TrialResources,
) -> Provenance:
    """Where this run's files come from."""
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
    )


def was_interrupted(trials: Sequence[TrialRecord], options: SearchOptions, seconds: float) -> bool:
    """Whether the search ended before its trials did, other than by its time budget."""
    unfinished = len(trials) < options.num_samples or any(t.status is TrialStatus.INTERRUPTED for t in trials)
    return unfinished and (options.time_budget is None or seconds < options.time_budget)


def _request(cpus: int, gpus: float) -> tune.PlacementGroupFactory:
    return tune.PlacementGroupFactory([{"CPU": cpus, **({"GPU": gpus} if gpus else {})}])


class SlotLimiter(ConcurrencyLimiter):
    """As many trials at a time as there are slots now. Ray's own fixes the number when the search begins."""

    def __init__(self, searcher: AmpSearch, count: Callable[[], int]) -> None:
        self._count = count
        super().__init__(searcher, max_concurrent=max(1, count()))

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The settings of the next trial, or None where all slots are taken."""
        self.max_concurrent = self._count()
        return super().suggest(trial_id)


def _prepare_next_attempt(searcher: AmpSearch, resources: TrialResources, trial: Any) -> None:
    """Hear of a worker's death, from the scheduler, before Tune asks for resources to try the trial again.

    A trial that ran out of its share of a GPU gets twice the share. That attempt, and one that a lost node costs, are
    not counted among those that a worker's death may cost; a trial whose retries are used up has ended, and nothing is
    changed.
    """
    searcher.note_worker_death(trial)
    if trial.status != Trial.ERROR:
        return
    cause = find_cause(trial)
    larger_share = LargerShareNeeded.__name__ in cause
    if larger_share:
        trial.update_resources(_request(resources.cpus, double_share(resources.gpus)))
    if larger_share or is_node_lost(cause):
        trial.max_failures += 1


@contextlib.contextmanager
def _written_at_the_end(searcher: AmpSearch, recorder: TrialRecorder) -> Iterator[None]:
    """Whatever ends the search, no trial stays running in the study and every report is on disk."""
    try:
        yield
    finally:
        try:
            recorder.finish()
        finally:
            searcher.close()


@contextlib.contextmanager
def _keeping_ctrl_c() -> Iterator[None]:
    """Tune leaves its own answer to Ctrl-C behind, which after a search would swallow the first."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
