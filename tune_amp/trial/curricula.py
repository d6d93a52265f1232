"""Curricula: how many of the training images, from easy to hard, an epoch draws from.

Easy examples first are the idea of Bengio et al. 2009, "Curriculum learning" (doi:10.1145/1553374.1553380); how fast
the harder ones come in is told by a pacing function (Hacohen & Weinshall 2019, arXiv:1904.03626). How hard an image is,
``batches.difficulty_order`` says: by its distance to the mean image of its class. All of ours begin with the easier
half and give the last half of the epochs to all images; they differ in the way between, which takes 4 epochs at least.
Imports nothing heavy, so that a search can tell without torch how many steps its trials will have.
"""

import math
import types
from collections.abc import Callable, Mapping

START = 0.5
"""Share of the images in the first epoch. The papers begin with less, but pace steps; here an epoch is the least."""


def linear_competence(progress: float) -> float:
    """As many new images with every epoch.

    Platanios et al. 2019, "Competence-based curriculum learning for neural machine translation" (arXiv:1903.09848).

    Args:
        progress: of the growing epochs, from 0 to 1.
    """
    return START + (1 - START) * progress


def root_competence(progress: float) -> float:
    """The square root of Platanios et al. 2019 (arXiv:1903.09848): many new images at first, and ever fewer.

    The more there are already, the fewer come in, so that there is as much time for each of the new ones.

    Args:
        progress: of the growing epochs, from 0 to 1.
    """
    return math.sqrt(START**2 + (1 - START**2) * progress)


def baby_steps(_progress: float) -> float:
    """The easier half, then all at once.

    Baby steps (Soviany et al. 2022, "Curriculum learning: a survey", arXiv:2101.10382) of two buckets, which is the
    two-stage schedule of Bengio et al. 2009, switched at half time.
    """
    return START


PACING: Mapping[str, Callable[[float], float]] = types.MappingProxyType(
    {"linear": linear_competence, "root": root_competence, "step": baby_steps}
)


def curriculum_fraction(curriculum: str, epoch: int, max_epochs: int) -> float:
    """Share of the images, from easy to hard, that ``epoch`` (counted from 0) draws from; always 1 for ``none``."""
    growing_epochs = max_epochs // 2
    if curriculum == "none" or epoch >= growing_epochs:
        return 1.0
    return PACING[curriculum](epoch / growing_epochs)


def count_drawn_images(curriculum: str, epoch: int, max_epochs: int, *, batch_size: int, train_images: int) -> int:
    """Images that ``epoch`` (counted from 0) draws from: a batch at least, all of them at most."""
    share = math.ceil(train_images * curriculum_fraction(curriculum, epoch, max_epochs))
    return min(train_images, max(batch_size, share))
