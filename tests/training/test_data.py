"""Data sets: checked, made by the user's own function, and split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from refusals import refusal
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from small_mnist import Arrays, make_arrays

from tune_amp.training import data
from tune_amp.training.data import Dataset, Split, describe_tail, load_dataset, make_long_tail, thin_classes
from tune_amp.training.mnist_files import FILE_STEMS, IMAGES_MAGIC, LABELS_MAGIC, read_idx
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import InputError, TrialConfig

pytestmark = pytest.mark.usefixtures("cache")

LoadArrays = Callable[[Arrays], Dataset]


@pytest.fixture
def load_arrays(monkeypatch: pytest.MonkeyPatch) -> LoadArrays:
    """A data set of the given arrays, as if a user's function had returned them."""

    def load(arrays: Arrays) -> Dataset:
        monkeypatch.setattr(data, "import_function", lambda _: lambda: arrays)
        return load_dataset("user_module:load")

    return load


def rows_of(*splits: Split) -> npt.NDArray[Any]:
    """Every image with its label as one sorted value, to compare sets of them."""
    parts = [np.concatenate([s.images.reshape(len(s), -1), s.labels[:, None].astype(np.uint8)], axis=1) for s in splits]
    rows = np.ascontiguousarray(np.concatenate(parts))
    return np.sort(rows.view(f"V{rows.shape[1]}").ravel())


def test_unknown_name_lists_the_known_ones() -> None:
    message = refusal("cifar")
    assert "'cifar'" in message
    assert "auto, mnist, fashion_mnist, kmnist, digits, or module:function" in message


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
    images = read_idx(mnist_dir / f"{FILE_STEMS[0]}.gz", IMAGES_MAGIC)
    labels = read_idx(mnist_dir / f"{FILE_STEMS[1]}.gz", LABELS_MAGIC)
    original = Split(images=images[:, None], labels=labels.astype(np.int64))
    np.testing.assert_array_equal(rows_of(mnist.train, mnist.validation), rows_of(original))
    share = np.bincount(original.labels) / 12
    assert np.abs(np.bincount(mnist.validation.labels) - share).max() <= 1


@pytest.mark.parametrize("seed", range(100))
def test_split_is_that_of_scikit_learn(seed: int) -> None:
    """Of classes of any sizes, with ties among their remainders."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(2, 40, generator.integers(2, 12))
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes if seed % 3 else sizes.max()))
    images = np.arange(len(labels), dtype=np.uint16)  # each is its own number
    count = int(generator.integers(len(sizes), len(labels) - len(sizes) + 1))
    found = data._stratified_split(Split(images=images, labels=labels), count)
    expected = train_test_split(images, test_size=count, stratify=labels, random_state=data.SPLIT_SEED)
    for part, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part.images, np.sort(wanted))


def test_split_is_disjoint_and_does_not_follow_the_global_seed(load_arrays: LoadArrays) -> None:
    images = np.arange(240, dtype=np.uint8).reshape(240, 1, 1)  # each image is its own number
    labels = (np.arange(240) % 10).astype(np.uint8)
    held = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002  # the global generator is what must not matter
        dataset = load_arrays([images, labels, images[:10], labels[:10]])
        np.testing.assert_array_equal(dataset.train.labels, dataset.train.images.ravel() % 10)
        assert sorted([*dataset.train.images.ravel(), *dataset.validation.images.ravel()]) == list(range(240))
        assert np.bincount(dataset.validation.labels).tolist() == [2] * 10
        held.append(dataset.validation.images.ravel().tolist())
    assert held[0] == held[1]
    assert held[0] not in ([*range(20)], [*range(220, 240)])  # drawn, not cut off


def test_smallest_data_set_leaves_every_class_on_both_sides(load_arrays: LoadArrays) -> None:
    dataset = load_arrays(make_arrays(train=20, test=10))
    assert np.bincount(dataset.train.labels).tolist() == [1] * 10
    assert np.bincount(dataset.validation.labels).tolist() == [1] * 10


@pytest.mark.parametrize("changed", range(4))
def test_hash_changes_with_one_value_of_any_array(load_arrays: LoadArrays, changed: int) -> None:
    first = load_arrays(make_arrays()).content_hash
    assert load_arrays(make_arrays()).content_hash == first
    arrays = make_arrays()
    arrays[changed].flat[-1] -= 1
    assert load_arrays(arrays).content_hash != first


def test_hash_changes_with_the_shape_alone(load_arrays: LoadArrays) -> None:
    arrays = make_arrays()
    turned = [arrays[0].reshape(-1, 5, 4), arrays[1], arrays[2].reshape(-1, 5, 4), arrays[3]]
    assert load_arrays(arrays).content_hash != load_arrays(turned).content_hash


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


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise KeyError('x')", "the call failed (KeyError: 'x')"),
        ("raise SystemExit(3)", "the call failed (RuntimeError: the code called sys.exit(3))"),
        ("raise KeyboardInterrupt", "the call failed (RuntimeError: the code raised KeyboardInterrupt)"),
        (
            "return 1",
            "must return (train_images, train_labels, test_images, test_labels), or six with validation_images and "
            "validation_labels in the middle, or two or three parts, each a pair (images, labels) or a torch Dataset, "
            "got int",
        ),
        ("return x, y, x", "got 3 values, train of type ndarray"),
        ("return x.tolist(), y, x, y", "must be a numpy array or a torch tensor, got list; numpy.asarray makes one"),
        ("return x, y, x[:, None] / 255, y", "train_images: must have the dtype of user_module"),
        ("return x, y, torch.zeros(3, dtype=torch.bfloat16), y", "test_images: must be a tensor that numpy can hold"),
        (
            "return x[0], y, x, y",
            "train_images: uint8 images must be [n, h, w] or [n, c, h, w] without a zero (integer tokens must be "
            "int64), got (4, 5)",
        ),
        ("return x, y, x[:0], y[:0]", "test_images: uint8 images must be [n, h, w] or [n, c, h, w] without a zero"),
        ("return x, y.astype(float), x, y", "train_labels: must be integers"),
        ("return x, y > 0, x, y", "train_labels: must be integers"),
        ("return x, y[:, None], x, y", "train_labels: must be integers, one for each of 36 images, got int64 (36, 1)"),
        ("return x, y, x, y[:5]", "test_labels: must be integers, one for each of 36 images, got int64 (5,)"),
        ("return x, y - 1, x, y", "train_labels: must count from 0, got -1 to 1; number the classes anew"),
        ("return x, y, x, y.astype('u8') + 2**63", "test_labels: must count from 0"),
        ("return x, y * 10**15, x, y", "at least 2 classes, each with at least 2 training images"),
        ("return x, y * 0, x, y * 0", "at least 2 classes"),
        ("return x, y, x, y + 1", "got 0 of class 3"),
        ("return x, y * 2, x, y", "got 0 of class 1"),
        ("return x, y, x[:, :3], y", "must have the shape (channels, height, width for images) of"),
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


@pytest.mark.parametrize(
    ("shape", "turned"),
    [
        ((28, 28, 1), True),
        ((8, 8, 3), True),
        ((48, 64, 3), True),
        ((128, 64, 4), True),
        ((64, 128, 1), False),  # 64 sensors, 128 samples
        ((64, 1, 1), False),  # features of a table
        ((12, 4, 4), False),
        ((64, 1, 3), False),
        ((3, 8, 8), False),
        ((1, 28, 28), False),
        ((28, 28, 2), False),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_only_what_is_nearly_surely_channels_last_is_turned_and_that_is_said(
    load_arrays: LoadArrays, shape: tuple[int, int, int], turned: bool, dtype: str
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, *shape), np.uint8).astype(dtype)
    labels = (np.arange(24) % 2).astype(np.uint8)
    dataset = load_arrays([images, labels, images, labels])
    if not turned:
        assert (dataset.input_shape, dataset.notice) == (shape, None)
        np.testing.assert_array_equal(dataset.test.images, images)
        return
    height, width, channels = shape
    assert dataset.input_shape == (channels, height, width)
    assert dataset.test.images.flags.c_contiguous
    np.testing.assert_array_equal(dataset.test.images[:, -1], images[..., -1])
    said = f"channels come last in (24, {height}, {width}, {channels}): taken as (24, {channels}, {height}, {width})"
    assert dataset.notice == "; ".join(f"user_module:load: {part}_images: {said}" for part in ("train", "test"))


# Other inputs than uint8 images, and a validation split of the user's own

FLOATS = """
import numpy as np
import torch
generator = np.random.default_rng(0)
labels = np.arange(60) % 3
table = generator.normal(size=(60, 4)) + 4 * (labels[:, None] == np.arange(4))
words = (labels[:, None] * 5 + generator.integers(0, 5, (60, 6))).astype(np.uint16)
images = generator.integers(0, 256, (60, 4, 4), np.uint8)
def floats():
    return table, labels, table[:6], labels[:6]
def tensors():
    return [torch.from_numpy(part) for part in (table, labels, table[:6], labels[:6])]
def tokens():
    return words, labels, words[:6], labels[:6]
def own_validation():
    return images[:30], labels[:30], images[30:40], labels[30:40], images[40:], labels[40:]
def pairs():
    return (images[:30], labels[:30]), (images[30:40], labels[30:40]), (images[40:], labels[40:])
def net(input_shape, num_classes, width=8):
    layers = torch.nn.Linear(*input_shape, width), torch.nn.ReLU(), torch.nn.Linear(width, num_classes)
    return torch.nn.Sequential(*layers)
class Words(torch.nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.bag, self.head = torch.nn.EmbeddingBag(15, 8), torch.nn.LazyLinear(num_classes)
    def forward(self, words):
        return self.head(self.bag(words))
"""


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    ("function", "net", "dtype", "shape"),
    [("floats", "net", "float32", (4,)), ("tensors", "net", "float32", (4,)), ("tokens", "Words", "int64", (6,))],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_floats_and_tokens_reach_the_model_as_they_are(
    function: str, net: str, dtype: str, shape: tuple[int], precision: str, write_module: Callable[[str], str]
) -> None:
    module = write_module(FLOATS)
    dataset = load_dataset(f"{module}:{function}")
    assert dataset.train.images.dtype == np.dtype(dtype)
    assert (dataset.input_shape, dataset.notice) == (shape, None)
    placed = TrainingData(dataset.train, dataset.validation, dataset.num_classes, torch.device("cpu"))
    config = TrialConfig(model=f"{module}:{net}", lr=0.05, batch_size=8, max_epochs=6, precision=precision)
    run = TrainingRun(config, placed)
    seen: list[torch.Tensor] = []
    run.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    *_, last = run.epochs()
    given = {row.tobytes() for row in dataset.train.images}
    assert {row.tobytes() for row in seen[0].numpy()} <= given
    assert last.val_accuracy is not None
    assert last.val_accuracy > 0.6
    assert len(last.val_recalls) == 3


@pytest.mark.parametrize("function", ["own_validation", "pairs"])
def test_a_validation_split_of_the_users_own_is_kept(function: str, write_module: Callable[[str], str]) -> None:
    module = write_module(FLOATS)
    dataset = load_dataset(f"{module}:{function}")
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [30, 10, 20]
    assert dataset.validation.labels.tolist() == [index % 3 for index in range(30, 40)]
    assert dataset.validation.images.shape == (10, 1, 4, 4)
    assert dataset.content_hash != load_dataset(f"{module}:floats").content_hash


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return table, table[:, 0], table, labels", "train_labels: must be integers, one for each of 60 images"),
        ("return table, table[:, 0], table, labels", "anything but a class needs a task of your own: --task m"),
        ("x = table.copy(); x[3] = np.nan; return x, labels, table, labels", "finite in float32, got nan; convert or"),
        ("return table.astype(str), labels, table, labels", "must be uint8 images, floats or integers, got <U"),
        ("return labels, labels, labels, labels", "train_images: must be [n, ...] with two dimensions or more"),
        ("return table[:, :2], labels, table, labels", "must have the shape (channels, height, width for"),
        ("return table, labels, table[:, :2], labels, table, labels", "of user_module_0:own: validation_images"),
        ("return table, labels, table, labels + 1, table, labels", "got 0 of class 3"),
        ("return (table, labels), table", "got 2 values, test of type ndarray"),
    ],
)  # fmt: skip
def test_a_misfit_of_other_inputs_is_refused(body: str, expected: str, write_module: Callable[[str], str]) -> None:
    name = write_module(FLOATS + f"def own():\n    {body}\n") + ":own"
    message = refusal(name)
    assert message.startswith(f"{name}: ")
    assert expected in message


# A long tail


def count_classes(split: Split) -> list[int]:
    return [int(count) for count in np.bincount(split.labels, minlength=10)]


def test_class_sizes_of_a_long_tail_fall_exponentially_from_the_first_label_to_the_last(mnist: Dataset) -> None:
    long = make_long_tail(mnist, 100.0)
    counts = count_classes(long.train)
    assert counts[0] == count_classes(mnist.train)[0]  # as many as the data allow
    assert counts == [round(counts[0] * 100 ** (-label / 9)) for label in range(10)]
    assert counts[0] / counts[9] == pytest.approx(100, rel=0.01)
    assert (len(long.train), long.imbalance) == (13_474, 100)
    assert describe_tail(long) == " (long tail 100:1, 5,429 to 54 a class)"
    assert describe_tail(mnist) == ""


def test_a_long_tail_leaves_validation_test_and_hash_as_they_are(digits: Dataset) -> None:
    long = make_long_tail(digits, 20.0)
    assert long.validation is digits.validation
    assert long.test is digits.test
    assert (long.content_hash, long.name) == (digits.content_hash, digits.name)
    assert make_long_tail(digits, 1.0) is digits
    assert make_long_tail(long, 20.0) is long  # not thinned again


def test_images_of_a_long_tail_are_always_the_same_and_in_their_order(digits: Dataset) -> None:
    np.random.seed(1)  # noqa: NPY002 - the global generator plays no part
    long = thin_classes(digits.train, 10, 20.0)
    np.random.seed(2)  # noqa: NPY002
    again = thin_classes(digits.train, 10, 20.0)
    np.testing.assert_array_equal(long.images, again.images)
    numbered = Split(images=np.arange(len(digits.train))[:, None], labels=digits.train.labels)
    places = thin_classes(numbered, 10, 20.0).images[:, 0]
    assert np.diff(places).min() > 0
    np.testing.assert_array_equal(long.images, digits.train.images[places])
    np.testing.assert_array_equal(long.labels, digits.train.labels[places])
    last = np.flatnonzero(digits.train.labels == 9)
    kept = places[long.labels == 9]
    assert kept.tolist() != last[: len(kept)].tolist()  # drawn, not the first ones


def test_most_images_are_kept_that_the_frequencies_of_the_given_data_allow() -> None:
    labels = np.repeat(np.arange(3), [50, 8, 90])
    split = Split(images=np.zeros((148, 1, 2, 2), np.uint8), labels=labels)
    assert np.bincount(thin_classes(split, 3, 4.0).labels).tolist() == [16, 8, 4]


def test_a_class_that_would_keep_one_image_is_refused(digits: Dataset) -> None:
    with pytest.raises(InputError) as caught:
        make_long_tail(digits, 100.0)
    rule = "each class of digits must keep at least 2 training images"
    assert str(caught.value) == f"imbalance: {rule}, got 1 of class 9 at 100:1"
    with pytest.raises(InputError, match="got 0 of class 1 at 1e\\+308:1"):
        make_long_tail(digits, 1e308)  # without a warning of NumPy's
    assert min(count_classes(make_long_tail(digits, 60.0).train)) == 2
