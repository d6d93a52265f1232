"""The table of confirmed configurations fits a terminal, and its sentences follow from the numbers."""

import dataclasses
import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from records import PROVENANCE, make_scored, make_trial
from rich.console import Console

from tune_amp.config import TrialConfig, TrialStatus
from tune_amp.confirm_table import describe_confirmed, describe_gain, print_confirmed, render_confirmed
from tune_amp.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.ranking import rank_confirmed
from tune_amp.results import (
    BestRow,
    Provenance,
    load_best_rows,
    load_confirmed,
    load_provenance,
    write_best,
    write_confirmed,
)

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
) -> tuple[list[BestRow], list[ConfirmedRun]]:
    """Confirmed configurations by their accuracies on the three seeds; ``extra`` takes the place of a trial's runs."""
    runs = [run for name, values in scores.items() for run in make_runs(name, values)]
    runs = [run for run in runs if run.trial_id not in {other.trial_id for other in extra}] + list(extra)
    runs += make_runs(DEFAULT_ID, default) if default else []
    settings = {"precision": "fp16", "max_epochs": 1, **config}
    ranked = [
        make_scored(name, 0.97, config=TrialConfig(**{"lr": number / 1000, **settings}))
        for number, name in enumerate(scores, start=2)
    ]
    return rank_confirmed(ranked, DEFAULT if default else None, runs, objective.split(",")), runs


def show(rows: Sequence[BestRow], provenance: Provenance = PROVENANCE, runs: Sequence[ConfirmedRun] = ()) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    print_confirmed(console, rows, provenance, runs)
    return console.export_text()


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


SPREAD = [0.960, 0.962, 0.964]
CLOSE = [0.961, 0.960, 0.966]
FAR = [0.900, 0.903, 0.904]


def test_table_shows_every_number_within_80_columns() -> None:
    widest: dict[str, Any] = {"lr": 1.234e-4, "batch_size": 1024, "init_scale": 2.0**-24, "growth_interval": 123456}
    rows, runs = make_rows({"a": SPREAD, "b": [0.5, 0.9, 0.1]}, CLOSE, **widest)
    text = show(rows, runs=runs)
    assert "…" not in text
    table = text.splitlines()[: len(rows) + 1]
    assert all(len(line.rstrip()) <= 80 for line in table)
    assert ["1", "1.23e-04", "1024", "fp16", "2^-24", "123456", "96.20", "±0.50", "95.00", "±0.00", "+0.80"] in words(
        text
    )
    assert "default" in text


def test_ties_and_the_default_are_marked() -> None:
    rows, runs = make_rows({"a": SPREAD, "b": CLOSE, "c": FAR}, [0.959, 0.963, 0.961])
    lines = words(show(rows, runs=runs))
    assert [(line[0], line[-1]) for line in lines[2:5]] == [("2", "yes"), ("3", "no"), ("default", "yes")]
    sentences = list(describe_confirmed(rows, PROVENANCE, runs))
    assert "Number 1 cannot be told from 2 and the default configuration (Tukey's honestly" in sentences[1]
    assert sentences[0].startswith("Means over 3 fresh seeds")


def test_a_number_1_that_is_told_from_all_says_so() -> None:
    rows, runs = make_rows({"a": SPREAD, "c": FAR}, FAR)
    assert "Number 1 is told from all others" in " ".join(describe_confirmed(rows, PROVENANCE, runs))


def make_broken(name: str) -> list[ConfirmedRun]:
    """One run of three diverged."""
    return [
        dataclasses.replace(run, status=TrialStatus.DIVERGED, error="diverged: weights are not finite")
        if run.seed == 1001
        else run
        for run in make_runs(name, SPREAD)
    ]


def test_a_number_1_is_told_from_those_only_that_could_be_compared() -> None:
    rows, runs = make_rows({"a": SPREAD, "b": CLOSE}, FAR, make_broken("b"))
    told = " ".join(describe_confirmed(rows, PROVENANCE, runs))
    assert "Number 1 is told from the other that completed on every seed" in told


def test_what_failed_is_named_with_its_reason() -> None:
    broken = make_broken("a")
    rows, runs = make_rows({"a": SPREAD, "b": CLOSE}, CLOSE, broken)
    text = show(rows, runs=runs)
    assert "1 of 3 failed" in text
    assert "Number 2 has no mean: seed 1001: diverged: weights are not finite." in " ".join(text.split())


def test_a_search_that_stopped_a_trial_early_says_what_its_optimism_compares() -> None:
    rows, runs = make_rows({"a": SPREAD}, CLOSE, max_epochs=2)
    assert any("ended early" in sentence for sentence in describe_confirmed(rows, PROVENANCE, runs))
    rows, runs = make_rows({"a": SPREAD}, CLOSE)
    assert not any("ended early" in sentence for sentence in describe_confirmed(rows, PROVENANCE, runs))


def test_rows_that_were_not_confirmed_are_left_out() -> None:
    rows, _ = make_rows({"a": SPREAD, "b": CLOSE}, objective="val_accuracy,train_seconds")
    rows.append(BestRow(rank=3, trial=make_scored("c", 0.9)))
    pareto = dataclasses.replace(PROVENANCE, objective="val_accuracy,train_seconds")
    assert render_confirmed(rows, pareto).row_count == 2
    assert "ranks are the search's" in next(iter(describe_confirmed(rows, pareto)))


# The gain


def gain_of(a: Sequence[float], default: Sequence[float], with_runs: bool = True, **changes: Any) -> str:
    rows, runs = make_rows({"a": a}, default, **changes)
    return describe_gain(rows, PROVENANCE, runs if with_runs else ())


@pytest.mark.parametrize(("winner", "default", "expected"), [
    (SPREAD, FAR, "+5.97 points of validation accuracy (95 % interval +5.82 to +6.11): better than the defaults"),
    (FAR, SPREAD, "-5.97 points of validation accuracy (95 % interval -6.11 to -5.82): worse than the defaults"),
    (SPREAD, CLOSE, "-0.03 points of validation accuracy (95 % interval -0.55 to +0.48): not told from the defaults"),
])  # fmt: skip
def test_gain_is_number_1_minus_the_defaults_with_its_interval_and_verdict(
    winner: Sequence[float], default: Sequence[float], expected: str
) -> None:
    """Of two configurations Tukey's interval is that of the paired t test, from which the figures are."""
    assert gain_of(winner, default) == f"gain     number 1 minus the defaults: {expected}"


def test_gain_without_the_runs_keeps_its_verdict_and_leaves_the_interval_out() -> None:
    text = gain_of(SPREAD, FAR, with_runs=False)
    assert text == "gain     number 1 minus the defaults: +5.97 points of validation accuracy: better than the defaults"
    assert gain_of(SPREAD, CLOSE, with_runs=False).endswith("validation accuracy: not told from the defaults")


def test_a_lower_loss_is_better() -> None:
    runs = [*make_runs("a", SPREAD), *make_runs(DEFAULT_ID, SPREAD)]
    losses = {"a": [0.10, 0.11, 0.12], DEFAULT_ID: [0.201, 0.212, 0.219]}
    runs = [dataclasses.replace(run, val_loss=losses[run.trial_id][run.seed - 1000]) for run in runs]
    ranked = [make_scored("a", 0.97, 0.09, config=TrialConfig(lr=0.1))]
    rows = rank_confirmed(ranked, DEFAULT, runs, ["val_loss"])
    by_loss = dataclasses.replace(PROVENANCE, objective="val_loss")
    text = describe_gain(rows, by_loss, runs)
    assert text.startswith("gain     number 1 minus the defaults: -0.1007 nats of validation loss (95 % interval -0.10")
    assert text.endswith("better than the defaults")
    assert "0.1100 ±0.0248" in show(rows, by_loss, runs)
    assert "-0.0200" in show(rows, by_loss, runs)


def test_a_winner_that_is_the_default_gained_nothing() -> None:
    assert (
        gain_of(SPREAD, SPREAD, lr=1e-3, seed=5, max_epochs=5) == "gain     none: number 1 is the default configuration"
    )


def test_without_a_default_or_its_mean_there_is_no_number() -> None:
    rows, runs = make_rows({"a": SPREAD, "b": CLOSE})
    assert describe_gain(rows, PROVENANCE, runs) == ""
    broken = [dataclasses.replace(run, status=TrialStatus.FAILED) for run in make_runs(DEFAULT_ID, SPREAD)]
    rows = rank_confirmed([make_scored("a", 0.9)], DEFAULT, [*make_runs("a", SPREAD), *broken], ["val_accuracy"])
    assert describe_gain(rows, PROVENANCE) == "gain     no number: the defaults did not complete on every seed"


# From the files alone


def test_what_is_shown_from_the_files_is_what_was_shown_and_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    rows, runs = make_rows({"a": SPREAD, "b": CLOSE}, FAR)
    write_best(tmp_path, rows, PROVENANCE)
    write_confirmed(tmp_path, runs, PROVENANCE)
    again = show(load_best_rows(tmp_path), load_provenance(tmp_path), load_confirmed(tmp_path))
    assert again == show(rows, PROVENANCE, runs)
    code = "import sys, tune_amp.confirm_table; print(sorted({'torch', 'ray', 'optuna'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
