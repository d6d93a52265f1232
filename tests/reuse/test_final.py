"""A chosen configuration trained again: for use, on everything but the test set; or as a replay, bit for bit."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from records import make_epoch
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_runs import TIED_MODEL

from tune_amp.reuse import final as reuse
from tune_amp.reuse.final import (
    CARD_FILE,
    EPOCH_FIELDS,
    MEASURED_FIELDS,
    METRICS_FILE,
    FinalResult,
    FinalTraining,
    find_differences,
    replay_trial,
)
from tune_amp.training.batches import fit_input_scaling
from tune_amp.training.data import Dataset, Split, make_long_tail, thin_classes
from tune_amp.training.models import build_model
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import EpochMetrics, InputError, TrialConfig

CPU = torch.device("cpu")


def make_split(count: int, seed: int) -> Split:
    """Images of 4x4 pixels that can be told apart, though not all of them: class c is brighter in row c."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    images = generator.integers(0, 150, (count, 1, 4, 4))
    images[np.arange(count), 0, labels] += 40
    return Split(images=images.astype(np.uint8), labels=labels)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    train, validation, test = (make_split(count, seed=count) for count in (50, 22, 37))
    return Dataset(name="small", num_classes=3, content_hash="0", train=train, validation=validation, test=test)


def make_config(**settings: Any) -> TrialConfig:
    return TrialConfig(**{"lr": 0.01, "batch_size": 8, "max_epochs": 3, **settings})


def train_finally(config: TrialConfig, dataset: Dataset) -> tuple[FinalTraining, FinalResult]:
    final = FinalTraining(config, dataset, CPU)
    assert len(list(final.epochs())) == config.max_epochs
    return final, final.test()


def count_correct(model: torch.nn.Module, split: Split, scaled_as: Split) -> int:
    """Images of ``split`` classified correctly, counted in numpy."""
    scaling = fit_input_scaling(scaled_as, "minmax")
    images = torch.from_numpy(((split.images - np.float32(scaling.shift)) * scaling.factor).astype(np.float32))
    with torch.no_grad():
        return int((model.eval()(images).argmax(dim=1).numpy() == split.labels).sum())


def test_joined_splits_hold_both_in_order() -> None:
    first, second = make_split(5, 0), make_split(3, 1)
    whole = first.join(second)
    assert len(whole) == 8
    assert whole.images.dtype == np.uint8
    assert whole.labels.dtype == np.int64
    for part, start in ((first, 0), (second, 5)):
        np.testing.assert_array_equal(whole.images[start : start + len(part)], part.images)
        np.testing.assert_array_equal(whole.labels[start : start + len(part)], part.labels)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_final_training_is_on_training_and_validation_images_together(precision: str, dataset: Dataset) -> None:
    config = make_config(precision=precision, seed=2)
    final = FinalTraining(config, dataset, CPU)
    whole = TrainingRun(config, TrainingData(dataset.train.join(dataset.validation), None, 3, CPU))
    for metrics, expected in zip(final.epochs(), whole.epochs(), strict=True):
        assert metrics.steps == metrics.epoch * ((50 + 22) // 8)
        assert (metrics.val_loss, metrics.val_accuracy, metrics.val_seconds) == (None, None, 0.0)
        assert find_differences(expected, metrics) == []
    assert final.divergence is None
    result = final.test()
    assert (result.train_images, result.test_images) == (72, 37)
    assert (result.config, result.device) == (config, "cpu")
    assert (result.input_shape, result.num_classes, result.data_hash) == ((1, 4, 4), 3, "0")
    assert result.num_parameters == 16 * 256 + 256 + 256 * 3 + 3
    assert [metrics.epoch for metrics in result.epochs] == [1, 2, 3]


def test_final_training_and_replay_have_the_long_tail_that_the_configuration_was_chosen_on(dataset: Dataset) -> None:
    config = make_config(imbalance=3.0, batch_size=4, max_epochs=1)
    long = make_long_tail(dataset, 3.0)
    _, result = train_finally(config, dataset)
    part = thin_classes(dataset.validation, 3, 3.0)
    assert len(part) < 22
    assert result.train_images == len(long.train) + len(part) < 72
    expected = TrainingRun(config, TrainingData(long.train.join(part), None, 3, CPU)).train_epoch()
    assert find_differences(expected, result.epochs[0]) == []
    trial = TrainingRun(config, TrainingData(long.train, dataset.validation, 3, CPU)).train_epoch()
    for given in (dataset, long):
        [replayed] = replay_trial(config, given, CPU)
        assert find_differences(trial, replayed) == []


def test_test_set_is_what_is_tested(dataset: Dataset) -> None:
    final, result = train_finally(make_config(max_epochs=1), dataset)
    whole = dataset.train.join(dataset.validation)
    correct = count_correct(final.models["model"], dataset.test, scaled_as=whole)
    assert result.test_accuracy == pytest.approx(correct / 37, abs=1e-12)
    counts = np.bincount(dataset.test.labels)
    assert sum(count * recall for count, recall in zip(counts, result.test_recalls, strict=True)) == pytest.approx(
        correct
    )
    assert 0 < correct < 37
    elsewhere = dataclasses.replace(dataset, test=make_split(90, 5))
    _, other = train_finally(make_config(max_epochs=1), elsewhere)
    assert other.test_loss != result.test_loss
    assert other.test_images == 90
    assert other.epochs[-1].train_loss == result.epochs[-1].train_loss  # the test set plays no part before


def test_test_set_is_not_read_before_the_last_epoch(dataset: Dataset) -> None:
    final = FinalTraining(make_config(), dataset, CPU)
    with pytest.raises(AssertionError):
        final.test()
    epochs = final.epochs()
    next(epochs)
    with pytest.raises(AssertionError):
        final.test()
    list(epochs)
    final.test()


def test_diverged_training_says_why_and_is_not_tested(dataset: Dataset) -> None:
    final = FinalTraining(make_config(lr=1e30, optimizer="sgd"), dataset, CPU)
    assert str(final.divergence) == "None"
    assert len(list(final.epochs())) == 1
    assert str(final.divergence).startswith("weights are not finite")
    with pytest.raises(AssertionError):
        final.test()


@pytest.mark.parametrize("model", ["simple_net", "conv_net", "vit", "tied"])
def test_saved_weights_give_the_same_test_result_in_a_fresh_model(
    model: str, dataset: Dataset, tmp_path: Path, write_module: Callable[[str], str]
) -> None:
    name = f"{write_module(TIED_MODEL)}:net" if model == "tied" else model
    final, result = train_finally(make_config(model=name, precision="bf16", max_epochs=1), dataset)
    final.save(tmp_path, result, {}, "")
    torch.manual_seed(77)
    fresh = build_model(name, dataset.input_shape, dataset.num_classes)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    missing, unexpected = fresh.load_state_dict(stored, strict=model != "tied")
    assert len(missing) == (model == "tied")  # one name of two for the same weights
    assert not unexpected
    whole = dataset.train.join(dataset.validation)
    assert count_correct(fresh, dataset.test, scaled_as=whole) / 37 == pytest.approx(result.test_accuracy, abs=1e-12)
    trained = final.models["model"].state_dict()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_saved_metrics_are_valid_json_with_configuration_and_source(
    precision: str, dataset: Dataset, tmp_path: Path
) -> None:
    config = make_config(precision=precision)
    final, result = train_finally(config, dataset)
    final.save(tmp_path, result, {"source": "best.parquet", "rank": 1}, "# a card\n")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert (content["source"], content["rank"]) == ("best.parquet", 1)
    assert TrialConfig(**content["config"]) == config
    assert content["test_accuracy"] == result.test_accuracy
    assert content["test_loss"] == result.test_loss
    assert tuple(content["test_recalls"]) == result.test_recalls
    assert (content["train_images"], content["test_images"], content["device"]) == (72, 37, "cpu")
    tuples = ("loss_scale_steps", "loss_scale_values", "val_recalls")
    epochs = [EpochMetrics(**{**epoch, **{name: tuple(epoch[name]) for name in tuples}}) for epoch in content["epochs"]]
    assert epochs == list(result.epochs)
    assert (tmp_path / CARD_FILE).read_text() == "# a card\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD_FILE, METRICS_FILE, "model.safetensors"]


def test_saving_leaves_a_file_that_was_put_there_meanwhile_and_nothing_of_its_own(
    dataset: Dataset, tmp_path: Path
) -> None:
    final, result = train_finally(make_config(), dataset)
    (tmp_path / METRICS_FILE).write_text("mine")
    with pytest.raises(InputError, match=f"--output: .*{METRICS_FILE} cannot be written"):
        final.save(tmp_path, result, {}, "# a card\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {METRICS_FILE: "mine"}


def test_test_loss_that_is_no_number_is_null_in_json(dataset: Dataset, tmp_path: Path) -> None:
    final, result = train_finally(make_config(max_epochs=1), dataset)
    final.save(tmp_path, dataclasses.replace(result, test_loss=math.inf, test_recalls=(0.5, math.nan)), {}, "")
    content = json.loads((tmp_path / METRICS_FILE).read_text())
    assert content["test_loss"] is None
    assert content["test_recalls"] == [0.5, None]


def test_weights_that_cannot_be_written_are_one_line(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    final, result = train_finally(make_config(max_epochs=1), dataset)
    monkeypatch.setattr(reuse, "save_model", refuse)
    with pytest.raises(
        InputError, match=r"^--output: .*model\.safetensors cannot be written \(No space left on device\)$"
    ):
        final.save(tmp_path, result, {}, "")


# Replaying a trial


def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(
    dataset: Dataset, write_module: Callable[[str], str]
) -> None:
    text = TIED_MODEL + "    return Extra()\nclass Extra(Net):\n    def get_extra_state(self): return {'version': 1}\n"
    name = write_module(text.replace("    return Net()\n", ""))
    with pytest.raises(InputError, match=r"^model: the state of Extra must be of dense tensors, .* \(AttributeError: "):
        FinalTraining(make_config(model=f"{name}:net"), dataset, CPU)


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "fp16", "init_scale": 2.0**26, "optimizer": "sgd"}, {"precision": "bf16", "model": "vit"}],
)
def test_replay_equals_the_record_bit_for_bit(settings: dict[str, Any], dataset: Dataset) -> None:
    config = make_config(seed=3, curriculum="linear", **settings)
    recorded = list(TrainingRun(config, TrainingData(dataset.train, dataset.validation, 3, CPU)).epochs())
    torch.manual_seed(99)
    again = list(replay_trial(config, dataset, CPU))
    assert [metrics.epoch for metrics in again] == [1, 2, 3]
    assert [find_differences(*pair) for pair in zip(recorded, again, strict=True)] == [[], [], []]
    other = next(replay_trial(dataclasses.replace(config, seed=4), dataset, CPU))
    assert {"train_loss", "val_loss"} <= set(find_differences(recorded[0], other))


RECORDED = make_epoch(train_loss=1.0)


@pytest.mark.parametrize("field", dataclasses.fields(EpochMetrics), ids=lambda field: field.name)
def test_difference_in_any_field_but_a_measured_one_is_told(field: "dataclasses.Field[Any]") -> None:
    change: dict[str, Any] = {field.name: (2,) if isinstance(getattr(RECORDED, field.name), tuple) else 7}
    changed = dataclasses.replace(RECORDED, **change)
    measured = field.name in {
        "train_seconds",
        "val_seconds",
        "probe_seconds",
        "data_seconds",
        "samples_per_second",
        "peak_memory_bytes",
    }
    assert (field.name in MEASURED_FIELDS) is measured
    assert find_differences(RECORDED, changed) == ([] if measured else [field.name])
    assert find_differences(changed, RECORDED) == ([] if measured else [field.name])


def test_fields_that_cannot_be_compared_are_left_out() -> None:
    assert EPOCH_FIELDS == ("loss_scale_steps", "loss_scale_values", "val_recalls")
    last = dataclasses.replace(RECORDED, loss_scale_steps=(), loss_scale_values=(), val_recalls=())
    again = dataclasses.replace(RECORDED, loss_scale_steps=(1,), loss_scale_values=(2.0,), val_recalls=(0.5,))
    assert find_differences(last, again) == list(EPOCH_FIELDS)
    assert find_differences(last, again, EPOCH_FIELDS) == []
    assert find_differences(last, dataclasses.replace(again, train_loss=3.0), EPOCH_FIELDS) == ["train_loss"]


def test_nan_equals_nan_and_nothing_else() -> None:
    diverged = dataclasses.replace(RECORDED, train_loss=math.nan)
    assert find_differences(diverged, dataclasses.replace(RECORDED, train_loss=math.nan)) == []
    assert find_differences(diverged, RECORDED) == ["train_loss"]
    assert find_differences(diverged, dataclasses.replace(RECORDED, train_loss=math.inf)) == ["train_loss"]
    absent = [dataclasses.replace(RECORDED, val_recalls=(0.5, float("nan"))) for _ in range(2)]
    assert find_differences(absent[0], absent[1]) == []
    assert find_differences(absent[0], dataclasses.replace(RECORDED, val_recalls=(0.5,))) == ["val_recalls"]
    missing = dataclasses.replace(RECORDED, val_loss=None)
    assert find_differences(dataclasses.replace(RECORDED, val_loss=math.nan), missing) == ["val_loss"]


def test_smallest_difference_is_told() -> None:
    near = dataclasses.replace(RECORDED, train_loss=math.nextafter(1.0, 2.0), val_accuracy=0.25)
    assert find_differences(RECORDED, near) == ["train_loss", "val_accuracy"]
