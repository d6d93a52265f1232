"""The profile of a search: its arithmetic, the parts that it watches, and that a real search is profiled."""

import dataclasses
import datetime
import importlib
from pathlib import Path

import pytest
from records import STARTED, make_epoch, make_trial
from small_mnist import write_mnist

from benchmarks.search_speed import profiled
from benchmarks.search_speed.profile import Profile, measure_profiles, render_profiles, split_slots
from benchmarks.search_speed.speed import Pairing
from tune_amp.results.records import TrialRecord

START = STARTED.timestamp()


def train(worker: int, begin: float, seconds: float) -> TrialRecord:
    epoch = make_epoch(1, train_seconds=seconds / 2, val_seconds=seconds / 4, probe_seconds=seconds / 16)
    return make_trial(
        f"{worker}-{begin}",
        epochs=(epoch,),
        started=STARTED + datetime.timedelta(seconds=begin),
        wall_seconds=seconds,
        setup_seconds=seconds / 16,
        checkpoint_seconds=seconds / 16,
        worker=worker,
    )


def test_every_slot_second_has_one_use() -> None:
    trials = [train(1, 0, 16), train(1, 18, 16), train(2, 3, 32)]
    uses = split_slots(trials, slots=3, first=START, last=START + 40)
    assert uses == {
        "training": 32,
        "validation": 16,
        "probe": 4,
        "model and optimizer": 4,
        "checkpoints": 4,
        "reports, the driver's answers": 4,
        "between two trials": 2,
        "later workers not started yet": 3,
        "no trial left at the end": 6 + 5,
        "slots without a worker": 40,
    }
    assert sum(uses.values()) == 3 * 40


def make_pairing(repeat: int = 0) -> Pairing:
    return Pairing(
        data_dir=Path(), precision="bf16", trials=3, repeat=repeat, max_epochs=2, slots=2, gpus_per_trial=0.0
    )


def make_profile(wall: float) -> Profile:
    return Profile(
        wall_seconds=wall,
        driver={"trials": wall / 2, "report": wall / 2},
        driver_cpu={"report": 1.0},
        slots={"training": wall / 2, "rest": wall / 2},
        confirm_slots={"training": wall / 10, "rest": wall / 10},
        trial_epochs=30,
        trials=3,
    )


def test_table_has_the_medians_of_all_repeats() -> None:
    text = render_profiles({make_pairing(n): make_profile(wall) for n, wall in enumerate((10, 20, 40))}, load=0.25)
    assert "n = 3" in text
    assert "load average before: 0.2" in text
    assert "| trials | 10.00 s (5.00 s to 20.00 s) | 50% |  |" in text
    assert "| report | 10.00 s (5.00 s to 20.00 s) | 50% | 1.00 s (1.00 s to 1.00 s) |" in text
    assert "| whole | 20.0 s (10.0 s to 40.0 s) | 100% |  |" in text
    assert "| trials | training | 10.00 s (5.00 s to 20.00 s) | 50.0% |" in text
    assert "| confirmation | rest | 2.00 s (1.00 s to 4.00 s) | 50.0% |" in text
    assert "Trial-epochs a second: 1.50 (0.75 to 3.00). Slots in training steps, of the whole command: 30 %" in text


def test_every_part_that_is_watched_exists() -> None:
    for place in profiled.WATCHED.values():
        name, _, function = place.rpartition(".")
        assert callable(getattr(importlib.import_module(name), function)), place


@pytest.mark.slow
def test_the_parts_of_a_real_search_add_up_to_its_wall_time(tmp_path: Path) -> None:
    write_mnist(tmp_path, train=1500)
    pairing = dataclasses.replace(make_pairing(), data_dir=tmp_path)
    [profile] = measure_profiles([pairing]).values()
    assert sum(profile.driver.values()) == pytest.approx(profile.wall_seconds)
    assert min(profile.driver.values()) >= 0
    assert (profile.trials, set(profile.driver_cpu)) == (3, {"trials", "ranking, importance", "confirmation", "report"})
    assert 3 <= profile.trial_epochs <= 6
    assert sum(profile.slots.values()) == pytest.approx(2 * profile.driver["trials"])
    assert all(seconds > -0.01 for seconds in profile.slots.values())
    assert profile.confirm_slots["training"] > 0
    assert 0 < profile.at_work < 1
