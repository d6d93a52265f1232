from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tune_amp.config import InputError
from tune_amp.data import Dataset, Split
from tune_amp.options import SearchOptions
from tune_amp.preflight import check_fit
from tune_amp.space import SearchSpace, load_space


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], SearchSpace]:
    def write_and_load(text: str) -> SearchSpace:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return load_space(str(path))

    return write_and_load


def make_dataset(train_images: int, name: str = "digits") -> Dataset:
    split = Split(images=np.zeros((train_images, 1, 28, 28), np.uint8), labels=np.zeros(train_images, np.int64))
    return Dataset(name=name, num_classes=10, train=split, validation=split, test=split, content_hash="")


LR = "  lr: {low: 1.0e-4, high: 0.1}\n"


@pytest.mark.parametrize(
    "entry", ["{low: 64, high: 2048}", "{low: 64, high: 2048, power_of_two: true}", "{choices: [2048, 64]}"]
)
def test_batch_larger_than_the_data_set_is_refused_with_file_field_and_counts(
    load: Callable[[str], SearchSpace], entry: str
) -> None:
    space = load(f"parameters:\n  batch_size: {entry}\n")
    with pytest.raises(InputError) as caught:
        check_fit(space, make_dataset(1413), SearchOptions())
    assert str(caught.value) == (
        f"{space.source}: batch_size: must be at most the 1,413 training images of digits, got 2048"
    )
    check_fit(space, make_dataset(2048), SearchOptions())


def test_fixed_batch_larger_than_the_data_set_is_refused(load: Callable[[str], SearchSpace]) -> None:
    space = load(f"parameters:\n{LR}fixed: {{batch_size: 101}}\n")
    with pytest.raises(InputError, match=r"batch_size: must be at most the 100 training images of digits, got 101$"):
        check_fit(space, make_dataset(100), SearchOptions())


def test_data_set_smaller_than_the_default_batch_is_refused_where_none_is_given(
    load: Callable[[str], SearchSpace],
) -> None:
    space = load(f"parameters:\n{LR}")
    with pytest.raises(InputError) as caught:
        check_fit(space, make_dataset(63, "my:data"), SearchOptions())
    assert str(caught.value) == "--dataset: my:data has fewer training images than the default batch_size"
    check_fit(space, make_dataset(64), SearchOptions())
    check_fit(load(f"parameters:\n{LR}fixed: {{batch_size: 16}}\n"), make_dataset(63), SearchOptions())


def test_model_that_cannot_be_imported_is_refused(load: Callable[[str], SearchSpace]) -> None:
    with pytest.raises(InputError) as caught:
        check_fit(load(f"parameters:\n{LR}"), make_dataset(99), SearchOptions(model="no_such_module:net"))
    reason = "ModuleNotFoundError: No module named 'no_such_module'"
    assert str(caught.value) == f"no_such_module:net: importing no_such_module failed ({reason})"


def test_model_that_does_not_fit_the_data_is_refused(
    load: Callable[[str], SearchSpace], write_module: Callable[[str], str]
) -> None:
    module = write_module("import torch\ndef net(shape, classes): return torch.nn.Linear(3, classes)\n")
    with pytest.raises(InputError) as caught:
        check_fit(load(f"parameters:\n{LR}"), make_dataset(99), SearchOptions(model=f"{module}:net"))
    assert str(caught.value).startswith(
        f"model: {module}:net must accept images of shape [batch, 1, 28, 28], got RuntimeError: "
    )
    assert "\n" not in str(caught.value)
