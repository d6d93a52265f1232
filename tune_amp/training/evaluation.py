"""Evaluates a model on a split: loss, accuracy and recalls, in strict fp32, in batches that fit if training fits."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from tune_amp.training.amp import fp32_arithmetic
from tune_amp.training.batches import DeviceSplit, InputScaling, scale_images
from tune_amp.training.own_code import exits_as_errors

EVALUATION_BATCH = 2048
"""Maximum number of images in a batch."""
# 256 MNIST images, 0.8 MB in float32. On one core, conv_net evaluates 5,000 of them in 1.0 s in batches of 64 or 256
# and in 2.2 s in batches of 2,048; simple_net takes 27, 23 and 27 ms.
EVALUATION_PIXELS = 256 * 28 * 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's results on a split."""

    loss: float
    """Mean cross entropy, in nats."""
    accuracy: float
    """Share of the images classified correctly, 0 to 1."""
    recalls: tuple[float, ...]
    """The same share within each class; NaN for a class without an image in the split."""


def choose_evaluation_batch(batch_size: int, pixels: int) -> int:
    """Return how many images to evaluate at a time: a training batch, or more if images are small.

    An fp32 batch without gradients takes a quarter to three quarters of the memory that the same batch takes in bf16
    training. The number depends on the settings alone, because the last bits of sums depend on it.

    Args:
        batch_size: images in a training step.
        pixels: values in an image, over all channels.
    """
    return min(EVALUATION_BATCH, max(batch_size, EVALUATION_PIXELS // pixels))


@exits_as_errors()
def evaluate(model: nn.Module, split: DeviceSplit, scaling: InputScaling, *, batch_size: int) -> Evaluation:
    """Return loss, accuracy and recalls, in strict fp32 whatever precision the model was trained in.

    Args:
        model: float32 weights, on the split's device.
        split: uint8 images [n, channels, height, width], int64 labels [n].
        scaling: as fitted to the training split.
        batch_size: images in a training step.
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
    """Return the correctly classified and all images of each class: float64 [num_classes] each, exact."""
    # Not bincount, which waits for the device to find the length of its result.
    none = torch.zeros(num_classes, dtype=torch.float64, device=labels.device)
    answers = correct.to(torch.float64)
    return none.index_add(0, labels, answers), none.index_add(0, labels, torch.ones_like(answers))
