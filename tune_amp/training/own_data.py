"""Checks and converts what a user's own function or task returns as data: arrays, tensors, or data sets of torch.

A part of the data is a pair (inputs, targets) of arrays of any shape, or a ``torch.utils.data.Dataset`` of such pairs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from tune_amp.trial.config import InputError, check
from tune_amp.trial.text import describe_error

Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]
Part = Pair | TorchDataset[Any]

THREE = ("train", "validation", "test")
_FOUR_ARRAYS = "(train_images, train_labels, test_images, test_labels)"
FUNCTION_RULE = (
    f"must return {_FOUR_ARRAYS}, or six with validation_images and validation_labels in the middle, or two or three "
    "parts, each a pair (images, labels) or a torch Dataset"
)
TASK_RULE = "must return (train, validation, test), each a pair (inputs, targets) or a torch Dataset"
WRITE_A_TASK = "anything but a class needs a task of your own: --task module:Class"
REPAIR_FIRST = "convert or leave out such values first"


def name_parts(name: str, result: Any, *, of_task: bool = False) -> dict[str, Any]:
    """Return the parts of ``result`` by name, unchecked: train, perhaps validation, and test.

    Raises:
        InputError: there are other parts than a function, or a task, must return.
    """
    rule, counts = (TASK_RULE, (3,)) if of_task else (FUNCTION_RULE, (2, 3))
    if not isinstance(result, tuple | list):
        raise InputError(f"{name}: {rule}, got {type(result).__name__}")
    parts = list(result)
    if not of_task and len(parts) in (4, 6) and not any(isinstance(part, tuple | TorchDataset) for part in parts):
        parts = [tuple(parts[at : at + 2]) for at in range(0, len(parts), 2)]
    elif len(parts) not in counts:
        raise InputError(f"{name}: {rule}, got {len(parts)} values")
    names = THREE if len(parts) == 3 else (THREE[0], THREE[2])
    for part_name, part in zip(names, parts, strict=True):
        if not (isinstance(part, TorchDataset) or (isinstance(part, tuple | list) and len(part) == 2)):
            raise InputError(f"{name}: {rule}, got {len(parts)} values, {part_name} of type {type(part).__name__}")
    return dict(zip(names, parts, strict=True))


def check_classes_part(part: Any, name: str, part_name: str, notices: list[str]) -> Part:
    """Return a part as inputs and integer labels, int64 [n]; add to ``notices`` what was converted.

    Raises:
        InputError: the inputs or labels have another form.
    """
    if isinstance(part, TorchDataset):
        labels = read_targets(part)
        if labels is None or labels.dtype.kind not in "iu" or labels.shape != (count_items(part),):
            rule = "a data set must list the class of each item as `targets`, as those of torchvision do"
            raise InputError(f"{name}: {part_name}: {rule}; {WRITE_A_TASK}")
        return part
    images_place, labels_place = (f"{name}: {part_name}_{kind}" for kind in ("images", "labels"))
    images = _check_inputs(_as_array(part[0], images_place), images_place, notices)
    labels = _as_array(part[1], labels_place)
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        rule = f"must be integers, one for each of {len(images)} images, got {labels.dtype} {labels.shape}"
        raise InputError(f"{labels_place}: {rule}; {WRITE_A_TASK}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= np.iinfo(np.int64).max:
        raise InputError(f"{labels_place}: must count from 0, got {low} to {high}; number the classes anew")
    return np.ascontiguousarray(images), np.ascontiguousarray(labels, dtype=np.int64)


def check_task_part(part: Any, name: str, part_name: str) -> Part:
    """Return a part of a task's data. Floats become float32; whole numbers as targets become int64, as losses need.

    Raises:
        InputError: a part is empty, or its inputs and targets differ in number.
    """
    if isinstance(part, TorchDataset):
        if count_items(part) == 0:
            raise InputError(f"{name}: {part_name}: must be a Dataset with a length and items by index, not empty")
        return part
    places = [f"{name}: {part_name} {kind}" for kind in ("inputs", "targets")]
    inputs, targets = (
        _standard_numbers(_as_array(value, place), place) for value, place in zip(part, places, strict=True)
    )
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or inputs.size == 0:
        raise InputError(f"{places[0]}: must be as many as targets and at least one, got {inputs.shape, targets.shape}")
    if targets.dtype.kind in "iu":
        targets = targets.astype(np.int64, copy=False)
    return np.ascontiguousarray(inputs), np.ascontiguousarray(targets)


def _check_inputs(images: npt.NDArray[Any], place: str, notices: list[str]) -> npt.NDArray[Any]:
    """Return images as [n, c, h, w] uint8; floats and integer tokens as they are, but for channels that come last."""
    if images.dtype == np.uint8:
        rule = "uint8 images must be [n, h, w] or [n, c, h, w] without a zero (integer tokens must be int64)"
        check(place, images.shape, images.ndim in (3, 4) and 0 not in images.shape, rule)
        images = images[:, None] if images.ndim == 3 else images
    else:
        images = _standard_numbers(images, place)
        rule = "must be [n, ...] with two dimensions or more, without a zero"
        check(place, images.shape, images.ndim > 1 and 0 not in images.shape, rule)
    if images.ndim == 4 and _has_channels_last(images.shape):
        before, images = images.shape, images.transpose(0, 3, 1, 2)
        notices.append(f"{place}: channels come last in {before}: taken as {images.shape}")
    return images


def _standard_numbers(array: npt.NDArray[Any], place: str) -> npt.NDArray[Any]:
    """Return floats as float32 and large unsigned integers as int64, which torch computes with."""
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
        others = array[~np.isfinite(array)]
        if others.size:
            raise InputError(f"{place}: must be finite in float32, got {others[0]}; {REPAIR_FIRST}")
        return array
    if array.dtype.kind not in "iub":
        raise InputError(f"{place}: must be uint8 images, floats or integers, got {array.dtype}; {REPAIR_FIRST}")
    return array.astype(np.int64) if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array


def _has_channels_last(shape: tuple[int, ...]) -> bool:
    """Return whether [n, a, b, c] is almost certainly [n, height, width, channels]: colours, or a grey square.

    Neither of these is: series of sensors are [n, 64, 128, 1], features of a table [n, 64, 1, 1].
    """
    _, rows, columns, channels = shape
    is_image = min(rows, columns) > 4
    return is_image and (channels in (3, 4) or (channels == 1 and rows == columns))


def _as_array(value: Any, place: str) -> npt.NDArray[Any]:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    except (TypeError, RuntimeError) as error:  # bfloat16, sparse, on no device
        raise InputError(f"{place}: must be a tensor that numpy can hold ({describe_error(error)})") from error
    if not isinstance(array, np.ndarray):
        got = type(value).__name__
        raise InputError(f"{place}: must be a numpy array or a torch tensor, got {got}; numpy.asarray makes one")
    return np.asarray(array)


def read_targets(dataset: TorchDataset[Any]) -> npt.NDArray[Any] | None:
    """Return the targets that a data set lists without reading its items; None if it lists none."""
    if isinstance(dataset, Subset):
        of_all = read_targets(dataset.dataset)
        return None if of_all is None else of_all[np.asarray(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [read_targets(part) for part in dataset.datasets]
        return np.concatenate(parts) if all(part is not None for part in parts) else None  # type: ignore[arg-type]
    if isinstance(dataset, TensorDataset):
        return np.asarray(dataset.tensors[-1])
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))  # torchvision's SVHN and STL10: labels
    return None if targets is None else np.asarray(targets)


def read_example(dataset: TorchDataset[Any], place: str) -> npt.NDArray[Any]:
    """Return the first input of a data set as [1, ...]; empty if an item holds more than one tensor of inputs.

    Raises:
        InputError: the first item cannot be read, or is an image that is no tensor.
    """
    try:
        item = dataset[0]
    except Exception as error:  # a user's data set may raise anything
        raise InputError(f"{place}: reading the first item failed ({describe_error(error)})") from error
    example = item[0] if isinstance(item, tuple | list) and item else item
    if type(example).__module__.startswith("PIL."):
        rule = "items must be tensors; give the data set transform=torchvision.transforms.ToTensor()"
        raise InputError(f"{place}: {rule}, got {type(example).__name__}")
    if isinstance(example, torch.Tensor | np.ndarray | np.generic | float | int):
        return np.asarray(example)[None]
    return np.empty((1, 0), np.float32)


def count_items(dataset: TorchDataset[Any]) -> int:
    """Return the length of a data set, which torch's base class does not declare; 0 if it has none."""
    return len(dataset) if hasattr(dataset, "__len__") else 0
