"""MNIST's four files in small, for tests of what reads them."""

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

Arrays = list[npt.NDArray[np.uint8]]


def make_arrays(train: int = 48, test: int = 20) -> Arrays:
    """Images of 4x5 pixels, not square, with labels that take turns: of training, then of test."""
    generator = np.random.default_rng(0)
    arrays: Arrays = []
    for count in (train, test):
        arrays.append(generator.integers(0, 256, (count, 4, 5), np.uint8))
        arrays.append((np.arange(count) % 10).astype(np.uint8))
    return arrays


def encode_idx(array: npt.NDArray[np.uint8]) -> bytes:
    """The content of a file of MNIST's format."""
    header = [0x800 + array.ndim, *array.shape]
    return b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes()


def write_mnist(folder: Path, train: int = 240, test: int = 40) -> None:
    """MNIST's four files with images that can be told apart: class c is bright in row c."""
    for stem, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        images[np.arange(count), 2 * labels] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(encode_idx(array)))
