"""Probing gradients: how many underflow, which weights are dead, and what the extremes of the scale would do."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tune_amp.training.amp import scaler_settings, start_telemetry
from tune_amp.training.probe import all_finite, probe_gradients
from tune_amp.training.verdict import GradientProbe
from tune_amp.trial.config import TrialConfig


def probe(
    config: TrialConfig,
    parameters: list[nn.Parameter],
    compute_loss: Callable[[torch.Tensor], torch.Tensor],
    images: int,
    **sizes: Any,
) -> GradientProbe:
    scaler = torch.amp.GradScaler("cpu", **scaler_settings(config))
    given = {"batch_size": images, "steps_left": 1, "all_skipped": False, **sizes}
    return probe_gradients(
        config,
        scaler,
        start_telemetry(config),
        nn.ParameterList(parameters),
        compute_loss,
        torch.arange(images),
        **given,
    )


def make_config(init_scale: float, **settings: Any) -> TrialConfig:
    return TrialConfig(precision="fp16", init_scale=init_scale, **settings)


@pytest.mark.parametrize(("scale_exponent", "lost"), [(0, 0.0), (-16, 0.0), (-18, 0.75), (-22, 0.9375), (-24, 1.0)])
def test_underflow_share_is_that_of_the_elements_that_fp32_has_and_fp16_has_not(
    scale_exponent: int, lost: float
) -> None:
    """The gradient is the scale times the input: elements below half of 2^-24 become zero in fp16."""
    inputs = torch.tensor([[0.0] * 8 + [2.0**-8] * 12 + [2.0**-4] * 3 + [2.0**-2]])
    weight = nn.Parameter(torch.zeros(1, 24))
    config = make_config(2.0**scale_exponent, growth_interval=10**6)
    found = probe(config, [weight], lambda _: nn.functional.linear(inputs, weight).float().sum(), 1, steps_left=5)
    assert found.underflow_share == lost
    assert found.vanishes_at_highest == (True if lost == 1 else None)
    assert (found.is_dead, found.overflows_at_lowest) == (False, None)
    assert weight.grad is None


def test_probe_tries_the_extremes_that_the_scale_can_reach() -> None:
    weight = nn.Parameter(torch.zeros(1, 4))

    def try_scale(scale: float, **settings: Any) -> GradientProbe:
        def compute_loss(images: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(torch.ones(1, 4), weight).float().sum() * (len(images) / 64)

        return probe(make_config(scale, **settings), [weight], compute_loss, 64, steps_left=11, all_skipped=scale > 1)

    assert try_scale(2.0**20, backoff_factor=0.5).overflows_at_lowest is False  # ten halvings: 2^10
    assert try_scale(2.0**30, backoff_factor=0.5).overflows_at_lowest is True
    assert try_scale(2.0**30, backoff_factor=0.5).underflow_share is None
    assert try_scale(2.0**-25, growth_interval=5).vanishes_at_highest is False  # two doublings, half a batch
    assert try_scale(2.0**-25, growth_interval=11).vanishes_at_highest is True


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_probe_tells_dead_weights(precision: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def is_dead(**settings: Any) -> bool:
        def compute_loss(_: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(model(torch.ones(2, 3)), torch.tensor([0, 1]))

        return probe(TrialConfig(precision=precision, **settings), list(model.parameters()), compute_loss, 2).is_dead

    bias = list(model.parameters())[1]
    nn.init.constant_(bias, 10.0)
    assert not is_dead()
    nn.init.constant_(bias, -10.0)
    assert is_dead()  # the last bias still gets a gradient
    assert not is_dead(weight_decay=0.1)  # it may move them back


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_found(value: float) -> None:
    tensors = [torch.ones(3), torch.full((2, 2), 1e30)]
    assert all_finite(tensors)
    tensors[1][1, 0] = value
    assert not all_finite(tensors)


def test_weights_of_an_own_loop_are_judged_in_any_dtype() -> None:
    large = torch.ones(300, 300)  # its sum exceeds fp16's largest number
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.complex64):
        assert all_finite([large, large.to(dtype)])
    assert not all_finite([large, torch.tensor(complex(0, math.inf))])
    assert not all_finite([large, torch.tensor(math.nan, dtype=torch.float16)])


def test_verdicts_are_asked_of_more_images_than_the_share() -> None:
    """Weights that only some image in a thousand reaches are not dead; a whole batch overflows before a few images."""
    weight = nn.Parameter(torch.ones(1, 1))
    asked: list[int] = []

    def is_dead_but_for(image: int) -> bool:
        def compute_loss(images: torch.Tensor) -> torch.Tensor:
            asked.append(len(images))
            return weight.sum() * (images == image).sum() * 2.0**-8

        return probe(TrialConfig(precision="fp32"), [weight], compute_loss, 5000, batch_size=300).is_dead

    assert not is_dead_but_for(999)
    assert asked == [32, 300, 300, 300, 300]  # never more than a batch at once
    asked.clear()
    assert is_dead_but_for(2048)
    assert asked == [32, *[300] * 6, 2048 - 6 * 300]
    asked.clear()

    # Twenty growths on, a single image has a gradient in fp16: 2^-20. Those of all others are below 2^-40.
    def vanishes(image: int) -> bool | None:
        def compute_loss(images: torch.Tensor) -> torch.Tensor:
            asked.append(len(images))
            strength = torch.where(images == image, 1.0, 2.0**-30).sum().reshape(1, 1)
            return nn.functional.linear(strength, weight).float().sum()

        config = make_config(2.0**-40, growth_interval=1)
        return probe(config, [weight], compute_loss, 5000, batch_size=8, steps_left=21).vanishes_at_highest

    assert vanishes(2047) is False
    assert max(asked) == 8
    assert vanishes(2048) is True
    asked.clear()

    def overflows(batch_size: int) -> bool | None:
        def compute_loss(images: torch.Tensor) -> torch.Tensor:
            asked.append(len(images))
            return nn.functional.linear(torch.full((1, 1), len(images) / 16), weight).float().sum()

        sizes = {"batch_size": batch_size, "all_skipped": True}
        return probe(make_config(2.0**14), [weight], compute_loss, 5000, **sizes).overflows_at_lowest

    assert overflows(512)
    assert asked == [32, 32, 512]
    assert not overflows(64)
