"""The benchmark of searches under load: that it notices what was lost, and small real searches."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from benchmarks.load.load import PLANS, Kept, check_run, count_at_a_time, find_first_new, measure_plan
from benchmarks.load.load_search import CUT_OFF, RUN, Plan, fabricate
from benchmarks.load.load_table import PARTS, LoadResult, LoadRow, render_load, write_load
from tune_amp.results.journal import read_journal
from tune_amp.results.records import load_trials
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import open_history
from tune_amp.search.study import open_storage

TRIALS = 40


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a search that ended."""
    folder = tmp_path_factory.mktemp("peaceful")
    (folder / RUN).mkdir()
    fabricate(Plan(part="resume", trials=TRIALS, epochs=3, slots=2), folder, cut_off=0)
    return folder / RUN


@pytest.fixture
def run(peaceful: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(peaceful, tmp_path / RUN))


def change_rows(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def count_reports(run: Path) -> int:
    return sum(event["event"] == "report" for event in read_journal(RunFolder(run).journal))


def test_run_that_kept_everything_is_found_to(peaceful: Path) -> None:
    assert check_run(peaceful, TRIALS) == Kept(reports=count_reports(peaceful), lost=0, doubled=0, unended=0)
    assert TRIALS < count_reports(peaceful) < 3 * TRIALS  # some were stopped by the scheduler


@pytest.mark.parametrize(
    ("file", "change", "found"),
    [
        ("epochs", lambda rows: rows.pop(7), {"lost": 1}),
        ("epochs", lambda rows: rows[7].update(val_loss=0.25), {"lost": 1}),
        ("epochs", lambda rows: rows.append(rows[7]), {"doubled": 1}),
        ("epochs", lambda rows: rows.append(rows[7] | {"epoch": 9}), {"doubled": 1}),
        ("trials", lambda rows: rows.append(rows[7]), {"doubled": 1}),
        ("trials", lambda rows: rows.pop(7), {"unended": 1}),
        ("trials", lambda rows: rows[7].update(status="interrupted"), {"unended": 1}),
    ],
    ids=["lost", "changed", "doubled", "made up", "trial doubled", "trial lost", "trial not ended"],
)
def test_what_the_files_lack_or_have_twice_is_noticed(
    run: Path, file: str, change: Callable[[list[dict[str, Any]]], object], found: dict[str, int]
) -> None:
    change_rows(run / f"{file}.parquet", change)
    nothing = {"lost": 0, "doubled": 0, "unended": 0}
    assert dataclasses.asdict(check_run(run, TRIALS)) == {"reports": count_reports(run)} | nothing | found


def test_trials_that_were_never_made_are_missed(peaceful: Path) -> None:
    assert check_run(peaceful, TRIALS + 3).unended == 3


def test_trial_that_runs_in_the_study_for_ever_is_noticed(run: Path) -> None:
    optuna.load_study(study_name=None, storage=open_storage(RunFolder(run).study)).ask()
    assert check_run(run, TRIALS).unended == 1


def test_trial_that_the_study_was_told_of_twice_is_noticed(run: Path) -> None:
    study = optuna.load_study(study_name=None, storage=open_storage(RunFolder(run).study))
    study.add_trial(study.trials[7])
    assert check_run(run, TRIALS).unended == 1


def test_fabricated_run_that_was_cut_off_is_one_that_a_search_can_go_on_with(tmp_path: Path) -> None:
    (tmp_path / RUN).mkdir()
    fabricate(Plan(part="resume", trials=30, epochs=3, slots=2), tmp_path)
    with open_history(tmp_path / RUN) as past:
        assert (len(past.trials), len(past.unfinished)) == (30, CUT_OFF)
        assert past.num_samples == 30 + CUT_OFF
        assert set(past.last_epochs.values()) == {1}


def make_events(*kinds: str) -> list[dict[str, Any]]:
    """Events such as ``start a``, one a second."""
    named = [kind.partition(" ") for kind in kinds]
    return [{"event": event, "trial_id": trial_id, "at": float(at)} for at, (event, _, trial_id) in enumerate(named)]


def test_trials_at_a_time_are_those_between_start_and_end_in_the_last_session() -> None:
    before = ["session", "start a", "start b", "start c"]
    assert count_at_a_time(make_events(*before)) == 3
    after = ["session", "start a", "end a", "start b", "start c", "lost b", "start b", "end b", "end c"]
    assert count_at_a_time(make_events(*before, *after)) == 2


def test_first_new_trial_is_none_that_an_earlier_process_knew_of() -> None:
    before = ["session", "trial a", "start a", "trial b"]
    after = ["session", "start b", "start a", "trial c", "start c"]
    assert find_first_new(make_events(*before, *after)) == 4.0
    assert find_first_new(make_events(*before, "session", "start b")) is None


def make_row(**changes: Any) -> LoadRow:
    values: dict[str, Any] = {
        "part": "trials",
        "trials": 2_000,
        "epochs": 1,
        "slots": 2,
        "at_a_time": 2,
        "workers": 4,
        "sessions": 2,
        "reports": 2_000,
        "lost": 0,
        "doubled": 0,
        "unended": 0,
        "wall_seconds": 300.0,
        "driver_seconds": 100.0,
        "work_share": 0.1,
        "memory_trials": (500, 1_000),
        "memory_bytes": (800 * 2**20, 900 * 2**20),
        "peak_memory_bytes": 1_000 * 2**20,
        "read_seconds": 1.0,
        "replay_seconds": 2.0,
        "rungs_seconds": 3.0,
        "study_seconds": 4.0,
        "first_seconds": 20.0,
        "suggest_seconds": 0.05,
        "write_seconds": 0.5,
        "writes": 7,
        "journal_bytes": 3_000_000,
        "study_bytes": 4_000_000,
        "parquet_bytes": 500_000,
        "load_average": 12.4,
    }
    return LoadRow(**values | changes)


def make_result(*rows: LoadRow) -> LoadResult:
    return LoadResult(rows=rows, machine={"processor": "some"}, versions={"ray": "2.60"})


def test_table_shows_each_search_with_the_load_that_it_ran_under() -> None:
    slots = make_row(part="slots", slots=64, trials=256, at_a_time=64, read_seconds=None, work_share=0.8)
    text = render_load(make_result(make_row(), slots))
    kept = [line for line in text.splitlines() if line.startswith("| ")]
    assert "2 of 2 | 2,000 | 0 | 0 | 0 | 300 s | 10% | 800 MiB at 500, 900 MiB at 1,000; most 1000 MiB" in text
    assert "| 64 slots, 256 trials | 2 | 64 of 64 |" in text
    assert kept[1].endswith("| 12 |")
    assert text.count("| 2,000 trials, killed halfway |") == 3
    assert text.count("| 64 slots, 256 trials |") == 2  # it was not resumed


@pytest.mark.parametrize("count", ["lost", "doubled", "unended"])
def test_anything_that_was_not_kept_fails_the_benchmark(count: str) -> None:
    assert make_result(make_row()).nothing_lost
    assert not make_result(make_row(), make_row(**{count: 1})).nothing_lost


def test_file_holds_a_row_for_each_search(tmp_path: Path) -> None:
    write_load(tmp_path / "load.parquet", make_result(make_row(), make_row(part="slots", work_share=None)))
    table = pq.read_table(tmp_path / "load.parquet")
    assert table["part"].to_pylist() == ["trials", "slots"]
    assert table["memory_trials"].to_pylist()[0] == [500, 1_000]


def test_every_part_has_a_plan() -> None:
    assert {part: plan.part for part, plan in PLANS.items()} == dict(zip(PARTS, PARTS, strict=True))


@pytest.mark.long
@pytest.mark.slow  # starts Ray
def test_search_that_is_killed_halfway_keeps_everything(tmp_path: Path) -> None:
    row = measure_plan(Plan(part="trials", trials=400, epochs=1, slots=2), tmp_path)
    assert (row.sessions, row.reports, row.lost, row.doubled, row.unended) == (2, 400, 0, 0, 0)
    assert len(load_trials(tmp_path / RUN)) == 400
    assert row.first_seconds is not None
    assert 0 < row.first_seconds < row.wall_seconds


@pytest.mark.slow  # starts Ray
@pytest.mark.long
def test_fabricated_run_is_resumed_and_loses_nothing(tmp_path: Path) -> None:
    row = measure_plan(Plan(part="resume", trials=200, epochs=3, slots=2), tmp_path)
    assert (row.sessions, row.trials, row.lost, row.doubled, row.unended) == (2, 200 + CUT_OFF, 0, 0, 0)
    assert len(load_trials(tmp_path / RUN)) == 200 + CUT_OFF
    steps = (row.read_seconds, row.replay_seconds, row.rungs_seconds, row.study_seconds, row.suggest_seconds)
    assert all(seconds is not None and seconds > 0 for seconds in steps)


@pytest.mark.long
@pytest.mark.slow  # starts Ray
def test_workers_that_are_forked_train_side_by_side(tmp_path: Path) -> None:
    model = "benchmarks.load.load_search:napping_net"
    plan = dataclasses.replace(PLANS["slots"], slots=4, trials=8, epochs=1, model=model)
    row = measure_plan(plan, tmp_path)
    assert (row.at_a_time, row.workers, row.lost, row.doubled, row.unended) == (4, 4, 0, 0, 0)
    assert row.work_share is not None
    assert row.work_share > 0
