"""Images that a few steps can learn, and metrics that can be compared: for tests that train."""

import dataclasses
from typing import Any

import numpy as np

from tune_amp.training.data import Split
from tune_amp.trial.config import EpochMetrics

CLOCKS = ("train_seconds", "val_seconds", "probe_seconds", "data_seconds", "samples_per_second")

TIED_MODEL = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 3)
    def forward(self, images):
        return self.head(self.second(self.first(images.flatten(1)).relu()).relu())
def net(input_shape, num_classes):
    return Net()
"""


def make_split(count: int = 60, classes: int = 3, seed: int = 0, side: int = 4) -> Split:
    """Images of side x side pixels that can be told apart: class c is bright in row c. Labels take turns."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = generator.integers(0, 120, (count, 1, side, side))
    images[np.arange(count), 0, labels] += 100
    return Split(images=images.astype(np.uint8), labels=labels.astype(np.int64))


def untimed(metrics: EpochMetrics, **changes: Any) -> EpochMetrics:
    """The metrics without what a clock measured."""
    return dataclasses.replace(metrics, **{**dict.fromkeys(CLOCKS, 0.0), **changes})
