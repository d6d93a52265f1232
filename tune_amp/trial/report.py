"""What a worker reports of a trial, after an epoch and at its end."""

import dataclasses
import math
from typing import Any

from tune_amp.trial.config import OBJECTIVES, EpochMetrics, list_values


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrialReport:
    """A trial's report of an epoch, or of its end by an exception."""

    metrics: EpochMetrics | None
    """None if an exception ended the trial before the end of the epoch."""
    status: str
    """``RUNNING``, or the ``TrialStatus`` with which the trial ended by itself."""
    error: str | None
    """One line: why the trial diverged or failed."""
    done: bool
    """Whether the trial ended with this report, by itself or stopped by the scheduler."""
    config_fault: bool
    """Whether a failure is the settings' fault."""
    device: str
    num_threads: int
    setup_seconds: float
    checkpoint_seconds: float

    def as_result(self) -> dict[str, Any]:
        """Return what Tune's schedulers and searchers receive; without metrics, the objectives are NaN."""
        metrics = dict.fromkeys(OBJECTIVES, math.nan) if self.metrics is None else list_values(self.metrics)
        return {**metrics, "status": self.status, "done": self.done, "config_fault": self.config_fault}
