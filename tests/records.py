"""Epochs, trials and a provenance as tests need them; every value can be changed."""

import datetime
import math
from typing import Any

from tune_amp.results.provenance import Provenance
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import EpochMetrics, TrialConfig, TrialStatus

NAN, INF = math.nan, math.inf
STARTED = datetime.datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=datetime.UTC)


def make_epoch(epoch: int = 1, **changes: Any) -> EpochMetrics:
    values: dict[str, Any] = {
        "epoch": epoch,
        "train_loss": 0.5 / epoch,
        "val_loss": 0.4 / epoch,
        "val_accuracy": 0.9,
        "steps": 100 * epoch,
        "applied_steps": 99 * epoch,
        "skipped_steps": epoch,
        "growths": 0,
        "first_applied_step": 2,
        "loss_scale": 32768.0,
        "min_loss_scale": 32768.0,
        "max_loss_scale": 65536.0,
        "train_seconds": 1.5 * epoch,
        "val_seconds": 0.25 * epoch,
        "data_seconds": 0.0,
        "samples_per_second": 12345.6,
        "peak_memory_bytes": None,
        "state": "steady",
        "underflow_share": 0.0,
        "probe_seconds": 0.01 * epoch,
        "loop": "eager: the CPU has no CUDA graphs",
        "loss_scale_steps": (1, 2),
        "loss_scale_values": (65536.0, 32768.0),
        "val_recalls": (0.95, 0.85),
    }
    return EpochMetrics(**values | changes)


def make_trial(trial_id: str = "7422e802", **changes: Any) -> TrialRecord:
    values: dict[str, Any] = {
        "trial_id": trial_id,
        "status": TrialStatus.COMPLETED,
        "config": TrialConfig(precision="fp16", lr=0.003),
        "epochs": (make_epoch(1), make_epoch(2)),
        "trial_name": "AmpTrainable_1",
        "started": STARTED,
        "wall_seconds": 4.5,
        "device": "NVIDIA H200",
        "num_threads": 2,
    }
    return TrialRecord(**values | changes)


def make_scored(trial_id: str, accuracy: float | None, loss: float | None = 0.1, **changes: Any) -> TrialRecord:
    return make_trial(trial_id, epochs=(make_epoch(1, val_accuracy=accuracy, val_loss=loss),), **changes)


FIVE_SETTINGS = """parameters:
  lr: {low: 1.0e-4, high: 0.1}
  batch_size: {low: 64, high: 1024}
  precision: {choices: [fp16]}
  init_scale: {low: 2^-24, high: 2^24, power_of_two: true}
  growth_interval: {low: 1, high: 200000}
"""
"""Text of a space."""

PROVENANCE = Provenance(
    run="2026-03-01-mnist",
    command=("scripts/search.py", "--seed", "7"),
    created="2026-03-01T12:30:00Z",
    space_source="search_spaces/mnist_amp.yaml",
    space_text="parameters:\n  lr: {low: 1.0e-4, high: 0.1}\n",
    dataset="mnist",
    data_hash="sha256:0123",
    train_images=55_000,
    validation_images=5_000,
    objective="val_accuracy",
    sampler="tpe",
    scheduler="asha",
    seed=7,
    device="cpu",
    versions={"torch": "2.15.0", "ray": "2.60.0"},
)
