"""Training and evaluating one configuration: it learns, repeats, continues bit for bit, and says when it diverged."""

import dataclasses
import importlib
import io
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_memory import FakeMemory
from small_runs import make_split, untimed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tune_amp.training import batches, training_data
from tune_amp.training import run as training
from tune_amp.training.amp import fp32_arithmetic
from tune_amp.training.batches import batch_indices, place_split, scale_images
from tune_amp.training.data import Dataset, Split
from tune_amp.training.generators import read_generators, seed_generators
from tune_amp.training.memory import MemoryMeter, release_memory
from tune_amp.training.models import build_model
from tune_amp.training.optimizers import build_optimizer
from tune_amp.training.run import ESTIMATE_IMAGES, TrainingRun, estimate_epoch_seconds
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import MODELS, OPTIMIZERS, EpochMetrics, InputError, TrialConfig

CPU = torch.device("cpu")
WriteModule = Callable[[str], str]

# Initial weights from NumPy; in training, numbers of torch, of Python and of NumPy.
RANDOM_MODEL = """
import math
import random
import numpy as np
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 12), nn.ReLU(), nn.Dropout(0.5))
        self.block, self.head = nn.Linear(12, 12), nn.Linear(12, num_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(np.random.normal(0, 0.2, self.head.weight.shape)))
    def forward(self, images):
        hidden = self.stem(images)
        if not self.training or random.random() < 0.5:
            hidden = hidden + self.block(hidden)
        return self.head(hidden) + (np.random.normal() if self.training else 0)
"""


@pytest.fixture
def small_data() -> TrainingData:
    return TrainingData(make_split(), make_split(21, seed=1), 3, CPU)


def make_config(**settings: Any) -> TrialConfig:
    return TrialConfig(**{"lr": 0.01, "batch_size": 8, "max_epochs": 3, **settings})


def train(config: TrialConfig, data: TrainingData) -> list[EpochMetrics]:
    return [untimed(metrics) for metrics in TrainingRun(config, data).epochs()]


def weights_of(run: TrainingRun) -> list[Tensor]:
    return [tensor.clone() for tensor in run.model.state_dict().values()]


def equal_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Learning


@pytest.fixture(scope="module")
def digits_data(digits: Dataset) -> TrainingData:
    return TrainingData(digits.train, digits.validation, digits.num_classes, CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_simple_net_learns_digits_in_every_precision(precision: str, digits_data: TrainingData) -> None:
    epochs = train(make_config(precision=precision, batch_size=32, lr=3e-3), digits_data)
    assert len(epochs) == 3
    accuracy = epochs[-1].val_accuracy
    assert accuracy is not None
    assert 0.9 < accuracy <= 1
    assert epochs[-1].train_loss < epochs[0].train_loss / 3
    assert epochs[-1].state == "steady"


@pytest.mark.parametrize("name", ["conv_net", "vit"])
def test_other_built_in_models_train(name: str, digits: Dataset) -> None:
    few = Split(images=digits.train.images[:256], labels=digits.train.labels[:256])
    data = TrainingData(few, few, digits.num_classes, CPU)
    first, second = train(make_config(model=name, batch_size=32, max_epochs=2, lr=1e-3), data)
    assert first.val_loss is not None
    assert second.val_loss is not None
    assert second.val_loss < first.val_loss < 2.4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_fused_and_has_the_settings_of_the_trial(optimizer: str) -> None:
    config = make_config(optimizer=optimizer, lr=0.02, weight_decay=0.3)
    made = build_optimizer(config, nn.Linear(2, 2))
    assert type(made).__name__.lower() == optimizer
    (group,) = made.param_groups
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.02, 0.3, True)
    assert group.get("momentum", 0.9) == 0.9


LEAVING_MODEL = """
import sys
from torch import nn
class Net(nn.Linear):
    def __init__(self, shape, classes):
        super().__init__(16, classes)
    def forward(self, images):
        if self.training == {in_training}:
            {leave}
        return super().forward(images.flatten(1))
"""


@pytest.mark.parametrize("in_training", [True, False])
@pytest.mark.parametrize("leave", ["sys.exit(0)", "raise KeyboardInterrupt"])
def test_model_that_exits_fails_its_epoch_and_not_the_process(
    leave: str, in_training: bool, small_data: TrainingData, write_module: WriteModule
) -> None:
    name = write_module(LEAVING_MODEL.format(leave=leave, in_training=in_training))
    run = TrainingRun(make_config(model=f"{name}:Net"), small_data)
    with pytest.raises(RuntimeError, match=r"^the code (called sys\.exit\(0\)|raised KeyboardInterrupt)$"):
        run.train_epoch()
    if not in_training:
        with pytest.raises(RuntimeError):
            run.test(make_split())


def test_gradients_that_the_process_has_turned_off_are_on_in_training(small_data: TrainingData) -> None:
    expected = train(make_config(precision="fp16"), small_data)
    with torch.no_grad():
        assert train(make_config(precision="fp16"), small_data) == expected
    assert expected[0].underflow_share is not None  # the probe needs them too


# Repeating


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16", "init_scale": 2.0**30}, {"model": "vit", "lr": 1e-3}])
def test_a_seed_gives_the_same_metrics_bit_for_bit_and_another_seed_others(
    settings: dict[str, Any], small_data: TrainingData
) -> None:
    first = train(make_config(seed=5, **settings), small_data)
    torch.manual_seed(99)  # what ran before plays no part
    assert train(make_config(seed=5, **settings), small_data) == first
    other = train(make_config(seed=6, **settings), small_data)
    assert all(a.train_loss != b.train_loss for a, b in zip(first, other, strict=True))


def test_data_shared_with_other_trials_gives_the_metrics_of_data_of_its_own(small_data: TrainingData) -> None:
    fancy = make_config(input_scaling="standard", class_weighting="balanced", curriculum="linear")
    train(fancy, small_data)
    for config in (make_config(), fancy):
        own = TrainingData(make_split(), make_split(21, seed=1), 3, CPU)
        assert train(config, small_data) == train(config, own)


def test_order_of_the_data_does_not_depend_on_the_model(small_data: TrainingData) -> None:
    runs = [TrainingRun(make_config(model=name), small_data) for name in MODELS]
    first, second, third = (run._draw_batches() for run in runs)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


# Continuing from a checkpoint

CHECKPOINTED = [
    {},
    {"optimizer": "adamw", "precision": "bf16", "curriculum": "linear", "max_epochs": 6},
    {"optimizer": "sgd", "precision": "fp16", "init_scale": 2.0**34, "growth_interval": 2, "growth_factor": 32.0},
    {"optimizer": "adam", "precision": "fp16", "init_scale": 2.0**34, "growth_interval": 3, "growth_factor": 32.0},
]


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("settings", CHECKPOINTED)
def test_restored_run_continues_bit_for_bit(
    settings: dict[str, Any], after: int, small_data: TrainingData, write_module: WriteModule
) -> None:
    model = f"{write_module(RANDOM_MODEL)}:Net"
    config = make_config(**{"model": model, "max_epochs": 4, "seed": 3, **settings})
    whole = TrainingRun(config, small_data)
    expected = list(map(untimed, itertools.islice(whole.epochs(), after)))
    stored = io.BytesIO()
    torch.save(whole.state_dict(), stored)
    expected += map(untimed, whole.epochs())
    if config.precision == "fp16":  # else the scaler's part of the checkpoint is not put to the test
        assert expected[after - 1].skipped_steps < expected[-1].skipped_steps
        assert expected[after - 1].growths < expected[-1].growths

    seed_generators(1234)
    stored.seek(0)
    restored = TrainingRun(config, TrainingData(make_split(), make_split(21, seed=1), 3, CPU))
    restored.load_state_dict(torch.load(stored, weights_only=True))
    continued = [untimed(metrics) for metrics in restored.epochs()]
    assert continued == expected[after:]
    assert len(continued) == config.max_epochs - after
    assert equal_bits(weights_of(restored), weights_of(whole))


def test_random_numbers_of_a_run_are_its_seeds(small_data: TrainingData, write_module: WriteModule) -> None:
    config = make_config(model=f"{write_module(RANDOM_MODEL)}:Net")
    first, second = TrainingRun(config, small_data), TrainingRun(config, small_data)
    images = torch.rand(4, 1, 4, 4)
    assert equal_bits(weights_of(first), weights_of(second))
    assert not torch.equal(first.model(images), second.model(images))  # dropout is there, and drawn anew
    alone = train(config, small_data)
    assert train(config, small_data) == alone
    other = TrainingRun(dataclasses.replace(config, seed=1), small_data)
    taking_turns = [(untimed(run.train_epoch()), other.train_epoch())[0] for run in [first] * 3]
    assert taking_turns == alone


def test_random_numbers_of_the_process_are_not_disturbed(small_data: TrainingData, write_module: WriteModule) -> None:
    before = read_generators(CPU)
    run = TrainingRun(make_config(model=f"{write_module(RANDOM_MODEL)}:Net"), small_data)
    run.train_epoch()
    run.test(make_split())
    after, own = read_generators(CPU), run.state_dict()["generators"]
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    assert all(own[name] != before[name] for name in ("python", "numpy"))  # the run did draw


@pytest.fixture
def let_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock on by so many seconds."""
    clock, passed = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(passed))
    return passed.append


def test_drawing_the_batches_counts_as_training(
    small_data: TrainingData, monkeypatch: pytest.MonkeyPatch, let_pass: Callable[[float], None]
) -> None:
    draw = batch_indices

    def draw_slowly(*arguments: Any) -> Tensor:
        let_pass(1000.0)
        return draw(*arguments)

    monkeypatch.setattr(training, "batch_indices", draw_slowly)
    metrics = TrainingRun(make_config(), small_data).train_epoch()
    assert metrics.train_seconds > 1000
    assert metrics.samples_per_second < 7 * 8 / 1000


def test_restored_run_adds_to_the_seconds_and_counts_of_the_checkpoint(small_data: TrainingData) -> None:
    config = make_config()
    first = TrainingRun(config, small_data)
    saved = first.train_epoch()
    restored = TrainingRun(config, TrainingData(make_split(), make_split(21, seed=1), 3, CPU))
    restored.load_state_dict(first.state_dict())
    metrics = restored.train_epoch()
    assert (metrics.epoch, metrics.steps) == (2, 2 * saved.steps)
    assert metrics.train_seconds > saved.train_seconds
    assert metrics.val_seconds > saved.val_seconds
    assert metrics.data_seconds > saved.data_seconds > 0  # both workers placed the data


# What a step sees


def test_train_loss_and_weights_are_those_of_a_plain_loop(small_data: TrainingData) -> None:
    config = make_config(seed=4, max_epochs=2)
    split = make_split()
    pixels = torch.from_numpy(split.images).float()
    low, high = pixels.min(), pixels.max()
    images, labels = (pixels - low) * (1 / (high.item() - low.item())), torch.from_numpy(split.labels)

    torch.manual_seed(4)
    model = build_model("simple_net", (1, 4, 4), 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=True)
    generator = torch.Generator().manual_seed(4)
    expected = []
    for _ in range(2):
        losses = []
        for batch in torch.randperm(60, generator=generator)[:56].split(8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        expected.append(np.mean(losses))

    run = TrainingRun(config, small_data)
    assert [metrics.train_loss for metrics in run.epochs()] == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(run.model.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-7)


OWN_JUDGE = """
import torch
from tune_amp.training.task import ImageClassification
class Judge(ImageClassification):
    def schedule(self, optimizer, steps):
        assert steps == 100 // 8 * 3
        return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps // 10)
    def has_learned(self, loss, averages):
        return averages["accuracy"] > 0.5
"""


@pytest.mark.parametrize("scaling", ["minmax", "standard"])
def test_epoch_is_estimated_though_the_first_images_are_blank_and_the_task_expects_a_whole_trial(
    scaling: str, write_module: WriteModule, let_pass: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_split(100)
    blank = Split(images=split.images * (np.arange(100) > ESTIMATE_IMAGES).reshape(-1, 1, 1, 1), labels=split.labels)
    take = TrainingRun._take_step

    def take_slowly(*arguments: Any) -> None:
        take(*arguments)
        let_pass(2000.0)

    monkeypatch.setattr(TrainingRun, "_take_step", take_slowly)
    config = make_config(input_scaling=scaling, task=write_module(OWN_JUDGE) + ":Judge")
    assert estimate_epoch_seconds(config, blank, 3, CPU) == pytest.approx(2000 * 100 / ESTIMATE_IMAGES, rel=0.01)


def test_batch_larger_than_the_training_images_is_refused(small_data: TrainingData) -> None:
    with pytest.raises(InputError, match=r"batch_size: must not exceed the 60 images .*, got 61"):
        TrainingRun(make_config(batch_size=61), small_data).train_epoch()
    assert train(make_config(batch_size=60, max_epochs=1), small_data)[0].steps == 1


def test_balanced_class_weighting_weighs_the_training_loss_by_inverse_frequency() -> None:
    counts = (30, 8, 2)
    whole = make_split(90)
    chosen = np.concatenate([np.flatnonzero(whole.labels == label)[:count] for label, count in enumerate(counts)])
    split = Split(images=whole.images[chosen], labels=whole.labels[chosen])
    data = TrainingData(split, split, 3, CPU)
    # One step over all images: its loss is that of the initial weights.
    initial = TrainingRun(make_config(batch_size=40, max_epochs=1), data)
    placed = place_split(split, CPU)
    with torch.no_grad():
        logits = initial.model(scale_images(placed.images, data.input_scaling("minmax")))
        losses = nn.functional.cross_entropy(logits, placed.labels, reduction="none")
    weights = torch.tensor([40 / (3 * count) for count in counts])[placed.labels]
    plain, balanced = (
        train(make_config(batch_size=40, max_epochs=1, class_weighting=method, lr=1e-30), data)[0]
        for method in ("none", "balanced")
    )
    assert plain.train_loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert balanced.train_loss == pytest.approx(((weights * losses).sum() / weights.sum()).item(), rel=1e-5)
    assert abs(balanced.train_loss - plain.train_loss) > 1e-3
    assert plain.val_loss == balanced.val_loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_linear_curriculum_trains_on_the_easiest_images_first(
    small_data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainingRun(make_config(curriculum="linear", max_epochs=4, batch_size=5), small_data)
    easy_to_hard = small_data.easy_to_hard.tolist()
    assert sorted(easy_to_hard) == list(range(60))
    assert easy_to_hard != list(range(60))
    seen: list[int] = []
    step = run._step

    def watch(indices: Tensor) -> None:
        seen.extend(indices.tolist())
        step(indices)

    monkeypatch.setattr(run, "_step", watch)
    steps = []
    for expected in (30, 45, 60, 60):
        seen.clear()
        steps.append(run.train_epoch().steps)
        assert sorted(seen) == sorted(easy_to_hard[:expected])
        assert seen != easy_to_hard[:expected]  # but not always in the same order
    assert steps == [6, 15, 27, 39]


def test_curriculum_never_draws_from_less_than_a_batch(small_data: TrainingData) -> None:
    epochs = train(make_config(curriculum="linear", batch_size=50, max_epochs=4), small_data)
    assert [metrics.steps for metrics in epochs] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", ["minmax", "standard"])
def test_model_sees_the_scaling_of_the_trial_in_training_and_validation(method: str, small_data: TrainingData) -> None:
    run = TrainingRun(make_config(input_scaling=method), small_data)
    inputs: dict[bool, list[Tensor]] = {True: [], False: []}
    run.model.register_forward_pre_hook(lambda module, given: inputs[module.training].append(given[0]))
    run.train_epoch()
    pixels = make_split().images.astype(np.float64)
    shift, factor = pixels.min(), 1 / (pixels.max() - pixels.min())
    if method == "standard":
        shift, factor = pixels.mean(), 1 / pixels.std()
    validation = (make_split(21, seed=1).images - shift) * factor
    np.testing.assert_allclose(inputs[False][0].numpy(), validation, rtol=1e-5, atol=1e-6)
    trained_on = torch.cat(inputs[True]).numpy()
    assert trained_on.shape == (56, 1, 4, 4)
    rows = {image.astype(np.float32).round(3).tobytes() for image in (pixels - shift) * factor}
    assert all(image.round(3).tobytes() in rows for image in trained_on)


# Evaluating


def test_evaluation_is_strict_fp32_whatever_the_run_is_trained_in(small_data: TrainingData) -> None:
    run = TrainingRun(make_config(precision="fp16", max_epochs=1), small_data)
    seen: list[tuple[Any, ...]] = []

    def watch(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        flags = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
        precisions = {flag.fp32_precision for flag in flags}
        seen.append((module.training, output.dtype, output.requires_grad, precisions))

    run.model.register_forward_hook(watch)
    before = [flag.fp32_precision for flag in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]  # type: ignore[attr-defined]
    with fp32_arithmetic("tf32"):
        metrics = run.train_epoch()
    assert seen[:7] == [(True, torch.float16, True, {"ieee"})] * 7
    assert seen[7] == (False, torch.float32, False, {"ieee"})
    assert seen[8:] == [(True, dtype, True, {"ieee"}) for dtype in (torch.float32, torch.float16)]  # the probe
    assert run.model.training
    after = [flag.fp32_precision for flag in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]  # type: ignore[attr-defined]
    assert after == before
    tested = run.test(make_split(21, seed=1))
    assert tuple(tested.values()) == (metrics.val_loss, metrics.val_accuracy, metrics.val_recalls, {})


def test_without_a_validation_split_there_are_no_validation_metrics() -> None:
    data = TrainingData(make_split(), None, 3, CPU)
    (metrics,) = TrainingRun(make_config(max_epochs=1), data).epochs()
    assert (metrics.val_loss, metrics.val_accuracy, metrics.val_recalls, metrics.val_seconds) == (None, None, (), 0.0)


def test_guessing_knows_how_frequent_classes_are_where_it_is_measured() -> None:
    """A long tail of training classes says nothing of a validation split that has none."""
    tail = make_split(90)
    tail.labels[:] = np.repeat(np.arange(3), (70, 15, 5))
    guessing = TrainingData(tail, make_split(60), 3, CPU).guessing
    assert (guessing.loss, guessing.accuracy, guessing.images) == pytest.approx((math.log(3), 1 / 3, 60))
    assert TrainingData(tail, None, 3, CPU).guessing.accuracy == pytest.approx(70 / 90)


# Counting and timing


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16", "init_scale": 2.0**40}])
def test_counts_and_seconds_are_cumulative(settings: dict[str, Any], small_data: TrainingData) -> None:
    epochs = list(TrainingRun(make_config(max_epochs=4, **settings), small_data).epochs())
    assert [metrics.epoch for metrics in epochs] == [1, 2, 3, 4]
    assert [metrics.steps for metrics in epochs] == [7, 14, 21, 28]
    for metrics in epochs:
        assert metrics.applied_steps + metrics.skipped_steps == metrics.steps
        assert metrics.peak_memory_bytes is None
    for before, after in itertools.pairwise(epochs):
        assert 0 < before.train_seconds < after.train_seconds
        assert 0 < before.val_seconds < after.val_seconds
        assert before.skipped_steps <= after.skipped_steps
        seconds = after.train_seconds - before.train_seconds
        assert after.samples_per_second == pytest.approx(7 * 8 / seconds, rel=1e-6)
    assert epochs[-1].skipped_steps > 0 or not settings


def test_placing_the_data_is_charged_to_the_first_trial_alone(small_data: TrainingData) -> None:
    first, second = (list(TrainingRun(make_config(max_epochs=2), small_data).epochs()) for _ in range(2))
    assert first[0].data_seconds == first[1].data_seconds > 0
    assert [metrics.data_seconds for metrics in second] == [0, 0]


def test_sorting_by_difficulty_is_charged_as_data_time_of_the_first_curriculum_alone(
    small_data: TrainingData, monkeypatch: pytest.MonkeyPatch, let_pass: Callable[[float], None]
) -> None:
    sort = batches.difficulty_order

    def sort_slowly(split: Split, num_classes: int) -> Any:
        let_pass(1000.0)
        return sort(split, num_classes)

    monkeypatch.setattr(training_data, "difficulty_order", sort_slowly)
    plain, first, second = (
        next(TrainingRun(make_config(curriculum=curriculum), small_data).epochs())
        for curriculum in ("none", "linear", "linear")
    )
    assert 0 < plain.data_seconds < 1000  # it did not wait
    assert first.data_seconds >= 1000 > first.train_seconds
    assert second.data_seconds == 0


# Memory


def test_peak_memory_is_the_largest_of_what_was_measured_without_what_lay_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = FakeMemory(monkeypatch)
    memory.allocated = 1000
    meter = MemoryMeter(torch.device("cuda"))
    assert meter.peak_bytes is None
    for between, within, expected in ((9999, 300, 300), (0, 200, 300), (9999, 400, 400), (9999, 0, 400)):
        memory.touch(between)  # as validation does
        with meter.measure():
            memory.touch(within)
        assert meter.peak_bytes == expected


def test_workspaces_of_a_library_count_for_every_trial_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, peaks = FakeMemory(monkeypatch), []
    for _ in range(3):
        meter = MemoryMeter(torch.device("cuda"))
        with meter.measure():
            memory.touch(100, workspaces=32)
        peaks.append(meter.peak_bytes)
    assert peaks == [132] * 3
    release_memory(torch.device("cuda"))
    assert memory.allocated == 0


def test_nothing_of_cuda_is_touched_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.delattr(torch.cuda, name)
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces", raising=False)
    meter = MemoryMeter(CPU)
    with meter.measure():
        pass
    release_memory(CPU)
    assert meter.peak_bytes is None


def test_memory_is_measured_while_training_and_not_while_validating(
    small_data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory(monkeypatch)
    run = TrainingRun(make_config(max_epochs=3), small_data)
    run._memory = MemoryMeter(torch.device("cuda"))
    amounts = (50, 70, 60, 10_000)  # the last one is that of a probe after the last epoch
    run.model.register_forward_hook(lambda model, *_: memory.touch(amounts[run.epoch] if model.training else 10_000))
    assert [run.train_epoch().peak_memory_bytes for _ in range(3)] == [50, 70, 70]


def test_peak_memory_of_earlier_epochs_is_in_the_checkpoint(
    small_data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory(monkeypatch)
    first, second = (TrainingRun(make_config(), small_data) for _ in range(2))
    for run in (first, second):
        run._memory = MemoryMeter(torch.device("cuda"))
    first.model.register_forward_hook(lambda *_: memory.touch(500))
    first.train_epoch()
    second.load_state_dict(first.state_dict())
    second.model.register_forward_hook(lambda *_: memory.touch(100))
    assert second.train_epoch().peak_memory_bytes == 500


# Divergence


def test_calibration_from_a_high_scale_goes_on(small_data: TrainingData) -> None:
    epochs = train(make_config(precision="fp16", init_scale=2.0**60, max_epochs=8), small_data)
    assert len(epochs) == 8
    assert epochs[1].applied_steps == 0  # fourteen steps, all skipped
    assert [metrics.state for metrics in epochs[:2]] == ["calibrating"] * 2
    assert epochs[-1].applied_steps > 0
    assert epochs[-1].state == "steady"


def test_calibration_that_the_trial_is_too_short_for_ends_with_its_first_epoch(small_data: TrainingData) -> None:
    run = TrainingRun(make_config(precision="fp16", init_scale=2.0**60, backoff_factor=0.9, max_epochs=8), small_data)
    [metrics] = run.epochs()
    assert metrics.state == "collapsed"
    assert (run.hopeless or "").startswith("every step is skipped, and gradients overflow even at")


def test_starved_run_goes_on_where_its_scale_will_grow_in_time(small_data: TrainingData) -> None:
    config = make_config(precision="fp16", init_scale=2.0**-30, growth_interval=1, max_epochs=6)
    epochs = train(config, small_data)
    assert len(epochs) == 6
    assert (epochs[0].state, epochs[0].underflow_share) == ("starved", 1.0)
    assert epochs[-1].state == "steady"
    assert epochs[-1].underflow_share == pytest.approx(0, abs=1e-3)
    assert (epochs[-1].val_accuracy or 0) > (epochs[0].val_accuracy or 0)


@pytest.mark.parametrize("init_scale", [2.0**-30, 2.0**-126])
def test_starved_run_ends_with_its_first_epoch_where_it_will_not(init_scale: float, small_data: TrainingData) -> None:
    run = TrainingRun(make_config(precision="fp16", init_scale=init_scale), small_data)
    before = weights_of(run)
    [metrics] = run.epochs()
    assert equal_bits(before, weights_of(run))  # and so would every further epoch
    assert (metrics.state, metrics.underflow_share) == ("collapsed", 1.0)
    assert (run.hopeless or "").startswith("gradients vanish in fp16, even at 2^")


def test_run_whose_weights_are_no_longer_finite_ends(small_data: TrainingData) -> None:
    run = TrainingRun(make_config(lr=1e39, optimizer="sgd", max_epochs=9), small_data)
    [metrics] = run.epochs()
    assert (metrics.state, run.hopeless, metrics.underflow_share) == ("diverged", "weights are not finite", None)


def test_run_whose_gradients_are_never_finite_ends_with_its_first_epoch(small_data: TrainingData) -> None:
    run = TrainingRun(make_config(precision="fp16", max_epochs=30), small_data)
    for parameter in run.model.parameters():
        parameter.register_hook(lambda gradient: gradient * math.nan)
    [metrics] = run.epochs()
    assert metrics.state == "collapsed"
    assert (run.hopeless or "").startswith("every step is skipped, and gradients overflow even at 2^-24, the lowest")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_dead_network_ends(precision: str, small_data: TrainingData) -> None:
    run = TrainingRun(make_config(precision=precision, max_epochs=9), small_data)
    with torch.no_grad():
        run.model[1].bias.fill_(-1e3)  # type: ignore[index]  # no hidden unit is ever active
    [metrics] = run.epochs()
    assert metrics.state == "collapsed"
    assert run.hopeless == "no weight gets a gradient, in fp32 either, and the model is no better than guessing"


def test_no_forward_pass_takes_more_large_images_than_a_training_step_does() -> None:
    """Nor does the second look of the probe, which takes all of them, when a verdict depends on it."""
    data = TrainingData(make_split(24, side=240), make_split(10, side=240), 3, CPU)
    run = TrainingRun(make_config(batch_size=4, max_epochs=2), data)
    with torch.no_grad():
        run.model[1].bias.fill_(-1e4)  # type: ignore[index]
    passes: list[tuple[bool, int]] = []
    run.model.register_forward_hook(lambda model, inputs, _: passes.append((model.training, len(inputs[0]))))
    assert run.train_epoch().state == "collapsed"
    steps, validation, probe = [(True, 4)] * 6, [(False, 4), (False, 4), (False, 2)], [(True, 4)] * (1 + 6)
    assert passes == [*steps, *validation, *probe]


@pytest.mark.parametrize(
    "settings", [{"lr": 10.0}, {"lr": 1.0, "init_scale": 1.0}, {"lr": 1.0, "optimizer": "sgd", "init_scale": 2.0**-12}]
)
def test_confident_model_with_a_bad_loss_and_a_good_accuracy_is_not_ended(
    settings: dict[str, Any], digits_data: TrainingData, write_module: WriteModule
) -> None:
    """Its loss is far above that of guessing, and on most images its gradient is zero in fp16."""
    model = write_module(
        "from torch import nn\ndef net(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))\n"
    )
    config = make_config(model=f"{model}:net", precision="fp16", batch_size=64, max_epochs=30, **settings)
    run = TrainingRun(config, digits_data)
    epochs = list(run.epochs())
    assert len(epochs) == 30
    assert max(metrics.val_loss or 0 for metrics in epochs) > 2 or "optimizer" in settings
    assert max(metrics.underflow_share or 0 for metrics in epochs) > 0.5
    assert (epochs[-1].val_accuracy or 0) > 0.85


# As reentrant activation checkpoints do, its backward pass refuses to be asked for some gradients only.
UNPROBED_MODEL = """
import torch
from torch import nn
class Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()
    @staticmethod
    def backward(ctx, gradient):
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("incompatible with .grad()")
        return gradient
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.first, self.out = nn.Linear(16, 8), nn.Linear(8, num_classes)
    def forward(self, images):
        return self.out(torch.relu(Whole.apply(self.first(images.flatten(1)))))
def net(input_shape, num_classes):
    return Net(input_shape, num_classes)
"""


def test_model_that_cannot_be_probed_trains_all_the_same(small_data: TrainingData, write_module: WriteModule) -> None:
    config = make_config(model=write_module(UNPROBED_MODEL) + ":net", precision="fp16", max_epochs=3)
    epochs = train(config, small_data)
    assert [(metrics.state, metrics.underflow_share) for metrics in epochs] == [("steady", None)] * 3
    assert epochs[-1].train_loss < epochs[0].train_loss


OVERFLOWING_MODEL = """
import math
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.out = nn.Linear(math.prod(input_shape), num_classes)
    def forward(self, images):
        flat = images.flatten(1)
        marked = flat[:, -1:] > 0.9  # one image in a dozen
        return self.out(torch.where(marked, flat * 1e6, flat)) * torch.where(marked, 1e-6, 1.0)
def net(input_shape, num_classes):
    return Net(input_shape, num_classes)
"""


@pytest.mark.parametrize("name", ["weight", "other"])
def test_model_that_replaces_a_parameter_or_adds_one_has_moved(name: str, small_data: TrainingData) -> None:
    run = TrainingRun(make_config(), small_data)
    layer = next(module for module in run.model.modules() if isinstance(module, nn.Linear))
    assert not run._weights_moved()
    layer.register_parameter(name, nn.Parameter(layer.weight.detach() + 1))
    assert run._weights_moved()


def test_forward_passes_that_overflow_now_and_then_are_no_divergence(write_module: WriteModule) -> None:
    """Their steps are skipped, so that weights and validation stay finite, and the rest of the batches train."""
    split = make_split(240)
    split.images[..., -1, -1] = 0
    split.images[::12, 0, -1, -1] = 255
    data = TrainingData(split, make_split(21, seed=1), 3, CPU)
    model = write_module(OVERFLOWING_MODEL) + ":net"
    run = TrainingRun(make_config(model=model, precision="fp16", growth_interval=1, max_epochs=6), data)
    epochs = list(run.epochs())
    assert len(epochs) == 6
    assert all(math.isfinite(metrics.train_loss) for metrics in epochs)
    assert 0 < epochs[-1].skipped_steps < epochs[-1].steps
    assert run.hopeless is None
    assert (epochs[-1].val_loss or math.inf) < (epochs[0].val_loss or 0)


# The brightest image overflows fp16 before running statistics: a batch norm's, and those of a module that replaces its
# buffer by another tensor at every step.
NORM_MODEL = """
import math
import torch
from torch import nn
class Loud(nn.Linear):
    def forward(self, images):
        return super().forward(images.flatten(1) * 2e5)
class Centre(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
    def forward(self, hidden):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().float().mean(dim=0)
        return hidden - self.mean
def net(input_shape, num_classes):
    return nn.Sequential(Loud(math.prod(input_shape), 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))
def replacing(input_shape, num_classes):
    return nn.Sequential(Loud(math.prod(input_shape), 8), Centre(), nn.ReLU(), nn.Linear(8, num_classes))
"""


@pytest.fixture
def one_loud_image() -> TrainingData:
    split = make_split(240)
    split.images[:] //= 32
    split.images[7] = 255
    validation = make_split(21, seed=1)
    validation.images[:] //= 32
    return TrainingData(split, validation, 3, CPU)


def test_skipped_step_leaves_running_statistics_finite(one_loud_image: TrainingData, write_module: WriteModule) -> None:
    """PyTorch keeps those of a step whose forward pass overflowed: validation would be NaN ever after."""
    module = write_module(NORM_MODEL)
    run = TrainingRun(make_config(model=f"{module}:net", precision="fp16", init_scale=1.0), one_loud_image)
    first = run.train_epoch()
    assert (first.skipped_steps, first.steps, run.hopeless) == (1, 30, None)
    assert math.isfinite(first.train_loss)
    assert math.isfinite(first.val_loss or math.nan)
    with CountReads() as counter:
        run._train(run._draw_batches())
    assert counter.reads == 0


def test_running_statistics_that_are_lost_are_named(one_loud_image: TrainingData, write_module: WriteModule) -> None:
    module = write_module(NORM_MODEL)
    run = TrainingRun(make_config(model=f"{module}:replacing", precision="fp16", init_scale=1.0), one_loud_image)
    run.train_epoch()
    assert run.hopeless == "val_loss is nan: weights are finite, but buffer 1.mean is not"


DENORMAL_MODEL = """
import math
import torch
from torch import nn
seen = []
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.out = nn.Linear(math.prod(input_shape), num_classes)
    def forward(self, images):
        if images.requires_grad is False and torch.is_grad_enabled():
            seen.append((torch.full((1,), 1e-40) * 1).item())
        return self.out(images.flatten(1))
def net(input_shape, num_classes):
    return Net(input_shape, num_classes)
"""


def test_training_steps_flush_denormals(write_module: WriteModule, small_data: TrainingData) -> None:
    module = write_module(DENORMAL_MODEL)
    TrainingRun(make_config(model=f"{module}:net"), small_data).train_epoch()
    seen = importlib.import_module(module).seen
    assert seen[: 60 // 8] == [0.0] * (60 // 8)


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for a value of the device: ``item``, ``equal``, ``nonzero``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad_clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_epoch_reads_the_device_as_often_whatever_its_number_of_steps(
    model: str, precision: str, optimizer: str, grad_clip: float | None
) -> None:
    split = make_split(24)
    large = Split(images=np.repeat(np.repeat(split.images, 2, 2), 2, 3), labels=split.labels)
    data = TrainingData(large, None, 3, CPU)
    weighted = {"class_weighting": "balanced", "curriculum": "linear", "input_scaling": "standard"}
    config = make_config(model=model, precision=precision, optimizer=optimizer, grad_clip=grad_clip, **weighted)
    run = TrainingRun(config, data)
    with CountReads() as counter:
        run._train(run._draw_batches())
    assert counter.reads == 0


def test_counter_of_reads_sees_those_of_an_unfused_optimizer(small_data: TrainingData) -> None:
    run = TrainingRun(make_config(precision="fp16"), small_data)
    run._optimizer = torch.optim.SGD(run.model.parameters(), 0.1, fused=False)
    with CountReads() as counter:
        run._train(run._draw_batches())
    assert counter.reads == 60 // 8


def test_no_trial_imports_the_compiler() -> None:
    """Optimizers would, which costs every worker 0.8 s of its start."""
    code = """
import sys
import numpy as np
import torch
from tune_amp.trial.config import TrialConfig
from tune_amp.training.data import Split
from tune_amp.training.run import ESTIMATE_IMAGES, TrainingRun, estimate_epoch_seconds
from tune_amp.training.training_data import TrainingData
split = Split(images=np.arange(256, dtype=np.uint8).reshape(16, 1, 4, 4), labels=np.arange(16) % 2)
for optimizer in ("adam", "adamw", "sgd"):
    config = TrialConfig(optimizer=optimizer, precision="fp16", grad_clip=1.0, batch_size=4, max_epochs=2)
    run = TrainingRun(config, TrainingData(split, split, 2, torch.device("cpu")))
    run.train_epoch()
    run.load_state_dict(run.state_dict())
    run.train_epoch()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The probe


# Everything that a careless probe would disturb: random numbers, running statistics, a recurrent and a frozen layer.
PROBED_MODEL = """
import math
import random
import numpy as np
from torch import nn
from torch.nn import functional
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(input_shape[-1])
        self.recurrent = nn.GRU(input_shape[-1], 6, num_layers=2, dropout=0.5, batch_first=True)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(6, 6)
        self.out = nn.Linear(6, num_classes)
    def forward(self, images):
        rows = images.flatten(1, 2)
        states, _ = self.recurrent(self.norm(rows.transpose(1, 2)).transpose(1, 2))
        return self.out(functional.dropout(self.frozen(states[:, -1]), random.random(), np.random.random() < 0.9))
def net(input_shape, num_classes):
    return Net(input_shape, num_classes)
"""


@pytest.mark.parametrize("fresh", [{}, {"batch_size": 40}, {"precision": "bf16"}, {"class_weighting": "balanced"}])
def test_underflow_is_measured_without_a_trace_in_training(
    fresh: dict[str, Any], small_data: TrainingData, write_module: WriteModule
) -> None:
    model = write_module(PROBED_MODEL) + ":net"
    config = make_config(**{"model": model, "precision": "fp16", **fresh})
    weights, generators = [], []
    for probed in (True, False):
        run = TrainingRun(config, small_data, probed=probed)
        assert len(list(run.epochs())) == 3
        assert all(module.training for module in run.model.modules())
        weights.append(weights_of(run))
        generators.append(run.state_dict()["generators"])
    assert equal_bits(*weights)
    assert torch.equal(*(states["torch"] for states in generators))
    assert len({(states["python"], str(states["numpy"])) for states in generators}) == 1


def test_underflow_share_falls_as_the_scale_rises_and_is_null_outside_fp16(digits_data: TrainingData) -> None:
    def measure(**settings: Any) -> float | None:
        return TrainingRun(make_config(batch_size=64, **settings), digits_data).train_epoch().underflow_share

    shares = [measure(precision="fp16", init_scale=2.0**exponent) for exponent in (-22, -16, -12, 8)]
    assert all(share is not None for share in shares)
    assert shares == sorted(shares, reverse=True)  # type: ignore[type-var]
    assert shares[0] == 1
    assert (shares[-1] or 0) < 1e-3
    assert [measure(precision=precision) for precision in ("fp32", "bf16")] == [None, None]


@pytest.mark.parametrize(
    ("init_scale", "states"),
    [(2.0**24, ["calibrating", "steady"]), (2.0**8, ["steady", "steady"]), (2.0**-24, ["collapsed"])],
)
def test_states_of_a_transformer_whose_window_of_scales_is_narrower(
    init_scale: float, states: list[str], digits: Dataset
) -> None:
    half = Split(images=digits.train.images[:704], labels=digits.train.labels[:704])
    data = TrainingData(half, digits.validation, digits.num_classes, CPU)
    config = make_config(model="vit", precision="fp16", batch_size=64, lr=1e-3, init_scale=init_scale, max_epochs=2)
    epochs = train(config, data)
    assert [metrics.state for metrics in epochs] == states
    assert (epochs[0].skipped_steps > 4) == (init_scale == 2.0**24)  # it had to come down


def test_time_of_the_probe_is_told_and_cumulative(small_data: TrainingData) -> None:
    first, second = (metrics.probe_seconds for metrics in TrainingRun(make_config(max_epochs=2), small_data).epochs())
    assert 0 < first < second


def run_seldom_probed(config: TrialConfig, data: TrainingData, probe_every: int) -> TrainingRun:
    run = TrainingRun(config, data)
    run.probe_every = probe_every  # as on a GPU
    return run


def list_probed(epochs: Iterable[EpochMetrics]) -> list[int]:
    return [metrics.epoch for metrics in epochs if metrics.underflow_share is not None]


def test_gradients_are_probed_after_the_first_epoch_and_then_once_enough_steps_were_taken(
    small_data: TrainingData,
) -> None:
    config = make_config(precision="fp16", max_epochs=9)  # seven steps an epoch
    assert list_probed(run_seldom_probed(config, small_data, 0).epochs()) == [*range(1, 10)]
    assert list_probed(run_seldom_probed(config, small_data, 14).epochs()) == [1, 3, 5, 7, 9]
    assert list_probed(run_seldom_probed(config, small_data, 15).epochs()) == [1, 4, 7]


def test_run_that_is_resumed_probes_after_the_same_epochs(small_data: TrainingData) -> None:
    config = make_config(precision="fp16", max_epochs=9)
    for stopped_after in (1, 2, 3):
        run, resumed = (run_seldom_probed(config, small_data, 15) for _ in range(2))
        epochs = [untimed(run.train_epoch()) for _ in range(stopped_after)]
        resumed.load_state_dict(run.state_dict())
        epochs += [untimed(metrics) for metrics in resumed.epochs()]
        assert epochs == [untimed(metrics) for metrics in run_seldom_probed(config, small_data, 15).epochs()]
        assert list_probed(epochs) == [1, 4, 7]


def test_starved_run_is_probed_until_it_starves_no_longer(small_data: TrainingData) -> None:
    config = make_config(precision="fp16", init_scale=2.0**-30, growth_interval=1, max_epochs=6)
    always, seldom = (list(run_seldom_probed(config, small_data, every).epochs()) for every in (0, 10_000))
    states = [metrics.state for metrics in seldom]
    assert states == [metrics.state for metrics in always]
    assert (states[0], states[-1]) == ("starved", "steady")
    assert list_probed(seldom) == list(range(1, states.index("steady") + 2))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_scale": 2.0**60, "backoff_factor": 0.9, "max_epochs": 8},
        {"init_scale": 2.0**60, "backoff_factor": 0.5, "max_epochs": 3},
        {"init_scale": 2.0**-30},
    ],
)
def test_hopeless_run_ends_with_the_same_epoch_however_seldom_it_is_probed(
    settings: dict[str, Any], small_data: TrainingData
) -> None:
    config = make_config(precision="fp16", **settings)
    always, seldom = (run_seldom_probed(config, small_data, every) for every in (0, 10_000))
    ends = [(len(list(run.epochs())), run.hopeless) for run in (always, seldom)]
    assert ends[0] == ends[1]
    assert ends[0][1] is not None


# On a GPU


@pytest.fixture
def cuda_data() -> Iterator[TrainingData]:
    yield TrainingData(make_split(600), make_split(210, seed=1), 3, torch.device("cuda"))
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_training_on_a_gpu_learns_and_tells_its_memory(precision: str, cuda_data: TrainingData) -> None:
    epochs = list(TrainingRun(make_config(precision=precision, max_epochs=5), cuda_data).epochs())
    assert (epochs[-1].val_accuracy or 0) > 0.9
    weights = 4 * (16 * 256 + 256 + 256 * 3 + 3)
    assert all((metrics.peak_memory_bytes or 0) >= 4 * weights for metrics in epochs)  # with gradients and two moments
    assert all((metrics.peak_memory_bytes or 0) < 2**30 for metrics in epochs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_trial_of_a_worker_tells_the_memory_of_the_first(precision: str, cuda_data: TrainingData) -> None:
    config = make_config(precision=precision, max_epochs=2)
    release_memory(cuda_data.device)
    peaks = []
    for _ in range(3):
        peaks.append([metrics.peak_memory_bytes for metrics in TrainingRun(config, cuda_data).epochs()])
        release_memory(cuda_data.device)
    # The allocator's blocks may differ a little; cuBLAS's workspaces, of megabytes, are far more than the model.
    assert peaks[1:] == [pytest.approx(peaks[0], rel=0.02)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_a_gpu_is_that_of_training(cuda_data: TrainingData) -> None:
    def peak(data: TrainingData) -> int:
        release_memory(data.device)
        (metrics,) = TrainingRun(make_config(max_epochs=1, model="conv_net"), data).epochs()
        assert metrics.peak_memory_bytes is not None
        return metrics.peak_memory_bytes

    without_validation = TrainingData(make_split(600), None, 3, torch.device("cuda"))
    large_validation = TrainingData(make_split(600), make_split(60_000), 3, torch.device("cuda"))
    assert peak(large_validation) == pytest.approx(peak(without_validation), rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_steps_of_an_epoch_on_a_gpu_never_wait_for_it(precision: str, model: str, cuda_data: TrainingData) -> None:
    config = make_config(precision=precision, model=model, grad_clip=1.0, class_weighting="balanced")
    run = TrainingRun(config, cuda_data)
    run.train_epoch()  # libraries wait for the device when they are first used
    batches = run._draw_batches()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for indices in batches:
            run._step(indices)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert math.isfinite(run._amp.read_epoch())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_run_on_a_gpu_continues_from_its_checkpoint(cuda_data: TrainingData, write_module: WriteModule) -> None:
    config = make_config(precision="fp16", model=f"{write_module(RANDOM_MODEL)}:Net", init_scale=2.0**30)
    whole = TrainingRun(config, cuda_data)
    whole.train_epoch()
    stored = io.BytesIO()
    torch.save(whole.state_dict(), stored)
    expected = [untimed(metrics) for metrics in whole.epochs()]
    torch.cuda.manual_seed(1234)
    stored.seek(0)
    restored = TrainingRun(config, cuda_data)
    restored.load_state_dict(torch.load(stored, map_location="cpu", weights_only=True))
    continued = [untimed(metrics) for metrics in restored.epochs()]
    memory = [dataclasses.replace(metrics, peak_memory_bytes=None) for metrics in (*expected, *continued)]
    assert memory[: len(expected)] == memory[len(expected) :]
