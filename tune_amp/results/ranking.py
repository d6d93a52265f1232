"""Ranks trials and finds ties, by the search's own results and by confirmation on fresh seeds."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from tune_amp.results.confirmed import Confirmation, ConfirmedRun
from tune_amp.results.gain import describe_verdict, find_sign, judge_gain, score_runs, without_seed
from tune_amp.results.provenance import Provenance
from tune_amp.results.records import BestRow, TrialRecord
from tune_amp.results.statistics import list_possible_best, mean_interval
from tune_amp.trial.config import MEAN_PARTS, RANKING_OBJECTIVES, TrialStatus, check
from tune_amp.trial.objectives import is_maximized, metric_of
from tune_amp.trial.text import join_names

_UNFINISHED = (TrialStatus.STOPPED, TrialStatus.INTERRUPTED)
# The first of these groups that has a trial is ranked.
_ELIGIBLE = ((TrialStatus.COMPLETED,), _UNFINISHED)
_ELIGIBLE_BY_ACCURACY = ((TrialStatus.COMPLETED, *_UNFINISHED),)


def choose_best(trials: Sequence[TrialRecord], objectives: Sequence[str], top_k: int) -> list[TrialRecord]:
    """Return the best trials by their last epoch, best first; fewer than ``top_k``, or none, if fewer are eligible.

    - One objective: the ``top_k`` trials by it. Of ``val_accuracy`` and ``val_loss``, the other one breaks ties.
    - Several: the whole Pareto set, because only the whole set is the answer; ``top_k`` is ignored. The set contains
      the trials that no other trial dominates: equals or betters in every objective and betters in one. The best by the
      first objective comes first. Trials with the same values in all objectives are all kept.

    By ``val_accuracy`` alone, stopped and interrupted trials are eligible like completed ones, with their last
    accuracy: more epochs rarely lower it, and a trial that leads a completed one after fewer epochs is worth more. By
    other objectives, they are eligible only if no trial completed: a validation loss rises again if training continues
    too long, and costs grow with every epoch. All objectives must be finite, and loss and accuracy if any trial has
    them; a trial without a loss or accuracy that others have loses a tie. Remaining ties keep the order of ``trials``.
    """
    assert objectives
    assert top_k >= 1
    lasts = [trial.last for trial in trials if trial.last]
    others = [name for name in RANKING_OBJECTIVES if any(last.find_value(name) is not None for last in lasts)]
    keys = (*objectives, *(name for name in others if name not in map(metric_of, objectives)))
    scored = [(scores, trial) for trial in trials if (scores := _score(trial, keys, len(objectives))) is not None]
    for statuses in _ELIGIBLE_BY_ACCURACY if tuple(objectives) == ("val_accuracy",) else _ELIGIBLE:
        eligible = [(scores, trial) for scores, trial in scored if trial.status in statuses]
        if eligible:
            ranked = sorted(eligible, key=lambda pair: pair[0])
            if len(objectives) == 1:
                return [trial for _, trial in ranked[:top_k]]
            front: list[tuple[tuple[float, ...], TrialRecord]] = []
            for scores, trial in ranked:
                # A trial's dominators come before it, and one that is left out is dominated by one of the set.
                if not any(_dominates(better, scores[: len(objectives)]) for better, _ in front):
                    front.append((scores[: len(objectives)], trial))
            return [trial for _, trial in front]
    return []


def _score(trial: TrialRecord, names: Sequence[str], needed: int) -> tuple[float, ...] | None:
    """Return the last value of each metric, negated if more is better; None if one is missing or not finite.

    A user's own training needs to report the first ``needed`` only.
    """
    if not (trial.config.train or trial.config.task):
        needed = len(names)
    scores = []
    for place, name in enumerate(names):
        value = trial.last.find_value(name) if trial.last else None
        if (value is None and place < needed) or (value is not None and not math.isfinite(value)):
            return None
        scores.append(math.inf if value is None else -value if is_maximized(name) else value)
    return tuple(scores)


def _dominates(scores: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return scores != others and all(score <= other for score, other in zip(scores, others, strict=True))


def list_obstacles(trials: Sequence[TrialRecord]) -> list[str]:
    """Return why no trial could be ranked, each reason with its number of trials, the three commonest first."""
    errors = ((trial.status, trial.error or "no usable result") for trial in trials)
    # A verdict begins with its state, which may be the status.
    reasons = collections.Counter(text if text.startswith(f"{end}: ") else f"{end}: {text}" for end, text in errors)
    return [f"{count} {reason}" for reason, count in reasons.most_common(3)]


def accuracy_standard_error(accuracy: float, images: int) -> float:
    """Return the binomial standard error of a share of ``images`` classified correctly: sqrt(p (1 - p) / n)."""
    check("val_accuracy", accuracy, 0 <= accuracy <= 1, "must be between 0 and 1")
    check("validation_images", images, images >= 1, "must be at least 1")
    return math.sqrt(accuracy * (1 - accuracy) / images)


def count_ties(ranked: Sequence[TrialRecord], validation_images: int) -> int:
    """Return how many of ``ranked``, from the top, are tied with the first by ``val_accuracy``; at least 1.

    Trials are tied unless they differ by more than 2 standard errors of the difference, sqrt(se1^2 + se2^2), of
    unpaired samples. This is conservative: all trials see the same images, so their errors are correlated and the true
    error is smaller.
    """
    accuracies = [trial.last.val_accuracy for trial in ranked if trial.last and trial.last.val_accuracy is not None]
    assert len(accuracies) == len(ranked)
    errors = [accuracy_standard_error(accuracy, validation_images) for accuracy in accuracies]
    for place, (accuracy, error) in enumerate(zip(accuracies, errors, strict=True)):
        if abs(accuracies[0] - accuracy) > 2 * math.hypot(errors[0], error):
            return place
    return len(ranked)


def describe_ties(ranked: Sequence[TrialRecord], provenance: Provenance) -> str:
    """Return what a ranking by accuracy, or a Pareto set, does and does not show; empty if that is unknown."""
    if provenance.objectives != ("val_accuracy",) and ranked[0].status is not TrialStatus.COMPLETED:
        return "No trial completed: those ranked were stopped or interrupted, after different numbers of epochs."
    if len(provenance.objectives) > 1:
        names = join_names([*map(metric_of, provenance.objectives)])
        return f"The Pareto set of {names}: no trial is better than one of these in one of them and as good in all."
    if provenance.objective != "val_accuracy" or not provenance.validation_images:  # unknown to a user's own loop
        return ""
    ties = count_ties(ranked, provenance.validation_images)
    images = f"{provenance.validation_images:,} validation images"
    if len(ranked) == 1:
        last = ranked[0].last
        assert last is not None
        assert last.val_accuracy is not None
        error = accuracy_standard_error(last.val_accuracy, provenance.validation_images)
        noise = f", a standard error of {100 * error:.2g} points" if error else ""  # the formula fails at 0 and 1
        text = f"One seed on {images}{noise}: other seeds will differ."
    elif ties == 1:
        text = f"Rank 1 leads by more than the noise of {images}; one seed each, so other seeds may reorder them."
    else:
        text = f"Ranks 1 to {ties} are indistinguishable on {images} (2 standard errors): a tie, one seed each."
    if any(trial.status is not TrialStatus.COMPLETED for trial in ranked):
        text += " Those with fewer epochs ended early, and count with the accuracy they had."
    return text


# ---- confirmed ----


def rank_confirmed(
    ranked: Sequence[TrialRecord],
    default: TrialRecord | None,
    runs: Sequence[ConfirmedRun],
    objectives: Sequence[str],
) -> list[BestRow]:
    """Rank ``ranked`` and ``default`` by their runs on fresh seeds.

    - One objective: the configuration that ``gain.judge_gain`` recommends comes first, the others follow by their means
      over the seeds on validation; of accuracy and loss, the other one breaks ties. A configuration with a run that did
      not complete has no mean, and comes after those with one. Remaining ties keep their order, with the default last.
    - Several objectives: the order of the search is kept, because no other objective was measured again, and the
      default gets no rank.

    Test metrics are reported but do not affect the ranking. ``statistics.list_possible_best`` finds the ties.

    Args:
        ranked: the search's own ranking, best first; trials without runs are not confirmed.
        default: the tutorial's configuration, if it was trained.
        runs: one run of each configuration on each of its seeds.
        objectives: objectives of the search.
    """
    objective, several = objectives[0], len(objectives) > 1
    trials = [*ranked, *([default] if default else [])]
    trained = {run.trial_id for run in runs}
    configs = {trial.trial_id: trial.config for trial in trials if trial.trial_id in trained}
    verdict = judge_gain(configs, runs, objective)
    means = {trial_id: _measure_means([run for run in runs if run.trial_id == trial_id]) for trial_id in trained}
    if not several:
        trials.sort(key=lambda trial: _mean_scores(means.get(trial.trial_id), objective))
        trials.sort(key=lambda trial: trial.trial_id != verdict.recommended)
    ranks = {trial.trial_id: None if several and trial is default else rank for rank, trial in enumerate(trials, 1)}
    possible = _list_possible_best(trials, runs, objective)
    rows = []
    for trial in trials:
        found = means.get(trial.trial_id)
        mean = found.find_mean(objective) if found else None
        if found and mean is not None:
            searched = trial.last.find_value(objective) if trial.last else None
            optimism = None if searched is None else searched - mean
            found = dataclasses.replace(found, tied_with_best=trial.trial_id in possible, optimism=optimism)
        if found and trial is trials[0]:
            text = describe_verdict(verdict, objective, ranks, several=several)
            found = dataclasses.replace(found, verdict=text, verdict_kind=str(verdict.kind))
            if gain := verdict.gain:
                found = dataclasses.replace(found, gain=gain.difference, gain_low=gain.low, gain_high=gain.high)
        rows.append(BestRow(rank=ranks[trial.trial_id], trial=trial, confirmation=found))
    return rows


def _measure_means(runs: Iterable[ConfirmedRun]) -> Confirmation:
    """Return the means and intervals of one configuration; none if a run did not complete."""
    runs = sorted(runs, key=lambda run: run.seed)
    failed = [run for run in runs if run.status is not TrialStatus.COMPLETED]
    columns: dict[str, Any] = {}
    own = sorted({name for run in runs for name in run.metrics})
    if any(run.val_accuracy is None for run in runs):  # a user's own training, whose loss may be all that it tests
        own.append("test_loss")
    for name in () if failed else ("val_loss", "val_accuracy", "test_accuracy", *own):
        values = [value for run in runs if (value := run.find_value(name)) is not None]
        if len(values) == len(runs):
            found = mean_interval(values)
            parts = {f"{name}_{part}": getattr(found, part) for part in MEAN_PARTS}
            columns |= {"means": columns.get("means", {}) | parts} if name in own else parts
    return Confirmation(
        confirm_seeds=tuple(run.seed for run in runs),
        confirm_failures=tuple(f"seed {run.seed}: {run.error or run.status}" for run in failed),
        **columns,
    )


def _mean_scores(confirmation: Confirmation | None, objective: str) -> tuple[float, ...]:
    """Return the sort key of a configuration, less is better; infinity, after all others, if it has no means."""
    keys = (objective, *(name for name in RANKING_OBJECTIVES if name != objective))
    if confirmation is None or confirmation.find_mean(objective) is None:
        return (math.inf,) * len(keys)
    means = [confirmation.find_mean(name) or 0.0 for name in keys]
    return tuple(-mean if is_maximized(name) else mean for name, mean in zip(keys, means, strict=True))


def _list_possible_best(trials: Sequence[TrialRecord], runs: Sequence[ConfirmedRun], objective: str) -> set[str]:
    """Return the trial ids of the configurations that may be the true best."""
    sign = find_sign(objective)
    of_trials = {trial.trial_id: score_runs(trial.trial_id, runs, objective) for trial in trials}
    scores = {name: {seed: sign * value for seed, value in of.items()} for name, of in of_trials.items() if of}
    # A configuration counts once: its copies share its runs, and would count as rivals.
    first_of = {without_seed(trial.config): trial.trial_id for trial in reversed(trials)}
    possible = list_possible_best({name: scores[name] for name in first_of.values() if name in scores})
    return {trial.trial_id for trial in trials if first_of[without_seed(trial.config)] in possible}
