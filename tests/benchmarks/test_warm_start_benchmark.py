import json
from pathlib import Path

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from curve_tables import make_stress_table

from benchmarks.quality.curves import write_curves
from benchmarks.quality.replay import CurveTable
from benchmarks.quality.warm_start import (
    CLOSE,
    COLD,
    DONOR,
    MISLED,
    SUGGESTED,
    WARM,
    SearchPath,
    WarmStartResult,
    WarmStartRow,
    compare_paths,
    count_costs,
    make_donor,
    measure_warm_start,
    mislead,
    render_warm_start,
    replay_arms,
    replay_search,
    write_warm_start,
)
from tune_amp.results.records import TrialRecord
from tune_amp.search.options import SearchOptions
from tune_amp.training.data import Dataset

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
COLD_PATH = SearchPath(accuracies=[0.5, 0.9, 0.7, 0.95])


def test_paths_are_measured_by_the_best_that_the_cold_search_ever_reported() -> None:
    quick = SearchPath(accuracies=[0.95 - CLOSE, 0.96])
    never = SearchPath(accuracies=[0.6] * 6)
    rows = compare_paths("p", 7, {COLD: COLD_PATH, WARM: quick, MISLED: never})
    assert [(row.arm, row.reached, row.came_close, row.epochs, row.best) for row in rows] == [
        (COLD, 4, 4, 4, 0.95),
        (WARM, 2, 1, 2, 0.96),
        (MISLED, None, None, 6, 0.6),
    ]
    assert {(row.problem, row.seed) for row in rows} == {("p", 7)}


@pytest.mark.parametrize(("length", "cost"), [(2, 4), (6, 6)])
def test_a_search_that_never_gets_there_gains_nothing_by_being_short(length: int, cost: int) -> None:
    never = SearchPath(accuracies=[0.6] * length)
    cold, short = compare_paths("p", 0, {COLD: COLD_PATH, WARM: never})
    assert count_costs([short], [cold], "reached") == [cost]
    assert count_costs([cold], [cold], "reached") == [4]


@pytest.fixture(scope="module")
def table() -> CurveTable:
    return CurveTable(make_stress_table(32))


def test_misleading_donor_has_the_worst_trials_for_winners_and_other_data(table: CurveTable) -> None:
    donor = make_donor(table, replay_search(table, 1, None, 32), 32)
    misled = mislead(donor)

    def accuracies(trials: tuple[TrialRecord, ...]) -> list[float]:
        return [trial.last.val_accuracy or 0.0 for trial in trials if trial.last]

    assert len(misled.winners) == 3
    assert sorted(accuracies(donor.trials))[:3] == accuracies(misled.winners)
    assert misled.provenance.data_hash != donor.provenance.data_hash


def test_replayed_arms_differ_in_what_they_take_over(table: CurveTable) -> None:
    paths = replay_arms(table, 0, budget=32)
    taken = {
        arm: None if path.warm_start is None else (len(path.warm_start.suggestions) > 0, path.warm_start.obstacle)
        for arm, path in paths.items()
    }
    other = "the data differ"
    assert taken == {COLD: None, WARM: (True, None), SUGGESTED: (True, other), MISLED: (True, other), DONOR: None}
    assert {len(path.accuracies) for path in paths.values()} == {32}
    assert paths[COLD].accuracies == replay_arms(table, 0, budget=32)[COLD].accuracies


def test_table_says_what_the_rows_say(tmp_path: Path, digits: Dataset) -> None:
    curves = make_stress_table(32)
    path = tmp_path / "curves-stress.parquet"
    write_curves(path, curves.configs, curves.epochs, curves.origin)
    rows: list[WarmStartRow] = []
    result = measure_warm_start(
        None,
        digits,
        SearchOptions(),
        folder=tmp_path,
        seeds=0,
        curves={"stress": path},
        replay_seeds=2,
        report=rows.append,
    )
    assert tuple(rows) == result.rows
    assert len(rows) == 2 * 5
    text = render_warm_start(result)
    assert "### stress, replayed (n = 2 seeds)" in text
    [cold] = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {COLD} |")]
    reached = [row.reached for row in rows if row.arm == COLD]
    assert cold[1] == f"{sum(value or 0 for value in reached) / 2:.1f}"
    assert cold[2:4] == ["", ""]
    write_warm_start(tmp_path / "warm-start.parquet", result)
    written = pq.read_table(tmp_path / "warm-start.parquet")
    assert written.to_pylist() == [vars(row) for row in rows]
    assert json.loads(written.schema.metadata[b"tune_amp"]) == result.about


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("warm-start*.parquet")), ids=lambda path: path.stem)
def test_reference_table_follows_from_its_rows(path: Path) -> None:
    written = pq.read_table(path)
    rows = tuple(WarmStartRow(**row) for row in written.to_pylist())
    result = WarmStartResult(rows=rows, about=json.loads(written.schema.metadata[b"tune_amp"]))
    assert render_warm_start(result) == path.with_suffix(".md").read_text()
