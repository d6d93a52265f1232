"""The four files: found in either layout, read, refused where damaged, downloaded from a server of our own."""

import contextlib
import gzip
import os
import pwd
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torchvision  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from small_mnist import Arrays, encode_idx, make_arrays

from tune_amp.training import mnist_files as idx_files
from tune_amp.training.data import Dataset, load_dataset
from tune_amp.training.mnist_files import IMAGES_MAGIC, LABELS_MAGIC, read_idx
from tune_amp.trial.config import InputError

pytestmark = pytest.mark.usefixtures("cache")

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_set(folder: Path, *, compressed: bool = False, arrays: Arrays | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in zip(STEMS, arrays or make_arrays(), strict=True):
        content = encode_idx(array)
        if compressed:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / stem).write_bytes(content)
    return folder


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data")


def pairs(images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> list[tuple[bytes, int]]:
    """Every image with its label, sorted, to compare sets of them."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


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
    images, labels = (
        np.concatenate([getattr(split, part) for split in (dataset.train, dataset.validation)])
        for part in ("images", "labels")
    )
    assert pairs(images, labels) == pairs(arrays[0], arrays[1])


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


def big_endian(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in numbers)


GOOD_IMAGES = encode_idx(make_arrays()[0])
GOOD_LABELS = encode_idx(make_arrays()[1])
DAMAGE = {
    "empty": ("train-images-idx3-ubyte", b"", "got 0 bytes"),
    "header cut": ("train-images-idx3-ubyte", GOOD_IMAGES[:15], "header of 16 bytes, got 15 bytes"),
    "truncated": ("train-images-idx3-ubyte", GOOD_IMAGES[:-1], "must hold 960 bytes after its header"),
    "trailing": ("t10k-labels-idx1-ubyte", GOOD_LABELS + b"\0", "got more"),
    "no values": ("train-images-idx3-ubyte", big_endian(0x803, 0, 4, 5), "got shape (0, 4, 5)"),
    "absurd": ("train-images-idx3-ubyte", big_endian(0x803, *[2**32 - 1] * 3), "4,294,967,295"),
    "absurd images": ("train-images-idx3-ubyte", big_endian(0x803, 2, *[2**32 - 1] * 2), "4294967295"),
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
        patch.setattr(Path, "open", refuse)
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


@settings(max_examples=150, database=None)
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


def test_hash_of_the_content_does_not_change_with_the_layout(tmp_path: Path) -> None:
    plain = load_dataset("mnist", write_set(tmp_path / "a"))
    compressed = load_dataset("kmnist", write_set(tmp_path / "b" / "KMNIST" / "raw", compressed=True).parents[1])
    assert plain.content_hash == compressed.content_hash


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
    closed_port: int,
) -> None:
    target = cache if place == "cache" else tmp_path / "new"
    if place == "data_dir":
        target.mkdir()
    if place == "environment":
        monkeypatch.setenv("TUNE_AMP_DATA", str(target))
    data_dir = target if place == "data_dir" else None
    with serve(read_from(mnist_dir)) as address:
        offer(monkeypatch, f"http://127.0.0.1:{closed_port}/", address)
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
    assert "corrupted" in message  # torchvision's word; which file it was, 0.26 does not say
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


def test_download_leaves_what_somebody_else_put_in_its_place(
    tmp_path: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "notes.txt").write_text("mine")
    with serve(read_from(mnist_dir)) as address:
        offer(monkeypatch, address)
        assert "download failed" in refusal("mnist", tmp_path)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {raw / "notes.txt": "mine"}


def test_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx_files, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)
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


def test_folder_that_cannot_be_written_to_is_a_refusal(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the place of the folder")
    assert "NotADirectoryError" in refusal("mnist", None)


def test_without_a_home_folder_the_refusal_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", fail)
    assert refusal("mnist", None).startswith("--data-dir: must be given where no HOME is set (")
