"""Evaluates a model on a split, in strict fp32, in batches that fit if training fits."""

import dataclasses
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tune_amp.training.amp import fp32_arithmetic
from tune_amp.training.batches import DeviceSplit, InputScaling
from tune_amp.training.own_code import exits_as_errors
from tune_amp.training.streams import StreamedBatches, count_in_batch
from tune_amp.training.task import Averages, Task, TaskError

EVALUATION_BATCH = 2048
"""Maximum number of images in a batch."""
# 256 MNIST images, 0.8 MB in float32. On one core, conv_net evaluates 5,000 of them in 1.0 s in batches of 64 or 256
# and in 2.2 s in batches of 2,048; simple_net takes 27, 23 and 27 ms.
EVALUATION_PIXELS = 256 * 28 * 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's results on a split."""

    averages: Averages
    """Values by name, ``loss`` among them (a cross entropy is in nats); vectors, as of ``recalls``, are tuples."""

    def number(self, name: str) -> float:
        """Return a value that is no vector."""
        value = self.averages[name]
        assert isinstance(value, float)
        return value

    def columns(self, prefix: str) -> dict[str, Any]:
        """Return the fields of a record: ``PREFIX_loss``, ``PREFIX_accuracy``, ``PREFIX_recalls``, ``metrics``."""
        others = dict(self.averages)
        common: dict[str, Any] = {
            f"{prefix}_loss": others.pop("loss"),
            f"{prefix}_accuracy": others.pop("accuracy", None),
        }
        common[f"{prefix}_recalls"] = others.pop("recalls", ())
        metrics = {f"{prefix}_{name}": value for name, value in others.items() if not isinstance(value, tuple)}
        return {**common, "metrics": metrics}


def choose_evaluation_batch(batch_size: int, pixels: int) -> int:
    """Return how many images of ``pixels`` values to evaluate at a time: a training batch, or more if they are small.

    An fp32 batch without gradients takes a quarter to three quarters of the memory that the same batch takes in bf16
    training. The number depends on the settings alone, because the last bits of sums depend on it.
    """
    return min(EVALUATION_BATCH, max(batch_size, EVALUATION_PIXELS // pixels))


@exits_as_errors()
def evaluate(
    task: Task,
    model: nn.Module,
    split: DeviceSplit | StreamedBatches,
    scaling: InputScaling,
    *,
    batch_size: int,
) -> Evaluation:
    """Return the averages of the task's score, in strict fp32 whatever precision the model was trained in.

    Args:
        task: what to measure.
        model: float32 weights, on the split's device.
        split: the items to evaluate.
        scaling: as fitted to the training split.
        batch_size: items in a training step.

    Raises:
        TaskError: the task's methods do not return the loss or the task's metric.
    """
    at_once = choose_evaluation_batch(batch_size, split.input_size)
    was_training = model.training
    model.eval()
    # float64: a sum of many small losses in float32 would depend on the batch size in the fourth digit.
    totals: dict[str, Tensor] = {}
    # Not inference_mode(): a model may keep a tensor that it makes here, such as longer positions, and train with it.
    with torch.no_grad(), fp32_arithmetic("fp32"):
        for batch in split.in_order(at_once, scaling):
            sums = dict(task.score(model, batch))
            if "loss" not in sums:
                sums["loss"] = task.loss(model, batch) * count_in_batch(batch)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.to(torch.float64)
    model.train(was_training)
    device = totals["loss"].device  # a user's sums may be on the CPU
    values = iter(torch.cat([total.to(device).flatten() for total in totals.values()]).tolist())  # one read
    read = {name: [*islice(values, len(total))] if total.ndim else next(values) for name, total in totals.items()}
    return Evaluation(averages=_check_averages(task, task.average(read, len(split))))


def _check_averages(task: Task, averages: Averages) -> Averages:
    """Return the averages with plain floats."""
    try:
        read = {name: value if isinstance(value, tuple) else float(value) for name, value in averages.items()}
    except (TypeError, ValueError) as error:
        raise TaskError(f"{task.config.task}.average: must return numbers or tuples of them ({error})") from error
    for name in ("loss", task.metric[0]):
        if not isinstance(read.get(name), float):
            got = ", ".join(read) or "nothing"
            raise TaskError(f"{task.config.task}: score and average must give a number {name}, got {got}")
    accuracy = read.get("accuracy")
    if isinstance(accuracy, float) and 1 < accuracy < 1 + 1e-6:
        read["accuracy"] = 1.0  # a sum in float32 that was rounded up
    elif isinstance(accuracy, float) and (accuracy < 0 or accuracy > 1):  # NaN is judged like any other value
        raise TaskError(f"{task.config.task}.average: accuracy must be a share between 0 and 1, got {accuracy:g}")
    return read
