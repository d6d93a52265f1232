"""What a finished run is shown as, from its files: what is there is shown, and what is missing is said."""

import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from records import PROVENANCE, make_epoch, make_scored, make_trial
from rich.console import Console

from tune_amp.cli.run_summary import load_summary, print_summary
from tune_amp.results.confirmed import Confirmation
from tune_amp.results.importance import ImportanceResult, ParameterImportance, write_importance
from tune_amp.results.provenance import list_reuse_words
from tune_amp.results.records import (
    BestRow,
    SlotTime,
    TrialRecord,
    rank_trials,
    write_best,
    write_trials,
)
from tune_amp.trial.config import InputError, TrialConfig, TrialStatus
from tune_amp.trial.consent import list_own_code

SLOT_TIME = SlotTime(slots=2, wall_seconds=50.0)


def make_trials(count: int = 4) -> list[TrialRecord]:
    """From worst to best."""
    return [make_scored(f"{place}", 0.90 + 0.01 * place, trial_name=f"trial-{place}") for place in range(count)]


def write_run(
    folder: Path, trials: Sequence[TrialRecord], best: Sequence[BestRow] = (), slot_time: SlotTime | None = SLOT_TIME
) -> Path:
    write_trials(folder, trials, PROVENANCE, slot_time)
    if best:
        write_best(folder, best, PROVENANCE)
    return folder


def shown(folder: Path, top_k: int | None = None) -> tuple[str, str]:
    """Standard output and what goes to the error stream."""
    streams = io.StringIO(), io.StringIO()
    console, errors = (Console(file=stream, width=100, highlight=False) for stream in streams)
    print_summary(console, load_summary(folder, top_k), "the line that trains", errors)
    return streams[0].getvalue(), streams[1].getvalue()


def ranks(text: str) -> list[list[str]]:
    """Rank and accuracy of each line of the ranking."""
    rows = [line.split() for line in text.splitlines() if re.match(r"\d+ .*%", line)]
    return [[row[0], *(cell for cell in row if cell.endswith("%"))] for row in rows]


@pytest.mark.parametrize("is_out_of_time", [True, False])
def test_a_time_budget_that_ended_the_search_is_named_with_what_resumes_it(
    is_out_of_time: bool, tmp_path: Path
) -> None:
    stream = io.StringIO()
    summary = dataclasses.replace(load_summary(write_run(tmp_path, make_trials())), is_out_of_time=is_out_of_time)
    print_summary(Console(file=stream, width=60), summary, "the line that trains", Console(stderr=True))
    line = f"the time budget is used up: --resume {tmp_path} with a larger --time-budget resumes the search"
    assert (line in stream.getvalue().splitlines()) is is_out_of_time


def test_a_finished_run_is_shown_with_all_that_its_files_hold(tmp_path: Path) -> None:
    trials = make_trials()
    told = ParameterImportance(parameter="lr", importance=1.0, null_95=0.3, p_value=0.01, told_from_noise=True, raw=2.0)
    result = ImportanceResult(objective="val_accuracy", epoch=2, trials=20, method="any", rows=(told,))
    write_importance(tmp_path, result, PROVENANCE)
    text, errors = shown(write_run(tmp_path, trials, rank_trials([trials[3], trials[2]])))
    lines = text.splitlines()
    assert errors == ""
    assert lines[0] == "4 trials: 4 completed"
    assert ranks(text) == [["1", "93.00%"], ["2", "92.00%"]]
    assert "Ranks 1 to 2 are indistinguishable on 5,000 validation images" in text
    assert "importance at epoch 2 (20 trials), and what permuted values reach in 5 %:" in lines
    assert ["lr", "1.00", "0.30", "0.010"] in [line.split() for line in lines]
    assert lines[-3] == "slot time  2 slots x 50.0 s: useful training 6.0%, validation and probes 1.0%, rest 93.0%"
    assert lines[-2] == f"files    {tmp_path}: best.parquet, trials.parquet, epochs.parquet, importance.parquet"
    assert lines[-1] == "reuse    the line that trains"


def test_more_or_fewer_of_the_best_are_shown_where_asked_for(tmp_path: Path) -> None:
    trials = make_trials(6)
    write_run(tmp_path, trials, rank_trials([trials[5]]))
    assert [row[0] for row in ranks(shown(tmp_path)[0])] == ["1"]
    assert [row[0] for row in ranks(shown(tmp_path, top_k=4)[0])] == ["1", "2", "3", "4"]
    assert [row[0] for row in ranks(shown(tmp_path, top_k=99)[0])] == ["1", "2", "3", "4", "5", "6"]


def test_a_killed_run_is_shown_with_what_it_had_written(tmp_path: Path) -> None:
    running = make_scored("x", 0.97, status=TrialStatus.INTERRUPTED)
    text, errors = shown(write_run(tmp_path, [*make_trials(4), running], slot_time=None))
    assert errors == ""
    assert "5 trials: 4 completed, 1 interrupted" in text
    assert ranks(text) == [["1", "97.00%"], ["2", "93.00%"], ["3", "92.00%"]]
    assert "importance: not measured: needs at least 15 trials" in text
    assert (
        "unfinished: the search was cut off, or is still running; the line that it printed, or else --resume " in text
    )
    assert "slot time" not in text
    assert "reuse" not in text  # there is no best.parquet to train from


def test_importance_that_a_killed_search_did_not_measure_is_measured(tmp_path: Path) -> None:
    lr = [10 ** (-4 + 3 * place / 23) for place in range(24)]
    trials = [
        make_scored(f"{place}", 0.6 + 0.01 * place, config=TrialConfig(precision="fp16", lr=value))
        for place, value in enumerate(lr)
    ]
    text, _ = shown(write_run(tmp_path, trials, slot_time=None))
    assert "importance at epoch 1 (24 trials)" in text


def test_a_run_without_a_result_says_why_in_the_commonest_words(tmp_path: Path) -> None:
    failed = [make_trial(f"{place}", status=TrialStatus.FAILED, epochs=(), error="it broke") for place in range(3)]
    diverged = make_trial(
        "d",
        status=TrialStatus.DIVERGED,
        epochs=(make_epoch(1, val_loss=float("nan")),),
        error="diverged: val_loss is nan",
    )
    text, errors = shown(write_run(tmp_path, [diverged, *failed]))
    assert "4 trials: 1 diverged, 3 failed" in text
    assert "slot time" in text
    assert errors.splitlines()[:3] == [
        "no trial produced a result:",
        "  3 failed: it broke",
        "  1 diverged: val_loss is nan",
    ]


def test_where_fresh_seeds_know_better_the_searchs_own_ranking_is_shown_only_on_demand(tmp_path: Path) -> None:
    trials = make_trials()
    means = {f"{name}_{what}": 0.91 for name in ("val_accuracy", "test_accuracy") for what in ("mean", "high")}
    confirmation = Confirmation(confirm_seeds=(1, 2, 3), tied_with_best=True, **means)  # type: ignore[arg-type]
    copies = [BestRow(rank=rank, trial=trials[rank], confirmation=confirmation) for rank in (1, 2)]
    write_run(tmp_path, trials, copies)
    assert load_summary(tmp_path).is_confirmed
    assert "confirmed: 1 configuration on seeds" in shown(tmp_path)[0]
    assert ["1", "93.00%"] not in ranks(shown(tmp_path)[0])
    assert ranks(shown(tmp_path, top_k=2)[0])[:2] == [["1", "93.00%"], ["2", "92.00%"]]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold trials\.parquet"):
        load_summary(tmp_path)


def test_the_line_that_trains_names_the_data_and_consents_to_the_users_own_code_only() -> None:
    words = list_reuse_words(
        ("tune-amp", "train"),
        "my runs/best.parquet",
        data_dir="my data",
        own_code=list_own_code(vars(TrialConfig(model="mine:net"))),
    )
    assert words == ["tune-amp", "train", "my runs/best.parquet", "--data-dir", "my data", "--model", "mine:net"]


def test_a_run_without_a_trial_says_so(tmp_path: Path) -> None:
    text, errors = shown(write_run(tmp_path, []))
    assert text.startswith("0 trials\n")
    assert errors == "no trial has begun\n"
