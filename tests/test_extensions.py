"""The tutorial's extensions do what they say, on real MNIST."""

import dataclasses
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tune_amp.space.no_effect import count_steps
from tune_amp.space.space import load_space
from tune_amp.training.data import Dataset, Split, make_long_tail
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import CURRICULA, EpochMetrics, TrialConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(mnist: Dataset) -> TrainingData:
    """6,000 training images."""
    few = Split(images=mnist.train.images[:6_000], labels=mnist.train.labels[:6_000])
    return TrainingData(few, mnist.validation, 10, CPU)


def train(config: TrialConfig, data: TrainingData) -> EpochMetrics:
    *_, last = TrainingRun(config, data).epochs()
    return last


# Class weights


@pytest.mark.parametrize("seed", [0, 1])
def test_balanced_weights_raise_the_recall_of_the_rarest_classes_of_a_long_tail(seed: int, mnist: Dataset) -> None:
    long = make_long_tail(mnist, 100.0)
    data = TrainingData(long.train, long.validation, 10, CPU)
    config = TrialConfig(precision="bf16", batch_size=128, max_epochs=2, imbalance=100, seed=seed)
    plain, balanced = (
        train(dataclasses.replace(config, class_weighting=weighting), data) for weighting in ("none", "balanced")
    )
    rarest = slice(7, 10)
    assert statistics.fmean(plain.val_recalls[rarest]) < 0.6
    assert statistics.fmean(balanced.val_recalls[rarest]) > statistics.fmean(plain.val_recalls[rarest]) + 0.15
    assert min(balanced.val_recalls) > min(plain.val_recalls) + 0.3
    assert balanced.val_recalls[0] < plain.val_recalls[0]  # what the frequent ones pay
    # Validation is as it was, and its recalls are the parts of its accuracy.
    counts = np.bincount(mnist.validation.labels)
    assert counts @ balanced.val_recalls / 5_000 == pytest.approx(balanced.val_accuracy)


# Curricula


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_a_curriculum_trains_on_easy_images_first_and_on_all_at_last(
    curriculum: str, small: TrainingData, mnist: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainingRun(TrialConfig(curriculum=curriculum, batch_size=60, max_epochs=4), small)
    seen: list[Tensor] = []
    step = run._step

    def watch(indices: Tensor) -> None:
        seen.append(indices)
        step(indices)

    monkeypatch.setattr(run, "_step", watch)
    difficulty = measure_difficulty(mnist.train.images[:6_000], mnist.train.labels[:6_000])
    means, images = [], []
    for _ in run.epochs():
        indices = torch.cat(seen).numpy()
        means.append(difficulty[indices].mean() / difficulty.mean())
        images.append(len(set(indices.tolist())))
        seen.clear()
    expected = {"none": [6_000] * 2, "linear": [3_000, 4_500], "root": [3_000, 4_740], "step": [3_000, 3_000]}
    assert images == [*expected[curriculum], 6_000, 6_000]
    assert means[-1] == pytest.approx(1)
    if curriculum == "none":
        assert means == pytest.approx([1] * 4)
    else:
        assert means[0] < 0.9
        assert means[0] <= means[1] < means[2] == pytest.approx(1)


def measure_difficulty(images: Any, labels: Any) -> Any:
    """Distance of each image to the mean image of its class."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    means = np.stack([flat[labels == label].mean(axis=0) for label in range(10)])
    return np.sqrt(((flat - means[labels]) ** 2).sum(axis=1))


# Input scaling


def test_standard_scaling_shows_the_model_mean_0_and_deviation_1(mnist: Dataset) -> None:
    data = TrainingData(mnist.train, None, 10, CPU)
    seen = {}
    for method in ("minmax", "standard"):
        run = TrainingRun(TrialConfig(input_scaling=method, batch_size=1_000, max_epochs=1), data)
        sums: list[tuple[float, float]] = []
        run.model.register_forward_pre_hook(
            lambda _, given, sums=sums: sums.append((given[0].mean().item(), given[0].square().mean().item()))
        )
        assert run.train_epoch().steps == 55  # every image
        mean, square = np.mean(sums[:55], axis=0)
        seen[method] = (mean, (square - mean**2) ** 0.5)
    assert seen["standard"] == pytest.approx((0, 1), abs=1e-4)
    assert seen["minmax"] == pytest.approx((0.1307, 0.3081), abs=1e-3)  # MNIST's, in every tutorial


# Static loss scaling


def test_a_static_loss_scale_stays_what_it_is_for_a_whole_run_on_mnist(mnist: Dataset) -> None:
    """As the bundled space suggests it, all training images, one epoch."""
    sampled = load_space("extensions").sample(50, seed=0, train_images=55_000, max_epochs=1)
    suggested = next(s for s in sampled if (s["init_scale"], s["growth_interval"]) == (128, 1_000_000))
    last = train(TrialConfig(**suggested, max_epochs=1), TrainingData(mnist.train, None, 10, CPU))
    assert last.steps == last.applied_steps == 55_000 // 64
    assert (last.growths, last.min_loss_scale, last.loss_scale, last.max_loss_scale) == (0, 128, 128, 128)
    assert (last.loss_scale_steps, last.loss_scale_values) == ((1,), (128,))


def test_a_static_loss_scale_still_falls_where_gradients_overflow_and_another_one_grows(small: TrainingData) -> None:
    config = TrialConfig(precision="fp16", batch_size=256, max_epochs=2, init_scale=2.0**26, growth_interval=10**6)
    fallen = train(config, small)
    assert fallen.skipped_steps > 0
    assert fallen.growths == 0
    assert fallen.loss_scale == 2.0 ** (26 - fallen.skipped_steps)
    grown = train(dataclasses.replace(config, init_scale=128.0, growth_interval=10), small)
    assert grown.growths == 2 * (6_000 // 256) // 10
    assert grown.loss_scale == 128 * 2**grown.growths


def test_a_third_of_the_trials_of_the_extensions_space_is_static() -> None:
    size = {"train_images": 55_000, "max_epochs": 8}
    configs = [TrialConfig(**s, max_epochs=8) for s in load_space("extensions").sample(100, seed=1, **size)]
    intervals = {config.growth_interval for config in configs}
    assert intervals == {50, 2_000, 1_000_000}
    for config in configs:
        assert config.growth_interval is not None
        assert (config.growth_interval > count_steps(config, 55_000)) == (config.growth_interval == 1_000_000)
