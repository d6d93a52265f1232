"""Whether one way to train did what another did: losses, weights, the optimizer's buffers, the path of the scale."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.gpu_rows import GpuRow
from benchmarks.training.loop_programs import GRAPH, LONG
from tune_amp.training.cuda_graph import WARM_UP_STEPS
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import EpochMetrics, TrialConfig

LEAST_APPLIED = 10
"""Replays that changed the weights: fewer, and a graph that does nothing looks much like one that works."""
MOST_LOSS_DIFFERENCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 2e-2, "fp16": 5e-3}
"""Of the mean loss, relative: rounding of the precision, not of the program."""
MOST_CHANGE_DIFFERENCE = {"fp32": 0.01, "tf32": 0.1, "bf16": 0.1, "fp16": 0.1}
"""Norm of the difference over norm, of how far the weights moved and of the optimizer's buffers.

Where every gradient got noise of the precision's rounding, 40 steps of simple_net and vit came to 7e-4 in fp32, 0.02 in
fp16 and 0.03 in bf16; where no replay did anything, to 0.9.
"""

MOST_PATH_DIFFERENCE = 2
"""Skips and growths of an epoch that may differ: a gradient at the edge of overflow goes over it or not by rounding.

Where every gradient got noise of 1e-4, the path differed in 2 of 24 runs of conv_net. A graph that does not update the
scaler is 7 growths or more apart on this path.
"""


def early_config(model: str, precision: str, optimizer: str) -> TrialConfig:
    """In fp16 a scale that gradients of the first steps overflow or soon will, since it grows every third step.

    So steps are skipped again and again, about one in four, and most are applied, wherever the model's limit lies.
    """
    scaler: dict[str, Any] = {"init_scale": 2.0**18, "growth_interval": 3} if precision == "fp16" else {}
    return TrialConfig(model=model, precision=precision, optimizer=optimizer, max_epochs=LONG, **scaler)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Watched:
    """What an epoch did."""

    told: EpochMetrics
    moved: Tensor
    """By how much each weight changed: float64 on the CPU, all weights one after the other."""
    buffers: Mapping[str, Tensor]
    """The optimizer's, by name, of all weights one after the other: float64 on the CPU."""


def train_and_watch(run: TrainingRun) -> Watched:
    """Train an epoch from the start."""
    before = _flatten(run.model.parameters())
    told = run.train_epoch()
    states = list(run._optimizer.state.values())  # noqa: SLF001 - a run shows nobody its optimizer
    return Watched(
        told=told,
        moved=_flatten(run.model.parameters()) - before,
        buffers={name: _flatten(state[name] for state in states) for name in states[0]},
    )


def _flatten(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().to("cpu", torch.float64).flatten() for tensor in tensors])


def compare_training(subject: str, precision: str, graphed: Watched, eager: Watched) -> list[GpuRow]:
    """Whether an epoch of replays did what one of eager steps did."""
    told, expected = graphed.told, eager.told
    changes = {"change of the weights": _compare_vectors(graphed.moved, eager.moved)}
    for name, buffer in eager.buffers.items():
        changes[name] = _compare_vectors(graphed.buffers[name], buffer)
    rows = [
        judge_losses("graphs", f"{subject}, {told.loop}", precision, told, expected),
        _judge_change(subject, precision, changes),
    ]
    if precision == "fp16":
        rows.append(_judge_path(subject, told, expected))
    if told.loop != GRAPH:
        note = f"not captured: {told.loop}"
        rows.append(GpuRow(part="graphs", subject=subject, quantity="capture", verdict="failed", note=note))
    return rows


def _compare_vectors(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over that of ``other``; NaN where ``other`` is nothing."""
    return float((one - other).norm() / other.norm())


def _judge_change(subject: str, precision: str, changes: Mapping[str, float]) -> GpuRow:
    most = MOST_CHANGE_DIFFERENCE[precision]
    values = changes.values()
    worst = max(values) if all(map(math.isfinite, values)) else None
    return GpuRow(
        part="graphs",
        subject=subject,
        quantity="relative difference of the weights' change and of the optimizer's buffers, the largest",
        value=worst,
        verdict="met" if worst is not None and worst <= most else "failed",
        note=f"at most {most:g}; " + ", ".join(f"{name} {value:.2g}" for name, value in changes.items()),
    )


def _judge_path(subject: str, told: EpochMetrics, expected: EpochMetrics) -> GpuRow:
    """The same path of the scale up to rounding, and one on which there was something to see."""
    names = ("skipped_steps", "growths")
    same = all(abs(getattr(told, name) - getattr(expected, name)) <= MOST_PATH_DIFFERENCE for name in names)
    shown = expected.growths > 0 and expected.skipped_steps > 0
    shown &= expected.applied_steps - WARM_UP_STEPS >= LEAST_APPLIED
    note = f"{told.skipped_steps} skipped, {told.growths} growths, {len(told.loss_scale_values)} scales; eager "
    note += f"{expected.skipped_steps}, {expected.growths}, {len(expected.loss_scale_values)}"
    note += "" if shown else f"; both, and {LEAST_APPLIED} applied replays, must be there"
    verdict = "met" if same and shown else "failed"
    return GpuRow(part="graphs", subject=subject, quantity="path of the scale", verdict=verdict, note=note)


def judge_losses(part: str, subject: str, precision: str, one: EpochMetrics, other: EpochMetrics) -> GpuRow:
    """How far the mean losses of two epochs are apart."""
    difference = abs(one.train_loss - other.train_loss) / abs(other.train_loss)
    most = MOST_LOSS_DIFFERENCE[precision]
    return GpuRow(
        part=part,
        subject=subject,
        quantity=f"relative difference of the mean loss over {one.steps} steps",
        value=difference if math.isfinite(difference) else None,
        verdict="met" if difference <= most else "failed",  # NaN fails
        note=f"at most {most:g}",
    )


def read_every_step(run: TrainingRun, data: TrainingData) -> Iterator[tuple[float, bool]]:
    """The scale that each step used, and whether it was skipped, read from the scaler: one wait a step."""
    run.model.train()
    scaler = run._amp.scaler  # noqa: SLF001 - the reference looks where telemetry does not
    for indices in run._draw_batches():  # noqa: SLF001
        before = scaler.get_scale()
        run._step(indices)  # noqa: SLF001
        yield before, scaler.get_scale() < before  # backoff, and nothing else, makes it smaller


def expand_scales(told: EpochMetrics) -> list[float]:
    """The scale of every step of the first epoch, from its changes."""
    ends = (*told.loss_scale_steps[1:], told.steps + 1)
    spans = zip(told.loss_scale_steps, ends, told.loss_scale_values, strict=True)
    return [value for begin, end, value in spans for _ in range(begin, end)]
