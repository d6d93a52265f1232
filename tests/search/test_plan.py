"""What a search is refused before it starts, and how many of its trials start at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tune_amp.cluster.resources import TrialResources
from tune_amp.search.options import SearchOptions
from tune_amp.search.plan import SearchPlan, describe_wait
from tune_amp.space.space import SearchSpace
from tune_amp.training.data import Dataset
from tune_amp.trial.config import InputError


def make_resources(gpus: float, max_concurrent: int = 4) -> TrialResources:
    return TrialResources(cpus=2, gpus=gpus, max_concurrent=max_concurrent, reason="")


@pytest.mark.parametrize(
    ("free", "gpus", "now"),
    [
        ({"CPU": 8.0}, 0, None),
        ({"CPU": 7.0}, 0, 3),
        ({}, 0, 0),
        ({"CPU": 8.0, "GPU": 0.99999}, 0.25, 3),
        ({"CPU": 8.0, "GPU": 0.999999999}, 0.25, None),  # what Ray's sums of shares leave of a whole GPU
        ({"CPU": 8.0}, 0.25, 0),
    ],
)
def test_user_learns_how_many_trials_wait_for_what_other_jobs_hold(
    free: dict[str, float], gpus: float, now: int | None
) -> None:
    expected = "" if now is None else f"; others hold part of the cluster: {now} can start now, the rest wait"
    assert describe_wait(free, make_resources(gpus)) == expected


def test_memory_of_gpus_is_no_objective_of_trials_without_one(
    make_space: Callable[[str], SearchSpace], digits: Dataset, tmp_path: Path
) -> None:
    space = make_space("parameters:\n  lr: {low: 1.0e-4, high: 1.0e-2}\n")
    options = SearchOptions(objective="val_accuracy,peak_memory_bytes")
    about: dict[str, Any] = {"space": space, "dataset": digits, "options": options, "folder": tmp_path, "unfit": {}}
    SearchPlan(**about, resources=make_resources(0.5))
    with pytest.raises(InputError) as caught:
        SearchPlan(**about, resources=make_resources(0))
    rule = "peak_memory_bytes is measured on GPUs only, and trials get none here"
    assert str(caught.value) == f"--objective: {rule}"
