"""Early stopping: ASHA by epoch, in which a trial that diverged ranks last."""

import math
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from tune_amp.config import TrialStatus

# Finite, because ASHA's cutoff interpolates between neighbours, and anything between infinity and a number is infinite.
WORST_VALUES = {"val_accuracy": 0.0, "val_loss": 1e9}


class DivergenceAwareASHA(ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934), with one repair.

    Ray's own never stops a trial whose metric is NaN, because ``NaN < cutoff`` is false, and leaves it out of the
    percentile that the others are measured by. Here a metric that is not finite counts as the worst there is, and so
    does that of a trial that diverged with finite losses, because its loss scale collapsed.

    Args:
        objective: ``val_accuracy`` or ``val_loss``.
        max_epochs: a trial's full budget.
        grace_period: epochs that every trial gets.
        reduction_factor: one in so many trials goes on from rung to rung.
    """

    def __init__(self, *, objective: str, max_epochs: int, grace_period: int, reduction_factor: float) -> None:
        self._objective = objective
        super().__init__(
            time_attr="epoch",
            metric=objective,
            mode=objective_mode(objective),
            max_t=max_epochs,
            grace_period=grace_period,
            reduction_factor=reduction_factor,
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop."""
        decision: str = super().on_trial_result(tune_controller, trial, self._ranked(result))
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record a finished trial's last value in its rung, the worst there is where it diverged."""
        super().on_trial_complete(tune_controller, trial, self._ranked(result))

    def _ranked(self, result: dict[str, Any]) -> dict[str, Any]:
        finite = all(math.isfinite(result.get(name) or 0.0) for name in ("train_loss", *WORST_VALUES))
        diverged = not finite or result.get("status") == TrialStatus.DIVERGED
        return {**result, self._objective: WORST_VALUES[self._objective]} if diverged else result


def objective_mode(objective: str) -> str:
    """Tune's word for which way is better."""
    return "max" if objective == "val_accuracy" else "min"
