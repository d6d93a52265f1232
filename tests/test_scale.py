"""The benchmark of the driver: its arithmetic, and a small real search."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from tune_amp.benchmarks.scale import (
    Sample,
    ScaleResult,
    ScaleRow,
    StudyRow,
    make_images,
    measure_search,
    measure_study,
    render_scale,
    summarise_samples,
    write_scale,
)


def make_row(**changes: Any) -> ScaleRow:
    values: dict[str, Any] = {
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
    study = (StudyRow(size=100, suggest_seconds=0.002, tell_seconds=0.001),)
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
    assert "A report more costs the driver 5.0 ms" in render_scale(make_result(*rows))


def test_file_holds_a_row_for_each_search(tmp_path: Path) -> None:
    write_scale(tmp_path / "scale.parquet", make_result(make_row(), make_row(trials=100)))
    assert pq.read_table(tmp_path / "scale.parquet")["trials"].to_pylist() == [2_000, 100]


def test_study_is_timed_at_each_size() -> None:
    rows = list(measure_study((5, 12)))
    assert [row.size for row in rows] == [5, 12]
    assert all(row.suggest_seconds > 0 and row.tell_seconds > 0 for row in rows)


def test_images_can_be_told_apart() -> None:
    images, labels, *_ = make_images()
    assert images.shape == (300, 1, 8, 8)
    rows = images[:, 0, :4].mean(axis=2)
    assert (rows.argmax(axis=1) == labels).mean() > 0.95


@pytest.mark.slow  # starts Ray
def test_search_of_a_few_trials_is_measured_from_its_own_process() -> None:
    row = measure_search(6, 1)
    assert (row.trials, row.epochs) == (6, 1)
    assert row.wall_seconds > 0
    assert row.driver_seconds > 0
    assert row.journal_bytes > 1_000
