"""Runs a search as planned: open, run, conclude, confirm. It leaves a run folder behind."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from tune_amp.cluster.checkpoints import RunStorage, check_from_nodes, prepare_storage
from tune_amp.cluster.health import RayHealth
from tune_amp.cluster.interrupt import StopRequest, watching
from tune_amp.cluster.ray_patches import is_private
from tune_amp.cluster.resources import count_slots_now, list_nodes
from tune_amp.cluster.trainable import AmpTrainable
from tune_amp.confirm.plan import build_default, confirm, count_most_runs, plan_confirmation
from tune_amp.confirm.slots import ConfirmSlots
from tune_amp.monitor.prometheus import Gauges
from tune_amp.results.importance import FEWEST_TRIALS, ImportanceResult, measure_importance, write_importance
from tune_amp.results.progress import ConfirmResult, Observer, SearchProgress
from tune_amp.results.provenance import Provenance
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import (
    SlotTime,
    TrialRecord,
    load_confirmed,
    rank_trials,
    write_best,
)
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import RecordedTrial, RunHistory, begin_run
from tune_amp.search.mending import mend_run
from tune_amp.search.options import SearchOptions
from tune_amp.search.plan import SearchPlan, describe_run, list_shared
from tune_amp.search.recorder import TrialRecorder
from tune_amp.search.schedulers import DivergenceAware, build_scheduler, make_key, restore_scheduler
from tune_amp.search.source import KeptWorkers, TrialSource
from tune_amp.search.study import AmpSearch
from tune_amp.search.time_limit import TimeLimit
from tune_amp.search.tuner import bind_trainable, prepare_next_attempt, run_tuner
from tune_amp.trial.config import TrialStatus
from tune_amp.trial.text import generalize_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search left behind."""

    folder: Path
    """The run folder: ``trials.parquet``, ``epochs.parquet``, ``space.yaml``, ``best.parquet`` if any trial counts."""
    trials: Sequence[TrialRecord]
    ranked: Sequence[TrialRecord]
    """The best first, as in ``best.parquet``: at most ``top_k``, or the Pareto set; empty if none has a result."""
    importance: ImportanceResult
    """Which parameters mattered for the first objective, as in ``importance.parquet``, or why that is unknown."""
    provenance: Provenance
    interrupted: bool
    """Whether something ended the search before its trials did: a signal, a full disk, the end of Ray."""
    is_out_of_time: bool
    """Whether the time budget ended the search before its trials did."""
    reason: str | None = None
    """Why the search was asked to end; None if it was not."""
    failing: bool = False
    """Whether the reason is that the first trials all failed with the same error."""
    slot_time: SlotTime
    """Slots, and seconds until the last trial ended."""
    wrap_up_seconds: float
    """Seconds from then until everything was written and the importance of the parameters was measured."""
    confirmation: ConfirmResult | None = None
    """Results of the best on fresh seeds; None if there was no confirmation."""

    @property
    def is_cut_off(self) -> bool:
        """Whether there is something to resume: trials, or the runs that confirm them."""
        return self.interrupted or (self.confirmation is not None and self.confirmation.interrupted)

    @property
    def best_path(self) -> Path:
        """Path of ``best.parquet``, which exists if ``ranked`` is not empty."""
        return RunFolder(self.folder).best


def run_search(
    plan: SearchPlan,
    observer: Observer,
    *,
    stop: StopRequest | None = None,
    trackers: Sequence[tune.Callback] = (),
    announce: Callable[[str], object] = lambda line: None,
) -> SearchResult:
    """Search for the settings under which the plan's model trains best on its data set.

    Call it inside ``session.ray_session``. Unless the search was interrupted, the best are then confirmed on fresh
    seeds: see ``confirm``.

    However it ends, another call resumes it from ``reports.journal`` in the run folder. Trials that ended keep their
    results, study and scheduler regain their state, and trials that were cut off resume from their last checkpoint.

    Args:
        plan: from ``plan_search``.
        observer: is notified of everything that happens.
        stop: asks the search to end; None: a KeyboardInterrupt does.
        trackers: from ``trackers.build_trackers``.
        announce: is called with a line for each part of the run that is not as the search left it.

    Raises:
        InputError: the run cannot be resumed, or its place for checkpoints is of no use; nothing has been trained.
        OSError: a file cannot be written, for example to a full disk; what was reported is in the journal.
    """
    stop, health = stop or StopRequest(), RayHealth()
    storage = _open_storage(plan)
    gauges = Gauges(observer, slots=plan.resources.max_concurrent)
    resumed = contextlib.nullcontext(plan.history) if plan.history else None
    opened = resumed or begin_run(plan.folder, plan.space, describe_run(plan), plan.arguments)
    with opened as history, concurrent.futures.ThreadPoolExecutor(1) as remover:  # Tune does not wait for a slow disk
        for line in mend_run(plan.folder, history):
            announce(line)
        limit = TimeLimit(plan.options.trial_time_limit)
        recorder = TrialRecorder(
            plan.folder,
            history,
            _describe_progress(plan),
            gauges,
            storage_root=storage.path,
            begin=plan.begun,
            explain_death=limit.explain_death,
            on_fault=stop.ask,
            on_end=lambda name: remover.submit(_clean_up, storage, name, plan.options),
            on_failure=functools.partial(stop_if_failing, plan.options, stop),
        )
        callbacks = [limit, *trackers, recorder]
        unfinished, objectives = history.unfinished, plan.options.objectives
        trainable = bind_trainable(plan.dataset, plan.resources, storage, unfinished, objectives)
        with gauges:
            workers = _run_trials(
                plan, history, storage, recorder, trainable, stop, health, callbacks=callbacks, announce=announce
            )
        result = _conclude(plan, recorder, history.provenance, stop)
        if not is_unfinished(result.trials, plan.options):
            remover.submit(storage.remove_checkpoints)
        if result.interrupted or not plan.options.confirm_seeds or not result.ranked:
            return result
        slots = ConfirmSlots(
            trainable,
            plan.dataset.test,
            plan.resources,
            workers=workers,
            objectives=objectives,
            time_limit=plan.options.trial_time_limit or math.inf,
            check=functools.partial(stop.check, health.find_dead_process),
        )
        with gauges:
            return _confirm(plan, result, slots, gauges, stop, health)


def _clean_up(storage: RunStorage, trial_name: str, options: SearchOptions) -> None:
    """Remove the checkpoints of a trial that is over. After the first, import what the search's end will need.

    That takes a second, in which slots would wait.
    """
    storage.remove_checkpoints(trial_name)
    if options.num_samples >= FEWEST_TRIALS:
        importlib.import_module("optuna.importance")
    if options.confirm_seeds:
        importlib.import_module("scipy.stats")


def _open_storage(plan: SearchPlan) -> RunStorage:
    """Return the storage for checkpoints, checked to be one place for all nodes."""
    nodes, earlier = len(list_nodes()), plan.history.storages if plan.history else None
    storage = prepare_storage(plan.storage_path, plan.folder, nodes=nodes, earlier=earlier)
    if nodes > 1:
        check_from_nodes(storage, plan.resources)
    return storage


def _run_trials(
    plan: SearchPlan,
    history: RunHistory,
    storage: RunStorage,
    recorder: TrialRecorder,
    trainable: type[AmpTrainable],
    stop: StopRequest,
    health: RayHealth,
    *,
    callbacks: Sequence[tune.Callback],
    announce: Callable[[str], object],
) -> Sequence[Any]:
    """Run the trials until all are over or the search is asked to end.

    Returns:
        Handles of workers that the confirmation can use.
    """
    workers = KeptWorkers()
    options, resources, time_left = plan.options, plan.resources, plan.time_left
    searcher = AmpSearch(
        plan.space,
        list_shared(plan.dataset, options),
        train_images=len(plan.dataset.train),
        objectives=options.objectives,
        seed=options.seed,
        folder=plan.folder,
        study_name=history.provenance.run,  # the folder may have been renamed since
        sampler=options.sampler,
        num_samples=history.num_samples or options.num_samples,
        warm_start=plan.warm_start,
        past=history.trials,
        on_fault=stop.ask,
    )
    # However the block ends, no trial stays running in the study.
    with stop.watched_by_tune(), contextlib.closing(searcher):
        scheduler = build_scheduler(options, functools.partial(prepare_next_attempt, resources, set(), workers))
        restore_scheduler(scheduler, [trial.trial_id for trial in history.trials], history.reports)
        for other in storage.list_foreign():
            announce(f"{other} was not made by this run folder: the checkpoints in it are read, but not removed")
        storage.claim()
        recorder.open_session(
            num_samples=options.num_samples,
            slots=resources.max_concurrent,
            storage={"place": storage.place, "name": storage.name, "token": storage.token},
            command=list(plan.command),
            arguments=dict(plan.arguments),
        )
        try:
            for trial in history.trials:
                _pass_on_end(trial, recorder, searcher, scheduler)
            if time_left is not None and time_left <= 0:
                return ()
            source = TrialSource(
                searcher,
                count_slots=count_slots_now(resources.cpus, resources.gpus, max_concurrent=options.max_concurrent),
                on_submit=recorder.add_trial,
                on_fault=stop.ask,
                past=history.trials,
                workers=workers if is_private() and options.confirm_seeds else None,
            )
            end_process = functools.partial(_end_process, searcher, recorder, stop)
            with watching(stop, health.find_dead_process, end_process):
                run_tuner(
                    trainable,
                    source,
                    scheduler,
                    storage=storage,
                    stop=stop,
                    callbacks=callbacks,
                    num_samples=options.num_samples,
                    time_left=time_left,
                )
            return workers.actors
        finally:
            recorder.finish()


def _describe_progress(plan: SearchPlan) -> SearchProgress:
    options = plan.options
    return SearchProgress(
        run=plan.folder.name,
        model=options.model,
        dataset=plan.dataset.name,
        objectives=options.objectives,
        num_samples=options.num_samples,
        time_budget=options.time_budget,
        slots=plan.resources.max_concurrent,
        confirm_runs=count_most_runs(min(options.top_k, options.num_samples), options.confirm_seeds),
        started=time.monotonic(),
    )


def _pass_on_end(
    trial: RecordedTrial, recorder: TrialRecorder, searcher: AmpSearch, scheduler: DivergenceAware
) -> None:
    """Pass on the end of a trial that had ended when the search was cut off, before that was recorded."""
    if trial.unrecorded_end is None:
        return
    assert trial.last_result is not None  # it is the report that ended the trial
    scheduler.on_trial_complete(None, make_key(trial.trial_id), trial.last_result)
    searcher.on_trial_complete(trial.trial_id, trial.last_result)
    recorder.record_end(trial.trial_id, trial.unrecorded_end)


def stop_if_failing(options: SearchOptions, stop: StopRequest, trials: Sequence[TrialRecord]) -> None:
    """Stop a search whose trials fail, if that spares it trials."""
    reason = find_failing(trials, options.max_failures)
    if reason is not None and len(trials) < options.num_samples:
        stop.ask(reason)


def find_failing(trials: Sequence[TrialRecord], most: int) -> str | None:
    """Return why a search should stop: its first trials all failed with the same error. None if it should not.

    A trial that is still running may yet do better. Trials that ran out of memory are left out, since that is the fault
    of one setting or another.

    Args:
        trials: in order of submission.
        most: number of first trials that must have failed.
    """
    if any(trial.epochs for trial in trials):
        return None
    first = [trial for trial in trials if trial.status is not TrialStatus.OUT_OF_MEMORY][:most]
    errors = {generalize_error(trial.error or "") for trial in first}
    if len(first) < most or len(errors) > 1 or any(trial.status is not TrialStatus.FAILED for trial in first):
        return None
    what = f"the first {most} trials all failed with the same error: {first[0].error}"
    return f"{what}; fix its cause and resume, or resume with a larger --max-failures"


def _conclude(plan: SearchPlan, recorder: TrialRecorder, provenance: Provenance, stop: StopRequest) -> SearchResult:
    """Rank the trials of a search that is over, and write the best and the importance of the parameters."""
    begun = time.monotonic()
    options, trials, slot_time = plan.options, recorder.trials, recorder.slot_time
    assert slot_time is not None  # the search is over
    ranked = choose_best(trials, options.objectives, options.top_k)
    if ranked:
        write_best(plan.folder, rank_trials(ranked), provenance)
    importance = measure_importance(
        plan.space, trials, options.objectives[0], train_images=len(plan.dataset.train), seed=options.seed
    )
    if importance.rows:
        write_importance(plan.folder, importance, provenance)
    interrupted = stop.reason is not None or was_interrupted(trials, options, slot_time.wall_seconds)
    return SearchResult(
        folder=plan.folder,
        trials=trials,
        ranked=ranked,
        importance=importance,
        provenance=provenance,
        interrupted=interrupted,
        is_out_of_time=not interrupted and is_unfinished(trials, options),
        reason=stop.reason,
        failing=stop.reason is not None and stop.reason == find_failing(trials, options.max_failures),
        slot_time=slot_time,
        wrap_up_seconds=time.monotonic() - begun,
    )


def _confirm(
    plan: SearchPlan,
    result: SearchResult,
    slots: ConfirmSlots,
    observer: Observer,
    stop: StopRequest,
    health: RayHealth,
) -> SearchResult:
    """Train the best trials again on fresh seeds."""
    dataset, options, space = plan.dataset, plan.options, plan.space
    planned = plan_confirmation(
        result.ranked,
        build_default(space.precisions, own=space.own_defaults, **list_shared(dataset, options)),
        train_images=len(dataset.train),
        top_k=options.top_k,
        seeds=options.confirm_seeds,
        objective=options.objectives[0],
        search_seconds=sum(trial.wall_seconds for trial in result.trials),
    )
    with watching(stop, health.find_dead_process, stop.leave), slots:
        confirmation = confirm(
            planned,
            slots.train,
            done=load_confirmed(result.folder) if RunFolder(result.folder).confirm.exists() else (),
            folder=result.folder,
            provenance=result.provenance,
            num_threads=plan.resources.cpus,
            observer=observer,
        )
    ranked = [row.trial for row in confirmation.rows if row.rank is not None]
    return dataclasses.replace(result, ranked=ranked or result.ranked, confirmation=confirmation)


def was_interrupted(trials: Sequence[TrialRecord], options: SearchOptions, seconds: float) -> bool:
    """Return whether the search ended before its trials did, other than by its time budget."""
    within_budget = options.time_budget is None or seconds < options.time_budget
    return is_unfinished(trials, options) and within_budget


def is_unfinished(trials: Sequence[TrialRecord], options: SearchOptions) -> bool:
    """Return whether there are trials that a search could resume or create."""
    return len(trials) < options.num_samples or any(trial.status is TrialStatus.INTERRUPTED for trial in trials)


def _end_process(searcher: AmpSearch, recorder: TrialRecorder, stop: StopRequest) -> None:
    """Write everything, then end the process, for the case that Tune cannot be ended."""
    try:
        with contextlib.closing(searcher):
            recorder.finish()
    finally:
        stop.leave()
