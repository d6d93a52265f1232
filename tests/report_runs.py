"""Run folders with everything that a report can show, written as a search writes them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records import INF, NAN, PROVENANCE, make_epoch, make_trial

from tune_amp.results.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.results.importance import ImportanceResult, ParameterImportance, write_importance
from tune_amp.results.provenance import Provenance
from tune_amp.results.ranking import choose_best, rank_confirmed
from tune_amp.results.records import (
    SlotTime,
    TrialRecord,
    rank_trials,
    write_best,
    write_confirmed,
    write_trials,
)
from tune_amp.trial.config import TrialConfig, TrialStatus

SPACE = """\
parameters:
  lr: {low: 1.0e-4, high: 0.1, log: true}
  batch_size: {low: 64, high: 1024, power_of_two: true}
  precision: {choices: [bf16, fp16]}
  init_scale: {low: 1, high: 2^24, power_of_two: true, when: {precision: fp16}}
  growth_interval: {low: 0.02, high: 0.5, log: true, fraction_of_trial: true, when: {precision: fp16}}
"""

SEEDS = (101, 102, 103)
TEST_ACCURACIES = {1: (0.971, 0.973, 0.975), 2: (0.970, 0.973, 0.974), DEFAULT_ID: (0.965, 0.969, 0.970)}

SLOT_TIME = SlotTime(slots=2, wall_seconds=100.0)

BF16 = (4, 6)

# Accuracy after the last epoch, epochs, and how each trial ended.
OUTCOMES: Sequence[tuple[TrialStatus, float | None, int]] = (
    (TrialStatus.COMPLETED, 0.968, 4),
    (TrialStatus.STOPPED, 0.91, 1),
    (TrialStatus.COMPLETED, 0.976, 4),
    (TrialStatus.DIVERGED, NAN, 2),
    (TrialStatus.OUT_OF_MEMORY, None, 0),
    (TrialStatus.STOPPED, 0.95, 2),
    (TrialStatus.FAILED, None, 0),
    (TrialStatus.COMPLETED, 0.971, 4),
    (TrialStatus.INTERRUPTED, 0.94, 3),
)


def make_outcome(number: int, status: TrialStatus, accuracy: float | None, epochs: int, **changes: Any) -> TrialRecord:
    """Trial ``number``; those of ``BF16`` without loss scaling."""
    fp16 = number not in BF16
    scaler: dict[str, Any] = {"init_scale": 65536.0, "growth_interval": 500 + number} if fp16 else {}
    config = TrialConfig(
        lr=0.001 * number,
        batch_size=2 ** (6 + number % 5),
        precision="fp16" if fp16 else "bf16",
        max_epochs=4,
        **scaler,
    )
    unscaled = {} if fp16 else {"loss_scale_steps": (), "loss_scale_values": (), "loss_scale": None}
    loss = INF if status is TrialStatus.DIVERGED else 0.3 / number
    reports = tuple(
        make_epoch(epoch, val_accuracy=accuracy, val_loss=loss, **unscaled) for epoch in range(1, epochs + 1)
    )
    values = {
        "status": status,
        "config": config,
        "epochs": reports,
        "trial_name": f"{number:02d}-{config.precision}",
        "error": "no memory left" if status in (TrialStatus.OUT_OF_MEMORY, TrialStatus.FAILED) else None,
        "device": "cpu",
    }
    return make_trial(f"{number:08x}", **(values | changes))


def make_outcomes() -> list[TrialRecord]:
    """A trial of every status."""
    return [make_outcome(number, *outcome) for number, outcome in enumerate(OUTCOMES, start=1)]


def write_run(folder: Path, trials: Sequence[TrialRecord] | None = None, **origin: Any) -> Path:
    """What a search leaves that was not confirmed, without importance and slot time."""
    trials = make_outcomes() if trials is None else trials
    provenance = make_provenance(**origin)
    write_trials(folder, trials, provenance)
    ranked = choose_best(trials, provenance.objectives, 3)
    if ranked:
        write_best(folder, rank_trials(ranked), provenance)
    return folder


def make_provenance(**changes: Any) -> Provenance:
    return dataclasses.replace(PROVENANCE, **{"space_text": SPACE, **changes})


def write_full_run(folder: Path, trials: Sequence[TrialRecord] | None = None, **origin: Any) -> Path:
    """What a confirmed search leaves: every file of a run, each with all that it can hold."""
    trials = make_outcomes() if trials is None else trials
    provenance = make_provenance(**origin)
    write_trials(folder, trials, provenance, SLOT_TIME)
    best = choose_best(trials, ("val_accuracy",), 2)
    default = make_trial(
        DEFAULT_ID, trial_name=DEFAULT_ID, epochs=(), config=TrialConfig(precision="fp16", max_epochs=4)
    )
    runs = [*make_runs(best[0], 1), *make_runs(best[1], 2), *make_runs(default, DEFAULT_ID)]
    rows = rank_confirmed(best, default, runs, provenance.objectives)
    write_best(folder, rows, provenance)
    write_confirmed(folder, runs, provenance)
    write_importance(folder, make_importance(), provenance)
    return folder


OWN_SPACE = """\
parameters:
  lr: {low: 1.0e-4, high: 0.1, log: true}
fixed: {precision: fp16}
own:
  hidden: {choices: [64, 128]}
  kind: {choices: [<b>wide</b>, deep]}
"""


def write_own_run(folder: Path, objective: str, values: Sequence[float | None]) -> Path:
    """What a search of a user's own training loop leaves, with a trial for each value of the objective."""
    name = objective.partition(":")[0]
    trials = [make_own_trial(f"{number:08x}", number, name, value) for number, value in enumerate(values, start=1)]
    default = make_own_trial(DEFAULT_ID, 0, name, None)
    origin = {"dataset": "mine:train", "data_hash": "own", "train_images": 0, "validation_images": 0}
    provenance = make_provenance(objective=objective, space_text=OWN_SPACE, **origin)
    write_trials(folder, trials, provenance, SLOT_TIME)
    best = choose_best(trials, provenance.objectives, 2)
    names = (name, name.replace("val_", "test_"))
    runs = [
        ConfirmedRun(
            trial_id=trial.trial_id,
            seed=seed,
            status=TrialStatus.COMPLETED,
            **spread_metrics(dict.fromkeys(names, level + 0.01 * seed)),
        )
        for trial, level in zip((*best, default), (3.0, 2.0, 1.0), strict=True)
        for seed in SEEDS
    ]
    write_best(folder, rank_confirmed(best, default, runs, provenance.objectives), provenance)
    write_confirmed(folder, runs, provenance)
    return folder


def make_own_trial(trial_id: str, number: int, metric: str, value: float | None) -> TrialRecord:
    own = {"hidden": (64, 128)[number % 2], "kind": ("<b>wide</b>", "deep")[number % 2]}
    names: dict[str, Any] = dict.fromkeys(("model", "dataset", "train"), "mine:train")
    config = TrialConfig(lr=0.001 * (number + 1), precision="fp16", own=own, **names)
    none = {"val_accuracy": None, "val_loss": None, "val_recalls": ()}
    reports = (make_epoch(epoch, **none | spread_metrics({metric: value})) for epoch in (1, 2))
    return make_trial(trial_id, config=config, epochs=() if value is None else tuple(reports))


def spread_metrics(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Arguments of ``EpochMetrics`` and ``ConfirmedRun``, which have fields for common metrics."""
    own = {name: value for name, value in values.items() if not name.endswith(("_accuracy", "_loss"))}
    return {name: value for name, value in values.items() if name not in own} | {"metrics": own}


def make_runs(trial: TrialRecord, place: int | str) -> list[ConfirmedRun]:
    return [
        ConfirmedRun(
            trial_id=trial.trial_id,
            seed=seed,
            status=TrialStatus.COMPLETED,
            val_loss=0.1,
            val_accuracy=accuracy - 0.002,
            test_accuracy=accuracy,
        )
        for seed, accuracy in zip(SEEDS, TEST_ACCURACIES[place], strict=True)
    ]


def make_importance() -> ImportanceResult:
    rows = (
        ParameterImportance(parameter="lr", importance=0.8, null_95=0.4, p_value=0.005, told_from_noise=True, raw=1.6),
        ParameterImportance(
            parameter="batch_size", importance=0.2, null_95=0.5, p_value=0.6, told_from_noise=False, raw=0.4
        ),
    )
    return ImportanceResult(objective="val_accuracy", epoch=1, trials=16, method="PED-ANOVA", rows=rows)


NASTY = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def make_nasty_trials() -> list[TrialRecord]:
    return [
        dataclasses.replace(trial, error=NASTY, trial_name=f"{trial.trial_name} {NASTY}", device=NASTY)
        for trial in make_outcomes()
    ]


def write_nasty_run(folder: Path) -> Path:
    origin = {"run": NASTY, "command": (NASTY,), "space_source": NASTY, "space_text": f"{SPACE}# {NASTY}\n"}
    more = {"dataset": NASTY, "data_hash": NASTY, "versions": {NASTY: NASTY}, "created": NASTY}
    return write_full_run(folder, make_nasty_trials(), **origin, **more)
