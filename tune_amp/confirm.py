"""Trains the best of a search again on fresh seeds, and the tutorial's default configuration beside them.

The best of many on one seed is best partly by luck; how much, the search cannot tell. So the configurations are frozen,
and trained at full budget on seeds that had no part in choosing them. Validation alone ranks them again; of a run that
is over, the test set is read, once, and decides nothing.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tune_amp.config import TrialConfig, TrialStatus
from tune_amp.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.data import Dataset
from tune_amp.inert import find_inert
from tune_amp.options import SearchOptions
from tune_amp.ranking import rank_confirmed, without_seed
from tune_amp.results import BestRow, Provenance, TrialRecord, write_best, write_confirmed
from tune_amp.space import SearchSpace


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
        observer.on_confirmation(progress, None)
        with contextlib.closing(finished):
            for job, run in finished:
                copies = [dataclasses.replace(run, trial_id=trial_id) for trial_id in job.trial_ids]
                known = {(run.trial_id, run.seed): run for run in (*progress.runs, *copies)}
                runs = _put_in_order(list(known.values()), plan)
                progress = dataclasses.replace(progress, runs=runs, done=progress.done + 1)
                write_confirmed(folder, runs, provenance)
                observer.on_confirmation(progress, copies[0])
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
