"""Judges from plain values how training stands after an epoch, and whether it is past saving.

A loss scale that is too high skips steps until it has come down (calibration); one that is too low makes gradients
vanish until it has grown (starvation). Both are fatal only if the trial ends first: the scales that it can still reach
follow from the scaler's settings and the steps left, and are tested on a few images. A verdict of collapsed or diverged
ends a trial. In doubt the trial continues, and the scheduler, which compares trials, decides. No recorded run with such
a verdict learned anything afterwards (``tests/benchmarks/test_reference.py``), though momentum may still move a dead
network.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tune_amp.trial.config import TrainingState
from tune_amp.trial.text import format_scale

# Gradients that overflow fp16 exceed 65504 / scale: 2^39 for a scale below 2^-24, and then no scale helps.
COLLAPSED_SCALE = 2.0**-24
LARGEST_REACHABLE_SCALE = 2.0**127

STARVED_SHARE = 0.5
"""Share of the gradient's elements. In batches of 256 MNIST images, the small network learns as well as ever while up
to half of them are lost (at 2^-12), badly from 0.6 on (2^-14), and not at all if all are lost (2^-18)."""

# On a GPU a probe launches about 93 operations and waits 6 times: 1 to 1.5 ms. That is 1 % of 1,000 steps as a CUDA
# graph, of about 125 us each. These times are estimates, to be measured on a GPU.
PROBE_EVERY_STEPS = 1_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleOutlook:
    """The loss scale after an epoch, the smallest so far, and the extremes that a step may still use."""

    scale: float
    smallest_so_far: float
    lowest: float
    """The last step's if every step is skipped; not below ``2^-24``."""
    highest: float
    """The last step's if none is skipped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientProbe:
    """Findings about the gradients, from backward passes over a few images at fixed weights.

    The defaults mean that nothing was probed.
    """

    is_dead: bool = False
    """Whether no weight matrix gets a gradient, not even in fp32, and weight decay moves none either."""
    underflow_share: float | None = None
    """Share of the gradient elements non-zero in fp32 that are zero in fp16 at the current loss scale; None if fp16
    gradients overflow or there is no gradient."""
    outlook: ScaleOutlook | None = None
    """None if the precision uses no scaler."""
    overflows_at_lowest: bool | None = None
    """Whether some gradient overflows even at half the lowest reachable scale; tested if every step was skipped."""
    vanishes_at_highest: bool | None = None
    """Whether the whole gradient is zero at the highest reachable scale; tested if it is zero at the current scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochEvidence:
    """The values that a verdict is based on."""

    weights_finite: bool
    weights_moved: bool
    """Whether any weight differs from its value before the first step."""
    validation: Mapping[str, float]
    """Validation values that must be finite, by name: ``val_loss`` and the task's metric; empty without validation."""
    nan_buffer: str | None = None
    """Name of a buffer that holds NaN, such as a batch norm's running variance; searched for only if one of
    ``validation`` is not finite."""
    has_learned: bool | None = None
    """Whether the model is now better than guessing: by its loss or by its accuracy. None if the task has no baseline:
    then a trial does not end because its network is dead, nor continue because it has learned."""
    probe: GradientProbe
    epoch_steps: int
    epoch_skipped: int
    applied_steps: int
    """Steps applied since the trial began."""
    skipped_steps: int
    is_last_epoch: bool


def is_probe_needed(
    *, precision: str, has_learned: bool | None, weights_moved: bool, skipped: int, is_due: bool
) -> bool:
    """Return whether to probe the gradients after an epoch. No trial ends later than with a probe after every epoch.

    A probe decides about the end of a trial only if its model is no better than guessing or no weight has moved, or,
    without a baseline (``has_learned`` is None), if the scale collapsed, which takes a step that was skipped. Otherwise
    a probe shows only whether fp16 gradients are *starved*: that beginning may be seen ``PROBE_EVERY_STEPS`` steps and
    an epoch late, the end is seen at once, because a probe of a starved trial ``is_due`` after every epoch.
    """
    if has_learned is False or precision != "fp16":
        return has_learned is False
    return is_due or not weights_moved or (has_learned is None and skipped > 0)


def look_ahead(scaler: Mapping[str, Any], smallest_so_far: float, steps_left: int) -> ScaleOutlook:
    """Return the extremes to which a ``torch.amp.GradScaler`` can still bring its scale.

    Args:
        scaler: its ``state_dict``.
        smallest_so_far: smallest scale since the trial began.
        steps_left: steps left in the trial's budget.
    """
    scale = scaler["scale"]
    updates = max(steps_left - 1, 0)  # no step uses the scale after the last update
    growths = (scaler["_growth_tracker"] + updates) // scaler["growth_interval"]
    # In powers of two: growth_factor ** growths leaves the range of a float.
    highest = math.log2(scale) + growths * math.log2(scaler["growth_factor"]) if 0 < scale < math.inf else -math.inf
    return ScaleOutlook(
        scale=scale,
        smallest_so_far=smallest_so_far,
        lowest=min(scale, max(scale * scaler["backoff_factor"] ** updates, COLLAPSED_SCALE)),
        highest=2.0 ** min(highest, math.log2(LARGEST_REACHABLE_SCALE)),
    )


def judge_epoch(evidence: EpochEvidence) -> tuple[TrainingState, str | None]:
    """Return the state of training, testing for the worst first, and on one line why it is past saving if it is."""
    if hopeless := _find_divergence(evidence):
        return TrainingState.DIVERGED, hopeless
    if hopeless := _find_collapse(evidence):
        return TrainingState.COLLAPSED, hopeless
    if 2 * evidence.epoch_skipped > evidence.epoch_steps:
        return TrainingState.CALIBRATING, None
    if (evidence.probe.underflow_share or 0.0) > STARVED_SHARE:
        return TrainingState.STARVED, None
    return TrainingState.STEADY, None


def _find_divergence(evidence: EpochEvidence) -> str | None:
    """Return why training diverged, or None.

    A training loss that is not finite is no divergence: steps whose fp16 forward pass overflows are skipped.
    """
    if not evidence.weights_finite:
        return "weights are not finite"
    for name, value in evidence.validation.items():
        if not math.isfinite(value):
            cause = f": weights are finite, but buffer {evidence.nan_buffer} is not" if evidence.nan_buffer else ""
            return f"{name} is {value}{cause}"
    return None


def _find_collapse(evidence: EpochEvidence) -> str | None:
    """Return why training collapsed, or None if it did not or the model has learned.

    A model that has learned keeps its value even if it learns no more.
    """
    if evidence.has_learned and evidence.weights_moved:
        return None
    if evidence.probe.is_dead and evidence.has_learned is not None:
        return "no weight gets a gradient, in fp32 either, and the model is no better than guessing"
    outlook = evidence.probe.outlook
    if outlook is None:
        return None
    if not math.isfinite(outlook.scale) or outlook.scale <= 0:
        return f"loss_scale is {outlook.scale}"
    # GradScaler has no floor: NaN gradients halve the scale for ever.
    if outlook.scale < COLLAPSED_SCALE and evidence.skipped_steps and outlook.scale == outlook.smallest_so_far:
        return f"loss_scale collapsed to {outlook.scale:.3g} after {evidence.skipped_steps} skipped steps"
    return None if evidence.weights_moved else _find_unreachable_scale(evidence, outlook)


def _find_unreachable_scale(evidence: EpochEvidence, outlook: ScaleOutlook) -> str | None:
    """Return why no reachable scale lets the model learn, or None if one may.

    Valid while no weight has moved: only then are the next gradients like those that were tested.
    """
    if evidence.is_last_epoch and evidence.applied_steps == 0 < evidence.skipped_steps:
        return f"no step was applied: all {evidence.skipped_steps} were skipped"
    if evidence.probe.overflows_at_lowest and evidence.epoch_skipped == evidence.epoch_steps:
        lowest = format_scale(outlook.lowest)
        return f"every step is skipped, and gradients overflow even at {lowest}, the lowest loss_scale left to try"
    if evidence.probe.vanishes_at_highest:
        highest = format_scale(outlook.highest)
        return f"gradients vanish in fp16, even at {highest}, the highest loss_scale within the trial"
    return None
