import dataclasses
import math
from pathlib import Path

import pytest
from curve_tables import SHARED, TRAIN_IMAGES, make_config, make_curve, make_curves

from benchmarks.quality.curves import describe_origin, load_curves, record_curves, sample_configs, write_curves
from tune_amp.space.space import load_space
from tune_amp.training.data import Dataset
from tune_amp.trial.config import HOPELESS_STATES, InputError, TrialConfig


def test_curves_come_back_as_they_were_written(tmp_path: Path) -> None:
    configs = [
        make_config(lr=10.0**-exponent) for exponent in range(12)
    ]  # more than 10: numbers, not texts, order them
    curves = make_curves(configs, [make_curve(0.5, 0.1 * exponent % 1) for exponent in range(12)], "stress")
    write_curves(tmp_path / "c.parquet", curves.configs, curves.epochs, curves.origin)
    assert load_curves(tmp_path / "c.parquet") == curves


def test_values_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    curves = make_curves([make_config()], [make_curve(math.nan, math.nan)], "stress")
    write_curves(tmp_path / "c.parquet", curves.configs, curves.epochs, curves.origin)
    [[first, second]] = load_curves(tmp_path / "c.parquet").epochs
    assert math.isnan(first.val_loss or 0.0)
    assert (first.state, second.epoch) == ("diverged", 2)


@pytest.mark.parametrize(
    ("content", "rule"), [(None, "but does not exist"), (b"no Parquet", "must be a readable, undamaged Parquet file")]
)
def test_file_that_is_none_of_ours_is_refused_by_name(tmp_path: Path, content: bytes | None, rule: str) -> None:
    path = tmp_path / "c.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"c\.parquet: .*{rule}"):
        load_curves(path)


def test_configurations_are_drawn_anew_with_another_seed_only() -> None:
    space = load_space("stress")

    def draw(seed: int) -> list[TrialConfig]:
        return sample_configs(space, 5, seed=seed, train_images=TRAIN_IMAGES, shared=SHARED)

    assert draw(1) == draw(1)
    assert len({config.lr for config in (*draw(1), *draw(2))}) == 10
    assert {(config.max_epochs, config.dataset, config.precision) for config in draw(1)} == {(8, "mnist", "fp16")}


@pytest.mark.slow  # starts a process
def test_a_run_past_saving_is_trained_to_its_full_budget(digits: Dataset) -> None:
    good = TrialConfig(lr=3e-3, batch_size=64, dataset="digits", max_epochs=3)
    lost = dataclasses.replace(good, precision="fp16", init_scale=2.0**-60)
    recorded = list(record_curves([lost, good], digits, 1))
    assert [[metrics.epoch for metrics in curve] for curve in recorded] == [[1, 2, 3]] * 2
    assert recorded[0][0].state in HOPELESS_STATES
    assert (recorded[0][-1].val_accuracy or 0) < 0.3
    assert (recorded[1][-1].val_accuracy or 0) > 0.8


def test_origin_says_what_the_curves_were_recorded_with_and_nothing_of_the_machine(digits: Dataset) -> None:
    origin = describe_origin(load_space("stress"), digits, seed=3)
    assert (origin["dataset"], origin["train_images"], origin["seed"]) == ("digits", len(digits.train), 3)
    assert origin["space_text"] == load_space("stress").text
    assert str(Path.home()) not in str(origin)
