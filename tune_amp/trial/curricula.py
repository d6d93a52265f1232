"""Curricula: how many of the training images, from easy to hard, an epoch draws from.

Training on easy examples first is the idea of Bengio et al. 2009, "Curriculum learning" (doi:10.1145/1553374.1553380).
A pacing function sets how fast harder examples are added (Hacohen & Weinshall 2019, arXiv:1904.03626).
``batches.difficulty_order`` measures the difficulty of an image by its distance to the mean image of its class. Every
curriculum here begins with the easier half and draws from all images in the last half of the epochs; they differ in
between, which takes at least 4 epochs. The module imports nothing heavy, so that a search can count the steps of its
trials without torch.
"""

import math
import types
from collections.abc import Callable, Mapping

START = 0.5
"""Share of the images in the first epoch. The papers begin with less, but pace by steps; here the unit is an epoch."""


PACING: Mapping[str, Callable[[float], float]] = types.MappingProxyType(
    {
        # Each epoch adds as many images. Platanios et al. 2019, "Competence-based curriculum learning for neural
        # machine translation" (arXiv:1903.09848).
        "linear": lambda progress: START + (1 - START) * progress,
        # Their square root: the more images there are, the fewer are added, so that each new one gets as much time.
        "root": lambda progress: math.sqrt(START**2 + (1 - START**2) * progress),
        # Baby steps (Soviany et al. 2022, "Curriculum learning: a survey", arXiv:2101.10382) with two buckets, which is
        # the two-stage schedule of Bengio et al. 2009, switched after half of the epochs.
        "step": lambda _: START,
    }
)
"""Curriculum -> share of the images at a fraction of the growing epochs, from 0 to 1."""


def curriculum_fraction(curriculum: str, epoch: int, max_epochs: int) -> float:
    """Return the share of the images, easy first, that ``epoch`` (counted from 0) draws from; always 1 for ``none``."""
    growing_epochs = max_epochs // 2
    if curriculum == "none" or epoch >= growing_epochs:
        return 1.0
    return PACING[curriculum](epoch / growing_epochs)


def count_drawn_images(curriculum: str, epoch: int, max_epochs: int, *, batch_size: int, train_images: int) -> int:
    """Return how many images ``epoch`` (counted from 0) draws from: at least a batch, at most all of them."""
    share = math.ceil(train_images * curriculum_fraction(curriculum, epoch, max_epochs))
    return min(train_images, max(batch_size, share))
