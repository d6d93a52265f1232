"""Finds, downloads and reads the four files of MNIST and of data sets in its format."""

import contextlib
import gzip
import io
import math
import os
import socket
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tune_amp.trial.config import InputError
from tune_amp.trial.text import describe_error

DOWNLOAD_TIMEOUT_SECONDS = 20.0

MOST_BYTES = 2**30
"""Maximum bytes of values in a file; MNIST's largest file has 47 million."""
MOST_IMAGES = 2**24
"""Maximum number of images or labels in a file; a label takes eight bytes in memory."""
DEFLATE_RATIO = 1032
"""Maximum ratio of unpacked to compressed size: zlib.net/zlib_tech.html."""

IMAGES_MAGIC = 0x803
LABELS_MAGIC = 0x801
FILE_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TORCHVISION_CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


class DownloadError(InputError):
    """A data set is not on disk and cannot be downloaded: the only error for which ``auto`` falls back to digits."""

    def __init__(self, name: str, folder: Path, cause: str) -> None:
        remedy = f"pass --data-dir with a folder of {', '.join(FILE_STEMS)} (or .gz), or --dataset digits"
        super().__init__(f"dataset {name}: not in {folder}, and the download failed ({cause}); {remedy}")
        self.folder = folder
        self.cause = cause


def locate_files(name: str, data_dir: Path | None) -> list[Path]:
    """Return the four files of ``name`` in the order of ``FILE_STEMS``; download them if none of them is on disk.

    Args:
        name: mnist, fashion_mnist or kmnist.
        data_dir: torchvision's root folder (``MNIST/raw/...``) or a folder of the four files ``*-ubyte[.gz]``; if None,
            ``$TUNE_AMP_DATA`` or else ``~/.cache/tune_amp``.

    Raises:
        DownloadError: the files are not on disk and cannot be downloaded.
        InputError: the folder cannot be read, or holds only some of the files.
    """
    folder = _choose_folder(data_dir)
    paths = _find_files(name, folder)
    if paths is None:
        _download_files(name, folder)
        paths = _find_files(name, folder)
        assert paths is not None
    return paths


def read_idx(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """Return the array in an idx file, plain or, if its name ends in ``.gz``, compressed.

    The array is allocated only after a check that the file can hold the size that its header promises.

    Args:
        path: the file.
        magic: ``IMAGES_MAGIC`` for [n, height, width], ``LABELS_MAGIC`` for [n].

    Raises:
        InputError: the file cannot be read, is damaged, too large, or not of that kind.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: must be a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if path.suffix != ".gz":
                return _read_array(path, file, magic, available=size)
            with gzip.open(file) as unpacked:
                return _read_array(path, unpacked, magic, available=size * DEFLATE_RATIO)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({describe_error(error)})") from error


def _read_array(path: Path, file: io.BufferedIOBase, magic: int, available: int) -> npt.NDArray[np.uint8]:
    """Read header and values; ``available`` is the maximum number of bytes that ``file`` can hold."""
    shape = _read_shape(path, file, magic)
    promised = math.prod(shape)  # a damaged header can promise 2^96 bytes
    rule = f"{path}: must hold {promised} bytes after its header (shape {tuple(shape)})"
    left = available - 4 * (1 + len(shape))
    if promised > left:
        raise InputError(f"{rule}, got {left} at most")
    if promised > MOST_BYTES:
        raise InputError(f"{path}: must hold at most {MOST_BYTES:,} bytes, got {promised:,} (shape {tuple(shape)})")
    values = np.empty(promised, np.uint8)
    got = file.readinto(values.data)
    if got < promised:
        raise InputError(f"{rule}, got {got}")
    if file.read(1):  # reading to the end of a compressed file also verifies its checksum
        raise InputError(f"{rule}, got more")
    return values.reshape(shape)


def _read_shape(path: Path, file: io.BufferedIOBase, magic: int) -> list[int]:
    dimensions = magic & 0xFF  # the magic number's last byte
    header_bytes = 4 * (1 + dimensions)
    header = file.read(header_bytes)
    if len(header) < header_bytes:
        raise InputError(f"{path}: must begin with an idx header of {header_bytes} bytes, got {len(header)} bytes")
    found, *shape = (int.from_bytes(header[at : at + 4], "big") for at in range(0, header_bytes, 4))
    if found != magic:
        raise InputError(f"{path}: must begin with the magic number {magic:#010x}, got {found:#010x}")
    if shape[0] > MOST_IMAGES:
        raise InputError(f"{path}: must hold at most {MOST_IMAGES:,} images or labels, got {shape[0]:,}")
    if 0 in shape:
        raise InputError(f"{path}: must hold at least one value, got shape {tuple(shape)}")
    return shape


def _choose_folder(data_dir: Path | None) -> Path:
    if data_dir is None:
        try:
            return Path(os.environ.get("TUNE_AMP_DATA") or "~/.cache/tune_amp").expanduser()
        except RuntimeError as error:
            raise InputError(f"--data-dir: must be given where no HOME is set ({error})") from None
    if not os.path.isdir(data_dir.expanduser()):  # noqa: PTH112  # Path.is_dir raises if a parent is not accessible
        raise InputError(f"--data-dir: must be an existing folder, got {data_dir}")
    return data_dir.expanduser()


def _find_files(name: str, folder: Path) -> list[Path] | None:
    """Return the four files in either layout, or None if none is there, so that a download mixes with no other file."""
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
    """Return stem -> path of those of the four files that ``place`` holds, in the order of ``FILE_STEMS``."""
    try:
        names = set(os.listdir(place))  # noqa: PTH208  # names, not paths
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"{place}: must be a folder that can be read ({describe_error(error)})") from error
    # If torchvision unpacked, both exist: the plain file is faster.
    return {stem: place / name for stem in FILE_STEMS for name in (f"{stem}.gz", stem) if name in names}


def _download_files(name: str, folder: Path) -> None:
    """Download into torchvision's layout below ``folder``; torchvision has the mirrors and checks the MD5 sums."""
    import torchvision.datasets  # type: ignore[import-untyped]  # slow, and needed only here

    class_name = TORCHVISION_CLASSES[name]
    raw = folder / class_name / "raw"
    try:
        raw.parent.mkdir(parents=True, exist_ok=True)
        # Downloaded beside the target and renamed when complete: an interrupted or second download leaves no part.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary, _bounded_and_quiet():
            getattr(torchvision.datasets, class_name)(temporary, download=True)
            _move_unless_there(Path(temporary, class_name, "raw"), raw)
    except Exception as error:  # whatever urllib, http.client, gzip and the file system raise
        raise DownloadError(name, folder, describe_error(error)) from error


@contextlib.contextmanager
def _bounded_and_quiet() -> Iterator[None]:
    """Limit the wait for an absent network, and hide progress bars, in the ``with`` block."""
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
        if len(_files_in(target)) < len(FILE_STEMS):  # else another process stored the same files first
            raise
