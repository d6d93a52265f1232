"""Recorded curves as tests need them, computed instead of trained."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from records import NAN, make_epoch

from benchmarks.quality.curves import Curves, sample_configs
from tune_amp.space.space import load_space
from tune_amp.trial.config import EpochMetrics, TrialConfig

SHARED = {"model": "simple_net", "dataset": "mnist", "max_epochs": 8, "seed": 0}
TRAIN_IMAGES = 55_000

Learn = Callable[[TrialConfig, int], EpochMetrics]


def make_curve(*accuracies: float, **changes: Any) -> tuple[EpochMetrics, ...]:
    """One epoch for each accuracy; where it is NaN the loss is as well, and accuracy is that of class 0.

    The loss follows from the accuracy, but for a trace of the epoch: training that goes on repeats no loss exactly.
    """
    return tuple(
        make_epoch(
            epoch,
            val_accuracy=0.1 if math.isnan(accuracy) else accuracy,
            val_loss=NAN if math.isnan(accuracy) else 2 * (1 - accuracy) + 1e-12 * epoch,
            **({"state": "diverged"} if math.isnan(accuracy) else {}) | changes,
            loss_scale_steps=(),
            loss_scale_values=(),
            val_recalls=(),
        )
        for epoch, accuracy in enumerate(accuracies, start=1)
    )


def make_curves(configs: Sequence[TrialConfig], epochs: Sequence[Sequence[EpochMetrics]], space: str) -> Curves:
    """A table with the space's text in its origin, as recorded curves have it."""
    loaded = load_space(space)
    origin = {"space_source": loaded.source, "space_text": loaded.text, "train_images": TRAIN_IMAGES}
    return Curves(configs=tuple(configs), epochs=tuple(map(tuple, epochs)), origin=origin)


def learn(config: TrialConfig) -> tuple[EpochMetrics, ...]:
    """Best at a learning rate of 2e-3; NaN from 0.3 up; nothing learnt where the loss scale is below 2^-12."""
    assert config.init_scale is not None
    if config.lr > 0.3:
        return make_curve(*[NAN] * 8)
    if config.init_scale < 2.0**-12:
        return make_curve(*[0.1] * 8, state="collapsed")
    best = 0.98 - 0.05 * abs(math.log10(config.lr / 2e-3)) - 0.002 * math.log2(config.batch_size / 64)
    return make_curve(*(best - 0.2 / epoch**2 for epoch in range(1, 9)))


def make_stress_table(count: int = 64) -> Curves:
    """Random configurations of ``stress`` that learn as ``learn`` says."""
    configs = sample_configs(load_space("stress"), count, seed=5, train_images=TRAIN_IMAGES, shared=SHARED)
    return make_curves(configs, [learn(config) for config in configs], "stress")


def make_config(**changes: Any) -> TrialConfig:
    """A configuration of ``stress``."""
    settings: dict[str, Any] = {**SHARED, "precision": "fp16", "lr": 1e-3, "batch_size": 64, "init_scale": 2.0**16}
    settings |= {"growth_interval": 100, "backoff_factor": 0.5}
    return dataclasses.replace(TrialConfig(**settings), **changes)
