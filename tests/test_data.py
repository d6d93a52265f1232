"""Data sets: reading, checking, downloading and splitting them, and what the device sees."""

import contextlib
import dataclasses
import gzip
import itertools
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight  # type: ignore[import-untyped]

from tune_amp import data
from tune_amp.config import InputError
from tune_amp.data import (
    IMAGES_MAGIC,
    LABELS_MAGIC,
    Dataset,
    Split,
    batch_indices,
    class_weights,
    curriculum_fraction,
    difficulty_order,
    fit_input_scaling,
    load_dataset,
    load_function,
    place_split,
    read_idx,
    scale_images,
)

CPU = torch.device("cpu")
TORCHVISION = ("MNIST", "FashionMNIST", "KMNIST")
STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def encode_idx(array: npt.NDArray[np.uint8]) -> bytes:
    header = [0x800 + array.ndim, *array.shape]
    return b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes()


def make_arrays(train: int = 48, test: int = 20) -> list[npt.NDArray[np.uint8]]:
    """Images of 4x5 pixels, not square, and labels that take turns, in the order of ``STEMS``."""
    generator = np.random.default_rng(0)
    arrays: list[npt.NDArray[np.uint8]] = []
    for count in (train, test):
        arrays.append(generator.integers(0, 256, (count, 4, 5), np.uint8))
        arrays.append((np.arange(count) % 10).astype(np.uint8))
    return arrays


def write_set(folder: Path, *, compressed: bool = False, arrays: list[npt.NDArray[np.uint8]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in zip(STEMS, arrays or make_arrays(), strict=True):
        content = encode_idx(array)
        if compressed:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / stem).write_bytes(content)
    return folder


def closed_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve(answer: Callable[[str], bytes], *, cut: int = 0) -> Iterator[str]:
    """Serve ``answer(file name)`` and yield the address; ``cut`` bytes of each file never arrive."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answer(self.path.rsplit("/", 1)[-1])
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            # torchvision asks for each file twice and hangs up on the first answer, which it opens for its address.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[: len(content) - cut])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reaches the real cache or the network: the home folder is empty and nothing answers for the mirrors."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("TUNE_AMP_DATA", raising=False)
    for name in TORCHVISION:
        monkeypatch.setattr(getattr(torchvision.datasets, name), "mirrors", [f"http://127.0.0.1:{closed_port()}/"])
    return home / ".cache" / "tune_amp"


@pytest.fixture(scope="session")
def mnist(mnist_dir: Path) -> Dataset:
    return load_dataset("mnist", mnist_dir)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data")


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module into the current folder and return its name; import state is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    numbers = itertools.count()

    def write(text: str) -> str:
        name = f"user_module_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("user_"):
            del sys.modules[name]


def refusal(name: str, data_dir: Path | None = None) -> str:
    """The one line with which ``load_dataset`` refuses."""
    with pytest.raises(InputError) as caught:
        load_dataset(name, data_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows_of(*splits: Split) -> npt.NDArray[Any]:
    """Every image with its label as one sorted value, to compare sets of them."""
    parts = [np.concatenate([s.images.reshape(len(s), -1), s.labels[:, None].astype(np.uint8)], axis=1) for s in splits]
    rows = np.ascontiguousarray(np.concatenate(parts))
    return np.sort(rows.view(f"V{rows.shape[1]}").ravel())


# Reading files


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
@pytest.mark.parametrize("torchvision_layout", [False, True])
def test_both_layouts_hold_each_of_the_three_data_sets_plain_or_compressed(
    tmp_path: Path, name: str, compressed: bool, torchvision_layout: bool
) -> None:
    class_name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}[name]
    arrays = make_arrays()
    write_set(tmp_path / class_name / "raw" if torchvision_layout else tmp_path, compressed=compressed, arrays=arrays)
    dataset = load_dataset(name, tmp_path)
    assert (dataset.name, dataset.num_classes, dataset.input_shape) == (name, 10, (1, 4, 5))
    assert dataset.notice is None
    np.testing.assert_array_equal(dataset.test.images[:, 0], arrays[2])
    np.testing.assert_array_equal(dataset.test.labels, arrays[3])
    original = Split(images=arrays[0][:, None], labels=arrays[1].astype(np.int64))
    np.testing.assert_array_equal(rows_of(dataset.train, dataset.validation), rows_of(original))


def test_data_dir_goes_before_environment_and_environment_before_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, value in ((tmp_path / "given", 1), (tmp_path / "environment", 2), (cache, 3)):
        images, *rest = make_arrays()
        images[:] = value
        write_set(place, arrays=[images, *rest])
    assert load_dataset("mnist", None).train.images.max() == 3
    monkeypatch.setenv("TUNE_AMP_DATA", str(tmp_path / "environment"))
    assert load_dataset("mnist", None).train.images.max() == 2
    assert load_dataset("mnist", tmp_path / "given").train.images.max() == 1
    monkeypatch.setenv("TUNE_AMP_DATA", "")
    assert load_dataset("mnist", None).train.images.max() == 3


def test_another_data_sets_torchvision_folder_is_not_taken(tmp_path: Path) -> None:
    write_set(tmp_path / "MNIST" / "raw")
    assert "download failed" in refusal("kmnist", tmp_path)


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_data_dir_that_does_not_exist_is_refused_and_not_made(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / "absent") in refusal(name, tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "must be an existing folder" in refusal("mnist", tmp_path / "file")


def test_unknown_name_lists_the_known_ones() -> None:
    message = refusal("cifar")
    assert "'cifar'" in message
    assert "auto, mnist, fashion_mnist, kmnist, digits, or module:function" in message


def big_endian(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in numbers)


GOOD_IMAGES = encode_idx(make_arrays()[0])
GOOD_LABELS = encode_idx(make_arrays()[1])
DAMAGE = {
    "empty": ("train-images-idx3-ubyte", b"", "got 0 bytes"),
    "header cut": ("train-images-idx3-ubyte", GOOD_IMAGES[:15], "header of 16 bytes, got 15 bytes"),
    "truncated": ("train-images-idx3-ubyte", GOOD_IMAGES[:-1], "must hold 960 bytes after its header"),
    "trailing": ("t10k-labels-idx1-ubyte", GOOD_LABELS + b"\0", "got 49"),
    "no values": ("train-images-idx3-ubyte", big_endian(0x803, 0, 4, 5), "got shape (0, 4, 5)"),
    "absurd": ("train-images-idx3-ubyte", big_endian(0x803, *[2**32 - 1] * 3), "4294967295"),
    "labels for images": ("train-images-idx3-ubyte", GOOD_LABELS, "number 0x00000803, got 0x00000801"),
    "images for labels": ("train-labels-idx1-ubyte", GOOD_IMAGES, "number 0x00000801, got 0x00000803"),
    "signed bytes": ("train-labels-idx1-ubyte", b"\0\0\x09\1" + GOOD_LABELS[4:], "got 0x00000901"),
    "too few labels": ("train-labels-idx1-ubyte", encode_idx(make_arrays()[3]), "each of 48 images, got 20"),
    "label 10": ("t10k-labels-idx1-ubyte", encode_idx(np.arange(1, 11, dtype=np.uint8).repeat(2)), "9, got 10"),
    "text": ("train-images-idx3-ubyte", b"<html>404 not found, sorry</html>", "magic number"),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_named_with_rule_and_value(folder: Path, kind: str, compressed: bool) -> None:
    stem, content, expected = DAMAGE[kind]
    path = folder / stem
    if compressed:
        path.unlink()
        path, content = path.with_name(f"{stem}.gz"), gzip.compress(content)
    path.write_bytes(content)
    for name in ("mnist", "auto"):  # auto falls back for want of files, not for damage
        message = refusal(name, folder)
        assert message.startswith(f"{path}: ")
        assert expected in message


GZIPPED = gzip.compress(GOOD_IMAGES)


@pytest.mark.parametrize(
    "content",
    [GOOD_IMAGES, GZIPPED[:-9], GZIPPED[:5], GZIPPED[:10] + b"\xff" * 50, GZIPPED[:-8] + bytes(8)],
    ids=["not gzip", "cut", "header cut", "corrupt", "wrong checksum"],
)
def test_damaged_gzip_is_named(folder: Path, content: bytes) -> None:
    (folder / STEMS[0]).unlink()
    path = folder / f"{STEMS[0]}.gz"
    path.write_bytes(content)
    assert refusal("mnist", folder).startswith(f"{path}: cannot be read (")


def test_folder_in_the_place_of_a_file_is_named(folder: Path) -> None:
    (folder / STEMS[1]).unlink()
    (folder / STEMS[1]).mkdir()
    assert refusal("mnist", folder) == f"{folder / STEMS[1]}: must be a regular file"


def test_file_and_folder_that_may_not_be_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root, as which tests may run, can read everything
        patch.setattr(Path, "read_bytes", refuse)
        assert refusal("mnist", folder).startswith(f"{folder / STEMS[0]}: cannot be read (PermissionError")
    monkeypatch.setattr(os, "listdir", refuse)
    assert "must be a folder that can be read (PermissionError" in refusal("mnist", folder)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_missing_file_is_named_and_never_downloaded_beside_the_others(folder: Path, stem: str, name: str) -> None:
    (folder / stem).unlink()
    message = refusal(name, folder)
    assert message.startswith(f"{folder}: ")
    assert [s for s in STEMS if s in message] == [stem]
    assert sorted(p.name for p in folder.iterdir()) == sorted(set(STEMS) - {stem})


def test_train_and_test_images_must_have_one_shape(folder: Path) -> None:
    (folder / STEMS[2]).write_bytes(encode_idx(np.zeros((20, 5, 4), np.uint8)))
    message = refusal("mnist", folder)
    assert "(1, 5, 4)" in message
    assert "(1, 4, 5)" in message
    assert str(folder / STEMS[0]) in message


def test_class_with_a_single_training_image_is_refused(folder: Path) -> None:
    labels = np.array([0, *np.arange(1, 48) % 9 + 1], np.uint8)
    (folder / STEMS[1]).write_bytes(encode_idx(labels))
    assert "got 1 of class 0" in refusal("mnist", folder)


@settings(max_examples=150, deadline=None, database=None)
@given(
    noise=st.binary(max_size=60),
    at=st.integers(0, 40),
    keep=st.integers(0, 40),
    compressed=st.booleans(),
    break_gzip=st.booleans(),
    magic=st.sampled_from([IMAGES_MAGIC, LABELS_MAGIC]),
)
def test_reader_returns_exactly_the_promised_array_or_refuses(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    noise: bytes,
    at: int,
    keep: int,
    compressed: bool,
    break_gzip: bool,
    magic: int,
) -> None:
    good = encode_idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    content = good[:at] + noise + good[keep:]
    stored = gzip.compress(content) if compressed else content
    if break_gzip:
        stored = stored[:at] + noise[:3] + stored[keep:]
    path = tmp_path_factory.getbasetemp() / f"fuzzed-idx{os.getpid()}{'.gz' if compressed else ''}"
    path.write_bytes(stored)
    try:
        outcome: bytes | str = encode_idx(read_idx(path, magic))
    except InputError as error:
        outcome = str(error)
    if isinstance(outcome, str):
        assert outcome.startswith(f"{path}: ")
        assert "\n" not in outcome
    else:
        assert outcome == (gzip.decompress(stored) if compressed else stored)


# Download: the four real files from a server of our own, through torchvision


def offer(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", list(addresses))


def read_from(mnist_dir: Path) -> Callable[[str], bytes]:
    return lambda name: (mnist_dir / name).read_bytes()


@pytest.mark.parametrize("place", ["data_dir", "environment", "cache"])
def test_mnist_is_downloaded_into_the_chosen_folder_and_found_there_again(
    *,
    tmp_path: Path,
    cache: Path,
    mnist: Dataset,
    mnist_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    place: str,
) -> None:
    target = cache if place == "cache" else tmp_path / "new"
    if place == "data_dir":
        target.mkdir()
    if place == "environment":
        monkeypatch.setenv("TUNE_AMP_DATA", str(target))
    data_dir = target if place == "data_dir" else None
    with serve(read_from(mnist_dir)) as address:
        offer(monkeypatch, f"http://127.0.0.1:{closed_port()}/", address)
        assert load_dataset("auto" if place == "cache" else "mnist", data_dir).content_hash == mnist.content_hash
    assert [path.name for path in target.iterdir()] == ["MNIST"]
    assert {path.name for path in (target / "MNIST" / "raw").iterdir()} == {*STEMS, *(f"{stem}.gz" for stem in STEMS)}
    assert load_dataset("auto", data_dir).name == "mnist"  # the server is gone
    assert capfd.readouterr() == ("", "")
    assert socket.getdefaulttimeout() is None


def test_corrupted_download_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(name: str) -> bytes:
        content = bytearray((mnist_dir / name).read_bytes())
        if name == "t10k-labels-idx1-ubyte.gz":  # the last of the four
            content[4] ^= 1  # the time stamp: it unpacks to the same labels, and only the MD5 sum tells
        return bytes(content)

    with serve(answer) as address:
        offer(monkeypatch, address)
        message = refusal("mnist", tmp_path)
    assert "t10k-labels-idx1-ubyte.gz" in message
    assert "corrupted" in message
    assert "--data-dir" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with serve(read_from(mnist_dir)) as address:
        offer(monkeypatch, address)
        assert len(load_dataset("mnist", tmp_path).train) == 55_000


def test_broken_connection_is_refused(tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(read_from(mnist_dir), cut=1000) as address:
        offer(monkeypatch, address)
        assert "download failed" in refusal("mnist", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_second_process_that_finished_first_wins(
    tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "MNIST" / "raw"

    def answer(name: str) -> bytes:
        if not raw.exists():
            write_set(raw)
        return (mnist_dir / name).read_bytes()

    with serve(answer) as address:
        offer(monkeypatch, address)
        dataset = load_dataset("mnist", tmp_path)
    assert dataset.input_shape == (1, 4, 5)
    assert {path.name for path in raw.iterdir()} == set(STEMS)
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        offer(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert "timed out" in refusal("mnist", tmp_path)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_without_network_the_refusal_says_what_to_do(tmp_path: Path, name: str) -> None:
    message = refusal(name, tmp_path)
    assert message.startswith(f"dataset {name}: not in {tmp_path}, and the download failed (")
    assert "Connection refused" in message
    assert "--data-dir" in message
    assert "--dataset digits" in message
    assert all(stem in message for stem in STEMS)


def test_auto_without_files_and_network_is_digits_with_a_notice(tmp_path: Path, digits: Dataset) -> None:
    dataset = load_dataset("auto", tmp_path)
    assert dataset.name == "digits"
    assert dataset.content_hash == digits.content_hash
    assert digits.notice is None
    assert dataset.notice is not None
    assert f"MNIST is neither in {tmp_path} nor can it be downloaded (" in dataset.notice
    assert "Connection refused" in dataset.notice
    assert "digits" in dataset.notice
    assert "\n" not in dataset.notice


def test_folder_that_cannot_be_written_to_is_a_refusal(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the place of the folder")
    assert "NotADirectoryError" in refusal("mnist", None)


# Splits


def test_mnist_is_split_55000_5000_10000(mnist: Dataset) -> None:
    assert (len(mnist.train), len(mnist.validation), len(mnist.test)) == (55_000, 5_000, 10_000)
    assert mnist.input_shape == (1, 28, 28)
    for split in (mnist.train, mnist.validation, mnist.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert split.images.flags.c_contiguous
    # Recorded in every Parquet file: it must not change between versions of this package.
    assert mnist.content_hash == "da391adbc18b0d9eae51bc8b1a7a5cd9e56524915b4e635992460a8d77986c54"


def test_train_and_validation_are_together_the_original_and_stratified(mnist: Dataset, mnist_dir: Path) -> None:
    torchvision_style = [
        read_idx(mnist_dir / f"{stem}.gz", magic) for stem, magic in zip(STEMS[:2], (0x803, 0x801), strict=True)
    ]
    original = Split(images=torchvision_style[0][:, None], labels=torchvision_style[1].astype(np.int64))
    np.testing.assert_array_equal(rows_of(mnist.train, mnist.validation), rows_of(original))
    share = np.bincount(original.labels) / 12
    assert np.abs(np.bincount(mnist.validation.labels) - share).max() <= 1


def test_split_is_disjoint_and_does_not_follow_the_global_seed(tmp_path: Path) -> None:
    images = np.arange(240, dtype=np.uint8).reshape(240, 1, 1)  # each image is its own number
    labels = (np.arange(240) % 10).astype(np.uint8)
    write_set(tmp_path, arrays=[images, labels, images[:10], labels[:10]])
    held = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002  # the global generator is what must not matter
        dataset = load_dataset("mnist", tmp_path)
        np.testing.assert_array_equal(dataset.train.labels, dataset.train.images.ravel() % 10)
        assert sorted([*dataset.train.images.ravel(), *dataset.validation.images.ravel()]) == list(range(240))
        assert np.bincount(dataset.validation.labels).tolist() == [2] * 10
        held.append(dataset.validation.images.ravel().tolist())
    assert held[0] == held[1]
    assert held[0] not in ([*range(20)], [*range(220, 240)])  # drawn, not cut off


def test_smallest_data_set_leaves_every_class_on_both_sides(tmp_path: Path) -> None:
    write_set(tmp_path, arrays=make_arrays(train=20, test=10))
    dataset = load_dataset("mnist", tmp_path)
    assert np.bincount(dataset.train.labels).tolist() == [1] * 10
    assert np.bincount(dataset.validation.labels).tolist() == [1] * 10


@pytest.mark.parametrize("changed", range(4))
def test_hash_changes_with_one_value_of_any_array_and_not_with_layout(tmp_path: Path, changed: int) -> None:
    plain = load_dataset("mnist", write_set(tmp_path / "a")).content_hash
    assert (
        load_dataset("kmnist", write_set(tmp_path / "b" / "KMNIST" / "raw", compressed=True).parents[1]).content_hash
        == plain
    )
    arrays = make_arrays()
    arrays[changed].flat[-1] -= 1
    assert load_dataset("mnist", write_set(tmp_path / "c", arrays=arrays)).content_hash != plain


def test_hash_changes_with_the_shape_alone(tmp_path: Path) -> None:
    arrays = make_arrays()
    turned = [arrays[0].reshape(-1, 5, 4), arrays[1], arrays[2].reshape(-1, 5, 4), arrays[3]]
    first = load_dataset("mnist", write_set(tmp_path / "a", arrays=arrays)).content_hash
    assert load_dataset("mnist", write_set(tmp_path / "b", arrays=turned)).content_hash != first


def test_digits_look_like_mnist(digits: Dataset) -> None:
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1413, 128, 256)
    assert (digits.name, digits.num_classes, digits.input_shape) == ("digits", 10, (1, 28, 28))
    for split in (digits.train, digits.validation, digits.test):
        assert split.images.dtype == np.uint8
        shares = np.bincount(split.labels) / len(split)
        assert shares.min() > 0.08
        assert shares.max() < 0.12
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)
    whole = rows_of(digits.train, digits.validation, digits.test)
    assert len(np.unique(whole)) == len(whole) == 1797


def test_digits_are_enlarged_bilinearly() -> None:
    small = np.random.default_rng(0).integers(0, 17, (5, 8, 8))
    expected = torch.nn.functional.interpolate(torch.from_numpy(small)[:, None].double(), (28, 28), mode="bilinear")
    difference = data._enlarge_digits(small) - expected[:, 0].numpy() * 255 / 16
    assert np.abs(difference).max() <= 0.5 + 1e-9


# A user's own function

GOOD_MODULE = """
import numpy as np
def load():
    labels = np.arange(36) % 3
    images = np.random.default_rng(0).integers(0, 256, (36, 4, 5), np.uint8)
    return images, labels, images[:6], labels[:6]
def load_torch():
    import torch
    images, labels, *_ = load()
    images, labels = torch.from_numpy(images)[:, None].expand(-1, 2, -1, -1), torch.from_numpy(labels).to(torch.int32)
    return images, labels, images[:6], labels[:6]
"""


def test_function_in_the_current_folder_gives_the_data_set(write_module: Callable[[str], str]) -> None:
    name = f"{write_module(GOOD_MODULE)}:load"
    dataset = load_dataset(name, None)
    assert (dataset.name, dataset.num_classes, dataset.input_shape) == (name, 3, (1, 4, 5))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (33, 3, 6)
    assert np.bincount(dataset.validation.labels).tolist() == [1, 1, 1]


def test_function_may_return_tensors_with_channels(write_module: Callable[[str], str]) -> None:
    dataset = load_dataset(f"{write_module(GOOD_MODULE)}:load_torch", None)
    assert dataset.input_shape == (2, 4, 5)
    for split in (dataset.train, dataset.test):
        assert split.labels.dtype == np.int64
        assert split.images.flags.c_contiguous
        np.testing.assert_array_equal(split.images[:, 0], split.images[:, 1])


def test_function_in_a_package_is_found_and_installed_modules_are_not_shadowed(
    write_module: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "inner.py").write_text("def make():\n    return 7\n")
    assert load_function("user_package.inner:make")() == 7
    assert sys.path[-1] == str(tmp_path)
    load_function("user_package.inner:make")
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "function", "expected"),
    [
        ("import not_installed_anywhere", "load", "No module named 'not_installed_anywhere'"),
        ("raise RuntimeError('two\\nlines')", "load", "RuntimeError: two lines"),
        ("def load(:", "load", "SyntaxError"),
        ("import sys; sys.exit(3)", "load", "SystemExit: 3"),
        ("other = 1", "load", "must hold a function load, got no such name"),
        ("load = [1]", "load", "must hold a function load, got a value of type list"),
    ],
)
def test_function_that_cannot_be_imported_is_refused(
    write_module: Callable[[str], str], text: str, function: str, expected: str
) -> None:
    name = f"{write_module(text)}:{function}"
    message = refusal(name)
    assert message.startswith(f"{name}: ")
    assert expected in message


@pytest.mark.parametrize("name", ["no_such_module_here:load", "user_module.py", "a:b:c", ":load", "a:"])
def test_name_without_a_module_and_a_function_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        load_function(name)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise KeyError('x')", "the call failed (KeyError: 'x')"),
        ("return 1", "must return (train_images, train_labels, test_images, test_labels), got int"),
        ("return x, y, x", "got 3 values"),
        ("return x.tolist(), y, x, y", "train_images: must be a numpy array or a torch tensor, got list"),
        ("return x, y, x / 255, y", "test_images: must be uint8, got float64"),
        ("return x, y, torch.zeros(3, dtype=torch.bfloat16), y", "test_images: must be a tensor that numpy can hold"),
        ("return x[0], y, x, y", "train_images: must be [n, h, w] or [n, c, h, w] without a zero, got (4, 5)"),
        ("return x, y, x[:0], y[:0]", "test_images: must be [n, h, w] or [n, c, h, w] without a zero, got (0, 4, 5)"),
        ("return np.zeros((6, 8, 8, 3), 'u1'), y[:6], x, y", "channels must come before height and width"),
        ("return x, y.astype(float), x, y", "train_labels: must be integers"),
        ("return x, y > 0, x, y", "train_labels: must be integers"),
        ("return x, y[:, None], x, y", "train_labels: must be integers, one for each of 36 images, got int64 (36, 1)"),
        ("return x, y, x, y[:5]", "test_labels: must be integers, one for each of 36 images, got int64 (5,)"),
        ("return x, y - 1, x, y", "train_labels: must count from 0, got -1 to 1"),
        ("return x, y, x, y.astype('u8') + 2**63", "test_labels: must count from 0"),
        ("return x, y * 10**15, x, y", "at least 2 classes, each with at least 2 training images"),
        ("return x, y * 0, x, y * 0", "at least 2 classes"),
        ("return x, y, x, y + 1", "got 0 of class 3"),
        ("return x, y * 2, x, y", "got 0 of class 1"),
        ("return x, y, x[:, :3], y", "images must have the (channels, height, width) of"),
    ],
)
def test_function_that_breaks_its_contract_is_refused(
    write_module: Callable[[str], str], body: str, expected: str
) -> None:
    lines = ["import numpy as np, torch", "def load():", "    x = np.zeros((36, 4, 5), np.uint8)"]
    name = write_module("\n".join([*lines, "    y = np.arange(36) % 3", f"    {body}"])) + ":load"
    message = refusal(name)
    assert message.startswith(f"{name}: ")
    assert expected in message


# On the device


def make_split(count: int = 2600, classes: int = 2, seed: int = 0) -> Split:
    """More images than are widened at a time."""
    generator = np.random.default_rng(seed)
    images = generator.integers(3, 200, (count, 2, 3, 4), np.uint8)
    return Split(images=images, labels=generator.integers(0, classes, count))


def test_split_is_placed_on_the_cpu_without_a_copy_even_if_read_only() -> None:
    split = make_split(10)
    for array in (split.images, split.labels):
        array.flags.writeable = False
    placed = place_split(split, CPU)
    assert placed.images.dtype == torch.uint8
    assert placed.labels.dtype == torch.int64
    assert placed.images.data_ptr() == split.images.ctypes.data
    assert placed.labels.data_ptr() == split.labels.ctypes.data


def test_placing_silences_no_other_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(_: Any) -> torch.Tensor:
        warnings.warn("another", UserWarning, stacklevel=1)
        return torch.zeros(1)

    monkeypatch.setattr(torch, "from_numpy", warn)
    with pytest.warns(UserWarning, match="another"):
        place_split(make_split(10), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_split_and_batches_are_placed_on_the_gpu() -> None:
    device, split = torch.device("cuda"), make_split(10)
    placed = place_split(split, device)
    assert placed.images.device.type == placed.labels.device.type == "cuda"
    np.testing.assert_array_equal(placed.images.cpu().numpy(), split.images)
    on_gpu = batch_indices(100, 8, torch.Generator().manual_seed(1), device)
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), batch_indices(100, 8, torch.Generator().manual_seed(1), CPU))


def test_minmax_maps_the_training_pixels_to_0_and_1() -> None:
    split = make_split()
    split.images[-1, 0, 0, 0] = 215  # in the last chunk
    scaled = scale_images(torch.from_numpy(split.images), fit_input_scaling(split, "minmax"))
    assert scaled.dtype == torch.float32
    assert scaled.shape == split.images.shape
    assert (scaled.min().item(), scaled.max().item()) == (0, 1)
    expected = (split.images.astype(np.float64) - 3) / (215 - 3)
    np.testing.assert_allclose(scaled.numpy(), expected, rtol=1e-6)


def test_standard_scaling_gives_the_training_pixels_mean_0_and_deviation_1() -> None:
    split = make_split()
    scaling = fit_input_scaling(split, "standard")
    assert scaling.shift == pytest.approx(split.images.mean(dtype=np.float64), rel=1e-12)
    assert scaling.factor == pytest.approx(1 / split.images.std(dtype=np.float64), rel=1e-12)
    scaled = scale_images(torch.from_numpy(split.images), scaling)
    assert scaled.mean().item() == pytest.approx(0, abs=1e-5)
    assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["minmax", "standard"])
def test_scaling_of_a_data_set_knows_nothing_of_validation_and_test(tmp_path: Path, method: str) -> None:
    dataset = load_dataset("mnist", write_set(tmp_path))
    elsewhere = Split(images=dataset.test.images // 2, labels=dataset.test.labels)
    changed = dataclasses.replace(dataset, validation=elsewhere, test=elsewhere)
    scaling = fit_input_scaling(dataset.train, method)
    assert fit_input_scaling(changed.train, method) == scaling
    pixels = dataset.train.images
    expected = pixels.mean(dtype=np.float64) if method == "standard" else pixels.min()
    assert scaling.shift == pytest.approx(expected)


def test_scaling_leaves_the_resident_images_as_they_are() -> None:
    images = torch.arange(6, dtype=torch.uint8)
    assert scale_images(images, data.InputScaling(shift=1, factor=2)).tolist() == [-2, 0, 2, 4, 6, 8]
    assert images.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", ["minmax", "standard"])
def test_constant_images_cannot_be_scaled(method: str) -> None:
    split = Split(images=np.full((4, 1, 2, 2), 9, np.uint8), labels=np.zeros(4, np.int64))
    with pytest.raises(InputError, match="all are 9"):
        fit_input_scaling(split, method)


@given(count=st.integers(1, 200), batch_size=st.integers(1, 200), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=50, deadline=None, database=None)
def test_batches_hold_each_index_at_most_once_and_are_full(count: int, batch_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if batch_size > count:
        with pytest.raises(InputError, match=rf"batch_size: .* {count} images .* got {batch_size}"):
            batch_indices(count, batch_size, generator, CPU)
        return
    batches = batch_indices(count, batch_size, generator, CPU)
    assert batches.shape == (count // batch_size, batch_size)
    assert batches.dtype == torch.int64
    assert len(set(batches.ravel().tolist())) == batches.numel()
    assert batches.min() >= 0
    assert batches.max() < count


def test_batches_repeat_with_the_seed_and_differ_between_epochs() -> None:
    first, again, other = (torch.Generator().manual_seed(seed) for seed in (5, 5, 6))
    torch.manual_seed(0)
    epochs = [batch_indices(1000, 32, first, CPU) for _ in range(3)]
    torch.manual_seed(1)  # the global generator plays no part
    assert all(torch.equal(epoch, batch_indices(1000, 32, again, CPU)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], batch_indices(1000, 32, other, CPU))
    # What is dropped changes too: over epochs every image is seen.
    assert len(set(torch.cat(epochs).ravel().tolist())) == 1000


# Curriculum and class weights


def test_difficulty_is_the_distance_to_the_mean_image_of_the_class() -> None:
    split = make_split(classes=2)
    means = [split.images[split.labels == c].astype(np.float64).mean(axis=0) for c in range(2)]
    distances = [np.sqrt(((image - means[c]) ** 2).sum()) for image, c in zip(split.images, split.labels, strict=True)]
    order = difficulty_order(split, 3)  # a class without an image is no fault
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(split)))
    assert np.diff(np.array(distances)[order]).min() >= -1e-9


def test_images_of_one_difficulty_keep_their_order() -> None:
    split = Split(images=np.full((50, 1, 2, 2), 7, np.uint8), labels=np.arange(50) % 2)
    split.images[10] = 9
    split.images[11] = 9
    easy = [i for i in range(50) if i not in {10, 11}]
    assert difficulty_order(split, 2).tolist() == [*easy, 10, 11]


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [
        (1, [1]),
        (2, [0.5, 1]),
        (3, [0.5, 1, 1]),
        (4, [0.5, 0.75, 1, 1]),
        (5, [0.5, 0.75, 1, 1, 1]),
        (10, [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1]),
    ],
)
def test_linear_curriculum_grows_from_a_half_to_all_for_the_last_half(max_epochs: int, expected: list[float]) -> None:
    epochs = range(max_epochs)
    assert [curriculum_fraction("linear", epoch, max_epochs) for epoch in epochs] == pytest.approx(expected)
    assert [curriculum_fraction("none", epoch, max_epochs) for epoch in epochs] == [1.0] * max_epochs


def test_balanced_class_weights_are_scikit_learns() -> None:
    labels = np.repeat(np.arange(3), (2, 5, 13))
    weights = class_weights(labels, 3, "balanced")
    assert weights is not None
    assert weights.dtype == torch.float32
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    assert class_weights(labels, 3, "none") is None


def test_class_without_an_image_cannot_be_weighted() -> None:
    with pytest.raises(InputError, match="class 3 has none"):
        class_weights(np.array([0, 1, 2, 4]), 5, "balanced")
