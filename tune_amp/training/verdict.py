"""How training stands after an epoch, and whether it is past saving: plain values in, a verdict out.

A loss scale that is too high skips steps until it has come down (calibration), one that is too low makes gradients
vanish until it has grown (starvation). Both are ruinous only if the trial ends before: what it can still reach is
worked out from the scaler's settings and the steps that are left, and tried on a few images. A verdict of collapsed or
diverged ends a trial; in doubt it goes on, and the scheduler, which compares trials, decides. No recorded run that was
judged so learned anything afterwards (``tests/benchmarks/test_reference.py``), though momentum may still move a dead
network.
"""

import dataclasses
import math

from tune_amp.trial.config import TrainingState, format_scale

# Gradients that overflow fp16 exceed 65504 / scale: where the scale is below 2^-24, 2^39, and no scale will help.
COLLAPSED_SCALE = 2.0**-24
LARGEST_REACHABLE_SCALE = 2.0**127

STARVED_SHARE = 0.5
"""Of the gradient's elements. In batches of 256 MNIST images, the small network learns as well as ever while up to half
are lost (at 2^-12), badly from 0.6 on (2^-14), and not at all where all are (2^-18)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleOutlook:
    """The loss scale after an epoch, and the extremes that it can still reach."""

    scale: float
    smallest_so_far: float
    lowest: float
    """Of the scales that a step may still use: the last step's, if every one is skipped; not below ``2^-24``."""
    highest: float
    """The last step's, if none is skipped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochEvidence:
    """What is known after an epoch. Fields about the scaler are None where the precision uses none."""

    weights_finite: bool
    weights_moved: bool
    """Whether any weight is no more what it was before the first step."""
    val_loss: float | None
    nan_buffer: str | None
    """Name of a buffer that holds NaN, such as a batch norm's running variance; looked for where ``val_loss`` is not
    finite."""
    has_learned: bool
    """Whether the model, as it is now, is better than guessing: by its loss or by its accuracy."""
    is_dead: bool
    """No weight matrix gets a gradient, in fp32 either, nor will weight decay move one."""
    epoch_steps: int
    epoch_skipped: int
    applied_steps: int
    """Since the trial began."""
    skipped_steps: int
    underflow_share: float | None
    """Of the gradient's elements at the present scale."""
    outlook: ScaleOutlook | None
    overflows_at_lowest: bool | None
    """Whether gradients overflow even at the lowest scale in reach; None where that was not tried."""
    vanishes_at_highest: bool | None
    """Whether the whole gradient is zero even at the highest scale in reach; None where that was not tried."""
    is_last_epoch: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """How training stands, and why it is past saving where it is."""

    state: TrainingState
    hopeless: str | None = None
    """One line; None while the trial may still get better."""


def look_ahead(
    scale: float,
    smallest_so_far: float,
    growth_tracker: int,
    steps_left: int,
    *,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
) -> ScaleOutlook:
    """The extremes that ``torch.amp.GradScaler`` can still bring its scale to.

    Args:
        scale: the present scale.
        smallest_so_far: since the trial began.
        growth_tracker: steps without overflow since the scale last changed.
        steps_left: of the trial's budget.
        growth_factor: of the scaler, like the two that follow.
        backoff_factor: applied after each overflow.
        growth_interval: steps without overflow before the scale grows.
    """
    updates = max(steps_left - 1, 0)  # what the last update makes of the scale serves no step
    growths = (growth_tracker + updates) // growth_interval
    # In powers of two: growth_factor ** growths leaves the range of a float.
    highest = math.log2(scale) + growths * math.log2(growth_factor) if 0 < scale < math.inf else -math.inf
    return ScaleOutlook(
        scale=scale,
        smallest_so_far=smallest_so_far,
        lowest=min(scale, max(scale * backoff_factor**updates, COLLAPSED_SCALE)),
        highest=2.0 ** min(highest, math.log2(LARGEST_REACHABLE_SCALE)),
    )


def judge_epoch(evidence: EpochEvidence) -> Verdict:
    """The state of training, from the worst down."""
    hopeless = _find_divergence(evidence)
    if hopeless is not None:
        return Verdict(state=TrainingState.DIVERGED, hopeless=hopeless)
    hopeless = _find_collapse(evidence)
    if hopeless is not None:
        return Verdict(state=TrainingState.COLLAPSED, hopeless=hopeless)
    if 2 * evidence.epoch_skipped > evidence.epoch_steps:
        return Verdict(state=TrainingState.CALIBRATING)
    if (evidence.underflow_share or 0.0) > STARVED_SHARE:
        return Verdict(state=TrainingState.STARVED)
    return Verdict(state=TrainingState.STEADY)


def _find_divergence(evidence: EpochEvidence) -> str | None:
    """A training loss that is not finite is no divergence: steps whose fp16 forward pass overflows are skipped."""
    if not evidence.weights_finite:
        return "weights are not finite"
    if evidence.val_loss is not None and not math.isfinite(evidence.val_loss):
        cause = f": weights are finite, but buffer {evidence.nan_buffer} is not" if evidence.nan_buffer else ""
        return f"val_loss is {evidence.val_loss}{cause}"
    return None


def _find_collapse(evidence: EpochEvidence) -> str | None:
    """Only where nothing has been learned: a model that has, and learns no more, is worth what it is."""
    if evidence.has_learned and evidence.weights_moved:
        return None
    if evidence.is_dead:
        return "no weight gets a gradient, in fp32 either, and the model is no better than guessing"
    if evidence.outlook is None:
        return None
    return _find_collapsed_scale(evidence, evidence.outlook) or _find_unreachable_scale(evidence, evidence.outlook)


def _find_collapsed_scale(evidence: EpochEvidence, outlook: ScaleOutlook) -> str | None:
    """GradScaler has no floor: NaN gradients halve the scale for ever, and one of 0 or infinity skips every step."""
    scale = outlook.scale
    if not math.isfinite(scale) or scale <= 0:
        return f"loss_scale is {scale}"
    if scale < COLLAPSED_SCALE and evidence.skipped_steps and scale == outlook.smallest_so_far:
        return f"loss_scale collapsed to {scale:.3g} after {evidence.skipped_steps} skipped steps"
    return None


def _find_unreachable_scale(evidence: EpochEvidence, outlook: ScaleOutlook) -> str | None:
    """Only where no weight has moved yet: then the next gradients are like those that were tried."""
    if evidence.weights_moved:
        return None
    if evidence.is_last_epoch and evidence.applied_steps == 0:
        return f"no step was applied: all {evidence.skipped_steps} were skipped"
    if evidence.overflows_at_lowest and evidence.epoch_skipped == evidence.epoch_steps:
        lowest = format_scale(outlook.lowest)
        return f"every step is skipped, and gradients overflow even at {lowest}, the lowest loss_scale left to try"
    if evidence.vanishes_at_highest:
        highest = format_scale(outlook.highest)
        return f"gradients vanish in fp16, even at {highest}, the highest loss_scale within the trial"
    return None
