"""The benchmark of the driver: its arithmetic, and a small real search."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from benchmarks.load.instant import Sample, make_images
from benchmarks.load.scale import (
    ScaleResult,
    ScaleRow,
    StudyRow,
    measure_search,
    measure_study,
    render_scale,
    repeat_searches,
    summarise_samples,
    write_scale,
)


def make_row(**changes: Any) -> ScaleRow:
    values: dict[str, Any] = {
        "repeat": 0,
        "trials": 2_000,
        "epochs": 1,
        "slots": 2,
        "wall_seconds": 0.1,
        "late_wall_seconds": 0.12,
        "driver_seconds": 0.03,
        "late_driver_seconds": 0.04,
        "peak_memory_bytes": 2**30,
        "growth_bytes": 20_000.0,
        "journal_bytes": 4_000_000,
    }
    return ScaleRow(**{**values, **changes})


def make_result(*rows: ScaleRow) -> ScaleResult:
    study = tuple(
        StudyRow(repeat=repeat, size=100, suggest_seconds=seconds, tell_seconds=0.001)
        for repeat, seconds in enumerate((0.002, 0.009, 0.003))
    )
    return ScaleResult(rows=rows, study=study, machine={"processor": "some"}, versions={"ray": "2.60"})


def test_costs_of_a_trial_are_rises_from_the_first_end_to_the_last() -> None:
    """100 trials: 10 ms of CPU each, 20 ms from the 90th on; 1,000 bytes a trial after the first ten."""
    samples, driver = [], 5.0
    for ended in range(1, 101):
        driver += 0.02 if ended > 90 else 0.01
        memory = 10**8 + (1_000 * ended if ended >= 10 else 10**6)
        samples.append(Sample(ended=ended, clock=2.0 * ended, driver=driver, memory_bytes=memory))
    row = summarise_samples(samples, trials=100, epochs=1, slots=2, journal_bytes=7)
    assert row.wall_seconds == pytest.approx(2.0)
    assert row.driver_seconds == pytest.approx((89 * 0.01 + 10 * 0.02) / 99)
    assert row.late_driver_seconds == pytest.approx(0.02)
    assert row.growth_bytes == pytest.approx(1_000.0)
    assert row.peak_memory_bytes == 10**8 + 100_000


def test_memory_that_cannot_be_read_is_none() -> None:
    samples = [Sample(ended=n, clock=n, driver=n, memory_bytes=None) for n in (1, 2, 3)]
    row = summarise_samples(samples, trials=3, epochs=1, slots=1, journal_bytes=7)
    assert (row.peak_memory_bytes, row.growth_bytes) == (None, None)


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, ["met", "met"]),
        ({"late_driver_seconds": 0.051}, ["missed", "met"]),
        ({"growth_bytes": 50_000.0}, ["met", "missed"]),
    ],
)
def test_targets_are_told_from_the_largest_search(changes: dict[str, Any], verdicts: list[str]) -> None:
    small = make_row(trials=100, late_driver_seconds=1.0, growth_bytes=1e9)
    text = render_scale(make_result(small, make_row(**changes)))
    told = [line.rpartition(": ")[2].rstrip(".") for line in text.splitlines() if "target" in line]
    assert told == verdicts


def test_cost_of_a_report_is_that_of_the_epochs_more() -> None:
    rows = (make_row(trials=100, driver_seconds=0.02), make_row(trials=100, epochs=11, driver_seconds=0.07))
    assert "A report more costs the driver 5.0 ms, without a checkpoint." in render_scale(make_result(*rows))


def test_table_shows_the_median_of_the_repeats_with_its_range_and_number() -> None:
    drivers = ((0.060, 0.090), (0.030, 0.045), (0.020, 0.040))
    repeated = [
        make_row(repeat=repeat, driver_seconds=mean, late_driver_seconds=late)
        for repeat, (mean, late) in enumerate(drivers)
    ]
    text = render_scale(make_result(*repeated, make_row(trials=100)))
    large, small, study = [line for line in text.splitlines() if line.startswith(("| 2,000 ", "| 100 "))]
    assert "| 3 | 100.0 ms (100.0 ms to 100.0 ms) |" in large
    assert "| 30.0 ms (20.0 ms to 60.0 ms) | 45.0 ms (40.0 ms to 90.0 ms) |" in large
    assert small.startswith("| 100 | 1 | 2 | 1 | 100.0 ms | 120.0 ms |")
    assert study == "| 100 | 3 | 3.0 ms (2.0 ms to 9.0 ms) | 1.0 ms (1.0 ms to 1.0 ms) |"
    assert "at the end of 2,000: 45.0 ms, target at most 50.0 ms: met" in text


def test_searches_take_turns_and_only_affordable_ones_are_repeated() -> None:
    """By a clock that says: a trial takes a second."""
    now = 0.0

    def measure(trials: int, epochs: int, repeat: int) -> ScaleRow:
        nonlocal now
        now += trials
        return make_row(trials=trials, epochs=epochs, repeat=repeat)

    plans = [(100, 1), (121, 1), (120, 1), (100, 10)]
    rows = list(repeat_searches(plans, 3, measure, clock=lambda: now))
    assert [(row.repeat, row.trials, row.epochs) for row in rows] == [
        *((0, *plan) for plan in plans),
        *((repeat, *plan) for repeat in (1, 2) for plan in plans if plan != (121, 1)),
    ]


def test_file_holds_a_row_for_each_search(tmp_path: Path) -> None:
    write_scale(tmp_path / "scale.parquet", make_result(make_row(), make_row(trials=100)))
    assert pq.read_table(tmp_path / "scale.parquet")["trials"].to_pylist() == [2_000, 100]


def test_study_is_timed_at_each_size() -> None:
    rows = list(measure_study((5, 12), 2))
    assert [(row.repeat, row.size) for row in rows] == [(2, 5), (2, 12)]
    assert all(row.suggest_seconds > 0 and row.tell_seconds > 0 for row in rows)


def test_images_can_be_told_apart() -> None:
    images, labels, *_ = make_images()
    assert images.shape == (300, 1, 8, 8)
    rows = images[:, 0, :4].mean(axis=2)
    assert (rows.argmax(axis=1) == labels).mean() > 0.95


@pytest.mark.slow  # starts Ray
@pytest.mark.long
def test_search_of_a_few_trials_is_measured_from_its_own_process() -> None:
    row = measure_search(6, 1)
    assert (row.trials, row.epochs) == (6, 1)
    assert row.wall_seconds > 0
    assert row.driver_seconds > 0
    assert row.journal_bytes > 1_000
