import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_amp.space.no_effect import count_steps, describe_inert, estimate_inert, find_inert
from tune_amp.space.space import SearchSpace, load_space
from tune_amp.training.data import Split
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import CURRICULA, TrialConfig

MNIST = {"train_images": 55_000, "max_epochs": 8}


def scales_used(config: TrialConfig, overflows: Sequence[bool]) -> list[float]:
    """The loss scale that each step uses in torch's own GradScaler, with a step for each of ``overflows``."""
    assert config.init_scale is not None
    assert config.growth_factor is not None
    assert config.backoff_factor is not None
    assert config.growth_interval is not None
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=config.init_scale,
        growth_factor=config.growth_factor,
        backoff_factor=config.backoff_factor,
        growth_interval=config.growth_interval,
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    used = []
    for overflow in overflows:
        used.append(scaler.get_scale())
        optimizer.zero_grad()
        scaler.scale((weight * (math.inf if overflow else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return used


def fp16_trial(steps: int, **settings: Any) -> tuple[TrialConfig, int]:
    """A configuration, and the number of training images with which it has ``steps`` steps."""
    return TrialConfig(precision="fp16", batch_size=2, max_epochs=1, **settings), 2 * steps + 1


# Loss scaling


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("interval", range(1, 8))
def test_growth_is_inert_exactly_where_torch_s_scaler_uses_no_grown_scale(interval: int, steps: int) -> None:
    config, train_images = fp16_trial(steps, growth_interval=interval)
    never_grew = set(scales_used(config, [False] * steps)) == {config.init_scale}
    inert = find_inert(config, train_images)
    assert ("growth_interval" in inert) == ("growth_factor" in inert) == never_grew


@settings(max_examples=60)
@given(overflows=st.lists(st.booleans(), min_size=1, max_size=12), beyond=st.integers(0, 3), factor=st.floats(1.5, 64))
def test_no_overflow_makes_an_inert_growth_act(overflows: list[bool], beyond: int, factor: float) -> None:
    scales = []
    for interval, growth_factor in ((len(overflows) + beyond, 2.0), (10**6, factor)):
        config, train_images = fp16_trial(len(overflows), growth_interval=interval, growth_factor=growth_factor)
        assert {"growth_interval", "growth_factor"} <= set(find_inert(config, train_images))
        scales.append(scales_used(config, overflows))
    assert scales[0] == scales[1]


@pytest.mark.parametrize("steps", [1, 2])
def test_backoff_is_inert_in_a_trial_of_one_step_alone(steps: int) -> None:
    config, train_images = fp16_trial(steps)
    never_came_down = set(scales_used(config, [True] * steps)) == {config.init_scale}
    assert ("backoff_factor" in find_inert(config, train_images)) == never_came_down == (steps == 1)


def test_intervals_count_over_all_epochs() -> None:
    config = TrialConfig(precision="fp16", batch_size=1024, max_epochs=8, growth_interval=423)
    assert find_inert(config, 55_000) == ()
    assert find_inert(TrialConfig(**vars(config) | {"growth_interval": 424}), 55_000) == (
        "growth_factor",
        "growth_interval",
    )


def test_nothing_is_inert_that_is_off_or_absent() -> None:
    assert find_inert(TrialConfig(max_epochs=1), 55_000) == ()
    assert find_inert(TrialConfig(precision="bf16", max_epochs=1, batch_size=55_000), 55_000) == ()


# Curriculum and class weights: real training shows them


@pytest.fixture(scope="module")
def data() -> TrainingData:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [3, 7, 13]).astype(np.int64)
    images = generator.integers(0, 256, (len(labels), 1, 8, 8), dtype=np.uint8)
    return TrainingData(Split(images=images, labels=labels), None, 3, torch.device("cpu"))


def train(data: TrainingData, **settings: Any) -> tuple[int, torch.Tensor]:
    """Steps of a whole run, and the weights it ends with as one vector."""
    run = TrainingRun(TrialConfig(**settings), data)
    steps = max(metrics.steps for metrics in run.epochs())
    return steps, torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


@pytest.mark.parametrize("curriculum", CURRICULA)
@pytest.mark.parametrize("max_epochs", [1, 2, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 12, 13, 23])
def test_steps_are_those_of_a_real_run(curriculum: str, max_epochs: int, batch_size: int, data: TrainingData) -> None:
    config = TrialConfig(curriculum=curriculum, max_epochs=max_epochs, batch_size=batch_size)
    assert count_steps(config, 23) == train(data, **vars(config))[0]


def test_a_batch_that_does_not_fit_makes_no_step() -> None:
    for curriculum in ("none", "linear"):
        assert count_steps(TrialConfig(batch_size=24, max_epochs=4, curriculum=curriculum), 23) == 0


def test_interval_is_inert_that_only_the_shorter_epochs_of_a_curriculum_leave_unreached() -> None:
    config = TrialConfig(precision="fp16", max_epochs=4, batch_size=5, curriculum="linear", growth_interval=15)
    assert count_steps(config, 23) == 2 + 3 + 4 + 4  # 12, 18, 23 and 23 images
    assert "growth_interval" in find_inert(config, 23)
    assert "growth_interval" not in find_inert(TrialConfig(**vars(config) | {"curriculum": "none"}), 23)


@pytest.mark.parametrize(
    ("max_epochs", "batch_size", "inert"), [(1, 4, True), (2, 4, False), (2, 22, False), (2, 23, True), (1, 23, True)]
)
def test_curriculum_is_inert_exactly_where_it_changes_no_training(
    max_epochs: int, batch_size: int, inert: bool, data: TrainingData
) -> None:
    common: dict[str, Any] = {"max_epochs": max_epochs, "batch_size": batch_size, "lr": 0.01}
    plain, linear = (train(data, curriculum=curriculum, **common)[1] for curriculum in ("none", "linear"))
    # One batch of all images holds them in another order: the same gradient but for rounding.
    assert torch.allclose(plain, linear, rtol=0, atol=1e-4) == inert
    assert ("curriculum" in find_inert(TrialConfig(curriculum="linear", **common), 23)) == inert


@pytest.mark.parametrize(("batch_size", "inert"), [(1, True), (2, False)])
def test_class_weights_are_inert_exactly_in_batches_of_one_image(
    batch_size: int, inert: bool, data: TrainingData
) -> None:
    common: dict[str, Any] = {
        "max_epochs": 1,
        "batch_size": batch_size,
        "optimizer": "sgd",
        "lr": 0.01,
    }  # Adam magnifies rounding
    plain, weighted = (train(data, class_weighting=weighting, **common)[1] for weighting in ("none", "balanced"))
    assert torch.allclose(plain, weighted, rtol=0, atol=1e-5) == inert
    assert ("class_weighting" in find_inert(TrialConfig(class_weighting="balanced", **common), 23)) == inert


# Whole spaces


def make_space(tmp_path: Path, text: str) -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return load_space(str(path))


@pytest.mark.parametrize("name", ["mnist_amp", "precision", "quick"])
@pytest.mark.parametrize("train_images", [55_000, 1_347])  # MNIST, digits
def test_nothing_is_inert_in_the_bundled_spaces_that_are_meant_to_find_something(name: str, train_images: int) -> None:
    space = load_space(name)
    shares = estimate_inert(space, train_images=train_images, max_epochs=8, samples=200)
    assert set(shares.values()) == {0.0}
    assert describe_inert(shares, space, train_images=train_images, max_epochs=8) == []


def test_share_of_the_stress_space_is_what_its_distributions_make_it() -> None:
    shares = estimate_inert(load_space("stress"), **MNIST)
    # growth_interval is log-uniform in 1..2000, batch_size one of five
    longer = [math.log(2000 / steps) / math.log(2000) for steps in (424, 856, 1712)]
    assert shares.pop("growth_interval") == pytest.approx(sum(longer) / 5, abs=0.03)
    assert shares == dict.fromkeys(("lr", "batch_size", "init_scale", "backoff_factor", "precision"), 0.0)


@pytest.mark.parametrize(("train_images", "share"), [(55_000, 1 / 3), (1_347, 2 / 3)])
def test_a_third_of_the_extensions_space_has_a_static_loss_scale_and_on_digits_the_defaults_too(
    train_images: int, share: float
) -> None:
    space = load_space("extensions")
    shares = estimate_inert(space, train_images=train_images, max_epochs=8)
    assert shares.pop("growth_interval") == pytest.approx(share, abs=0.05)
    assert set(shares.values()) == {0.0}


def test_interval_that_is_fixed_beyond_the_trial_is_said_to_be_a_static_scale(tmp_path: Path) -> None:
    space = make_space(
        tmp_path, "parameters: {lr: {low: 0.1, high: 1}}\nfixed: {precision: fp16, growth_interval: 1000000}"
    )
    assert describe_inert(estimate_inert(space, **MNIST, samples=5), space, **MNIST) == [
        "growth_interval cannot act in 100 % of this space's trials: it is not shorter than the trial (6,872 steps at "
        "batch_size 64 x 8 epochs); that makes the loss scale static; searched with fraction_of_trial: true, the "
        "interval would be relative"
    ]


def test_only_settings_that_the_space_gives_have_a_share(tmp_path: Path) -> None:
    space = make_space(tmp_path, "parameters: {batch_size: {choices: [64, 1024]}}\nfixed: {precision: fp16}")
    assert "growth_interval" in find_inert(TrialConfig(precision="fp16", batch_size=1024, max_epochs=8), 55_000)
    assert estimate_inert(space, **MNIST, samples=20) == {"batch_size": 0.0, "precision": 0.0}


def test_share_counts_trials_without_the_setting_as_not_inert(tmp_path: Path) -> None:
    space = make_space(
        tmp_path,
        "parameters: {precision: {choices: [fp16, fp32]},"
        "growth_interval: {choices: [10000, 20000], when: {precision: fp16}}}",
    )
    assert estimate_inert(space, **MNIST)["growth_interval"] == pytest.approx(0.5, abs=0.1)


def test_share_is_drawn_by_seed(tmp_path: Path) -> None:
    space = make_space(tmp_path, "parameters: {growth_interval: {low: 1, high: 13744}}\nfixed: {precision: fp16}")
    first, again, other = (estimate_inert(space, **MNIST, samples=200, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert other["growth_interval"] == pytest.approx(0.5, abs=0.15)


INTERVALS = "growth_interval: {choices: [10000, 20000]}"
RELATIVE = "growth_interval: {choices: [1, 2], fraction_of_trial: true}"
SHORTEST = "424 steps at batch_size 1024 x 8 epochs"
LINES = [
    (f"parameters: {{{INTERVALS}, batch_size: {{low: 64, high: 1024, power_of_two: true}}}}",
     f"growth_interval cannot act in 31 % of this space's trials: it is not shorter than the trial ({SHORTEST}); "
     "fraction_of_trial: true makes it relative"),
    (f"parameters: {{{RELATIVE}}}",
     "growth_interval cannot act in 31 % of this space's trials: it is not shorter than the trial "
     "(6,872 steps at batch_size 64 x 8 epochs); fractions above 1 make the loss scale static, those well below 1 "
     "let it grow"),
    ("parameters: {growth_factor: {low: 2, high: 4}, batch_size: {choices: [1024]}}",
     "growth_factor cannot act in 31 % of this space's trials: growth_interval is not shorter than the trial "
     f"({SHORTEST}); searched with fraction_of_trial: true, the interval would be relative"),
    (f"parameters: {{{INTERVALS}, optimizer: {{choices: [adam, sgd]}},"
     "batch_size: {choices: [16, 32], when: {optimizer: sgd}}}",
     "growth_interval cannot act in 31 % of this space's trials: it is not shorter than the trial "
     "(6,872 steps at batch_size 64 x 8 epochs); fraction_of_trial: true makes it relative"),
    (f"parameters: {{{INTERVALS}, curriculum: {{choices: [linear, none]}}}}",
     "growth_interval cannot act in 31 % of this space's trials: it is not shorter than the trial "
     "(5,797 steps at batch_size 64 x 8 epochs, curriculum linear); fraction_of_trial: true makes it relative"),
    (f"parameters: {{{INTERVALS}, curriculum: {{choices: [none, step, root, linear]}}}}",
     "growth_interval cannot act in 31 % of this space's trials: it is not shorter than the trial "
     "(5,152 steps at batch_size 64 x 8 epochs, curriculum step); fraction_of_trial: true makes it relative"),
    (f"parameters: {{{INTERVALS}, accumulate: {{choices: [1, 8]}}}}",
     "growth_interval cannot act in 31 % of this space's trials: it is not shorter than the trial "
     "(856 steps at batch_size 64 x accumulate 8 x 8 epochs); fraction_of_trial: true makes it relative"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), LINES, ids=range(len(LINES)))
def test_line_says_how_often_and_why_a_setting_cannot_act_and_what_would_help(
    text: str, line: str, tmp_path: Path
) -> None:
    space = make_space(tmp_path, f"{text}\nfixed: {{precision: fp16}}")
    assert describe_inert({line.partition(" ")[0]: 0.31, "precision": 0.0}, space, **MNIST) == [line]


def test_every_setting_that_can_be_inert_has_its_line(tmp_path: Path) -> None:
    space = make_space(
        tmp_path,
        "parameters: {lr: {low: 0.1, high: 1}}\nfixed: {precision: fp16, growth_factor: 2, backoff_factor: 0.5,"
        "growth_interval: 1, class_weighting: balanced, curriculum: linear, batch_size: 1}",
    )
    trial = {"train_images": 1, "max_epochs": 1}
    lines = describe_inert(estimate_inert(space, **trial, samples=1), space, **trial)
    names = [line.split()[0] for line in lines]
    assert names == ["growth_factor", "backoff_factor", "growth_interval", "class_weighting", "curriculum"]


@pytest.mark.parametrize(("share", "shown"), [(0.001, "1 %"), (0.312, "31 %"), (0.999, "99 %"), (1.0, "100 %")])
def test_percentage_is_neither_none_nor_all_where_the_share_is_not(share: float, shown: str) -> None:
    (line,) = describe_inert({"growth_interval": share, "lr": 0.0}, load_space("stress"), **MNIST)
    assert line.startswith(f"growth_interval cannot act in {shown} of this space's trials: ")


def test_estimate_prints_nothing_and_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom tune_amp.space.no_effect import estimate_inert\nfrom tune_amp.space.space import load_space\n"
        "estimate_inert(load_space('stress'), train_images=100, max_epochs=1, samples=5)\n"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
