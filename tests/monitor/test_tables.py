"""The table of confirmed configurations fits a terminal, and its sentences follow from the numbers."""

import dataclasses
import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from records import FIVE_SETTINGS, PROVENANCE, make_scored, make_trial
from rich.console import Console

from tune_amp.cli.run_summary import print_confirmed
from tune_amp.monitor.tables import WideTable, describe_confirmed, render_confirmed
from tune_amp.results.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.results.provenance import Provenance
from tune_amp.results.ranking import rank_confirmed
from tune_amp.results.records import BestRow, load_best_rows, load_provenance, write_best
from tune_amp.trial.config import TrialConfig, TrialStatus

SEEDS = (1000, 1001, 1002)
DEFAULT = make_trial(DEFAULT_ID, config=TrialConfig(precision="fp16"), epochs=())


def make_runs(trial_id: str, accuracies: Sequence[float], **changes: Any) -> list[ConfirmedRun]:
    values = {"status": TrialStatus.COMPLETED, "val_loss": 0.1, "test_accuracy": 0.95, **changes}
    return [
        ConfirmedRun(trial_id=trial_id, seed=seed, **{"val_accuracy": accuracy, **values})
        for seed, accuracy in zip(SEEDS, accuracies, strict=True)
    ]


def make_rows(
    scores: dict[str, Sequence[float]],
    default: Sequence[float] | None = None,
    extra: Sequence[ConfirmedRun] = (),
    objective: str = "val_accuracy",
    **config: Any,
) -> list[BestRow]:
    """Confirmed configurations by their accuracies on the three seeds; ``extra`` takes the place of a trial's runs."""
    runs = [run for name, values in scores.items() for run in make_runs(name, values)]
    runs = [run for run in runs if run.trial_id not in {other.trial_id for other in extra}] + list(extra)
    runs += make_runs(DEFAULT_ID, default) if default else []
    settings = {"precision": "fp16", "max_epochs": 1, **config}
    ranked = [
        make_scored(name, 0.97, config=TrialConfig(**{"lr": number / 1000, **settings}))
        for number, name in enumerate(scores, start=2)
    ]
    return rank_confirmed(ranked, DEFAULT if default else None, runs, objective.split(","))


def show(rows: Sequence[BestRow], provenance: Provenance = PROVENANCE) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    print_confirmed(console, rows, provenance)
    return console.export_text()


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


SPREAD = [0.960, 0.962, 0.964]
CLOSE = [0.961, 0.960, 0.966]
FAR = [0.900, 0.903, 0.904]


def test_table_shows_every_number_within_80_columns() -> None:
    widest: dict[str, Any] = {"lr": 1.234e-4, "batch_size": 1024, "init_scale": 2.0**-24, "growth_interval": 123456}
    rows = make_rows({"a": SPREAD, "b": [0.5, 0.9, 0.1]}, CLOSE, **widest)
    text = show(rows, dataclasses.replace(PROVENANCE, space_text=FIVE_SETTINGS))
    assert "…" not in text
    table = text.partition("Means over")[0].splitlines()
    assert all(len(line.rstrip()) <= 80 for line in table)
    settings = ["2", "0.000123", "1024", "fp16", "2^-24", "123456"]
    assert [*settings, "96.20%", "±0.50", "95.00%", "±0.00"] in words(text)
    assert ["2", "+0.80"] in words(text)  # what does not fit follows below
    assert "default" in text


@pytest.mark.parametrize(("width", "parts"), [(11, 1), (10, 2), (7, 2)])
def test_columns_that_do_not_fit_follow_below(width: int, parts: int) -> None:
    table = WideTable(["aaa", "bbb", "ccc"])
    table.add_row("1", "2", "3")
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    assert text.count("aaa") == parts
    assert text.split()[-1] == "3"


def test_table_shows_an_own_metric_and_own_parameters() -> None:
    runs = [
        dataclasses.replace(run, val_accuracy=None, test_accuracy=None, metrics={"val_f1": f1, "test_f1": f1 / 2})
        for name, values in (("a", SPREAD), (DEFAULT_ID, FAR))
        for run, f1 in zip(make_runs(name, values), values, strict=True)
    ]
    space = "own:\n  hidden: {choices: [64, 128]}\n"
    by_f1 = dataclasses.replace(PROVENANCE, objective="val_f1", space_text=space)
    ranked = [make_trial("a", config=TrialConfig(own={"hidden": 128}))]
    text = show(rank_confirmed(ranked, DEFAULT, runs, ["val_f1"]), by_f1)
    assert words(text)[0] == ["#", "own.hidden", "val_f1", "test_f1"]
    assert ["1", "128", "0.9620", "±0.0050", "0.4810", "±0.0025"] in words(text)
    assert "the test set was read once a run" in " ".join(text.split())
    untested = [dataclasses.replace(run, metrics={"val_f1": run.metrics["val_f1"]}) for run in runs]
    assert "test set" not in show(rank_confirmed(ranked, DEFAULT, untested, ["val_f1"]), by_f1)


def test_the_default_has_its_place_and_what_may_be_the_best_is_named() -> None:
    rows = make_rows({"a": SPREAD, "b": CLOSE, "c": FAR}, [0.959, 0.963, 0.961])
    lines = words(show(rows))
    assert [line[:2] for line in lines[2:6]] == [["1", "default"], ["2", "0.003"], ["3", "0.002"], ["4", "0.004"]]
    sentences = list(describe_confirmed(rows, PROVENANCE))
    assert sentences[0].startswith("Means over 3 fresh seeds")
    assert sentences[1].startswith(
        "Any of rank 1 (default), rank 2 and rank 3 may be the best: none is shown to be worse than another ("
    )
    assert sentences[2] == "Shown to be worse than another: rank 4."


def test_a_number_1_that_is_better_than_all_says_so() -> None:
    rows = make_rows({"a": SPREAD, "c": FAR}, FAR)
    sentences = list(describe_confirmed(rows, PROVENANCE))
    assert sentences[1].startswith("Shown to be worse than another: rank 2 and rank 3 (default) (paired t tests")
    assert sentences[-1].startswith("verdict  rank 1 is better than the defaults: +5.97 points of validation accuracy")


def test_a_trial_with_the_settings_of_the_default_is_named() -> None:
    rows = make_rows({"a": CLOSE}, CLOSE, lr=DEFAULT.config.lr, max_epochs=DEFAULT.config.max_epochs)
    expected = "The settings of rank 2 are the default's, which a search tries first."
    assert list(describe_confirmed(rows, PROVENANCE))[1] == expected
    rows = make_rows({"a": SPREAD}, CLOSE, max_epochs=DEFAULT.config.max_epochs)
    assert not any("the default's" in sentence for sentence in describe_confirmed(rows, PROVENANCE))


def test_configurations_on_different_numbers_of_seeds_are_shown_as_such() -> None:
    rows = make_rows({"a": SPREAD, "b": CLOSE}, FAR, [*make_runs("a", SPREAD), *more_runs("a", SPREAD)])
    assert next(iter(describe_confirmed(rows, PROVENANCE))).startswith("Means over 3 to 6 fresh seeds")


def more_runs(name: str, accuracies: Sequence[float]) -> list[ConfirmedRun]:
    return [dataclasses.replace(run, seed=run.seed + 3) for run in make_runs(name, accuracies)]


def make_broken(name: str) -> list[ConfirmedRun]:
    """One run of three diverged."""
    return [
        dataclasses.replace(run, status=TrialStatus.DIVERGED, error="diverged: weights are not finite")
        if run.seed == 1001
        else run
        for run in make_runs(name, SPREAD)
    ]


def test_what_failed_is_named_with_its_reason() -> None:
    broken = make_broken("a")
    rows = make_rows({"a": SPREAD, "b": CLOSE}, CLOSE, broken)
    text = show(rows)
    assert "1 of 3 failed" in text
    assert "Rank 3 has no mean: seed 1001: diverged: weights are not finite." in " ".join(text.split())


def test_a_search_that_stopped_a_trial_early_says_what_search_minus_confirmed_compares() -> None:
    rows = make_rows({"a": SPREAD}, CLOSE, max_epochs=2)
    assert any("ended early" in sentence for sentence in describe_confirmed(rows, PROVENANCE))
    rows = make_rows({"a": SPREAD}, CLOSE)
    assert not any("ended early" in sentence for sentence in describe_confirmed(rows, PROVENANCE))


def test_rows_that_were_not_confirmed_are_left_out() -> None:
    rows = make_rows({"a": SPREAD, "b": CLOSE}, objective="val_accuracy,train_seconds")
    rows.append(BestRow(rank=3, trial=make_scored("c", 0.9)))
    pareto = dataclasses.replace(PROVENANCE, objective="val_accuracy,train_seconds")
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render_confirmed(rows, pareto))
    assert [line[0] for line in words(console.export_text()) if line[0].isdigit()] == ["1", "2"]
    assert "ranks are the search's" in next(iter(describe_confirmed(rows, pareto)))


def test_the_table_of_a_loss_is_in_nats() -> None:
    runs = [*make_runs("a", SPREAD), *make_runs(DEFAULT_ID, SPREAD)]
    losses = {"a": [0.10, 0.11, 0.12], DEFAULT_ID: [0.201, 0.212, 0.219]}
    runs = [dataclasses.replace(run, val_loss=losses[run.trial_id][run.seed - 1000]) for run in runs]
    ranked = [make_scored("a", 0.97, 0.09, config=TrialConfig(lr=0.1))]
    by_loss = dataclasses.replace(PROVENANCE, objective="val_loss")
    text = show(rank_confirmed(ranked, DEFAULT, runs, ["val_loss"]), by_loss)
    assert "0.1100 ±0.0248" in text
    assert "-0.0200" in text
    assert "better than the defaults: -0.1007 nats" in " ".join(text.split())


# From the files alone


def test_what_is_shown_from_the_files_is_what_was_shown_and_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    rows = make_rows({"a": SPREAD, "b": CLOSE}, FAR)
    write_best(tmp_path, rows, PROVENANCE)
    again = show(load_best_rows(tmp_path), load_provenance(tmp_path))
    assert again == show(rows, PROVENANCE)
    assert "verdict  rank 1 is better than the defaults" in again
    code = "import sys, tune_amp.monitor.tables; print(sorted({'torch', 'ray', 'optuna'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
