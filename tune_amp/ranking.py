"""Which trials are best, and which of them can be told apart."""

import math
from collections.abc import Sequence

from tune_amp.config import OBJECTIVES, InputError, TrialStatus, shown
from tune_amp.results import TrialRecord


def choose_best(trials: Sequence[TrialRecord], objective: str, top_k: int) -> list[TrialRecord]:
    """The ``top_k`` trials by ``objective`` at their last epoch, best first; fewer, or none, where fewer are eligible.

    Eligible are completed trials, and only where there is none, those stopped or interrupted: scores at different
    budgets do not compare. Loss and accuracy must both be finite. Ties are broken by the other of the two, then by the
    order of ``trials``.

    Raises:
        InputError: an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective: must be one of {', '.join(OBJECTIVES)}, got {shown(objective)}")
    assert top_k >= 1
    scored = [(key, trial) for trial in trials if (key := _ranking_key(trial, objective)) is not None]
    for statuses in ((TrialStatus.COMPLETED,), (TrialStatus.STOPPED, TrialStatus.INTERRUPTED)):
        eligible = [(key, trial) for key, trial in scored if trial.status in statuses]
        if eligible:
            return [trial for _, trial in sorted(eligible, key=lambda pair: pair[0])[:top_k]]
    return []


def _ranking_key(trial: TrialRecord, objective: str) -> tuple[float, float] | None:
    """Sorts better trials first; None where the trial has no finite score."""
    if trial.last is None or trial.last.val_loss is None or trial.last.val_accuracy is None:
        return None
    loss, accuracy = trial.last.val_loss, trial.last.val_accuracy
    if not (math.isfinite(loss) and math.isfinite(accuracy)):
        return None
    return (-accuracy, loss) if objective == "val_accuracy" else (loss, -accuracy)


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
