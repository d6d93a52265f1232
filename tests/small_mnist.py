"""MNIST's four files in small, for tests of what reads them."""

import gzip
import struct
from pathlib import Path

import numpy as np


def write_mnist(folder: Path, train: int = 240, test: int = 40) -> None:
    """MNIST's four files with images that can be told apart: class c is bright in row c."""
    for stem, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        images[np.arange(count), 2 * labels] = 255
        with gzip.open(folder / f"{stem}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 2049, count) + labels.tobytes())
