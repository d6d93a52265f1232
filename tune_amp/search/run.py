"""Runs a search: one call searches a space on a data set and leaves a run folder behind."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ray import tune
from ray.tune.schedulers import TrialScheduler

from tune_amp.cluster.checkpoints import RunStorage, check_from_nodes, prepare_storage
from tune_amp.cluster.health import RayHealth
from tune_amp.cluster.interrupt import StopRequest, watching
from tune_amp.cluster.resources import SlotCounter, TrialResources, list_nodes
from tune_amp.confirm.plan import build_default, confirm, plan_confirmation
from tune_amp.confirm.slots import train_on_slots
from tune_amp.monitor.prometheus import Gauges, SearchObserver
from tune_amp.results.files import check_free, write_atomically
from tune_amp.results.importance import ImportanceResult, measure_importance, write_importance
from tune_amp.results.journal import JOURNAL_VERSION, Journal
from tune_amp.results.progress import ConfirmResult, SearchProgress
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import Provenance, SlotTime, TrialRecord, load_confirmed, rank_trials, write_best
from tune_amp.results.run_files import BEST_FILE, CONFIRM_FILE, JOURNAL_FILE, RUN_FILES, SPACE_FILE
from tune_amp.search.history import PastRun, PastTrial
from tune_amp.search.mending import mend_run
from tune_amp.search.options import SearchOptions
from tune_amp.search.plan import describe_run, find_time_left, list_shared, plan_resources
from tune_amp.search.preflight import check_fit, check_objectives
from tune_amp.search.recorder import TrialRecorder
from tune_amp.search.schedulers import TrialKey, replay
from tune_amp.search.source import TrialSource
from tune_amp.search.study import AmpSearch
from tune_amp.search.time_limit import TimeLimit
from tune_amp.search.tuner import bind_trainable, build_tuner, fit, schedule
from tune_amp.search.warm_start import WarmStart
from tune_amp.space.space import SearchSpace
from tune_amp.training.data import Dataset
from tune_amp.trial.config import TrialStatus, generalize_error


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
        return self.folder / BEST_FILE


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
    past: PastRun | None = None,
    arguments: Mapping[str, Any] | None = None,
    stop: StopRequest | None = None,
    trackers: Sequence[tune.Callback] = (),
    announce: Callable[[str], object] = lambda line: None,
    checked: bool = False,
) -> SearchResult:
    """Search ``space`` for the settings under which ``options.model`` trains best on ``dataset``.

    Call it inside ``session.ray_session``. Trials see only the training and validation split. Unless the search was
    interrupted, the best are then confirmed on fresh seeds: see ``confirm``.

    However it ends, another call resumes it from ``reports.journal`` in ``folder``. Trials that ended keep their
    results, study and scheduler regain their state, and trials that were cut off resume from their last checkpoint.

    Args:
        space: what is searched.
        dataset: its test split stays here, unread. Trials record how imbalanced ``data.make_long_tail`` made it.
        options: how much is searched, and with what.
        folder: an empty folder from ``options.run_folder``, or that of ``past`` if there is one.
        observer: is notified of everything that happens.
        command: the command line, for the record.
        storage_path: where Ray keeps checkpoints, a path or URL that all nodes can write; None for the run folder.
        started: ``time.monotonic()`` when the command began, from which slot time counts; None: it counts from now.
        resources: from ``plan_resources``; None to plan them here.
        warm_start: from ``adapt_donor``; None to start from nothing.
        past: from ``history.open_past``: the run to resume, with the same space, data and options.
        arguments: the command line by ``argparse``'s names, recorded for resuming this run.
        stop: asks the search to end; None: a KeyboardInterrupt does.
        trackers: from ``trackers.build_trackers``.
        announce: is called with a line for each part of the run that is not as the search left it.
        checked: whether ``preflight.check_fit`` has found that space, data and model fit together.

    Raises:
        InputError: space, data, model and options do not fit together; nothing has been trained.
        OSError: a file cannot be written, for example to a full disk; what was reported is in the journal.
    """
    resources = resources or plan_resources(options, space, dataset)
    if not checked:
        check_fit(space, dataset, options, may_use_gpus=resources.gpus > 0)
    check_objectives(options, resources)
    stop, health = stop or StopRequest(), RayHealth()
    begin = time.monotonic() if started is None else started
    time_left = find_time_left(options, past)
    storage = _open_storage(storage_path, folder, resources, past)
    with contextlib.ExitStack() as stack:
        if past is not None:
            provenance, journal = past.provenance, past.journal
            for line in mend_run(folder, past):
                announce(line)
        else:
            provenance = describe_run(space, dataset, options, folder.name, command, resources, warm_start)
            journal = stack.enter_context(begin_run(folder, space, provenance, arguments or {}))
        gauges = Gauges(observer, slots=resources.max_concurrent)
        remover = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))  # Tune does not wait for a slow disk
        limit = TimeLimit(options.trial_time_limit)
        recorder = TrialRecorder(
            folder,
            provenance,
            _describe_progress(folder, dataset, options),
            gauges,
            journal=journal,
            storage_root=storage.path,
            slots=resources.max_concurrent,
            begin=begin,
            explain_death=limit.explain_death,
            on_fault=stop.ask,
            on_end=functools.partial(remover.submit, storage.remove_checkpoints),
            on_failure=functools.partial(stop_if_failing, options, stop),
        )
        if past is not None:
            recorder.replay(past.events)  # also refuses what no search writes, before anything else uses it
        build = functools.partial(_build_searcher, space, dataset, options, folder, provenance, warm_start, past, stop)
        # However the block ends, no trial stays running in the study.
        with stop.watched_by_tune(), contextlib.closing(build()) as searcher:
            scheduler = schedule(options, searcher, resources)
            if past is not None:
                replay(scheduler, past.events)
            for other in storage.list_foreign():
                announce(f"{other} was not made by this run folder: the checkpoints in it are read, but not removed")
            storage.claim()
            recorder.open_session(
                num_samples=options.num_samples,
                slots=resources.max_concurrent,
                storage={"place": storage.place, "name": storage.name, "token": storage.token},
                command=list(command),
                arguments=dict(arguments or {}),
            )
            with gauges, _finished(recorder):
                trials = past.trials if past else ()
                for trial in trials:
                    _end_unheard(trial, recorder, searcher, scheduler)
                source = TrialSource(
                    searcher,
                    count_slots=SlotCounter(resources.cpus, resources.gpus, max_concurrent=options.max_concurrent),
                    on_submit=recorder.add_trial,
                    on_fault=stop.ask,
                    past=trials,
                )
                tuner = build_tuner(
                    bind_trainable(dataset, resources, storage, past),
                    source,
                    scheduler,
                    storage=storage,
                    stop=stop,
                    # The recorder comes last: it cuts each report down to what Tune needs.
                    callbacks=[limit, *trackers, recorder],
                    num_samples=options.num_samples,
                    time_left=time_left,
                )
                if time_left is None or time_left > 0:
                    with watching(stop, health.find_dead_process, functools.partial(_leave, searcher, recorder, stop)):
                        fit(tuner, stop)
        result = _conclude(recorder, space, dataset, options, provenance, stop)
        if not is_unfinished(result.trials, options):
            remover.submit(storage.remove_checkpoints)
        if result.interrupted or not options.confirm_seeds:
            return result
        with gauges, watching(stop, health.find_dead_process, stop.leave):
            return _confirm(result, space, dataset, options, resources, gauges)


def _open_storage(
    storage_path: str | None, folder: Path, resources: TrialResources, past: PastRun | None
) -> RunStorage:
    """Return the storage for checkpoints, checked to be one place for all nodes."""
    nodes, earlier = len(list_nodes()), past.storages if past else None
    storage = prepare_storage(storage_path, folder, nodes=nodes, earlier=earlier)
    if nodes > 1:
        check_from_nodes(storage, resources)
    return storage


def _build_searcher(
    space: SearchSpace,
    dataset: Dataset,
    options: SearchOptions,
    folder: Path,
    provenance: Provenance,
    warm_start: WarmStart | None,
    past: PastRun | None,
    stop: StopRequest,
) -> AmpSearch:
    return AmpSearch(
        space,
        list_shared(dataset, options),
        train_images=len(dataset.train),
        objectives=options.objectives,
        seed=options.seed,
        folder=folder,
        study_name=provenance.run,  # the folder may have been renamed since
        sampler=options.sampler,
        num_samples=(past.num_samples if past else None) or options.num_samples,
        warm_start=warm_start,
        past=past.trials if past else (),
        on_fault=stop.ask,
    )


def begin_run(folder: Path, space: SearchSpace, provenance: Provenance, arguments: Mapping[str, Any]) -> Journal:
    """Record how a run begins, before anything else of it happens; return its open journal."""
    check_free(folder, *RUN_FILES)
    journal = Journal(folder / JOURNAL_FILE)
    write_atomically(folder / SPACE_FILE, lambda file: file.write(space.text.encode()), replace=False)
    about = {"arguments": dict(arguments), "provenance": dataclasses.asdict(provenance)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(journal)
        journal.append({"event": "run", "version": JOURNAL_VERSION, **about})
        stack.pop_all()
    return journal


def _describe_progress(folder: Path, dataset: Dataset, options: SearchOptions) -> SearchProgress:
    return SearchProgress(
        run=folder.name,
        model=options.model,
        dataset=dataset.name,
        objectives=options.objectives,
        num_samples=options.num_samples,
        time_budget=options.time_budget,
        started=time.monotonic(),
    )


def _end_unheard(trial: PastTrial, recorder: TrialRecorder, searcher: AmpSearch, scheduler: TrialScheduler) -> None:
    """Pass on the end of a trial that had ended when the search was cut off, before that was recorded."""
    if trial.unheard_end is None:
        return
    assert trial.last_result is not None  # it is the report that ended the trial
    scheduler.on_trial_complete(cast("Any", None), cast("Any", TrialKey(trial_id=trial.trial_id)), trial.last_result)
    searcher.on_trial_complete(trial.trial_id, trial.last_result)
    recorder.end_unheard(trial.trial_id, trial.unheard_end)
    trial.status = trial.unheard_end


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


def _conclude(
    recorder: TrialRecorder,
    space: SearchSpace,
    dataset: Dataset,
    options: SearchOptions,
    provenance: Provenance,
    stop: StopRequest,
) -> SearchResult:
    """Rank the trials of a search that is over, and write the best and the importance of the parameters."""
    begun = time.monotonic()
    ranked = choose_best(recorder.trials, options.objectives, options.top_k)
    if ranked:
        write_best(recorder.folder, rank_trials(ranked), provenance)
    importance = measure_importance(
        space, recorder.trials, options.objectives[0], train_images=len(dataset.train), seed=options.seed
    )
    if importance.rows:
        write_importance(recorder.folder, importance, provenance)
    slot_time = recorder.slot_time
    assert slot_time is not None  # the search is over
    return SearchResult(
        folder=recorder.folder,
        trials=recorder.trials,
        ranked=ranked,
        importance=importance,
        provenance=provenance,
        interrupted=stop.reason is not None or was_interrupted(recorder.trials, options, slot_time.wall_seconds),
        reason=stop.reason,
        failing=stop.reason is not None and stop.reason == find_failing(recorder.trials, options.max_failures),
        slot_time=slot_time,
        wrap_up_seconds=time.monotonic() - begun,
    )


def _confirm(
    result: SearchResult,
    space: SearchSpace,
    dataset: Dataset,
    options: SearchOptions,
    resources: TrialResources,
    observer: SearchObserver,
) -> SearchResult:
    if not result.ranked:
        return result
    plan = plan_confirmation(
        result.ranked,
        build_default(space.precisions, **list_shared(dataset, options)),
        train_images=len(dataset.train),
        top_k=options.top_k,
        seeds=options.confirm_seeds,
        objective=options.objectives[0],
        search_seconds=sum(trial.wall_seconds for trial in result.trials),
    )
    confirmation = confirm(
        plan,
        lambda jobs: train_on_slots(jobs, dataset, resources, time_limit=options.trial_time_limit or math.inf),
        done=load_confirmed(result.folder) if (result.folder / CONFIRM_FILE).exists() else (),
        folder=result.folder,
        provenance=result.provenance,
        num_threads=resources.cpus,
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


def _leave(searcher: AmpSearch, recorder: TrialRecorder, stop: StopRequest) -> None:
    """Write everything, then end the process, for the case that Tune cannot be ended."""
    try:
        with contextlib.closing(searcher), _finished(recorder):
            pass
    finally:
        stop.leave()


@contextlib.contextmanager
def _finished(recorder: TrialRecorder) -> Iterator[None]:
    """Write every report to disk at the end of the ``with`` block, however it ends."""
    try:
        yield
    finally:
        recorder.finish()
