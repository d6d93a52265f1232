"""Data that does not stay on the device: the same training, read by a DataLoader."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from small_runs import make_split, untimed
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from tune_amp.training import streams
from tune_amp.training.batches import DeviceSplit, InputScaling
from tune_amp.training.data import Split, StreamedSplit, build_split, load_dataset, make_long_tail
from tune_amp.training.own_data import read_targets
from tune_amp.training.run import TrainingRun, estimate_epoch_seconds
from tune_amp.training.streams import StreamedBatches, count_in_batch, explain_too_large, place
from tune_amp.training.task import load_task_dataset
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import EpochMetrics, InputError, TrialConfig

CPU = torch.device("cpu")
WriteModule = Callable[[str], str]


def as_dataset(split: Split) -> Split:
    """The same items as a data set of torch."""
    return build_split(TensorDataset(torch.from_numpy(split.images), torch.from_numpy(split.labels)), "data")


def train(data: TrainingData, **settings: Any) -> list[EpochMetrics]:
    config = TrialConfig(**{"lr": 0.01, "batch_size": 8, "max_epochs": 3, **settings})
    return [untimed(metrics, loop="") for metrics in TrainingRun(config, data).epochs()]


@pytest.fixture
def half_scaled() -> TrainingData:
    """Resident images whose pixels span all of uint8, as the scaling of a stream assumes."""
    split = make_split()
    split.images[0, 0, 3, :2] = 0, 255
    return TrainingData(split, make_split(21, seed=1), 3, CPU)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_streamed_images_train_as_resident_ones_do(precision: str, workers: int, half_scaled: TrainingData) -> None:
    host = half_scaled._host_train
    data = TrainingData(as_dataset(host), as_dataset(make_split(21, seed=1)), 3, CPU, workers=workers)
    settings = {"precision": precision, "accumulate": 2, "class_weighting": "balanced", "max_epochs": 2}
    assert train(data, **settings) == train(half_scaled, **settings)
    run = TrainingRun(TrialConfig(batch_size=8), data)
    assert run.train_epoch().loop == "eager: streamed from TensorDataset"
    assert data.guessing == half_scaled.guessing


AUGMENTED = """
import random
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tune_amp.training import Task
class Noisy(Dataset):
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        noise = random.random() + np.random.random() + float(torch.rand(()))
        return {"x": np.full(3, index + noise, np.float64), "scale": 2.0}, index / self.count
class Streamed(Task):
    metric = ("mae", "min")
    def data(self):
        return Noisy(40), Noisy(10), Noisy(7)
    def model(self):
        return nn.Linear(3, 1)
    def loss(self, model, batch):
        (inputs, targets) = batch
        return (model(inputs["x"] / 40 * inputs["scale"][:, None])[:, 0] - targets).square().mean()
    def score(self, model, batch):
        return {"mae": (model(batch[0]["x"])[:, 0] - batch[1]).abs().sum()}
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_draws_random_numbers_repeats_and_resumes_bit_for_bit(
    workers: int, write_module: WriteModule
) -> None:
    name = write_module(AUGMENTED) + ":Streamed"
    dataset = load_task_dataset(name)
    assert (len(dataset.train), len(dataset.test)) == (40, 7)
    data = TrainingData(dataset.train, dataset.validation, 0, CPU, workers=workers)
    config = TrialConfig(model=name, dataset=name, task=name, batch_size=4, max_epochs=3, lr=0.05, precision="fp16")
    whole = [untimed(metrics) for metrics in TrainingRun(config, data).epochs()]
    assert whole[0].loop == "eager: streamed from Noisy"
    assert whole[0].underflow_share is not None  # the probe reads items too
    first = TrainingRun(config, data)
    parts = [first.train_epoch()]
    second = TrainingRun(config, data)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    parts += second.epochs()
    assert [untimed(metrics) for metrics in parts] == whole
    other = [untimed(metrics) for metrics in TrainingRun(TrialConfig(**{**vars(config), "seed": 1}), data).epochs()]
    assert other != whole
    assert set(second.test(dataset.test)["metrics"]) == {"test_mae"}


def test_items_of_workers_differ_from_epoch_to_epoch_and_by_worker(write_module: WriteModule) -> None:
    name = write_module(AUGMENTED) + ":Streamed"
    placed = place(load_task_dataset(name).train, CPU, 2)
    assert isinstance(placed, StreamedBatches)
    scaling = InputScaling(shift=0.0, factor=1.0)
    order = torch.arange(8).view(4, 2)

    def noise(seed: int) -> list[float]:
        batches = placed.stream(order, seed, scaling)
        return (torch.cat([inputs["x"][:, 0] for inputs, _ in batches]) - torch.arange(8)).tolist()

    once, again, next_epoch = noise(1), noise(1), noise(2)
    assert once == again
    assert len({*once, *next_epoch}) == 16
    inputs, targets = next(iter(placed.stream(order, 1, scaling)))
    assert inputs["x"].dtype == targets.dtype == torch.float32
    assert count_in_batch((inputs, targets)) == 2


# What fits


class Item(NamedTuple):
    image: torch.Tensor
    target: int


class NamedItems(TorchDataset[Item]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Item:
        return Item(torch.full((1, 2, 2), index, dtype=torch.uint8), index)


@pytest.mark.parametrize("workers", [0, 1])
def test_named_items_keep_their_names(workers: int) -> None:
    split = StreamedBatches(NamedItems(), "", CPU, input_size=4, workers=workers)
    scaling = InputScaling(shift=0.0, factor=0.5)
    batches = [split.take(torch.tensor([1, 3]), scaling), *split.stream([torch.tensor([1, 3])], 0, scaling)]
    for batch in batches:
        assert batch.image[:, 0, 0, 0].tolist() == [0.5, 1.5]
        assert batch.target.tolist() == [1, 3]


def test_arrays_that_exceed_half_of_a_gpus_free_memory_are_streamed() -> None:
    assert explain_too_large(2**30, None) is None
    assert explain_too_large(2**30, 2**31) is None
    assert explain_too_large(2**31, 2**31) == "2.0 GiB exceed 50% of the GPU's free 2.0 GiB"


def test_arrays_that_do_not_fit_train_as_those_that_do(
    monkeypatch: pytest.MonkeyPatch, half_scaled: TrainingData
) -> None:
    host = half_scaled._host_train
    monkeypatch.setattr(streams, "explain_too_large", lambda *_: "too much")
    data = TrainingData(host, make_split(21, seed=1), 3, CPU)
    assert isinstance(half_scaled.train, DeviceSplit)
    assert isinstance(data.train, StreamedBatches)
    monkeypatch.undo()
    for each in (data, half_scaled):
        each.input_scaling = lambda _: InputScaling(shift=0.0, factor=1 / 255)  # type: ignore[assignment]
    assert train(data, curriculum="linear") == train(half_scaled, curriculum="linear")
    assert data.train.reason == "streamed from memory: too much"


# Plain functions that return data sets

LABELLED = """
import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset
class Images(Dataset):
    def __init__(self, count, item=lambda image: torch.from_numpy(image) / 255):
        self.targets = [index % 3 for index in range(count)]
        self.images = np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4), np.uint8)
        self.item = item
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):
        return self.item(self.images[index]), self.targets[index]
def load():
    return Images(60), Images(12)
def load_three():
    return Subset(Images(60), range(0, 60, 2)), Images(9), Images(12)
"""


def test_a_pair_of_torchvision_like_data_sets_is_split_by_class_and_trains(write_module: WriteModule) -> None:
    name = write_module(LABELLED) + ":load"
    dataset = load_dataset(name)
    assert (dataset.num_classes, dataset.input_shape, dataset.notice) == (3, (1, 4, 4), None)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (55, 5, 12)
    assert isinstance(dataset.train, StreamedSplit)
    assert np.bincount(dataset.validation.labels).min() > 0
    data = TrainingData(dataset.train, dataset.validation, dataset.num_classes, CPU)
    epochs = train(data, dataset=name)
    assert len(epochs) == 3
    assert len(epochs[0].val_recalls) == 3
    both = dataset.train.join(dataset.validation)
    assert sorted(both.labels) == sorted(index % 3 for index in range(60))
    assert estimate_epoch_seconds(TrialConfig(), dataset.train, 3, CPU) > 0
    assert len(make_long_tail(dataset, 2.0).train) < 55
    assert load_dataset(name).content_hash == dataset.content_hash


def test_three_parts_keep_the_validation_split_that_they_hold(write_module: WriteModule) -> None:
    dataset = load_dataset(write_module(LABELLED) + ":load_three")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (30, 9, 12)
    assert dataset.train.labels.tolist() == [index % 3 for index in range(0, 60, 2)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "return TensorDataset(torch.zeros(9, 4)), Images(9)",
            ": train: a data set must list the class of each item as",
        ),
        (
            "x = Images(9); x.targets = None; return x, x",
            "anything but a class needs a task of your own: --task module:Cl",
        ),
        (
            "return Images(9, lambda image: 1 / 0), Images(9)",
            ": train: reading the first item failed (ZeroDivisionError",
        ),
        (
            "from PIL import Image; x = Images(9, lambda image: Image.fromarray(image[0])); return x, x",
            ": train: items must be tensors; give the data set transform=torchvision.transforms.ToTensor(), got Image",
        ),
        ("return Images(9), Images(9), Images(9), Images(9)", "got 4 values"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(body: str, expected: str, write_module: WriteModule) -> None:
    name = write_module(LABELLED + f"def own():\n    {body}\n") + ":own"
    with pytest.raises(InputError) as caught:
        load_dataset(name)
    assert str(caught.value).startswith(name)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"curriculum": "linear"}, "curriculum: must be none for images that are read one by one"),
        (
            {"input_scaling": "standard"},
            "input_scaling: must be minmax for images that are read one by one, got standard",
        ),
    ],
)
def test_settings_that_need_all_images_are_refused_for_a_stream(settings: dict[str, Any], expected: str) -> None:
    split = as_dataset(make_split())
    with pytest.raises(InputError, match=f"^{expected}$"):
        TrainingRun(TrialConfig(batch_size=8, **settings), TrainingData(split, split, 3, CPU))


def test_targets_are_read_without_reading_items() -> None:
    class Labelled(TorchDataset[Any]):
        labels = np.array([3, 1, 2])

    tensors = TensorDataset(torch.zeros(2, 1), torch.tensor([7, 8]))
    both: TorchDataset[Any] = ConcatDataset([Subset(Labelled(), [2, 0]), tensors])
    targets = read_targets(both)
    assert targets is not None
    assert targets.tolist() == [2, 3, 7, 8]
    assert read_targets(TorchDataset()) is None
