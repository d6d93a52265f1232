"""The only module that implements mixed precision: arithmetic, loss scaler, one training step and its telemetry.

Weights and optimizer state stay in fp32 (the master weights of Micikevicius et al. 2018, arXiv:1710.03740); autocast
chooses fp16 or bf16 operation by operation. One path serves every precision, on CUDA and on the CPU: the scaler is
switched by ``enabled``, never left out.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tune_amp.training.fp16_products import fast_fp16_products
from tune_amp.trial.config import SCALER_DEFAULTS, TrialConfig

AUTOCAST_DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalerTelemetry:
    """Telemetry of loss scaling since the trial began, in fields of ``EpochMetrics``; without a scaler no scales."""

    steps: int = 0
    applied_steps: int = 0
    skipped_steps: int = 0
    growths: int = 0
    first_applied_step: int | None = None
    loss_scale: float | None = None
    min_loss_scale: float | None = None
    max_loss_scale: float | None = None
    loss_scale_steps: tuple[int, ...] = ()
    loss_scale_values: tuple[float, ...] = ()


class AmpStep:
    """Turns a loss into an optimizer step under the trial's precision and scaler settings.

    A step writes its loss, scale and overflow into one buffer on the device, which needs no host synchronisation;
    ``read_epoch`` copies the buffer to the host once. Between two calls of it are at most ``max_steps`` steps.
    """

    def __init__(self, config: TrialConfig, device: torch.device, max_steps: int) -> None:
        self._config = config
        self._device = device
        self.scaler = torch.amp.GradScaler(device.type, **scaler_settings(config))
        self.telemetry = start_telemetry(config)
        """Telemetry as of the last ``read_epoch``."""
        self.position: Tensor | None = None
        """Number of the step since ``read_epoch``, int64 [1], if a CUDA graph is to replay steps; else the host counts.
        Assign it between epochs only."""
        # A row a step: loss, and with a scaler the scale after the step and whether the step was skipped.
        columns = 3 if self.scaler.is_enabled() else 1
        self._log = torch.zeros(max_steps, columns, dtype=torch.float32, device=device)
        self._logged = 0
        self._loss: Tensor | None = None  # of the batches of a step so far

    def autocast(self) -> torch.autocast:
        """Return the context for forward pass and loss: fp16 or bf16 where safe, else fp32; off for fp32 and tf32."""
        # PyTorch wants the cache of cast weights off during graph capture. Weights are cast once a step anyway.
        return autocast_of(self._config.precision, self._device, cached=self.position is None)

    def accumulate(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Run the backward pass of a batch, and add its gradients and its loss to those of the next step."""
        if self._loss is None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # zero_grad() also calls a profiler: 50 us on one core
        self.scaler.scale(loss).backward()
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
            self.scaler.unscale_(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._config.grad_clip)
        self.scaler.step(optimizer)
        assert self._loss is not None  # set by accumulate()
        row = self._loss
        self._loss = None
        if self.scaler.is_enabled():
            # update() forgets the overflow flags and changes the scale: get the flags before it, the scale after it.
            [overflow] = self.scaler._found_inf_per_device(optimizer).values()  # noqa: SLF001 - one device, one flag
            self.scaler.update()
            scale = self.scaler._get_scale_async()  # noqa: SLF001 - get_scale() would wait for the device
            assert scale is not None  # created by the first scale()
            row = torch.stack((row, scale, overflow))  # one write to the log instead of three
        if self.position is None:
            self._log[self._logged] = row
            self._logged += 1
        else:
            self._log.index_copy_(0, self.position, row.to(self._log.dtype).view(1, -1))
            self.position.add_(1)

    def wait_whether_applied(self) -> bool:
        """Return whether the last step was applied. With a scaler, wait for the device. Not for captured steps."""
        return not self.scaler.is_enabled() or not bool(self._log[self._logged - 1, -1])

    def abandon_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Discard a step that raised an exception, so that the next step runs as if it had never started."""
        self._loss = None
        optimizer.zero_grad(set_to_none=True)
        for name in ("grad_scale", "found_inf"):  # set by GradScaler.step, which multiplies by a leftover scale
            vars(optimizer).pop(name, None)
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()  # noqa: SLF001 - else unscale_() raises: already called

    def read_epoch(self) -> float:
        """Update the telemetry, with the only host synchronisation of an epoch.

        Returns:
            The mean loss of the steps since the last call, except steps skipped because their own loss was not finite.
            NaN if no step remains.
        """
        logged = self._logged if self.position is None else int(self.position)
        losses, *scaling = self._log[:logged].cpu().numpy().T
        is_skipped = np.zeros(logged, np.bool_)
        if self.scaler.is_enabled():
            scales, is_skipped = scaling[0], scaling[1] != 0
            self.telemetry = summarise_steps(self.telemetry, scales, is_skipped)
        else:
            self.telemetry = count_unscaled(self.telemetry, logged)
        self._logged = 0
        if self.position is not None:
            self.position.zero_()
        counted = losses[np.isfinite(losses) | ~is_skipped]
        return float(counted.mean(dtype=np.float64)) if counted.size else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors (``weights_only=True`` loads them). Call it after ``read_epoch``."""
        assert (self._logged if self.position is None else int(self.position)) == 0
        return {"scaler": self.scaler.state_dict(), "telemetry": dataclasses.asdict(self.telemetry)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint of the same trial."""
        self.telemetry = ScalerTelemetry(**state["telemetry"])
        self.scaler.load_state_dict(state["scaler"])


def autocast_of(precision: str, device: torch.device, *, cached: bool = True) -> torch.autocast:
    """Return the context for forward pass and loss: fp16 or bf16 where safe, else fp32; off for fp32 and tf32."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cached)


def scaler_settings(config: TrialConfig) -> dict[str, Any]:
    """Return the arguments of ``torch.amp.GradScaler``: the trial's four settings, for fp16 only."""
    if config.precision != "fp16":
        return {"enabled": False}
    return {name: getattr(config, name) for name in SCALER_DEFAULTS}


def start_telemetry(config: TrialConfig) -> ScalerTelemetry:
    """Return the telemetry before the first step, with the scale as the scaler holds it: in float32."""
    scale = None if config.init_scale is None else float(np.float32(config.init_scale))
    return ScalerTelemetry(loss_scale=scale, min_loss_scale=scale, max_loss_scale=scale)


def count_unscaled(before: ScalerTelemetry, steps: int) -> ScalerTelemetry:
    """Return the telemetry after further ``steps`` without a scaler: all are applied."""
    total = before.steps + steps
    return ScalerTelemetry(steps=total, applied_steps=total, first_applied_step=1 if total else None)


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
    assert before.min_loss_scale is not None
    assert before.max_loss_scale is not None
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
        min_loss_scale=min(before.min_loss_scale, float(in_force.min())),
        max_loss_scale=max(before.max_loss_scale, float(in_force.max())),
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
    matmul_precision = torch.get_float32_matmul_precision()
    try:
        cudnn_tf32 = cudnn.allow_tf32
    except RuntimeError:  # it contradicts the strict settings
        cudnn_tf32 = True
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

    The backward pass belongs in it too, in which a checkpointed model computes again.
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
    """Return one sentence if ``device`` lacks units for ``precision``, None if it has them.

    Tensor cores for fp16 came with compute capability 7.0, those for bf16 and TF32 with 8.0:
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
    """
    if device.type == "cuda":
        needed = {"fp16": (7, 0), "bf16": (8, 0), "tf32": (8, 0)}.get(precision, (0, 0))
        capability = torch.cuda.get_device_capability(device)
        if capability >= needed:
            return None
        return (
            f"{name_device(device)} has compute capability {capability[0]}.{capability[1]}, and {precision} tensor "
            f"cores need {needed[0]}.{needed[1]}: expect no speed-up from {precision}"
        )
    if precision == "tf32":
        return "tf32 needs an NVIDIA GPU of compute capability 8.0 or newer: on the CPU it is computed as fp32"
    # AVX-512 multiplies bf16 pairs in one instruction, twice as many as fp32; its fp16 is not used for products.
    flags = {"fp16": ("amx_fp16",), "bf16": ("amx_bf16", "avx512_bf16")}
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may lack it
    if precision not in flags or any(capabilities.get(flag, False) for flag in flags[precision]):
        return None
    return (
        f"this CPU has no {precision} matrix units: arithmetic and loss scaling are real, expect no speed-up over fp32"
    )
