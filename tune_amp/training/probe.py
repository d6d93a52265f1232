"""Probes gradients for a verdict: a few images, at fixed weights, in the trial's precision and in fp32."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from tune_amp.training.amp import ScalerTelemetry, autocast_of, training_arithmetic
from tune_amp.training.generators import seed_generators, undisturbed
from tune_amp.training.verdict import GradientProbe, ScaleOutlook, look_ahead
from tune_amp.trial.config import TrialConfig

# Two forward and backward passes an epoch. Their share of an MNIST epoch's time is in results/reference/telemetry.md.
PROBE_IMAGES = 32
# In a nearly dead network, only a few images in a thousand still give some weight a gradient.
SECOND_LOOK_IMAGES = 2048


def probe_gradients(
    config: TrialConfig,
    scaler: torch.amp.GradScaler,
    telemetry: ScalerTelemetry,
    model: nn.Module,
    compute_loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    batch_size: int,
    steps_left: int,
    all_skipped: bool,
) -> GradientProbe:
    """Compare the gradients of a trial's precision with those of fp32. No weight, gradient, buffer or scale changes.

    A few images show how much underflows. A verdict that would end a trial is tested on more images: whether weights
    are dead, whether the whole gradient vanishes, and whether the sum over a whole batch overflows. No pass exceeds one
    batch, or the probe would need more memory than training. Every pass has the same dropout.

    Args:
        config: source of precision, weight decay and seed.
        scaler: the trial's scaler.
        telemetry: its telemetry so far.
        model: its fp32 weights, of which those that are frozen are ignored.
        compute_loss: forward pass and loss of some images, each weighted as in a training step.
        images: the images in the form that ``compute_loss`` takes, [n].
        batch_size: images in a training step.
        steps_left: steps left in the trial's budget.
        all_skipped: whether every step of the last epoch was skipped.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = weights[0].device

    def compute_gradients(some: Tensor, scale: float | None = None) -> list[Tensor]:
        """Return the gradients in fp32, or at ``scale`` in the trial's precision; ``.grad`` stays as it is."""
        seed_generators(config.seed)
        if scale is None:
            loss = compute_loss(some)
        else:
            with autocast_of(config.precision, device):
                loss = compute_loss(some)
            loss = loss * scale
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return [gradient.detach() for gradient in gradients]

    few, more = images[: min(batch_size, PROBE_IMAGES)], images[:SECOND_LOOK_IMAGES].split(batch_size)
    with undisturbed(model, device), training_arithmetic(config.precision, device), torch.enable_grad():
        exact = compute_gradients(few)
        # Weight decay moves weights that get no gradient, and may revive some.
        is_dead = config.weight_decay == 0 and _is_dead(exact)
        is_dead = is_dead and all(_is_dead(compute_gradients(some)) for some in more)
        outlook = find_outlook(scaler, telemetry, steps_left)
        if outlook is None or not (math.isfinite(outlook.scale) and outlook.scale > 0):
            return GradientProbe(is_dead=is_dead, outlook=outlook)
        share = _measure_underflow(exact, compute_gradients(few, outlook.scale))
        overflows = vanishes = None
        if all_skipped:  # another batch may have smaller gradients: half the scale must overflow too
            overflows = not all_finite(compute_gradients(images[:batch_size], outlook.lowest / 2))
        if share == 1:
            vanishes = not any(_any_nonzero(compute_gradients(some, outlook.highest)) for some in (few, *more))
    return GradientProbe(
        is_dead=is_dead,
        underflow_share=share,
        outlook=outlook,
        overflows_at_lowest=overflows,
        vanishes_at_highest=vanishes,
    )


def find_outlook(scaler: torch.amp.GradScaler, telemetry: ScalerTelemetry, steps_left: int) -> ScaleOutlook | None:
    """Return the extremes that the loss scale can still reach; None if the precision uses no scaler."""
    if not scaler.is_enabled():
        return None
    assert telemetry.min_loss_scale is not None
    return look_ahead(scaler.state_dict(), telemetry.min_loss_scale, steps_left)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every element is a finite number.

    Testing the sums takes a third of the time of testing each element. Sums of finite elements overflow only if these
    exceed 10^30. A user's own loop may have weights in fp16, whose sum overflows at 65504, or complex ones.
    """
    real = (
        torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in map(torch.Tensor.detach, tensors)
    )
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in real]
    return math.isfinite(torch.stack(sums).sum())


def _is_dead(gradients: Sequence[Tensor]) -> bool:
    return not _any_nonzero([gradient for gradient in gradients if gradient.ndim > 1])


def _any_nonzero(tensors: Sequence[Tensor]) -> bool:
    """Return whether any gradient is non-zero. NaN counts as a gradient."""
    return not tensors or bool(torch.stack([torch.linalg.vector_norm(tensor, 1) for tensor in tensors]).sum() != 0)


def _measure_underflow(exact: Sequence[Tensor], scaled: Sequence[Tensor]) -> float | None:
    """Return the share of the non-zero elements of ``exact`` that are zero in ``scaled``.

    None if ``exact`` has no non-zero element, or if a gradient is not finite.
    """
    # Count the elements kept, not lost: if all are lost, the count is exactly zero and the share exactly one.
    counts = [(a.count_nonzero(), torch.logical_and(a, b).count_nonzero()) for a, b in zip(exact, scaled, strict=True)]
    total, kept = torch.stack([torch.stack(pair) for pair in counts]).sum(dim=0).tolist()
    if total == 0 or not all_finite((*exact, *scaled)):
        return None
    return 1.0 - float(kept) / float(total)
