"""Trains the best configurations of a search again on fresh seeds, and the tutorial's default configuration too.

The best of many on one seed is best partly by luck. So the configurations are trained at full budget on seeds that
played no part in choosing them: all on the first few, then, if the best of them leads the default, these two on the
other seeds (see ``gain``). Validation alone ranks them again. The test set is read once, when a run is complete.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from typing import Any

from tune_amp.results.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.results.gain import FIRST_SEEDS, judge_gain, may_gain, without_seed
from tune_amp.results.progress import ConfirmJob, ConfirmProgress, ConfirmResult, Observer
from tune_amp.results.provenance import Provenance
from tune_amp.results.ranking import rank_confirmed
from tune_amp.results.records import BestRow, TrialRecord, write_best, write_confirmed
from tune_amp.space.no_effect import find_inert
from tune_amp.trial.config import TrialConfig, TrialStatus

SHORT_SECONDS = 60.0
"""Seconds that further seeds may take even after a shorter search."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfirmPlan:
    """The configurations to train again, and on which seeds."""

    ranked: Sequence[TrialRecord]
    """The search's ranking, best first."""
    top_k: int
    """Number of configurations to confirm, from the top of the ranking."""
    default: TrialConfig | None
    """The tutorial's configuration, or None if it does not fit the data set."""
    left_out: str | None
    """Reason why ``default`` is None, else None."""
    seeds: tuple[int, ...]
    """All seeds that may be used, in order."""
    objective: str
    """Objective that the challenger is chosen by."""
    budget_seconds: float
    """Seconds of training that the seeds after the first ones may take."""

    @property
    def names(self) -> dict[str, str]:
        """Trial id -> display name."""
        names = {trial.trial_id: trial.trial_name for trial in self.ranked}
        return {trial_id: names.get(trial_id, trial_id) for trial_id in self.configs}

    @property
    def configs(self) -> dict[str, TrialConfig]:
        """Trial id -> configuration to train, best of the search first, the default last."""
        found = {trial.trial_id: trial.config for trial in self.ranked[: self.top_k]}
        return found | ({DEFAULT_ID: self.default} if self.default else {})

    @property
    def first_jobs(self) -> list[ConfirmJob]:
        """Every configuration on the first seeds."""
        return self._list_jobs(self.configs, self.seeds[:FIRST_SEEDS])

    def list_further_jobs(self, runs: Sequence[ConfirmedRun]) -> list[ConfirmJob]:
        """Return challenger and default on as many further seeds as the budget allows; none if they can show no gain.

        Args:
            runs: the runs of ``first_jobs``.
        """
        verdict = judge_gain(self.configs, runs, self.objective)
        if verdict.challenger is None or not may_gain(verdict, self.objective):
            return []
        pair = (verdict.challenger, DEFAULT_ID)
        seconds = sum(run.train_seconds for run in runs if run.trial_id in pair) / FIRST_SEEDS
        further = self.seeds[FIRST_SEEDS:]
        return self._list_jobs(pair, further[: int(self.budget_seconds / seconds)] if seconds else further)

    def _list_jobs(self, trial_ids: Collection[str], seeds: Sequence[int]) -> list[ConfirmJob]:
        """Return all jobs on one seed before any on the next, so that an interruption leaves complete comparisons.

        Configurations that differ only in the seed share their runs.
        """
        owners: dict[TrialConfig, tuple[str, ...]] = {}
        for trial_id, config in self.configs.items():
            owners[without_seed(config)] = (*owners.get(without_seed(config), ()), trial_id)
        return [
            ConfirmJob(trial_ids=of_config, config=dataclasses.replace(config, seed=seed))
            for seed in seeds
            for config, of_config in owners.items()
            if {*of_config} & {*trial_ids}
        ]


def plan_confirmation(
    ranked: Sequence[TrialRecord],
    default: TrialConfig,
    *,
    train_images: int,
    top_k: int,
    seeds: int,
    objective: str,
    search_seconds: float,
) -> ConfirmPlan:
    """Plan to train the best ``top_k`` and the default configuration on the same fresh seeds.

    Args:
        ranked: the search's ranking.
        default: from ``build_default``, with the seed of the search.
        train_images: number of images in the training split; 0 if that is unknown.
        top_k: see ``ConfirmPlan``.
        seeds: maximum number of seeds.
        objective: see ``ConfirmPlan``.
        search_seconds: summed time of the search's trials: further seeds may take as long, at least ``SHORT_SECONDS``.
    """
    left_out = None
    if 0 < train_images < default.batch_size:
        images = f"{train_images:,} training images"
        left_out = f"the default configuration is left out: its batch of {default.batch_size} exceeds the {images}"
    return ConfirmPlan(
        ranked=ranked,
        top_k=top_k,
        default=None if left_out else default,
        left_out=left_out,
        seeds=choose_seeds(default.seed, seeds),
        objective=objective,
        budget_seconds=max(SHORT_SECONDS, search_seconds),
    )


def build_default(precisions: Sequence[str], **shared: Any) -> TrialConfig:
    """Return PyTorch's AMP tutorial: lr 1e-3, batch 64, and GradScaler's own defaults if the space has fp16.

    Args:
        precisions: precisions of the space. Without fp16, TrialConfig's default is used if listed, else the first.
        shared: the ``TrialConfig`` fields that all trials of the search have in common.
    """
    own = TrialConfig.precision if TrialConfig.precision in precisions else precisions[0]
    return TrialConfig(precision="fp16" if "fp16" in precisions else own, **shared)


def choose_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Return ``count`` seeds used neither by this search nor by one with a nearby seed: from 1000 on for seed 0."""
    first = 1_000 * (seed % 10**9 + 1)
    return tuple(itertools.islice((fresh for fresh in itertools.count(first) if fresh != seed), count))


def count_most_runs(top_k: int, seeds: int) -> int:
    """Return the largest number of runs of a confirmation: all on the first seeds, then two on the others."""
    return min(seeds, FIRST_SEEDS) * (top_k + 1) + 2 * max(0, seeds - FIRST_SEEDS)


def confirm(
    plan: ConfirmPlan,
    train: Callable[[Sequence[ConfirmJob]], Generator[tuple[ConfirmJob, ConfirmedRun]]],
    *,
    done: Sequence[ConfirmedRun] = (),
    folder: Path,
    provenance: Provenance,
    num_threads: int,
    observer: Observer,
) -> ConfirmResult:
    """Make the runs of a plan, then rank its configurations again and rewrite ``best.parquet``.

    ``confirm.parquet`` is rewritten after each run. On Ctrl-C, it keeps the finished runs, and ``best.parquet`` stays
    as the search wrote it.

    Args:
        plan: from ``plan_confirmation``.
        train: ``ConfirmSlots.train``, which cancels running jobs when it is closed.
        done: runs from before an interruption; those that the plan needs are not repeated.
        folder: folder of the run, in which the files get ``provenance``.
        provenance: see ``folder``.
        num_threads: CPU threads of a run.
        observer: receives every change of the progress.
    """
    started = time.monotonic()
    runs: list[ConfirmedRun] = []
    progress = ConfirmProgress(run=folder.name, names=plan.names, objective=plan.objective, started=started)
    rows: Sequence[BestRow] = ()
    try:
        most_further = 2 * len(plan.seeds[FIRST_SEEDS:])
        for list_jobs, may_follow in ((lambda _: plan.first_jobs, most_further), (plan.list_further_jobs, 0)):
            jobs = list_jobs(runs)
            needed = {(trial_id, job.config.seed) for job in jobs for trial_id in job.trial_ids}
            runs = _put_in_order([*runs, *(run for run in done if (run.trial_id, run.seed) in needed)], plan)
            lacking = needed - {(run.trial_id, run.seed) for run in runs}
            left = [job for job in jobs if any((trial_id, job.config.seed) in lacking for trial_id in job.trial_ids)]
            total, ended = progress.total + len(jobs), progress.done + len(jobs) - len(left)
            progress = dataclasses.replace(
                progress, jobs=jobs, runs=runs, total=total, done=ended, may_follow=may_follow
            )
            if jobs:
                observer.on_confirmation(progress, None)
            with contextlib.closing(train(left)) as finished:
                for job, run in finished:
                    copies = [dataclasses.replace(run, trial_id=trial_id) for trial_id in job.trial_ids]
                    known = {(run.trial_id, run.seed): run for run in (*runs, *copies)}
                    runs = _put_in_order(list(known.values()), plan)
                    progress = dataclasses.replace(progress, runs=runs, done=progress.done + 1)
                    write_confirmed(folder, runs, provenance)
                    observer.on_confirmation(progress, copies[0])
    except KeyboardInterrupt:
        if runs:  # the last run may not have been written
            write_confirmed(folder, runs, provenance)
    else:
        default = None if plan.default is None else _record_default(plan.default, runs, provenance, num_threads)
        rows = rank_confirmed(plan.ranked, default, runs, provenance.objectives)
        write_best(folder, rows, provenance)
    return ConfirmResult(
        rows=rows, runs=runs, progress=progress, left_out=plan.left_out, seconds=time.monotonic() - started
    )


def _put_in_order(runs: Sequence[ConfirmedRun], plan: ConfirmPlan) -> list[ConfirmedRun]:
    """Sort runs by configuration, as the search ranked them, and seed, instead of by the order in which they ended."""
    places = list(plan.names)
    return sorted(runs, key=lambda run: (places.index(run.trial_id), run.seed))


def _record_default(
    config: TrialConfig, runs: Sequence[ConfirmedRun], provenance: Provenance, num_threads: int
) -> TrialRecord:
    """Return the default configuration as a row of ``best.parquet``. It was no trial, so that it has no epochs."""
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
