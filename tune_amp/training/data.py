"""Loads data sets, checks them and divides them into fixed splits.

The driver reads a data set once and sends it as numpy arrays; each worker copies it to its device once. Only a
``torch.utils.data.Dataset`` of the user's own is read item by item in the workers.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, Subset
from torch.utils.data import Dataset as TorchDataset

from tune_amp.training.mnist_files import (
    IMAGES_MAGIC,
    LABELS_MAGIC,
    TORCHVISION_CLASSES,
    DownloadError,
    locate_files,
    read_idx,
)
from tune_amp.training.own_code import exits_as_errors, import_function, unchanged_process
from tune_amp.training.own_data import (
    Part,
    check_classes_part,
    check_task_part,
    count_items,
    name_parts,
    read_example,
    read_targets,
)
from tune_amp.trial.config import DATASETS, InputError, is_function_name
from tune_amp.trial.text import describe_error, shown

# The split belongs to the data set, not to a trial: its seed never varies, so that every trial sees the same images.
SPLIT_SEED = 20_251
VALIDATION_SHARE = 12  # one image in twelve: 5,000 of MNIST's 60,000
DIGITS_TEST_SHARE = 7  # one image in seven, like MNIST's 10,000 of 70,000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A part of a data set, in host memory."""

    images: npt.NDArray[Any]
    """Inputs [n, ...]: uint8 images are [n, channels, height, width], floats and integer tokens have any shape."""
    labels: npt.NDArray[Any]
    """Targets [n, ...]; classes are int64 [n], from 0 to num_classes - 1."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_scaled(self) -> bool:
        """Whether the inputs are uint8 images, which ``input_scaling`` maps to floats."""
        return self.images.dtype == np.uint8 and self.images.ndim > 2

    def select(self, chosen: npt.NDArray[np.integer[Any]] | range) -> "Split":
        """Return the items at the indices ``chosen``; those of a range without a copy."""
        key = slice(chosen.start, chosen.stop, chosen.step) if isinstance(chosen, range) else chosen
        return Split(images=self.images[key], labels=self.labels[key])

    def join(self, other: "Split") -> "Split":
        """Return the items of both."""
        images = np.concatenate([self.images, other.images])
        return Split(images=images, labels=np.concatenate([self.labels, other.labels]))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StreamedSplit(Split):
    """A data set of torch, read item by item; ``images`` is its first input alone, as [1, ...], for shape and dtype.

    ``labels`` are the targets that it lists; empty if it lists none.
    """

    source: TorchDataset[Any]
    """Data set of pairs (input, target)."""

    def __len__(self) -> int:
        return count_items(self.source)

    def select(self, chosen: npt.NDArray[np.integer[Any]] | range) -> "Split":
        """Return the items at the indices ``chosen``."""
        return build_split(Subset(self.source, list(map(int, chosen))), "data")

    def join(self, other: Split) -> "Split":
        """Return the items of both."""
        assert isinstance(other, StreamedSplit)
        return build_split(ConcatDataset([self.source, other.source]), "data")


def build_split(part: Part, place: str) -> Split:
    """Return a checked part of a user's own data as a split.

    Raises:
        InputError: the first item of a data set cannot be used.
    """
    if isinstance(part, TorchDataset):
        targets = read_targets(part)
        labels = np.empty(0, np.int64) if targets is None else targets
        return StreamedSplit(images=read_example(part, place), labels=labels, source=part)
    return Split(images=part[0], labels=part[1])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A data set in its three parts: numpy arrays, which Ray's object store shares between workers without a copy."""

    name: str
    """Name for the records: mnist, fashion_mnist, kmnist, digits or module:function."""
    num_classes: int
    """Labels run from 0 to num_classes - 1; 0 for the data of a task, whose targets need not be classes."""
    train: Split
    """Images, or other inputs, that trials are trained on."""
    validation: Split
    """Images that every choice is based on."""
    test: Split
    """Images that are read once, for the frozen winners."""
    content_hash: str
    """SHA-256 over shapes, dtypes and bytes of the given training and test arrays, before the split."""
    imbalance: float = 1.0
    """Ratio of the largest training class to the smallest to which ``make_long_tail`` thinned them; 1 if it did not."""
    notice: str | None = None
    """Warning to show the user prominently, such as a fall back to digits."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an input: channels, height and width of an image."""
        return self.train.images.shape[1:]


def build_no_data(name: str) -> Dataset:
    """Return the data set of a search that trains by the user's own loop ``name``, which has its own data: empty."""
    none = Split(images=np.empty((0, 1), np.float32), labels=np.empty(0, np.int64))
    return Dataset(name=name, num_classes=0, train=none, validation=none, test=none, content_hash="own")


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Return the data set ``name``, read from disk, downloaded, or made by the user's own function.

    Args:
        name: auto, mnist, fashion_mnist, kmnist, digits or module:function. ``auto`` is MNIST, or digits with a notice
            if MNIST is not on disk and cannot be downloaded.
        data_dir: torchvision's root folder (``MNIST/raw/...``) or a folder of the four files ``*-ubyte[.gz]``; if None,
            ``$TUNE_AMP_DATA`` or else ``~/.cache/tune_amp``.

    Raises:
        InputError: the name is unknown, files are damaged, missing or unreadable, or a function breaks its contract.
    """
    if name == "auto":
        try:
            return _load_files("mnist", data_dir)
        except DownloadError as error:
            return _load_digits(
                f"MNIST is neither in {error.folder} nor can it be downloaded ({error.cause}): using scikit-learn's "
                "bundled digits (1,797 images) instead; accuracies are not MNIST's"
            )
    if name in TORCHVISION_CLASSES:
        return _load_files(name, data_dir)
    if name == "digits":
        return _load_digits(None)
    if is_function_name(name):
        return _load_from_function(name)
    raise InputError(f"dataset: must be one of auto, {', '.join(DATASETS)}, or module:function, got {shown(name)}")


def make_long_tail(dataset: Dataset, imbalance: float) -> Dataset:
    """Return the data set with training class sizes that fall from ``imbalance`` to 1; other splits stay as they are.

    The hash stays that of the given data, because the same images are always kept: see :func:`thin_classes`.

    Raises:
        InputError: a class would keep fewer than 2 training images.
    """
    if imbalance == dataset.imbalance:
        return dataset
    assert dataset.imbalance == 1  # thinning a thinned data set would keep other images
    if not dataset.num_classes:
        rule = "must be left out for the data of a task, which have no classes"
        raise InputError(f"imbalance: {rule}, got {imbalance:g}")
    train = thin_classes(dataset.train, dataset.num_classes, imbalance)
    counts = np.bincount(train.labels, minlength=dataset.num_classes)
    if counts.min() < 2:
        rule = f"each class of {dataset.name} must keep at least 2 training images"
        raise InputError(f"imbalance: {rule}, got {counts.min()} of class {counts.argmin()} at {imbalance:g}:1")
    return dataclasses.replace(dataset, train=train, imbalance=imbalance)


def thin_classes(split: Split, num_classes: int, imbalance: float) -> Split:
    """Return a subset in which class sizes fall exponentially from the first label to the last; the whole split at 1.

    Class i keeps n * mu^i images, with mu^(num_classes - 1) = 1 / ``imbalance``: the long tail of Cui et al. 2019,
    "Class-balanced loss based on effective number of samples" (arXiv:1901.05555). n is as large as all classes
    allow. The images are drawn with a fixed seed: they belong to the data set, as its splits do.
    """
    if imbalance == 1:
        return split
    counts = np.bincount(split.labels, minlength=num_classes)
    shares = imbalance ** -(np.arange(num_classes) / (num_classes - 1))
    with np.errstate(over="ignore"):  # an extreme imbalance: the first class, whose share is 1, sets the minimum
        sizes = np.rint((counts / shares).min() * shares).astype(np.int64)
    # RandomState's stream is frozen; default_rng's may change with NumPy, and with it the data of a recorded run.
    generator = np.random.RandomState(SPLIT_SEED)
    kept = [
        generator.permutation(np.flatnonzero(split.labels == label))[:size] for label, size in enumerate(sizes.tolist())
    ]
    return split.select(np.sort(np.concatenate(kept)))


def describe_tail(dataset: Dataset) -> str:
    """Return, in brackets, how the training images are spread over the classes; empty if they are as given."""
    if dataset.imbalance == 1:
        return ""
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes)
    return f" (long tail {dataset.imbalance:g}:1, {counts.max():,} to {counts.min():,} a class)"


def _load_files(name: str, data_dir: Path | None) -> Dataset:
    paths = locate_files(name, data_dir)
    splits, places = {}, {}
    for part, (images_path, labels_path) in {"train": paths[:2], "test": paths[2:]}.items():
        images, labels = read_idx(images_path, IMAGES_MAGIC), read_idx(labels_path, LABELS_MAGIC)
        if len(images) != len(labels):
            raise InputError(f"{labels_path}: must hold a label for each of {len(images)} images, got {len(labels)}")
        if labels.max() > 9:
            raise InputError(f"{labels_path}: labels must be between 0 and 9, got {labels.max()}")
        splits[part] = Split(images=images[:, None], labels=labels.astype(np.int64))
        places[part] = str(images_path)
    return _build_dataset(name, splits, places, 10)


def _load_digits(notice: str | None) -> Dataset:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # slow to import

    bundle = load_digits()
    images = _enlarge_digits(bundle.images.astype(np.int64))[:, None]
    labels = bundle.target.astype(np.int64)
    rest, test = _stratified_split(Split(images=images, labels=labels), len(labels) // DIGITS_TEST_SHARE)
    return _build_dataset("digits", {"train": rest, "test": test}, {"train": "digits", "test": "digits"}, 10, notice)


def _enlarge_digits(images: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Scale [n, 8, 8] of 0..16 bilinearly to [n, 28, 28] of 0..255; integers give the same hash on every machine."""
    size, steps = 28, 14
    position = (4 * np.arange(size) - 5).clip(0, 7 * steps)  # (i + 0.5) * 8 / 28 - 0.5, in fourteenths of a pixel
    below, part = np.divmod(position, steps)
    weights = np.zeros((size, 8), np.int64)
    weights[np.arange(size), below] = steps - part
    weights[np.arange(size), (below + 1).clip(max=7)] += part
    whole = 16 * steps * steps
    return ((weights @ images @ weights.T * 255 + whole // 2) // whole).astype(np.uint8)


def _load_from_function(name: str) -> Dataset:
    try:
        function = import_function(name)
        with exits_as_errors(), unchanged_process():
            result = function()
    except InputError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise InputError(f"{name}: the call failed ({describe_error(error)})") from error
    return _build_own(name, name, name_parts(name, result), has_classes=True)


def build_task_dataset(name: str, result: Any, *, has_classes: bool = False) -> Dataset:
    """Return what the ``data`` of the task ``name`` returned as a data set; ``has_classes``: its targets are classes.

    Raises:
        InputError: it is not the three parts of a task's data.
    """
    place = f"{name}.data"
    return _build_own(name, place, name_parts(place, result, of_task=True), has_classes=has_classes)


def _build_own(name: str, place: str, parts: Mapping[str, Any], *, has_classes: bool) -> Dataset:
    """Return the parts of a user's own data as a data set; ``place`` names them in messages."""
    splits: dict[str, Split] = {}
    notices: list[str] = []
    for part, value in parts.items():
        checked = (
            check_classes_part(value, place, part, notices) if has_classes else check_task_part(value, place, part)
        )
        splits[part] = build_split(checked, f"{place}: {part}")
    places = {part: f"{place}: {part}{'_images' if has_classes else ' inputs'}" for part in parts}
    num_classes = int(max(split.labels.max() for split in splits.values())) + 1 if has_classes else 0
    return _build_dataset(name, splits, places, num_classes, "; ".join(notices) or None)


def _build_dataset(
    name: str, splits: dict[str, Split], places: Mapping[str, str], num_classes: int, notice: str | None = None
) -> Dataset:
    """Return the checked splits as a data set; validation images are split off unless they are given.

    Args:
        name: name of the data set.
        splits: train, test and perhaps validation.
        places: their images, for messages.
        num_classes: 0 if the targets are no classes.
        notice: warning to show the user.
    """
    train = splits["train"]
    for part, split in splits.items():
        _check_alike(train, split, places["train"], places[part])
    if num_classes:
        _check_classes(train, num_classes, places["train"])
    content_hash = _hash_splits(splits.values())
    validation = splits.get("validation")
    if validation is None:
        # At least one image a class, which scikit-learn requires of both sides; it matters below twelve a class.
        train, validation = _stratified_split(train, max(len(train) // VALIDATION_SHARE, num_classes))
    return Dataset(
        name=name,
        num_classes=num_classes,
        train=train,
        validation=validation,
        test=splits["test"],
        content_hash=content_hash,
        notice=notice,
    )


def _hash_splits(splits: Iterable[Split]) -> str:
    """Return SHA-256 over shapes, dtypes and bytes of arrays; of a data set, over its length and listed targets."""
    digest = hashlib.sha256()
    for split in splits:
        arrays = [split.images, split.labels]
        if isinstance(split, StreamedSplit):
            digest.update(f"{type(split.source).__name__} {len(split)}".encode())
            arrays = [split.labels] if split.labels.size else []
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _check_alike(train: Split, other: Split, place: str, other_place: str) -> None:
    """Refuse inputs of different shapes or dtypes."""
    for what, given, wanted in (
        ("shape (channels, height, width for images)", train.images.shape[1:], other.images.shape[1:]),
        ("dtype", train.images.dtype, other.images.dtype),
    ):
        if given != wanted:
            raise InputError(f"{place}: must have the {what} of {other_place}, {wanted}, got {given}")


def _check_classes(train: Split, num_classes: int, place: str) -> None:
    rule = "there must be at least 2 classes, each with at least 2 training images"
    if not 2 <= num_classes <= len(train) // 2:  # before bincount: a label may be 10^15
        raise InputError(f"{place}: {rule}, got {len(train)} images and labels up to {num_classes - 1}")
    counts = np.bincount(train.labels, minlength=num_classes)
    if counts.min() < 2:
        raise InputError(f"{place}: {rule}, got {counts.min()} of class {counts.argmin()}")


def _stratified_split(split: Split, count: int) -> tuple[Split, Split]:
    """Return the images kept and the ``count`` images taken, both in the data set's order.

    The choice is that of scikit-learn's ``train_test_split``, whose import takes 0.9 s of every search's start.
    """
    generator = np.random.RandomState(SPLIT_SEED)
    counts = np.bincount(split.labels)
    kept = _apportion(counts, len(split) - count, generator)
    taken = _apportion(counts - kept, count, generator)
    is_taken = np.zeros(len(split), np.bool_)
    classes = np.split(np.argsort(split.labels, kind="stable"), np.cumsum(counts)[:-1])
    for members, stay, go in zip(classes, kept, taken, strict=True):
        is_taken[members[generator.permutation(len(members))[stay : stay + go]]] = True
    return split.select(np.flatnonzero(~is_taken)), split.select(np.flatnonzero(is_taken))


def _apportion(counts: npt.NDArray[np.int64], total: int, generator: np.random.RandomState) -> npt.NDArray[np.int64]:
    """Divide ``total`` among classes in proportion to ``counts``, by largest remainders; ties are drawn."""
    exact = counts / counts.sum() * total
    shares: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    remainders = exact - shares
    for remainder in np.unique(remainders)[::-1]:
        missing = total - int(shares.sum())
        if missing == 0:
            break
        tied = np.flatnonzero(remainders == remainder)
        shares[generator.choice(tied, size=min(len(tied), missing), replace=False)] += 1
    return shares
