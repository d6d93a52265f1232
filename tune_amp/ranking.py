"""Which trials are best, and which of them can be told apart: by the search alone, and confirmed on fresh seeds."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from tune_amp.config import MORE_IS_BETTER, OBJECTIVES, RANKING_OBJECTIVES, InputError, TrialConfig, TrialStatus, shown
from tune_amp.confirmed import DEFAULT_ID, Confirmation, ConfirmedRun
from tune_amp.intervals import least_significant_difference, mean_interval
from tune_amp.results import BestRow, TrialRecord

_UNFINISHED = (TrialStatus.STOPPED, TrialStatus.INTERRUPTED)
# The first of these groups that has a trial is ranked.
_ELIGIBLE = ((TrialStatus.COMPLETED,), _UNFINISHED)
_ELIGIBLE_BY_ACCURACY = ((TrialStatus.COMPLETED, *_UNFINISHED),)


def choose_best(trials: Sequence[TrialRecord], objectives: Sequence[str], top_k: int) -> list[TrialRecord]:
    """The best trials at their last epoch, best first; fewer than asked for, or none, where fewer are eligible.

    - One objective: the ``top_k`` trials by it. Of ``val_accuracy`` and ``val_loss``, the other one breaks ties.
    - Several: the Pareto set, whatever its size, for it is the answer as a whole: ``top_k`` is ignored. In it are the
      trials that no other dominates, that is, equals or betters in every objective and betters in one. The best by the
      first objective comes first. Trials with the same values in all objectives are all kept.

    By ``val_accuracy`` alone, trials that were stopped or interrupted are eligible beside the completed ones, with the
    accuracy that they had: more epochs rarely lower it, and one that is ahead of a completed trial after fewer epochs
    is worth more. Otherwise they are only where no trial completed: a validation loss rises again where training goes
    on too long, and costs grow with every epoch. Loss, accuracy and all objectives must be finite. What is still tied
    keeps the order of ``trials``.

    Raises:
        InputError: an unknown objective.
    """
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise InputError(f"objective: must be one of {', '.join(OBJECTIVES)}, got {shown(objective)}")
    assert objectives
    assert top_k >= 1
    keys = (*objectives, *(name for name in RANKING_OBJECTIVES if name not in objectives))
    scored = [(scores, trial) for trial in trials if (scores := _score(trial, keys)) is not None]
    for statuses in _ELIGIBLE_BY_ACCURACY if tuple(objectives) == ("val_accuracy",) else _ELIGIBLE:
        eligible = [(scores, trial) for scores, trial in scored if trial.status in statuses]
        if eligible:
            ranked = sorted(eligible, key=lambda pair: pair[0])
            if len(objectives) == 1:
                return [trial for _, trial in ranked[:top_k]]
            return _pick_pareto_set([(scores[: len(objectives)], trial) for scores, trial in ranked])
    return []


def _score(trial: TrialRecord, objectives: Sequence[str]) -> tuple[float, ...] | None:
    """The last value of each objective, negated where more is better; None where one is missing or not finite."""
    scores = []
    for name in objectives:
        value: float | None = getattr(trial.last, name, None)
        if value is None or not math.isfinite(value):
            return None
        scores.append(-value if name in MORE_IS_BETTER else value)
    return tuple(scores)


def _pick_pareto_set(ranked: Sequence[tuple[tuple[float, ...], TrialRecord]]) -> list[TrialRecord]:
    """Those that no other dominates; ``ranked`` is sorted, so that whatever dominates a trial stands before it."""
    front: list[tuple[tuple[float, ...], TrialRecord]] = []
    for scores, trial in ranked:
        # To compare with those that are in is enough: whatever dominates one that is out dominates what that dominates.
        if not any(_dominates(better, scores) for better, _ in front):
            front.append((scores, trial))
    return [trial for _, trial in front]


def _dominates(scores: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return scores != others and all(score <= other for score, other in zip(scores, others, strict=True))


def accuracy_standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error of a share of ``images`` classified correctly: sqrt(p (1 - p) / n)."""
    assert 0 <= accuracy <= 1
    assert images >= 1
    return math.sqrt(accuracy * (1 - accuracy) / images)


def count_ties(ranked: Sequence[TrialRecord], validation_images: int) -> int:
    """How many of ``ranked``, from the top, cannot be told from the first by ``val_accuracy``; at least 1.

    Told apart means: further apart than 2 standard errors of the difference, sqrt(se1^2 + se2^2), of unpaired samples.
    All trials see the same images, so their errors are correlated and the true error is smaller: conservative.
    """
    accuracies = [_last_accuracy(trial) for trial in ranked]
    errors = [accuracy_standard_error(accuracy, validation_images) for accuracy in accuracies]
    for place, (accuracy, error) in enumerate(zip(accuracies, errors, strict=True)):
        if abs(accuracies[0] - accuracy) > 2 * math.hypot(errors[0], error):
            return place
    return len(ranked)


def _last_accuracy(trial: TrialRecord) -> float:
    assert trial.last is not None
    assert trial.last.val_accuracy is not None
    return trial.last.val_accuracy


# ---- confirmed ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
    """Number 1 minus the tutorial's default configuration: means over the seeds of the first objective, on validation.

    The interval is ``least_significant_difference`` to either side: it holds for all pairs of confirmed configurations
    at once, and so for that of the winner, which the same runs chose.
    """

    difference: float
    low: float
    high: float

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def without_seed(config: TrialConfig) -> TrialConfig:
    """The configuration itself: the same for two trials that differ in nothing but the seed."""
    return dataclasses.replace(config, seed=0)


def rank_confirmed(
    ranked: Sequence[TrialRecord], default: TrialRecord | None, runs: Sequence[ConfirmedRun], objectives: Sequence[str]
) -> list[BestRow]:
    """``ranked`` as its runs on fresh seeds put it, then ``default``, which gets no rank.

    - One objective: by its mean over the seeds on validation; of accuracy and loss, the other one breaks ties. Where a
      run did not complete there is no mean, and the configuration comes after those with one: the mean of the runs that
      survived would reward a configuration that diverges on every other seed. What is still tied keeps its order.
    - Several objectives: the order of the search stays, for no other objective was measured again.

    Test metrics are reported and decide nothing. Ties are told by ``intervals.least_significant_difference``, over all
    confirmed configurations.

    Args:
        ranked: the search's own ranking, best first; those without runs are not confirmed.
        default: the tutorial's configuration, where it was trained too.
        runs: of each configuration one on each seed, the same seeds for all.
        objectives: what was searched for.
    """
    own = {trial.trial_id: _runs_of(trial, runs) for trial in (*ranked, *([default] if default else []))}
    means = {trial_id: _measure_means(of_trial) for trial_id, of_trial in own.items() if of_trial}
    if len(objectives) == 1:
        ranked = sorted(ranked, key=lambda trial: _mean_scores(means.get(trial.trial_id), objectives[0]))
    least = _find_least_difference([*ranked, *([default] if default else [])], runs, objectives[0])
    best = means.get(ranked[0].trial_id)
    rows = [(rank, trial) for rank, trial in enumerate(ranked, start=1)] + ([(None, default)] if default else [])
    return [
        BestRow(
            rank=rank, trial=trial, confirmation=_judge(trial, means.get(trial.trial_id), best, least, objectives[0])
        )
        for rank, trial in rows
    ]


def measure_gain(rows: Sequence[BestRow], runs: Sequence[ConfirmedRun], objective: str) -> Gain | None:
    """What searching gained, by the first objective; None where there is no pair of complete configurations."""
    winner, default = find_pair(rows)
    least = _find_least_difference([row.trial for row in rows], runs, objective)
    if winner is None or default is None or least is None:
        return None
    means = [getattr(row.confirmation, f"{objective}_mean") for row in (winner, default)]
    if None in means or without_seed(winner.trial.config) == without_seed(default.trial.config):
        return None
    difference = means[0] - means[1]
    return Gain(difference=difference, low=difference - least, high=difference + least)


def find_pair(rows: Iterable[BestRow]) -> tuple[BestRow | None, BestRow | None]:
    """The row of rank 1 and that of the default configuration."""
    rows = list(rows)
    winner = next((row for row in rows if row.rank == 1), None)
    return winner, next((row for row in rows if row.trial.trial_id == DEFAULT_ID), None)


def _runs_of(trial: TrialRecord, runs: Iterable[ConfirmedRun]) -> list[ConfirmedRun]:
    return sorted((run for run in runs if run.trial_id == trial.trial_id), key=lambda run: run.seed)


def _is_complete(runs: Sequence[ConfirmedRun]) -> bool:
    return len(runs) > 0 and all(run.status is TrialStatus.COMPLETED for run in runs)


def _measure_means(runs: Sequence[ConfirmedRun]) -> Confirmation:
    """Means and intervals of one configuration; none where a run did not complete."""
    failed = [run for run in runs if run.status is not TrialStatus.COMPLETED]
    failures = tuple(f"seed {run.seed}: {run.error or run.status}" for run in failed)
    columns = {} if failed else _measure_columns(runs)
    return Confirmation(confirm_seeds=tuple(run.seed for run in runs), confirm_failures=failures, **columns)


def _measure_columns(runs: Sequence[ConfirmedRun]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name in ("val_loss", "val_accuracy", "test_accuracy"):
        found = mean_interval([getattr(run, name) for run in runs])
        columns |= {f"{name}_{part}": getattr(found, part) for part in ("mean", "std", "low", "high")}
    return columns


def _mean_scores(confirmation: Confirmation | None, objective: str) -> tuple[float, ...]:
    """What a configuration is sorted by, less is better; after all others where it has no means."""
    keys = (objective, *(name for name in RANKING_OBJECTIVES if name != objective))
    means: list[float | None] = [getattr(confirmation, f"{name}_mean", None) for name in keys]
    known = [mean for mean in means if mean is not None]
    if len(known) < len(keys):
        return (math.inf,) * len(keys)
    return tuple(-mean if name in MORE_IS_BETTER else mean for name, mean in zip(keys, known, strict=True))


def _find_least_difference(trials: Iterable[TrialRecord], runs: Sequence[ConfirmedRun], objective: str) -> float | None:
    """By how much means must differ to be told apart; None where fewer than two configurations are complete."""
    of_trials = ((trial, _runs_of(trial, runs)) for trial in trials)
    # A configuration counts once, or its copies would pass for agreement between configurations.
    scores = {
        without_seed(t.config): [getattr(run, objective) for run in own] for t, own in of_trials if _is_complete(own)
    }
    return least_significant_difference(list(scores.values())) if len(scores) >= 2 else None


def _judge(
    trial: TrialRecord, means: Confirmation | None, best: Confirmation | None, least: float | None, objective: str
) -> Confirmation | None:
    """``means`` with what only a comparison tells: whether it is tied, and how optimistic the search's number was."""
    mean: float | None = getattr(means, f"{objective}_mean", None)
    if means is None or mean is None:
        return means
    best_mean: float | None = getattr(best, f"{objective}_mean", None)
    searched: float | None = getattr(trial.last, objective, None)
    return dataclasses.replace(
        means,
        # Without a second configuration the only mean is that of rank 1 itself.
        tied_with_best=None if best_mean is None else abs(mean - best_mean) <= (least or 0.0),
        optimism=None if searched is None else searched - mean,
    )
