"""How a model does on a split: loss, accuracy and recalls, in strict fp32, in batches that fit where training fits."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from tune_amp.training.amp import fp32_arithmetic
from tune_amp.training.batches import DeviceSplit, InputScaling, scale_images
from tune_amp.training.own_code import exits_as_errors

EVALUATION_BATCH = 2048
"""Most images of a batch."""
# 256 of MNIST's images, 0.8 MB in float32. On one core conv_net evaluates 5,000 of them in 1.0 s by 64 or 256 at a
# time and in 2.2 s by 2,048, simple_net in 27, 23 and 27 ms.
EVALUATION_PIXELS = 256 * 28 * 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model does on a split."""

    loss: float
    """Mean cross entropy, in nats."""
    accuracy: float
    """Share of the images classified correctly, 0 to 1."""
    recalls: tuple[float, ...]
    """That share within each class; NaN for a class of which the split has no image."""


def choose_evaluation_batch(batch_size: int, pixels: int) -> int:
    """Images to evaluate at a time: a training batch, or more where images are small.

    Without gradients, in fp32, a batch takes a quarter to three quarters of the memory that the same batch takes in
    training in bf16. It follows from the settings alone, because sums depend on it in their last bits.

    Args:
        batch_size: images of a training step.
        pixels: values of an image, over all channels.
    """
    return min(EVALUATION_BATCH, max(batch_size, EVALUATION_PIXELS // pixels))


@exits_as_errors()
def evaluate(model: nn.Module, split: DeviceSplit, scaling: InputScaling, *, batch_size: int) -> Evaluation:
    """Loss, accuracy and recalls, in strict fp32 whatever the model was trained in.

    Args:
        model: float32 weights, on the split's device.
        split: uint8 images [n, channels, height, width], int64 labels [n].
        scaling: as fitted to the training split.
        batch_size: images of a training step.
    """
    at_once = choose_evaluation_batch(batch_size, split.images[0].numel())
    was_training = model.training
    model.eval()
    # float64: a sum of many small losses in float32 would depend on the batch size in the fourth digit.
    loss = torch.zeros(1, dtype=torch.float64, device=split.images.device)
    answers: list[Tensor] = []
    with torch.inference_mode(), fp32_arithmetic("fp32"):
        for images, labels in zip(split.images.split(at_once), split.labels.split(at_once), strict=True):
            logits = model(scale_images(images, scaling))
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
            answers.append(logits.argmax(dim=1) == labels)
        hits, counts = _count_by_class(split.labels, torch.cat(answers), num_classes=logits.shape[1])
        total_loss, *tallies = torch.cat([loss, hits, counts]).tolist()  # the one wait for the device
    model.train(was_training)
    by_class = list(zip(tallies[: len(hits)], tallies[len(hits) :], strict=True))
    return Evaluation(
        loss=total_loss / len(split.labels),
        accuracy=sum(hit for hit, _ in by_class) / len(split.labels),
        recalls=tuple(hit / count if count else math.nan for hit, count in by_class),
    )


def _count_by_class(labels: Tensor, correct: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images of each class that ``correct`` holds for, and all of them: float64 [num_classes], exact."""
    # Not bincount, which waits for the device to learn how long its result will be.
    none = torch.zeros(num_classes, dtype=torch.float64, device=labels.device)
    answers = correct.to(torch.float64)
    return none.index_add(0, labels, answers), none.index_add(0, labels, torch.ones_like(answers))
