"""Which trials are best, and which of them can be told apart."""

import math
from collections.abc import Sequence

from tune_amp.config import MORE_IS_BETTER, OBJECTIVES, RANKING_OBJECTIVES, InputError, TrialStatus, shown
from tune_amp.results import TrialRecord

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
