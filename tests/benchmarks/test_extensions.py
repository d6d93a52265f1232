"""The effects of the tutorial's extensions, pair by pair."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

from benchmarks.training.extensions import (
    METRICS,
    Comparison,
    measure_extensions,
    render_extensions,
    write_extensions,
)
from tune_amp.training.data import Dataset
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig

CPU = torch.device("cpu")


def test_effects_are_those_of_the_runs_pair_by_pair_and_nothing_is_a_null(digits: Dataset, tmp_path: Path) -> None:
    common: dict[str, Any] = {"batch_size": 64, "max_epochs": 2}
    comparisons = (
        Comparison(extension="slower", on={"lr": 1e-5}),
        Comparison(extension="nothing", on={"class_weighting": "none"}, both={"imbalance": 10.0}),
    )
    told: list[str] = []
    result = measure_extensions(digits, seeds=3, comparisons=comparisons, common=common, announce=told.append)
    assert [(row.extension, row.imbalance, row.metric) for row in result.rows] == [
        (name, imbalance, metric) for name, imbalance in (("slower", 1), ("nothing", 10)) for metric in METRICS
    ]
    data = TrainingData(digits.train, digits.validation, 10, CPU)
    slower = TrialConfig(**common, dataset="digits", lr=1e-5)
    runs = [list(TrainingRun(dataclasses.replace(slower, seed=seed), data).epochs())[-1] for seed in range(3)]
    accuracy, mean, worst = result.rows[:3]
    assert accuracy.on == tuple(run.val_accuracy for run in runs)
    assert worst.on == tuple(min(run.val_recalls) for run in runs)
    assert accuracy.effect == pytest.approx(statistics.fmean(accuracy.on) - statistics.fmean(accuracy.off))
    assert accuracy.low < accuracy.high < 0
    assert not accuracy.is_null
    assert mean.on != mean.off
    assert all((row.effect, row.low, row.high, row.is_null) == (0, 0, 0, True) for row in result.rows[3:])
    assert result.rows[3].on != accuracy.off  # of a long tail
    assert [line.partition(":")[0] for line in told] == ["slower", "nothing"]
    text = render_extensions(result)
    assert "+0.00 (+0.00 to +0.00), null" in text
    assert "| nothing | long tail 10:1 |" in text
    assert "n = 3 seeds" in text
    assert "linear 25 % fewer, root 25 % fewer, step 25 % fewer" in text  # of 2 epochs one has half of the images
    write_extensions(tmp_path / "extensions.parquet", result)
    assert pq.read_table(tmp_path / "extensions.parquet")["on"].to_pylist() == [list(row.on) for row in result.rows]
