"""The only file that knows automatic mixed precision: precision, loss scaler, one training step, and its telemetry.

Weights and optimizer state stay in fp32 (the master weights of Micikevicius et al. 2018, arXiv:1710.03740); autocast
chooses fp16 or bf16 operation by operation. One path serves every precision, on CUDA and on the CPU: the scaler is
switched by ``enabled``, never left out.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tune_amp.config import TrialConfig

AUTOCAST_DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalerTelemetry:
    """What loss scaling did since the trial began. Scales are None where the precision uses no scaler."""

    steps: int = 0
    """Training steps taken, skipped ones included."""
    applied_steps: int = 0
    skipped_steps: int = 0
    """Steps without an update, because a gradient was not finite."""
    growths: int = 0
    """Updates after which the scale was larger."""
    first_applied_step: int | None = None
    """Counted from 1."""
    loss_scale: float | None = None
    """The scale that the next step will use."""
    min_loss_scale: float | None = None
    max_loss_scale: float | None = None
    loss_scale_steps: tuple[int, ...] = ()
    """Steps of the last epoch, counted from 1 over the trial, from which each of ``loss_scale_values`` was in force."""
    loss_scale_values: tuple[float, ...] = ()


class AmpStep:
    """Turns a loss into an optimizer step under the trial's precision and scaler settings.

    Losses, scales and overflows are written into one device buffer by index, so that a step costs no host
    synchronisation; ``read_epoch`` moves the buffer to the host once.

    Args:
        config: precision, scaler settings and gradient clipping are read from it.
        device: where the model lives.
        max_steps: most steps between two calls of ``read_epoch``.
    """

    def __init__(self, config: TrialConfig, device: torch.device, max_steps: int) -> None:
        self._config = config
        self._device = device
        self._scaler = build_scaler(config, device)
        # Rows: loss, scale after the step, whether it was skipped. The last two stay 0 without a scaler.
        self._log = torch.zeros(3, max_steps, dtype=torch.float32, device=device)
        self._logged = 0
        self._telemetry = ScalerTelemetry()
        if self._scaler.is_enabled():
            self._start_scale(_float32(config.init_scale))

    @property
    def telemetry(self) -> ScalerTelemetry:
        """The state at the last ``read_epoch``."""
        return self._telemetry

    def autocast(self) -> torch.autocast:
        """The context for forward pass and loss: fp16 or bf16 where safe, fp32 elsewhere; off for fp32 and tf32."""
        dtype = AUTOCAST_DTYPES.get(self._config.precision)
        return torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None)

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Backward, unscale and clip where asked for, step unless a gradient overflowed, update the scale.

        Args:
            optimizer: holds the fp32 parameters; a fused one makes the step free of host synchronisation.
            loss: 0-dim, from a forward pass under ``autocast``.
        """
        optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._config.grad_clip is not None:
            # Clipping must see the true gradients, so they are unscaled first (PyTorch's AMP examples).
            self._scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._config.grad_clip)
        self._scaler.step(optimizer)
        self._log[0, self._logged].copy_(loss.detach())
        if self._scaler.is_enabled():
            # update() forgets the overflow flags and replaces the scale: read one before it, the other after.
            self._log[2, self._logged].copy_(_overflow_flag(self._scaler, optimizer))
            self._scaler.update()
            self._log[1, self._logged].copy_(_scale_tensor(self._scaler))
        self._logged += 1

    def read_epoch(self) -> float:
        """Bring the telemetry up to date, the one host synchronisation of an epoch.

        Returns:
            The mean loss of the steps since the last call, NaN where there was none.
        """
        losses, scales, overflows = self._log[:, : self._logged].cpu().numpy()
        if self._scaler.is_enabled():
            self._telemetry = summarise_steps(self._telemetry, scales, overflows != 0)
        else:
            steps = self._telemetry.steps + self._logged
            first = self._telemetry.first_applied_step or (1 if steps else None)
            self._telemetry = ScalerTelemetry(steps=steps, applied_steps=steps, first_applied_step=first)
        self._logged = 0
        return float(losses.mean(dtype=np.float64)) if losses.size else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that ``load_state_dict`` continues from, safe for ``torch.load(weights_only=True)``.

        Call it between epochs, after ``read_epoch``.
        """
        assert self._logged == 0
        return {
            "scaler": self._scaler.state_dict(),
            "init_scale": self._config.init_scale,
            "telemetry": dataclasses.asdict(self._telemetry),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint with this trial's own scaler settings.

        ``GradScaler.load_state_dict`` would put the checkpoint's growth and backoff settings in their place. The
        running scale and growth tracker are taken over, unless the checkpoint began from another ``init_scale``:
        then this trial's own scale starts afresh.
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


def build_scaler(config: TrialConfig, device: torch.device) -> torch.amp.GradScaler:
    """``torch.amp.GradScaler`` with the trial's four settings, enabled for fp16 only."""
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
    """The telemetry after further steps.

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
    """How what is left in fp32 is computed: on CUDA TF32 for ``tf32``, strict for every other precision and on the CPU.

    PyTorch's own default is a mixture (TF32 convolutions, strict products), which would make fp32 no clean baseline,
    and a user's module may have chosen another: ``torch.set_float32_matmul_precision("medium")`` is bf16 on the CPU.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    on_cuda: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    settings: tuple[Any, ...] = (*on_cuda, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)  # type: ignore[attr-defined]
    previous = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    # The older switches must say the same: torch raises where they are read (cudnn.flags and torch.compile do) while
    # they contradict the settings above. With all of those strict, they can be read whatever they were.
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


def describe_hardware(precision: str, device: torch.device) -> str | None:
    """One sentence where ``device`` lacks units for ``precision``, None where it has them."""
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
    """The same for a CUDA device of ``capability`` (major, minor) called ``name``.

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
    """The older switch of cuDNN, while convolutions and recurrent layers are set to strict fp32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # it contradicts them
        return True


def _scale_tensor(scaler: torch.amp.GradScaler) -> Tensor:
    """The current scale as a 0-dim device tensor. ``get_scale`` would wait for the device."""
    scale = scaler._get_scale_async()  # noqa: SLF001
    assert scale is not None  # made by the first scale()
    return scale


def _overflow_flag(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Tensor:
    """0-dim device float, non-zero where ``step`` found a gradient that is not finite. Valid before ``update``."""
    flags = list(scaler._found_inf_per_device(optimizer).values())  # noqa: SLF001
    assert len(flags) == 1  # a trial's model lives on one device
    flag: Tensor = flags[0]
    return flag


def _float32(value: float | None) -> float:
    """``value`` as the scaler holds it."""
    assert value is not None
    return float(np.float32(value))


def _extreme(choose: Any, before: float | None, now: float) -> float:
    return now if before is None else float(choose(before, now))
