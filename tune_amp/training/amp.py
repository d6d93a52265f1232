"""The only module that implements mixed precision: arithmetic, loss scaler, one training step and its telemetry.

Weights and optimizer state stay in fp32 (the master weights of Micikevicius et al. 2018, arXiv:1710.03740); autocast
chooses fp16 or bf16 operation by operation. One path serves every precision, on CUDA and on the CPU: the scaler is
switched by ``enabled``, never left out.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tune_amp.training.fp16_products import fast_fp16_products
from tune_amp.training.verdict import ScaleOutlook, look_ahead
from tune_amp.trial.config import TrialConfig

# Two forward and backward passes an epoch. Their share of an MNIST epoch's time is in results/reference/telemetry.md.
PROBE_IMAGES = 32
# In a nearly dead network, only a few images in a thousand still give some weight a gradient.
SECOND_LOOK_IMAGES = 2048

AUTOCAST_DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalerTelemetry:
    """Telemetry of loss scaling since the trial began. Scales are None if the precision uses no scaler."""

    steps: int = 0
    """Training steps taken, skipped ones included."""
    applied_steps: int = 0
    skipped_steps: int = 0
    """Steps without a weight update, because a gradient was not finite."""
    growths: int = 0
    """Scaler updates that raised the scale."""
    first_applied_step: int | None = None
    """Number of the first applied step, counted from 1."""
    loss_scale: float | None = None
    """The scale that the next step will use."""
    min_loss_scale: float | None = None
    max_loss_scale: float | None = None
    loss_scale_steps: tuple[int, ...] = ()
    """First step of the last epoch that used each of ``loss_scale_values``, counted from 1 over the trial."""
    loss_scale_values: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientProbe:
    """Findings about the gradients, from backward passes over a few images at fixed weights.

    The defaults mean that nothing was probed.
    """

    is_dead: bool = False
    """Whether no weight matrix gets a gradient, not even in fp32."""
    underflow_share: float | None = None
    """Share of the gradient elements non-zero in fp32 that are zero in fp16 at the current loss scale; None if fp16
    gradients overflow or there is no gradient."""
    outlook: ScaleOutlook | None = None
    overflows_at_lowest: bool | None = None
    """Whether some gradient overflows even at half the lowest reachable scale; tested if every step was skipped."""
    vanishes_at_highest: bool | None = None
    """Whether the whole gradient is zero at the highest reachable scale; tested if it is zero at the current scale."""


class AmpStep:
    """Turns a loss into an optimizer step under the trial's precision and scaler settings.

    A step writes its loss, scale and overflow into one device buffer by index, which needs no host synchronisation;
    ``read_epoch`` copies the buffer to the host once. The index is counted on the host, or on the device so that a CUDA
    graph can replay a step: see ``follow``.

    Args:
        config: source of precision, scaler settings and gradient clipping.
        device: device of the model.
        max_steps: maximum number of steps between two calls of ``read_epoch``.
    """

    def __init__(self, config: TrialConfig, device: torch.device, max_steps: int) -> None:
        self._config = config
        self._device = device
        self._scaler = build_scaler(config, device)
        # A row a step: loss, and with a scaler the scale after the step and whether the step was skipped.
        columns = 3 if self._scaler.is_enabled() else 1
        self._log = torch.zeros(max_steps, columns, dtype=torch.float32, device=device)
        self._logged = 0
        self._position: Tensor | None = None
        self._loss: Tensor | None = None  # of the batches of a step so far
        self._telemetry = ScalerTelemetry()
        if self._scaler.is_enabled():
            self._start_scale(_float32(config.init_scale))

    @property
    def telemetry(self) -> ScalerTelemetry:
        """Telemetry as of the last ``read_epoch``."""
        return self._telemetry

    def autocast(self) -> torch.autocast:
        """Return the context for forward pass and loss: fp16 or bf16 where safe, else fp32; off for fp32 and tf32."""
        # PyTorch wants the cache of cast weights off during graph capture. Weights are cast once a step anyway.
        return autocast_of(self._config.precision, self._device, cached=self._position is None)

    def follow(self, position: Tensor | None) -> None:
        """Read the log index from ``position`` (int64 [1] on the device) from now on, or count on the host if None.

        Each step adds 1 to ``position``, and ``read_epoch`` resets it to 0. Call ``follow`` between epochs.
        """
        assert self._count_logged() == 0
        self._position = position

    def accumulate(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Run the backward pass of a batch, and add its gradients and its loss to those of the next step."""
        if self._loss is None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # zero_grad() also calls a profiler: 50 us on one core
        self._scaler.scale(loss).backward()
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Run the backward pass, unscale and clip if configured, step unless a gradient overflowed, update the scale.

        Args:
            optimizer: holds the fp32 parameters; a fused optimizer steps without host synchronisation.
            loss: 0-dim, from a forward pass under ``autocast``.
        """
        self.accumulate(optimizer, loss)
        if self._config.grad_clip is not None:
            # Clipping must see the true gradients, so they are unscaled first (PyTorch's AMP examples).
            self._scaler.unscale_(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._config.grad_clip)
        self._scaler.step(optimizer)
        assert self._loss is not None  # set by accumulate()
        row = self._loss
        self._loss = None
        if self._scaler.is_enabled():
            # update() forgets the overflow flags and changes the scale: get the flags before it, the scale after it.
            overflow = _overflow_flag(self._scaler, optimizer)
            self._scaler.update()
            row = torch.stack((row, _scale_tensor(self._scaler), overflow))  # one write to the log instead of three
        if self._position is None:
            self._log[self._logged] = row
            self._logged += 1
        else:
            self._log.index_copy_(0, self._position, row.to(self._log.dtype).view(1, -1))
            self._position.add_(1)

    def wait_whether_applied(self) -> bool:
        """Return whether the last step was applied. With a scaler, wait for the device. Not for captured steps."""
        return not self._scaler.is_enabled() or not bool(self._log[self._logged - 1, -1])

    def abandon_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Discard a step that raised an exception, so that the next step runs as if it had never started."""
        self._loss = None
        optimizer.zero_grad(set_to_none=True)
        for name in ("grad_scale", "found_inf"):  # set by GradScaler.step, which multiplies by a leftover scale
            vars(optimizer).pop(name, None)
        if self._scaler.is_enabled():
            self._scaler._per_optimizer_states.clear()  # noqa: SLF001 - else unscale_() raises: already called

    def _count_logged(self) -> int:
        return self._logged if self._position is None else int(self._position)

    def read_epoch(self) -> float:
        """Update the telemetry, with the only host synchronisation of an epoch.

        Returns:
            The mean loss of the steps since the last call, except steps skipped because their own loss was not finite.
            NaN if no step remains.
        """
        logged = self._count_logged()
        losses, *scaling = self._log[:logged].cpu().numpy().T
        is_skipped = np.zeros(logged, np.bool_)
        if self._scaler.is_enabled():
            scales, is_skipped = scaling[0], scaling[1] != 0
            self._telemetry = summarise_steps(self._telemetry, scales, is_skipped)
        else:
            steps = self._telemetry.steps + logged
            first = self._telemetry.first_applied_step or (1 if steps else None)
            self._telemetry = ScalerTelemetry(steps=steps, applied_steps=steps, first_applied_step=first)
        self._logged = 0
        if self._position is not None:
            self._position.zero_()
        counted = losses[np.isfinite(losses) | ~is_skipped]
        return float(counted.mean(dtype=np.float64)) if counted.size else math.nan

    def probe(
        self, parameters: Sequence[Tensor], compute_loss: Callable[[Tensor], Tensor], images: Tensor, **sizes: Any
    ) -> GradientProbe:
        """Return ``probe_gradients`` of this step's scaler."""
        return probe_gradients(self._config, self._scaler, self._telemetry, parameters, compute_loss, images, **sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors for ``load_state_dict``, safe for ``torch.load(weights_only=True)``.

        Call it between epochs, after ``read_epoch``.
        """
        assert self._count_logged() == 0
        return {
            "scaler": self._scaler.state_dict(),
            "init_scale": self._config.init_scale,
            "telemetry": dataclasses.asdict(self._telemetry),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, with this trial's own scaler settings.

        ``GradScaler.load_state_dict`` would replace them by the checkpoint's growth and backoff settings. The current
        scale and growth tracker are restored, unless the checkpoint started from another ``init_scale``: then the scale
        starts from this trial's own.
        """
        self._telemetry = ScalerTelemetry(**state["telemetry"])
        if not self._scaler.is_enabled():
            return
        own = self._scaler.state_dict()
        same_start = bool(state["scaler"]) and state["init_scale"] == self._config.init_scale
        running = {key: state["scaler"][key] for key in ("scale", "_growth_tracker")} if same_start else {}
        self._scaler.load_state_dict(own | running)
        if not same_start:
            self._start_scale(_float32(self._config.init_scale))

    def _start_scale(self, scale: float) -> None:
        self._telemetry = dataclasses.replace(
            self._telemetry,
            loss_scale=scale,
            min_loss_scale=_extreme(min, self._telemetry.min_loss_scale, scale),
            max_loss_scale=_extreme(max, self._telemetry.max_loss_scale, scale),
        )


def probe_gradients(
    config: TrialConfig,
    scaler: torch.amp.GradScaler,
    telemetry: ScalerTelemetry,
    parameters: Sequence[Tensor],
    compute_loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    batch_size: int,
    steps_left: int,
    all_skipped: bool,
) -> GradientProbe:
    """Compare the gradients of a trial's precision with those of fp32. No weight, gradient or scale changes.

    A few images show how much underflows. A verdict that would end a trial is tested on more images: whether weights
    are dead, whether the whole gradient vanishes, and whether the sum over a whole batch overflows. No pass exceeds one
    batch, or the probe would need more memory than training.

    Args:
        config: source of precision and scaler settings.
        scaler: the trial's scaler.
        telemetry: its telemetry so far.
        parameters: the fp32 weights.
        compute_loss: forward pass and loss of some images, each weighted as in a training step.
        images: the images in the form that ``compute_loss`` takes, [n].
        batch_size: images in a training step.
        steps_left: steps left in the trial's budget.
        all_skipped: whether every step of the last epoch was skipped.
    """
    few, more = images[: min(batch_size, PROBE_IMAGES)], images[:SECOND_LOOK_IMAGES].split(batch_size)
    exact = _compute_gradients(compute_loss(few), parameters)
    is_dead = _is_dead(exact) and all(_is_dead(_compute_gradients(compute_loss(some), parameters)) for some in more)
    probe = GradientProbe(is_dead=is_dead)
    outlook = find_outlook(config, scaler, telemetry, steps_left)
    if outlook is None or not (math.isfinite(outlook.scale) and outlook.scale > 0):
        return dataclasses.replace(probe, outlook=outlook)

    def scaled(scale: float, some: Tensor) -> list[Tensor]:
        with autocast_of(config.precision, parameters[0].device):
            loss = compute_loss(some)
        return _compute_gradients(loss * scale, parameters)

    share = _measure_underflow(exact, scaled(outlook.scale, few))
    # Another batch may have smaller gradients: half the scale must overflow too.
    lowest = outlook.lowest / 2
    return dataclasses.replace(
        probe,
        underflow_share=share,
        outlook=outlook,
        overflows_at_lowest=not all_finite(scaled(lowest, images[:batch_size])) if all_skipped else None,
        vanishes_at_highest=(
            not any(_any_nonzero(scaled(outlook.highest, some)) for some in (few, *more)) if share == 1 else None
        ),
    )


def find_outlook(
    config: TrialConfig, scaler: torch.amp.GradScaler, telemetry: ScalerTelemetry, steps_left: int
) -> ScaleOutlook | None:
    """Return the extremes that the loss scale can still reach; None if the precision uses no scaler."""
    if not scaler.is_enabled():
        return None
    state = scaler.state_dict()
    assert config.growth_factor is not None
    assert config.backoff_factor is not None
    assert config.growth_interval is not None
    assert telemetry.min_loss_scale is not None
    return look_ahead(
        state["scale"],
        telemetry.min_loss_scale,
        state["_growth_tracker"],
        steps_left,
        growth_factor=config.growth_factor,
        backoff_factor=config.backoff_factor,
        growth_interval=config.growth_interval,
    )


def autocast_of(precision: str, device: torch.device, *, cached: bool = True) -> torch.autocast:
    """Return the context for forward pass and loss: fp16 or bf16 where safe, else fp32; off for fp32 and tf32."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cached)


def build_scaler(config: TrialConfig, device: torch.device) -> torch.amp.GradScaler:
    """Return a ``torch.amp.GradScaler`` with the trial's four settings, enabled for fp16 only."""
    if config.precision != "fp16":
        return torch.amp.GradScaler(device.type, enabled=False)
    assert config.init_scale is not None  # TrialConfig fills the four settings for fp16
    assert config.growth_factor is not None
    assert config.backoff_factor is not None
    assert config.growth_interval is not None
    return torch.amp.GradScaler(
        device.type,
        init_scale=config.init_scale,
        growth_factor=config.growth_factor,
        backoff_factor=config.backoff_factor,
        growth_interval=config.growth_interval,
    )


def summarise_steps(
    before: ScalerTelemetry, scales: NDArray[np.float32], overflows: NDArray[np.bool_]
) -> ScalerTelemetry:
    """Return the telemetry after further steps.

    Args:
        before: the telemetry before them; its ``loss_scale`` is the scale of the first step.
        scales: float32 [steps], the scale after each step's update.
        overflows: bool [steps], whether the step was skipped.
    """
    assert before.loss_scale is not None
    in_force = np.concatenate(([np.float32(before.loss_scale)], scales))
    applied = np.flatnonzero(~overflows)
    first = before.first_applied_step
    if first is None and applied.size:
        first = before.steps + int(applied[0]) + 1
    used = in_force[:-1]
    changes = np.flatnonzero(np.concatenate(([True], used[1:] != used[:-1]))) if used.size else np.empty(0, np.int64)
    return ScalerTelemetry(
        steps=before.steps + scales.size,
        applied_steps=before.applied_steps + applied.size,
        skipped_steps=before.skipped_steps + int(overflows.sum()),
        growths=before.growths + int((in_force[1:] > in_force[:-1]).sum()),
        first_applied_step=first,
        loss_scale=float(in_force[-1]),
        min_loss_scale=_extreme(min, before.min_loss_scale, float(in_force.min())),
        max_loss_scale=_extreme(max, before.max_loss_scale, float(in_force.max())),
        loss_scale_steps=tuple((before.steps + 1 + changes).tolist()),
        loss_scale_values=tuple(used[changes].tolist()),
    )


@contextlib.contextmanager
def fp32_arithmetic(precision: str) -> Iterator[None]:
    """Compute fp32 operations as TF32 for ``tf32`` on CUDA, and in strict fp32 for other precisions and on the CPU.

    PyTorch's own default is a mixture (TF32 convolutions, strict products), which is no clean baseline for fp32. A
    user's module may have set another: ``torch.set_float32_matmul_precision("medium")`` is bf16 on the CPU.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    on_cuda: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    settings: tuple[Any, ...] = (*on_cuda, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)  # type: ignore[attr-defined]
    previous = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    # The older switches must agree with the settings above: while they contradict, torch raises when a switch is read,
    # as cudnn.flags and torch.compile do. With all settings strict, the switches can be read whatever their values.
    matmul_precision, cudnn_tf32 = torch.get_float32_matmul_precision(), _cudnn_switch_allows_tf32()
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        cudnn.allow_tf32 = precision == "tf32"
        for setting in settings:
            setting.fp32_precision = "tf32" if precision == "tf32" and setting in on_cuda else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
        cudnn.allow_tf32 = cudnn_tf32
        for setting, value in zip(settings, previous, strict=True):  # last: the older switches write here too
            setting.fp32_precision = value


@contextlib.contextmanager
def training_arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Compute what autocast leaves in fp32 as ``fp32_arithmetic`` says, and products in fp16 as fast as ``device`` can.

    It holds for the backward pass too, in which a checkpointed model computes again.
    """
    with fp32_arithmetic(precision), fast_fp16_products(precision, device):
        yield


@contextlib.contextmanager
def flushing_denormals() -> Iterator[None]:
    """Treat numbers below 1e-38 as zero in this thread's CPU arithmetic.

    Adam's moments decay into such numbers if a weight's gradient stays zero, as at the border of MNIST's images, and
    processors are slow with them: from the second epoch on, steps at batch 64 took 1.3 (fp16) to 1.5 times (fp32) as
    long. No recorded metric differs in a bit. The smallest numbers of fp16 are far larger and are not affected.
    """
    smallest = sys.float_info.min
    flushed = smallest / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


def name_device(device: torch.device) -> str:
    """Return ``cpu``, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def describe_hardware(precision: str, device: torch.device) -> str | None:
    """Return one sentence if ``device`` lacks units for ``precision``, None if it has them."""
    if device.type == "cuda":
        return describe_cuda(precision, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    if precision == "tf32":
        return "tf32 needs an NVIDIA GPU of compute capability 8.0 or newer: on the CPU it is computed as fp32"
    # AVX-512 multiplies bf16 pairs in one instruction, twice as many as fp32; its fp16 is not used for products.
    flags = {"fp16": ("amx_fp16",), "bf16": ("amx_bf16", "avx512_bf16")}
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may lack it
    if precision in flags and not any(capabilities.get(flag, False) for flag in flags[precision]):
        return (
            f"this CPU has no {precision} matrix units: arithmetic and loss scaling are real, "
            "expect no speed-up over fp32"
        )
    return None


def describe_cuda(precision: str, capability: tuple[int, int], name: str) -> str | None:
    """Return the same as ``describe_hardware`` for a CUDA device called ``name`` of ``capability`` (major, minor).

    Tensor cores for fp16 came with compute capability 7.0, those for bf16 and TF32 with 8.0:
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
    """
    needed = {"fp16": (7, 0), "bf16": (8, 0), "tf32": (8, 0)}.get(precision, (0, 0))
    if capability >= needed:
        return None
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and {precision} tensor cores need "
        f"{needed[0]}.{needed[1]}: expect no speed-up from {precision}"
    )


def _cudnn_switch_allows_tf32() -> bool:
    """Return cuDNN's older switch, while convolutions and recurrent layers are set to strict fp32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # the switch contradicts those settings
        return True


def _compute_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of ``loss``, zero for a parameter that it does not depend on; leave ``.grad`` unchanged."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [gradient.detach() for gradient in gradients]


def _is_dead(gradients: Sequence[Tensor]) -> bool:
    return not _any_nonzero([gradient for gradient in gradients if gradient.ndim > 1])


def _measure_underflow(exact: Sequence[Tensor], scaled: Sequence[Tensor]) -> float | None:
    """Return the share of the non-zero elements of ``exact`` that are zero in ``scaled``.

    None if ``exact`` has no non-zero element, or if a gradient is not finite.
    """
    # Count the elements kept, not lost: if all are lost, the count is exactly zero and the share exactly one.
    counts = [(a.count_nonzero(), torch.logical_and(a, b).count_nonzero()) for a, b in zip(exact, scaled, strict=True)]
    total, kept = torch.stack([torch.stack(pair) for pair in counts]).sum(dim=0).tolist()
    if total == 0 or not all_finite(exact) or not all_finite(scaled):
        return None
    return 1.0 - float(kept) / float(total)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether every element is a finite number.

    Testing the sums takes a third of the time of testing each element. Sums of finite elements overflow only if these
    exceed 10^30.
    """
    return math.isfinite(torch.stack([tensor.detach().sum() for tensor in tensors]).sum())


def find_nan(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN, or None. Infinity may be intended, as in a mask."""
    return next((name for name, tensor in named if tensor.isnan().any()), None)


def _any_nonzero(tensors: Sequence[Tensor]) -> bool:
    """Return whether any gradient is non-zero. NaN counts as a gradient."""
    return not tensors or bool(torch.stack([torch.linalg.vector_norm(tensor, 1) for tensor in tensors]).sum() != 0)


def _scale_tensor(scaler: torch.amp.GradScaler) -> Tensor:
    """Return the current scale as a 0-dim device tensor. ``get_scale`` would wait for the device."""
    scale = scaler._get_scale_async()  # noqa: SLF001
    assert scale is not None  # created by the first scale()
    return scale


def _overflow_flag(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return a 0-dim device float, non-zero if ``step`` found a non-finite gradient. Valid before ``update``."""
    flags = list(scaler._found_inf_per_device(optimizer).values())  # noqa: SLF001
    assert len(flags) == 1  # a trial's model lives on one device
    flag: Tensor = flags[0]
    return flag


def _float32(value: float | None) -> float:
    """Return ``value`` as the scaler holds it."""
    assert value is not None
    return float(np.float32(value))


def _extreme(choose: Any, before: float | None, now: float) -> float:
    return now if before is None else float(choose(before, now))
