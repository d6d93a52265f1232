"""Data sets as uint8 arrays, their fixed splits, and batches from tensors that stay on the device.

A data set is read once, in the driver, checked, and travels as numpy arrays; a worker places it on its device once.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import io
import math
import os
import socket
import sys
import tempfile
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tune_amp.config import DATASETS, InputError, is_function_name, shown

# The split belongs to the data set, not to a trial: its seed never varies, so that every trial sees the same images.
SPLIT_SEED = 20_251
VALIDATION_SHARE = 12  # one image in twelve: 5,000 of MNIST's 60,000
DIGITS_TEST_SHARE = 7  # one image in seven, as MNIST's 10,000 of 70,000
DOWNLOAD_TIMEOUT_SECONDS = 20.0
CHUNK_IMAGES = 1024  # images widened to 8 bytes a pixel at a time: 6 MB for 28x28

IMAGES_MAGIC = 0x803
LABELS_MAGIC = 0x801
FILE_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TORCHVISION_CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A part of a data set, in host memory."""

    images: npt.NDArray[np.uint8]
    """[n, channels, height, width]"""
    labels: npt.NDArray[np.int64]
    """[n], from 0 to num_classes - 1"""

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A data set in its three parts: numpy arrays, which Ray's object store shares between workers without a copy."""

    name: str
    """What is recorded: mnist, fashion_mnist, kmnist, digits or module:function."""
    num_classes: int
    """Labels run from 0 to num_classes - 1."""
    train: Split
    """What trials learn from."""
    validation: Split
    """What every choice is made on."""
    test: Split
    """Read once, for the frozen winners."""
    content_hash: str
    """SHA-256 over shapes, dtypes and bytes of the given training and test arrays, before the split."""
    notice: str | None = None
    """What the user must be told loudly, such as a fall back to digits."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DeviceSplit:
    """A split on the device where it is used."""

    images: torch.Tensor
    """uint8 [n, channels, height, width]"""
    labels: torch.Tensor
    """int64 [n]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputScaling:
    """What a model sees of a pixel: ``(pixel - shift) * factor`` in float32."""

    shift: float
    """Subtracted from the pixel."""
    factor: float
    """Multiplies the difference."""


class _DownloadError(InputError):
    """A data set is neither on disk nor can it be downloaded: the one fault for which ``auto`` falls back."""

    def __init__(self, name: str, folder: Path, cause: str) -> None:
        remedy = f"pass --data-dir with a folder of {', '.join(FILE_STEMS)} (or .gz), or --dataset digits"
        super().__init__(f"dataset {name}: not in {folder}, and the download failed ({cause}); {remedy}")
        self.folder = folder
        self.cause = cause


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """The data set ``name``, read from disk, downloaded, or made by the user's own function.

    Args:
        name: auto, mnist, fashion_mnist, kmnist, digits or module:function. ``auto`` is MNIST, and digits with a notice
            where MNIST is neither on disk nor can be downloaded.
        data_dir: torchvision's root folder (``MNIST/raw/...``) or a folder of the four files ``*-ubyte[.gz]``;
            where None, ``$TUNE_AMP_DATA`` or else ``~/.cache/tune_amp``.

    Raises:
        InputError: the name is unknown, files are damaged, missing or out of reach, or a function breaks its contract.
    """
    if name == "auto":
        return _load_mnist_or_digits(data_dir)
    if name in TORCHVISION_CLASSES:
        return _load_files(name, data_dir)
    if name == "digits":
        return _load_digits(None)
    if is_function_name(name):
        return _load_from_function(name)
    raise InputError(f"dataset: must be one of auto, {', '.join(DATASETS)}, or module:function, got {shown(name)}")


def load_function(name: str) -> Callable[..., Any]:
    """The function that a user names as ``package.module:function``; modules in the current folder count too.

    Raises:
        InputError: the module cannot be imported, or holds no such function.
    """
    if not is_function_name(name):
        raise InputError(f"{shown(name)}: must have the form module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file of the user's must not shadow an installed module that others import
    module_name, function_name = name.split(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:  # a user's module may raise anything, a script without a guard exits
        raise InputError(f"{name}: importing {module_name} failed ({_one_line(error)})") from error
    if not callable(function):
        got = "no such name" if function is None else f"a value of type {type(function).__name__}"
        raise InputError(f"{name}: {module_name} must hold a function {function_name}, got {got}")
    return function  # type: ignore[no-any-return]  # callable() tells no signature


def read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """The array in an idx file, plain or, where its name ends in ``.gz``, compressed.

    Args:
        path: the file.
        magic: ``IMAGES_MAGIC`` for [n, height, width], ``LABELS_MAGIC`` for [n].

    Raises:
        InputError: the file cannot be read, is damaged, or is none of that kind.
    """
    content = _read_bytes(path)
    dimensions = magic & 0xFF  # the magic number's last byte
    header_bytes = 4 * (1 + dimensions)
    if len(content) < header_bytes:
        raise InputError(f"{path}: must begin with an idx header of {header_bytes} bytes, got {len(content)} bytes")
    found, *shape = (int.from_bytes(content[at : at + 4], "big") for at in range(0, header_bytes, 4))
    if found != magic:
        raise InputError(f"{path}: must begin with the magic number {magic:#010x}, got {found:#010x}")
    if 0 in shape:
        raise InputError(f"{path}: must hold at least one value, got shape {tuple(shape)}")
    promised, got = math.prod(shape), len(content) - header_bytes  # a damaged header can promise 2^96 bytes
    if got != promised:
        raise InputError(f"{path}: must hold {promised} bytes after its header (shape {tuple(shape)}), got {got}")
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def place_split(split: Split, device: torch.device) -> DeviceSplit:
    """The split on ``device``: the same memory on a CPU, one copy on a GPU."""
    with warnings.catch_warnings():
        # Arrays from Ray's object store are read-only, which torch cannot express; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    return DeviceSplit(images=images.to(device), labels=labels.to(device))


def fit_input_scaling(train: Split, method: str) -> InputScaling:
    """The scaling that maps the training pixels to [0, 1] (``minmax``) or to mean 0, deviation 1 (``standard``).

    Raises:
        InputError: every pixel has the same value.
    """
    counts = np.zeros(256, np.int64)
    for start in range(0, len(train), CHUNK_IMAGES):  # bincount widens its argument to int64
        counts += np.bincount(train.images[start : start + CHUNK_IMAGES].reshape(-1), minlength=256)
    values = np.flatnonzero(counts)
    low, high = int(values[0]), int(values[-1])
    if low == high:
        raise InputError(f"input_scaling {method}: pixels of the training images must differ, all are {low}")
    if method == "minmax":
        return InputScaling(shift=float(low), factor=1 / (high - low))
    assert method == "standard"
    mean = float(counts[values] @ values / counts.sum())
    variance = float(counts[values] @ (values - mean) ** 2 / counts.sum())
    return InputScaling(shift=mean, factor=variance**-0.5)


def scale_images(images: torch.Tensor, scaling: InputScaling) -> torch.Tensor:
    """``images`` (uint8, any shape) as a model sees them, float32 of the same shape."""
    # uint8 minus a Python float is float32 in one kernel, no separate conversion; minus an int it would wrap around.
    return (images - float(scaling.shift)).mul_(scaling.factor)


def batch_indices(count: int, batch_size: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """One epoch's batches over ``count`` images: int64 [steps, batch_size] on ``device``, each index at most once.

    The permutation is made with the CPU ``generator``, so that every device sees the same order. The ragged last batch
    is dropped: shapes are static and every step weighs the same.

    Raises:
        InputError: a batch is larger than ``count``.
    """
    if batch_size > count:
        raise InputError(f"batch_size: must not exceed the {count} images trained on in an epoch, got {batch_size}")
    steps = count // batch_size
    order = torch.randperm(count, generator=generator)
    return order[: steps * batch_size].view(steps, batch_size).to(device)


def difficulty_order(split: Split, num_classes: int) -> npt.NDArray[np.int64]:
    """Indices of the split's images from easy to hard, int64 [n].

    Difficulty is the Euclidean distance to the mean image of the label's class; ties keep the data set's order.
    """
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


def curriculum_fraction(curriculum: str, epoch: int, max_epochs: int) -> float:
    """Share of the images, from easy to hard, that ``epoch`` (counted from 0) draws from.

    ``none`` is always 1. ``linear`` starts at a half and grows linearly to 1, which it keeps for the last half of the
    epochs: Bengio et al. 2009, "Curriculum learning", with a pacing function as in Hacohen & Weinshall 2019, "On the
    power of curriculum learning in training deep networks".
    """
    growing_epochs = max_epochs // 2
    if curriculum == "none" or epoch >= growing_epochs:
        return 1.0
    assert curriculum == "linear"
    return 0.5 + 0.5 * epoch / growing_epochs


def class_weights(labels: npt.NDArray[np.int64], num_classes: int, method: str) -> torch.Tensor | None:
    """Weights of the classes in the loss, float32 [num_classes]; None for ``none``.

    ``balanced`` is scikit-learn's: n / (num_classes * images of the class).

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


def _load_mnist_or_digits(data_dir: Path | None) -> Dataset:
    try:
        return _load_files("mnist", data_dir)
    except _DownloadError as error:
        return _load_digits(
            f"MNIST is neither in {error.folder} nor can it be downloaded ({error.cause}): using scikit-learn's "
            "bundled digits (1,797 images) instead; accuracies are not MNIST's"
        )


def _load_files(name: str, data_dir: Path | None) -> Dataset:
    folder = _choose_folder(data_dir)
    paths = _find_files(name, folder)
    if paths is None:
        _download_files(name, folder)
        paths = _find_files(name, folder)
        assert paths is not None
    train_images, train_labels, test_images, test_labels = paths
    train = _read_split(train_images, train_labels)
    test = _read_split(test_images, test_labels)
    num_classes = 10  # of each of the three, as torchvision's class lists say
    for split, path in ((train, train_labels), (test, test_labels)):
        if split.labels.max() >= num_classes:
            raise InputError(f"{path}: labels must be between 0 and {num_classes - 1}, got {split.labels.max()}")
    return _split_dataset(name, num_classes, train, test, places=(str(train_images), str(test_images)))


def _choose_folder(data_dir: Path | None) -> Path:
    if data_dir is None:
        return Path(os.environ.get("TUNE_AMP_DATA") or "~/.cache/tune_amp").expanduser()
    if not os.path.isdir(data_dir.expanduser()):  # noqa: PTH112  # Path.is_dir raises where a parent is closed to us
        raise InputError(f"--data-dir: must be an existing folder, got {data_dir}")
    return data_dir.expanduser()


def _find_files(name: str, folder: Path) -> list[Path] | None:
    """The four files in either layout; None where there is not one of them, so that a download mixes with nothing."""
    places = (folder / TORCHVISION_CLASSES[name] / "raw", folder)
    found = {place: _files_in(place) for place in places}
    for files in found.values():
        if len(files) == len(FILE_STEMS):
            return list(files.values())
    for place, files in found.items():
        if files:
            missing = ", ".join(f"{stem}[.gz]" for stem in FILE_STEMS if stem not in files)
            raise InputError(f"{place}: must hold all four files of {name}, missing: {missing}")
    return None


def _files_in(place: Path) -> dict[str, Path]:
    """Path by stem of those of the four files that ``place`` holds, in the order of ``FILE_STEMS``."""
    try:
        names = set(os.listdir(place))  # noqa: PTH208  # names, not paths
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"{place}: must be a folder that can be read ({_one_line(error)})") from error
    files: dict[str, Path] = {}
    for stem in FILE_STEMS:
        for name in (stem, f"{stem}.gz"):  # where torchvision unpacked, both are there: the plain one is faster
            if name in names:
                files.setdefault(stem, place / name)
    return files


def _download_files(name: str, folder: Path) -> None:
    """Download into torchvision's layout below ``folder``; torchvision checks the MD5 sums and knows the mirrors."""
    import torchvision.datasets  # type: ignore[import-untyped]  # slow, and needed only here

    class_name = TORCHVISION_CLASSES[name]
    raw = folder / class_name / "raw"
    try:
        raw.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target and renamed when complete: an interrupted or a second download leaves nothing half done.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary, _bounded_and_quiet():
            getattr(torchvision.datasets, class_name)(temporary, download=True)
            _move_unless_there(Path(temporary, class_name, "raw"), raw)
    except Exception as error:  # whatever urllib, http.client, gzip and the file system raise
        raise _DownloadError(name, folder, _one_line(error)) from error


@contextlib.contextmanager
def _bounded_and_quiet() -> Iterator[None]:
    """Sockets that give up on a network that is not there, and no progress bars."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _move_unless_there(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if len(_files_in(target)) < len(FILE_STEMS):  # else another process was faster, with the same files
            raise


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise InputError(f"{path}: must be a regular file")
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)})") from error


def _read_split(images_path: Path, labels_path: Path) -> Split:
    images = read_idx(images_path, IMAGES_MAGIC)
    labels = read_idx(labels_path, LABELS_MAGIC)
    if len(images) != len(labels):
        raise InputError(f"{labels_path}: must hold a label for each of {len(images)} images, got {len(labels)}")
    return Split(images=images[:, None], labels=labels.astype(np.int64))


def _load_digits(notice: str | None) -> Dataset:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # slow to import

    bundle = load_digits()
    images = _enlarge_digits(bundle.images.astype(np.int64))[:, None]
    labels = bundle.target.astype(np.int64)
    rest, test = _stratified_split(Split(images=images, labels=labels), len(labels) // DIGITS_TEST_SHARE)
    return _split_dataset("digits", 10, rest, test, places=("digits", "digits"), notice=notice)


def _enlarge_digits(images: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """[n, 8, 8] of 0 to 16 -> [n, 28, 28] of 0 to 255, bilinear; in integers, so that the hash is every machine's."""
    size, steps = 28, 14
    position = (4 * np.arange(size) - 5).clip(0, 7 * steps)  # (i + 0.5) * 8 / 28 - 0.5, in fourteenths of a pixel
    below, part = np.divmod(position, steps)
    weights = np.zeros((size, 8), np.int64)
    weights[np.arange(size), below] = steps - part
    weights[np.arange(size), (below + 1).clip(max=7)] += part
    whole = 16 * steps * steps
    return ((weights @ images @ weights.T * 255 + whole // 2) // whole).astype(np.uint8)


def _load_from_function(name: str) -> Dataset:
    function = load_function(name)
    try:
        result = function()
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise InputError(f"{name}: the call failed ({_one_line(error)})") from error
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    if not isinstance(result, tuple | list) or len(result) != len(parts):
        got = f"{len(result)} values" if isinstance(result, tuple | list) else type(result).__name__
        raise InputError(f"{name}: must return ({', '.join(parts)}), got {got}")
    train, test = (
        _check_split(result[at], result[at + 1], f"{name}: {parts[at]}", f"{name}: {parts[at + 1]}") for at in (0, 2)
    )
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    return _split_dataset(name, num_classes, train, test, places=(f"{name}: {parts[0]}", f"{name}: {parts[2]}"))


def _check_split(images: Any, labels: Any, images_place: str, labels_place: str) -> Split:
    images = _as_array(images, images_place)
    if images.dtype != np.uint8:
        raise InputError(f"{images_place}: must be uint8, got {images.dtype}")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise InputError(f"{images_place}: must be [n, h, w] or [n, c, h, w] without a zero, got {images.shape}")
    images = images[:, None] if images.ndim == 3 else images
    if images.shape[3] <= 4 < images.shape[1]:
        raise InputError(f"{images_place}: channels must come before height and width, got {images.shape}")
    labels = _as_array(labels, labels_place)
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        got = f"{labels.dtype} {labels.shape}"
        raise InputError(f"{labels_place}: must be integers, one for each of {len(images)} images, got {got}")
    if labels.min() < 0 or labels.max() >= np.iinfo(np.int64).max:
        raise InputError(f"{labels_place}: must count from 0, got {labels.min()} to {labels.max()}")
    return Split(images=np.ascontiguousarray(images), labels=np.ascontiguousarray(labels, dtype=np.int64))


def _as_array(value: Any, place: str) -> npt.NDArray[Any]:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    except (TypeError, RuntimeError) as error:  # bfloat16, sparse, on no device
        raise InputError(f"{place}: must be a tensor that numpy can hold ({_one_line(error)})") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{place}: must be a numpy array or a torch tensor, got {type(value).__name__}")
    return np.asarray(array)


def _split_dataset(
    name: str, num_classes: int, train: Split, test: Split, *, places: tuple[str, str], notice: str | None = None
) -> Dataset:
    """Split validation off; ``places`` name the training and the test images in messages."""
    if train.images.shape[1:] != test.images.shape[1:]:
        got = f"{test.images.shape[1:]}, got {train.images.shape[1:]}"
        raise InputError(f"{places[0]}: images must have the (channels, height, width) of {places[1]}, {got}")
    _check_classes(train, num_classes, places[0])
    digest = hashlib.sha256()
    for array in (train.images, train.labels, test.images, test.labels):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.data)
    # At least one image a class, which scikit-learn asks of both sides; it matters below twelve images a class.
    learn, validation = _stratified_split(train, max(len(train) // VALIDATION_SHARE, num_classes))
    return Dataset(
        name=name,
        num_classes=num_classes,
        train=learn,
        validation=validation,
        test=test,
        content_hash=digest.hexdigest(),
        notice=notice,
    )


def _check_classes(train: Split, num_classes: int, place: str) -> None:
    rule = "there must be at least 2 classes, each with at least 2 training images"
    if not 2 <= num_classes <= len(train) // 2:  # before bincount: a label may be 10^15
        raise InputError(f"{place}: {rule}, got {len(train)} images and labels up to {num_classes - 1}")
    counts = np.bincount(train.labels, minlength=num_classes)
    if counts.min() < 2:
        raise InputError(f"{place}: {rule}, got {counts.min()} of class {counts.argmin()}")


def _stratified_split(split: Split, count: int) -> tuple[Split, Split]:
    """What stays, and ``count`` images that are taken away, both in the data set's order."""
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]  # slow

    indices = np.arange(len(split))
    parts = train_test_split(indices, test_size=count, stratify=split.labels, random_state=SPLIT_SEED)
    kept, taken = (Split(images=split.images[part], labels=split.labels[part]) for part in map(np.sort, parts))
    return kept, taken


def _one_line(error: BaseException) -> str:
    """An exception's type and text on one line: some libraries write paragraphs."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
