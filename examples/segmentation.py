"""Segmentation: a small U-Net finds discs among squares in noise, judged by the Dice coefficient.

tune-amp search examples/segmentation.yaml --task examples.segmentation:Discs
"""

import numpy as np
import torch
from torch import nn

import tune_amp

SIDE = 32


def draw(count, seed):
    """Images float32 [count, 1, side, side], and masks of the disc in each."""
    generator = np.random.RandomState(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centres, radii = generator.uniform(8, SIDE - 8, (count, 2, 1, 1)), generator.uniform(3, 7, (count, 1, 1))
    discs = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < radii**2
    corners = generator.randint(0, SIDE - 8, (count, 2, 1, 1))
    squares = (abs(rows - corners[:, 0] - 4) < 4) & (abs(columns - corners[:, 1] - 4) < 4)
    images = np.maximum(discs, squares) + 0.3 * generator.randn(count, SIDE, SIDE)
    return images[:, None].astype(np.float32), discs[:, None].astype(np.float32)


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.middle, self.up = block(1, width), block(width, 2 * width), block(3 * width, width)
        self.pool, self.grow, self.last = nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.Conv2d(width, 1, 1)

    def forward(self, images):
        fine = self.down(images)
        return self.last(self.up(torch.cat([fine, self.grow(self.middle(self.pool(fine)))], dim=1)))


class Discs(tune_amp.Task):
    metric = ("dice", "max")

    def data(self):
        return draw(384, seed=1), draw(96, seed=2), draw(192, seed=3)

    def model(self, width):
        return UNet(width)

    def loss(self, model, batch):
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def score(self, model, batch):
        found, mask = model(batch[0]) > 0, batch[1] > 0
        both, either = (found & mask).sum((1, 2, 3)), found.sum((1, 2, 3)) + mask.sum((1, 2, 3))
        return {"dice": (2 * both / either.clamp(min=1)).sum()}
