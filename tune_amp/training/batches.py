"""Prepares a split for training steps: tensors that stay on the device, input scaling, and the order of batches."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tune_amp.training.data import Split, StreamedSplit
from tune_amp.trial.config import InputError

CHUNK_IMAGES = 1024  # images widened to 8 bytes a pixel at a time: 6 MB for 28x28


Batch = Any
"""A pair (inputs, targets) of tensors on the device [batch_size, ...]; of a data set of torch, whatever it collates."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DeviceSplit:
    """A split on the device that uses it."""

    images: torch.Tensor
    """Inputs [n, ...]: uint8 images [n, channels, height, width], floats or integer tokens."""
    labels: torch.Tensor
    """Targets [n, ...]; classes are int64 [n]."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor, scaling: "InputScaling") -> Batch:
        """Return the batch of the items at ``indices``, int64 [batch_size] on the device."""
        return scale_images(self.images.index_select(0, indices), scaling), self.labels.index_select(0, indices)

    def in_order(self, at_once: int, scaling: "InputScaling") -> Iterator[Batch]:
        """Return all items in their order, ``at_once`` a batch."""
        for images, labels in zip(self.images.split(at_once), self.labels.split(at_once), strict=True):
            yield scale_images(images, scaling), labels

    @property
    def input_size(self) -> int:
        """Number of values in an input."""
        return self.images[0].numel()


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputScaling:
    """The map from a pixel to a model's input: ``(pixel - shift) * factor`` in float32."""

    shift: float
    factor: float


def place_split(split: Split, device: torch.device) -> DeviceSplit:
    """Return the split on ``device``: the same memory on a CPU, one copy on a GPU."""
    with warnings.catch_warnings():
        # Arrays from Ray's object store are read-only, which torch does not support; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    return DeviceSplit(images=images.to(device), labels=labels.to(device))


def pick_few(train: Split, count: int) -> Split:
    """Return at most ``count`` >= 2 items, among them the darkest and the brightest pixel: they scale as all do.

    Other inputs, and a data set that is read item by item, are not measured: their first items are returned.
    """
    first = range(min(count, len(train)))
    if not train.is_scaled or isinstance(train, StreamedSplit):
        return train.select(first)
    flat = train.images.reshape(len(train), -1)
    chosen = dict.fromkeys((int(flat.min(axis=1).argmin()), int(flat.max(axis=1).argmax()), *first))
    return train.select(np.array([*chosen][:count]))


def fit_input_scaling(train: Split, method: str) -> InputScaling:
    """Return the scaling that maps the training pixels to [0, 1] (``minmax``) or to mean 0, deviation 1 (``standard``).

    Other inputs than uint8 images are not scaled. Images that are read one by one are not measured: their range is that
    of uint8.

    Raises:
        InputError: every pixel has the same value, or ``standard`` would need to read a whole data set.
    """
    if not train.is_scaled:
        return InputScaling(shift=0.0, factor=1.0)
    if isinstance(train, StreamedSplit):
        if method == "minmax":
            return InputScaling(shift=0.0, factor=1 / 255)
        raise InputError(f"input_scaling: must be minmax for images that are read one by one, got {method}")
    counts = np.zeros(256, np.int64)
    for start in range(0, len(train), CHUNK_IMAGES):  # bincount widens its argument to int64
        counts += np.bincount(train.images[start : start + CHUNK_IMAGES].reshape(-1), minlength=256)
    values = np.flatnonzero(counts)
    low, high = values[[0, -1]].tolist()
    if low == high:
        raise InputError(f"input_scaling {method}: pixels of the training images must differ, all are {low}")
    if method == "minmax":
        return InputScaling(shift=float(low), factor=1 / (high - low))
    assert method == "standard"
    mean = float(counts[values] @ values / counts.sum())
    variance = float(counts[values] @ (values - mean) ** 2 / counts.sum())
    return InputScaling(shift=mean, factor=variance**-0.5)


def scale_images(images: torch.Tensor, scaling: InputScaling) -> torch.Tensor:
    """Return uint8 images [n, ...] as model inputs, float32 of the same shape; other inputs as they are."""
    if images.dtype is not torch.uint8 or images.ndim < 3:
        return images
    # uint8 minus a Python float is float32 in one kernel, without a conversion; minus an int it would wrap around.
    return (images - float(scaling.shift)).mul_(scaling.factor)


def batch_indices(count: int, batch_size: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Return an epoch of batches over ``count`` images, int64 [steps, batch_size] on ``device``; no index repeats.

    The permutation comes from the CPU ``generator``, so that every device sees the same order. The ragged last batch is
    dropped, so that shapes are static and every step has the same weight.

    Raises:
        InputError: a batch is larger than ``count``.
    """
    if batch_size > count:
        raise InputError(f"batch_size: must not exceed the {count} images trained on in an epoch, got {batch_size}")
    steps = count // batch_size
    order = torch.randperm(count, generator=generator)
    return order[: steps * batch_size].view(steps, batch_size).to(device)


def difficulty_order(split: Split, num_classes: int) -> npt.NDArray[np.int64]:
    """Return the indices of the split's images from easy to hard, int64 [n].

    Difficulty is the Euclidean distance to the mean image of the label's class; ties keep the data set's order.

    Raises:
        InputError: the images are not in memory.
    """
    if isinstance(split, StreamedSplit):
        raise InputError("curriculum: must be none for images that are read one by one")
    flat = split.images.reshape(len(split), -1)
    distances = np.zeros(len(split))
    for label in range(num_classes):
        members = np.flatnonzero(split.labels == label)
        if len(members) == 0:
            continue
        mean = flat[members].mean(axis=0, dtype=np.float64)
        for start in range(0, len(members), CHUNK_IMAGES):
            chunk = members[start : start + CHUNK_IMAGES]
            distances[chunk] = np.linalg.norm(flat[chunk] - mean, axis=1)
    return np.argsort(distances, kind="stable").astype(np.int64, copy=False)


def class_weights(labels: npt.NDArray[np.int64], num_classes: int, method: str) -> torch.Tensor | None:
    """Return the weights of the classes in the loss, float32 [num_classes]; None for ``none``.

    ``balanced`` is scikit-learn's: n / (num_classes * images of the class), over the whole split in all epochs.

    Raises:
        InputError: a class has no image.
    """
    if method == "none":
        return None
    assert method == "balanced"
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() == 0:
        raise InputError(f"class_weighting balanced: every class must have an image, class {counts.argmin()} has none")
    return torch.from_numpy(len(labels) / (num_classes * counts)).to(torch.float32)
