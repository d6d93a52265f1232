"""Finds inert settings: those that no training step of a trial depends on, so that searching them is pointless.

A setting is inert only if the code proves that no training step depends on it; one that rarely matters is not inert.
Scaler settings outside fp16 would be inert too, but no trial has any: ``TrialConfig`` refuses them.
"""

import collections
from collections.abc import Mapping
from typing import Any

from tune_amp.space.document import STEP_SIZE
from tune_amp.space.space import SearchSpace
from tune_amp.trial.config import TrialConfig
from tune_amp.trial.curricula import count_drawn_images


def find_inert(config: TrialConfig, train_images: int) -> tuple[str, ...]:
    """Return the names of the settings that cannot act in a trial of ``config``, even at its full budget.

    - ``growth_interval``, ``growth_factor``: the interval is not shorter than the trial. ``GradScaler`` grows the scale
      in the update that completes an interval without overflow, and no step uses the scale after the last update.
    - ``backoff_factor``: the trial has a single step, so no step uses a reduced scale.
    - ``curriculum``: it is on, but every epoch draws from all images. ``none`` is off, which does not count as inert.
    - ``class_weighting``: it is balanced, but cross entropy divides by the sum of the weights of the batch, and the
      batch is one image.

    https://docs.pytorch.org/docs/stable/amp.html#torch.amp.GradScaler

    Args:
        config: the trial.
        train_images: images in the training split; 0 if that is unknown.
    """
    if not train_images:  # a user's own loop, whose steps are not known
        return ()
    steps = count_steps(config, train_images)
    never_grows = config.growth_interval is not None and config.growth_interval >= steps
    draws = _count_drawn_images(config, train_images)
    holds = {
        "growth_factor": never_grows,
        "backoff_factor": config.backoff_factor is not None and steps < 2,
        "growth_interval": never_grows,
        "class_weighting": config.class_weighting != "none" and config.batch_size == 1,
        "curriculum": config.curriculum != "none" and all(images == train_images for images in draws),
    }
    return tuple(name for name, inert in holds.items() if inert)


def count_steps(config: TrialConfig, train_images: int) -> int:
    """Return the training steps of a trial at its full budget, skipped steps included.

    The first epochs of a curriculum have fewer steps.
    """
    draws = _count_drawn_images(config, train_images)
    full_epochs = config.max_epochs - len(draws)
    return sum(images // config.step_images for images in draws) + full_epochs * (train_images // config.step_images)


def estimate_inert(
    space: SearchSpace, *, train_images: int, max_epochs: int, samples: int = 500, seed: int = 0
) -> dict[str, float]:
    """Return for each searched or fixed setting the share of ``samples`` random suggestions in which it is inert.

    Up to 100 epochs, 500 suggestions take 0.1 s on an idle core. They estimate a share to within 5 points (two standard
    errors).
    """
    counts = collections.Counter[str]()
    for settings in space.sample(samples, seed=seed, train_images=train_images, max_epochs=max_epochs):
        counts.update(find_inert(TrialConfig(max_epochs=max_epochs, **settings), train_images))
    names = (*(parameter.name for parameter in space.parameters), *space.fixed)
    return {name: counts[name] / samples for name in names}


def describe_inert(shares: Mapping[str, float], space: SearchSpace, *, train_images: int, max_epochs: int) -> list[str]:
    """Return a line for each setting that is inert in some of the space's trials: in how many, why, and a remedy.

    Args:
        shares: from :func:`estimate_inert`.
        space: the space they were estimated for.
        train_images: images in the training split.
        max_epochs: full budget of a trial.
    """
    trial = _describe_shortest_trial(space, train_images, max_epochs)
    remedy = _describe_remedy(space)
    reasons = {
        "growth_interval": f"it is not shorter than the trial ({trial}); {remedy}",
        "growth_factor": f"growth_interval is not shorter than the trial ({trial}); {remedy}",
        "backoff_factor": "a trial of one step uses the initial scale only",
        "class_weighting": "in a batch of one image its weight cancels out",
        "curriculum": "it needs 2 epochs, and batches smaller than the training set",
    }
    return [
        f"{name} cannot act in {_percent(share)} of this space's trials: {reasons[name]}"
        for name, share in shares.items()
        if share > 0
    ]


def _count_drawn_images(config: TrialConfig, train_images: int) -> list[int]:
    """Return the number of images that each growing epoch of a curriculum draws from."""
    name, epochs = config.curriculum, config.max_epochs
    sizes = {"batch_size": config.step_images, "train_images": train_images}
    return [count_drawn_images(name, epoch, epochs, **sizes) for epoch in range(0 if name == "none" else epochs // 2)]


def _describe_shortest_trial(space: SearchSpace, train_images: int, max_epochs: int) -> str:
    """Describe a full trial with the largest batch: ``424 steps at batch_size 1024 x 8 epochs``."""
    when = {parameter.name: parameter.when for parameter in space.parameters}
    sizes: dict[str, Any] = {}
    for name in STEP_SIZE:
        default = int(getattr(TrialConfig, name))
        bounds = space.bounds(name) or (default, default)
        sizes[name] = max(int(bounds[1]), default if when.get(name) else 0)  # a trial without a value has the default
    steps, curriculum = min(
        (count_steps(TrialConfig(**sizes, max_epochs=max_epochs, curriculum=name), train_images), name)
        for name in space.list_possible("curriculum")
    )
    accumulated = f" x accumulate {sizes['accumulate']}" if sizes["accumulate"] > 1 else ""
    with_curriculum = "" if curriculum == "none" else f", curriculum {curriculum}"
    return f"{steps:,} steps at batch_size {sizes['batch_size']}{accumulated} x {max_epochs} epochs{with_curriculum}"


def _describe_remedy(space: SearchSpace) -> str:
    """Return the remedy for an interval that is too long, which may be intended: it makes the loss scale static."""
    for parameter in space.parameters:
        if parameter.name == "growth_interval" and parameter.fraction_of_trial:
            return "fractions above 1 make the loss scale static, those well below 1 let it grow"
        if parameter.name == "growth_interval":
            return "fraction_of_trial: true makes it relative"
    static = "that makes the loss scale static; " if "growth_interval" in space.fixed else ""
    return f"{static}searched with fraction_of_trial: true, the interval would be relative"


def _percent(share: float) -> str:
    """Format a share above 0 as a whole percentage: at least 1, and 100 only if the share is 1."""
    return f"{100 if share == 1 else min(max(round(100 * share), 1), 99)} %"
