"""Winners are trained again on fresh seeds, ranked by validation alone, and nothing that happens to a run is lost."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import tune
from records import NAN, PROVENANCE, make_scored, make_trial
from small_runs import make_split

from tune_amp.cluster.memory_holders import MEMORY_HELD_SIGN, MEMORY_RETRIES
from tune_amp.cluster.resources import TrialResources
from tune_amp.cluster.session import ray_session
from tune_amp.cluster.trainable import NODE_RETRIES, WORKER_RETRIES, AmpTrainable, build_worker_setup
from tune_amp.confirm.plan import ConfirmPlan, build_default, choose_seeds, confirm, plan_confirmation
from tune_amp.confirm.slots import Attempt, ConfirmSlots, run_job, train_and_test
from tune_amp.results.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.results.progress import ConfirmJob, ConfirmProgress, ConfirmResult, Observer
from tune_amp.results.ranking import rank_confirmed
from tune_amp.results.records import (
    BestRow,
    TrialRecord,
    load_best_rows,
    load_confirmed,
    rank_trials,
    write_best,
)
from tune_amp.results.statistics import mean_interval
from tune_amp.search.options import SearchOptions
from tune_amp.search.plan import list_shared, plan_search
from tune_amp.search.run import run_search
from tune_amp.space.space import SearchSpace, load_space
from tune_amp.training.data import Dataset, make_long_tail
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import InputError, TrialConfig, TrialStatus

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SEEDS = (1000, 1001, 1002)

TRAIN, VALIDATION, TEST = make_split(60, seed=0), make_split(21, seed=1), make_split(37, seed=2)


def make_run(trial_id: str, seed: int = 1000, **changes: Any) -> ConfirmedRun:
    values = {"status": TrialStatus.COMPLETED, "val_loss": 0.1, "val_accuracy": 0.9, "test_accuracy": 0.9}
    return ConfirmedRun(trial_id=trial_id, seed=seed, **{**values, "test_loss": 0.1, **changes})


def make_runs(trial_id: str, accuracies: Sequence[float], **changes: Any) -> list[ConfirmedRun]:
    return [
        make_run(trial_id, seed, **{"val_accuracy": accuracy, **changes})
        for seed, accuracy in zip(SEEDS, accuracies, strict=True)
    ]


def make_ranked(*accuracies: float, **changes: Any) -> list[TrialRecord]:
    """Trials a, b, c ... with the accuracies that the search saw, each of another learning rate."""
    return [
        make_scored(name, accuracy, config=TrialConfig(lr=number * 1e-3), **changes)
        for number, (name, accuracy) in enumerate(zip("abcdef", accuracies, strict=False), start=2)
    ]


DEFAULT = make_trial(DEFAULT_ID, config=TrialConfig(), epochs=())


def ids(rows: Sequence[BestRow]) -> str:
    return " ".join(f"{row.trial.trial_id}{row.rank or ''}" for row in rows)


def column(rows: Sequence[BestRow], name: str) -> dict[str, Any]:
    return {row.trial.trial_id: getattr(row.confirmation, name) for row in rows}


# Ranked again


def test_a_default_that_is_best_is_rank_1() -> None:
    ranked = make_ranked(0.99, 0.98, 0.97)
    runs = [
        *make_runs("a", [0.90, 0.91, 0.92]),
        *make_runs("b", [0.94, 0.95, 0.96]),
        *make_runs("c", [0.92, 0.93, 0.94]),
        *make_runs(DEFAULT_ID, [0.97, 0.98, 0.99]),
    ]
    rows = rank_confirmed(ranked, DEFAULT, runs, ["val_accuracy"])
    assert ids(rows) == "default1 b2 c3 a4"
    first = rows[0].confirmation
    assert first is not None
    assert first.verdict is not None
    assert first.verdict.startswith("no gain over the defaults: keep them; rank 2 is worse: -3.00 points")
    assert first.verdict_kind == "worse"
    assert first.gain == pytest.approx(-0.03)
    found = mean_interval([0.94, 0.95, 0.96])
    best = rows[1].confirmation
    assert best is not None
    assert {best.verdict, best.verdict_kind, best.gain} == {None}
    assert (best.val_accuracy_mean, best.val_accuracy_std) == (found.mean, found.std)
    assert (best.val_accuracy_low, best.val_accuracy_high) == (found.low, found.high)
    assert best.confirm_seeds == SEEDS
    optimism = column(rows, "optimism")
    assert optimism.pop(DEFAULT_ID) is None
    assert optimism == pytest.approx({"a": 0.08, "b": 0.03, "c": 0.04})


def test_the_test_set_never_decides_a_rank_or_a_tie() -> None:
    ranked = make_ranked(0.99, 0.98, 0.97)
    accuracies = {"a": [0.96, 0.961, 0.959], "b": [0.95, 0.951, 0.949], "c": [0.94, 0.941, 0.939]}
    reverse = {"a": 0.1, "b": 0.5, "c": 0.9}
    with_test = [r for name, values in accuracies.items() for r in make_runs(name, values, test_accuracy=reverse[name])]
    without = [r for name, values in accuracies.items() for r in make_runs(name, values, test_accuracy=0.5)]
    rows = rank_confirmed(ranked, None, with_test, ["val_accuracy"])
    assert ids(rows) == "a1 b2 c3"
    assert column(rows, "test_accuracy_mean") == pytest.approx(reverse)
    for name in ("tied_with_best", "optimism", "val_accuracy_mean"):
        assert column(rows, name) == column(rank_confirmed(ranked, None, without, ["val_accuracy"]), name)


def test_a_loss_ranks_by_less_and_breaks_the_ties_of_accuracy() -> None:
    ranked = make_ranked(0.99, 0.98, 0.97)
    runs = [
        *make_runs("a", [0.95] * 3, val_loss=0.3),
        *make_runs("b", [0.95] * 3, val_loss=0.2),
        *make_runs("c", [0.96] * 3, val_loss=0.4),
    ]
    assert ids(rank_confirmed(ranked, None, runs, ["val_accuracy"])) == "c1 b2 a3"
    rows = rank_confirmed(ranked, None, runs, ["val_loss"])
    assert ids(rows) == "b1 a2 c3"
    assert column(rows, "optimism") == pytest.approx({"b": -0.1, "a": -0.2, "c": -0.3})  # the search saw 0.1


def test_what_fails_on_a_seed_comes_after_all_that_do_not_and_is_not_scored_by_the_others() -> None:
    """FACTS 7: the mean of the runs that survived would put ``a`` first."""
    ranked = make_ranked(0.99, 0.98, 0.97)
    broken = make_run(
        "a", 1001, status=TrialStatus.DIVERGED, error="diverged: weights are not finite", val_accuracy=None
    )
    dead = make_run("b", 1000, status=TrialStatus.OUT_OF_MEMORY, val_accuracy=None)
    runs = [
        make_run("a", 1000, val_accuracy=0.99),
        broken,
        make_run("a", 1002, val_accuracy=0.99),
        dead,
        *make_runs("b", [0.99] * 3)[1:],
        *make_runs("c", [0.50, 0.51, 0.52]),
    ]
    rows = rank_confirmed(ranked, None, runs, ["val_accuracy"])
    assert ids(rows) == "c1 a2 b3"
    failures = column(rows, "confirm_failures")
    assert failures == {
        "c": (),
        "a": ("seed 1001: diverged: weights are not finite",),
        "b": ("seed 1000: out_of_memory",),
    }
    for name in ("val_accuracy_mean", "test_accuracy_high", "tied_with_best", "optimism"):
        assert column(rows, name)["a"] is None
    assert rows[0].confirmation is not None
    assert rows[0].confirmation.tied_with_best is True  # the only one with a mean


def test_where_everything_fails_the_order_of_the_search_stays() -> None:
    runs = [make_run(name, seed, status=TrialStatus.FAILED, error="E: no") for name in "ab" for seed in SEEDS]
    rows = rank_confirmed(make_ranked(0.99, 0.98), None, runs, ["val_accuracy"])
    assert ids(rows) == "a1 b2"
    assert column(rows, "tied_with_best") == {"a": None, "b": None}


def test_a_default_that_no_other_is_shown_to_beat_is_rank_1_though_its_mean_is_not_the_best() -> None:
    runs = [*make_runs("a", [0.950, 0.940, 0.954]), *make_runs("b", [0.90, 0.91, 0.90])]
    runs += make_runs(DEFAULT_ID, [0.949, 0.942, 0.950])
    rows = rank_confirmed(make_ranked(0.96, 0.95), DEFAULT, runs, ["val_accuracy"])
    assert ids(rows) == "default1 a2 b3"
    assert column(rows, "tied_with_best") == {DEFAULT_ID: True, "a": True, "b": False}
    first = rows[0].confirmation
    assert first is not None
    assert first.verdict_kind == "indistinguishable"


def test_a_challenger_that_is_shown_to_be_better_is_rank_1_and_the_default_has_its_place_by_its_mean() -> None:
    runs = [*make_runs("a", [0.950, 0.952, 0.954]), *make_runs("b", [0.90, 0.91, 0.90])]
    runs += make_runs(DEFAULT_ID, [0.939, 0.942, 0.944])
    rows = rank_confirmed(make_ranked(0.95, 0.96), DEFAULT, runs, ["val_accuracy"])
    assert ids(rows) == "a1 default2 b3"
    first = rows[0].confirmation
    assert first is not None
    assert first.verdict_kind == "better"
    assert first.gain == pytest.approx(0.01033, abs=1e-5)


def test_a_copy_of_the_default_shares_its_place_and_ties() -> None:
    copy = make_scored("copy", 0.9, config=TrialConfig(seed=5))
    runs = [*make_runs("a", [0.90, 0.91, 0.90]), *make_runs("copy", SCORES), *make_runs(DEFAULT_ID, SCORES)]
    rows = rank_confirmed([*make_ranked(0.99), copy], DEFAULT, runs, ["val_accuracy"])
    assert ids(rows) == "default1 copy2 a3"
    assert column(rows, "tied_with_best") == {DEFAULT_ID: True, "copy": True, "a": False}


SCORES = [0.950, 0.952, 0.954]


def test_of_several_objectives_the_order_of_the_search_stays_and_the_default_has_no_rank() -> None:
    """The rest of the set, which was not trained again, has no columns."""
    ranked = make_ranked(0.99, 0.98, 0.97, 0.96)
    runs = [run for name, value in {"a": 0.90, "b": 0.95, "c": 0.92}.items() for run in make_runs(name, [value] * 3)]
    runs += make_runs(DEFAULT_ID, [0.5] * 3)
    rows = rank_confirmed(ranked, DEFAULT, runs, ["val_accuracy", "train_seconds"])
    assert ids(rows) == "a1 b2 c3 d4 default"
    assert rows[3].confirmation is None
    assert column(rows[:3], "val_accuracy_mean") == pytest.approx({"a": 0.90, "b": 0.95, "c": 0.92})
    first = rows[0].confirmation
    assert first is not None
    assert first.verdict is not None
    assert first.verdict.startswith("rank 2 is better than the defaults: +45.00 points")
    assert rank_confirmed(ranked, None, runs, ["val_accuracy"])[0].trial.trial_id == "b"


def test_runs_without_any_spread_and_a_single_configuration_are_judged() -> None:
    alone = rank_confirmed(make_ranked(0.9), None, make_runs("a", [0.9] * 3), ["val_accuracy"])
    assert column(alone, "tied_with_best") == {"a": True}
    assert column(alone, "val_accuracy_std") == {"a": 0.0}
    runs = [*make_runs("a", [0.9] * 3), *make_runs("b", [0.9] * 3), *make_runs("c", [0.8] * 3)]
    rows = rank_confirmed(make_ranked(0.9, 0.9, 0.9), None, runs, ["val_accuracy"])
    assert column(rows, "tied_with_best") == {"a": True, "b": True, "c": False}


# What is trained


SPACE = "parameters:\n  lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n"


@pytest.mark.parametrize(("fixed", "precision"), [
    ("fixed: {precision: fp16}", "fp16"),
    ("fixed: {precision: bf16}", "bf16"),
    ("", "fp32"),
    ("  precision: {choices: [bf16, fp16]}", "fp16"),
    ("  precision: {choices: [bf16, tf32]}", "bf16"),
    ("  precision: {choices: [bf16, fp32]}", "fp32"),
])  # fmt: skip
def test_default_is_the_tutorials_in_fp16_where_the_space_has_it(
    make_space: Callable[[str], SearchSpace], fixed: str, precision: str
) -> None:
    precisions = make_space(SPACE + fixed).precisions
    default = build_default(precisions, model="conv_net", dataset="digits", max_epochs=7, seed=4)
    assert (default.lr, default.batch_size, default.precision) == (1e-3, 64, precision)
    assert (default.model, default.dataset, default.max_epochs) == ("conv_net", "digits", 7)
    if precision == "fp16":
        assert (default.init_scale, default.growth_interval) == (65536.0, 2000)


def test_default_that_a_search_on_a_long_tail_found_itself_is_trained_once(
    make_space: Callable[[str], SearchSpace], digits: Dataset
) -> None:
    tailed = make_long_tail(digits, 5.0)
    space = make_space(SPACE + "  precision: {choices: [bf16, fp16]}")
    default = build_default(space.precisions, **list_shared(tailed, SearchOptions(max_epochs=2)))
    found = TrialConfig(precision="fp16", dataset="digits", max_epochs=2, imbalance=5.0)
    plan = plan_for([make_trial("a", config=found)], default, seeds=2)
    assert [job.trial_ids for job in plan.first_jobs] == [("a", "default")] * 2


def plan_for(
    ranked: Sequence[TrialRecord], default: TrialConfig, *, train_images: int = 1_000, seeds: int = 3
) -> ConfirmPlan:
    return plan_confirmation(
        ranked,
        default,
        train_images=train_images,
        top_k=3,
        seeds=seeds,
        objective="val_accuracy",
        search_seconds=100.0,
    )


def test_further_seeds_take_no_longer_than_the_search_or_a_minute() -> None:
    plan = plan_for(make_ranked(0.9), TrialConfig())
    assert plan.budget_seconds == 100.0
    short = plan_confirmation(
        [], TrialConfig(), train_images=99, top_k=1, seeds=3, objective="val_accuracy", search_seconds=1.0
    )
    assert short.budget_seconds == 60.0


def make_plan(
    *trials: TrialRecord,
    default: TrialConfig | None = None,
    top_k: int = 3,
    seeds: tuple[int, ...] = SEEDS,
    budget: float = 60.0,
) -> ConfirmPlan:
    return ConfirmPlan(
        ranked=trials,
        top_k=top_k,
        default=default,
        left_out=None,
        seeds=seeds,
        objective="val_accuracy",
        budget_seconds=budget,
    )


def test_every_configuration_is_trained_on_the_same_seeds_one_seed_after_the_other() -> None:
    trials = make_ranked(0.99, 0.98, 0.97)
    jobs = make_plan(*trials, default=TrialConfig(), top_k=2).first_jobs
    assert [(job.trial_ids, job.config.seed) for job in jobs] == [
        ((name,), seed) for seed in SEEDS for name in ("a", "b", DEFAULT_ID)
    ]
    assert {(job.config.lr, job.config.batch_size) for job in jobs} == {(2e-3, 64), (3e-3, 64), (1e-3, 64)}


def test_configurations_that_differ_in_the_seed_alone_share_their_runs() -> None:
    first, second = (
        make_scored(name, 0.9, config=TrialConfig(lr=0.5, seed=seed)) for name, seed in (("a", 0), ("b", 7))
    )
    default = make_scored("c", 0.9, config=TrialConfig(seed=3))
    jobs = make_plan(first, second, default, default=TrialConfig()).first_jobs
    assert [job.trial_ids for job in jobs] == [("a", "b"), ("c", DEFAULT_ID)] * 3
    assert [job.config.seed for job in jobs] == [seed for seed in SEEDS for _ in range(2)]


@pytest.mark.parametrize("seed", [0, 1, 999, 1000, 1_001_000, 2**63 - 1])
def test_seeds_are_fresh(seed: int) -> None:
    seeds = choose_seeds(seed, 5)
    assert len({*seeds, seed}) == 6
    assert not set(seeds) & set(choose_seeds(seed + 1 if seed < 2**62 else 0, 5))
    for fresh in seeds:
        TrialConfig(seed=fresh)


def test_a_default_whose_batch_exceeds_the_data_is_left_out_with_a_reason() -> None:
    plan = plan_for(make_ranked(0.9), TrialConfig(), train_images=63, seeds=2)
    assert plan.default is None
    assert plan.left_out == "the default configuration is left out: its batch of 64 exceeds the 63 training images"
    assert [job.trial_ids for job in plan.first_jobs] == [("a",)] * 2
    assert plan_for(make_ranked(0.9), TrialConfig(), train_images=64).left_out is None


# One run


@pytest.fixture
def data() -> Iterator[TrainingData]:
    state = torch.get_rng_state()
    yield TrainingData(TRAIN, VALIDATION, 3, CPU)
    torch.set_rng_state(state)


WATCHED_MODEL = """
import math
import torch

SEEN = []

class Net(torch.nn.Linear):
    def forward(self, images):
        logits = super().forward(images.flatten(1))
        if not self.training:
            SEEN.append(len(images))
        return fault(logits) if self.training else logits

def net(shape, classes):
    return Net(math.prod(shape), classes)

def fault(logits):
"""


def make_job(model: str = "simple_net", **config: Any) -> ConfirmJob:
    values = {"model": model, "batch_size": 10, "max_epochs": 2, "lr": 0.01, "seed": 1000, **config}
    return ConfirmJob(trial_ids=("a", "b"), config=TrialConfig(**values))


def test_a_run_is_trained_as_its_trial_was_and_the_test_set_read_once_at_its_end(
    data: TrainingData, write_module: Callable[[str], str]
) -> None:
    module = write_module(WATCHED_MODEL + "    return logits\n")
    run = train_and_test(make_job(f"{module}:net"), data, TEST)
    seen = sys.modules[module].SEEN
    assert seen[-1] == len(TEST)
    assert seen.count(len(TEST)) == 1
    assert (run.trial_id, run.seed, run.status, run.error, run.device) == ("a", 1000, "completed", None, "cpu")

    from tune_amp.training.run import TrainingRun

    again = TrainingRun(make_job(f"{module}:net").config, data)
    last = list(again.epochs())[-1]
    assert (run.val_loss, run.val_accuracy) == (last.val_loss, last.val_accuracy)
    tested = again.test(TEST)
    assert [run.test_loss, run.test_accuracy, run.test_recalls, run.metrics] == list(tested.values())
    assert run.test_accuracy != run.val_accuracy
    counts = [int((TEST.labels == label).sum()) for label in range(3)]
    hits = sum(recall * count for recall, count in zip(run.test_recalls, counts, strict=True))
    assert hits / len(TEST) == pytest.approx(run.test_accuracy)
    assert run.train_seconds > 0


TASK = """
import numpy as np
from torch import nn
from tune_amp.training import Task
class Line(Task):
    metric = ("mae", "min")
    def data(self):
        part = np.linspace(0, 1, 30)[:, None], np.linspace(1, 2, 30)[:, None]
        return part, part, (part[0][:9] + 1, part[1][:9])
    def model(self):
        return nn.Linear(1, 1)
    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])
    def score(self, model, batch):
        return {"mae": (model(batch[0]) - batch[1]).abs().sum()}
"""


def test_a_run_of_a_task_has_its_values_of_validation_and_test(write_module: Callable[[str], str]) -> None:
    from tune_amp.training.task import load_task_dataset

    name = write_module(TASK) + ":Line"
    dataset = load_task_dataset(name)
    run = train_and_test(
        make_job(name, task=name), TrainingData(dataset.train, dataset.validation, 0, CPU), dataset.test
    )
    assert (run.status, run.val_accuracy, run.test_accuracy, run.test_recalls) == ("completed", None, None, ())
    assert set(run.metrics) == {"val_mae", "test_mae"}
    assert run.metrics["val_mae"] != run.metrics["test_mae"]
    assert run.val_loss != run.test_loss


def test_a_class_that_the_test_set_lacks_has_no_recall(data: TrainingData) -> None:
    two = make_split(20, classes=2)
    recalls = train_and_test(make_job(), data, two).test_recalls
    assert math.isnan(recalls[2])
    assert not math.isnan(recalls[0])


def test_a_run_that_diverges_is_a_row_and_never_reads_the_test_set(
    data: TrainingData, write_module: Callable[[str], str]
) -> None:
    module = write_module(WATCHED_MODEL + "    return logits * math.nan\n")
    run = train_and_test(make_job(f"{module}:net"), data, TEST)
    assert (run.status, run.error) == (TrialStatus.DIVERGED, "diverged: weights are not finite")
    assert (run.val_accuracy, run.test_accuracy, run.test_recalls) == (None, None, ())
    assert len(TEST) not in sys.modules[module].SEEN


@pytest.mark.parametrize(("fault", "status", "error"), [
    ("raise ValueError('line one\\nline two')", TrialStatus.FAILED, "ValueError: line one line two"),
    ("torch.empty(2**46)", TrialStatus.OUT_OF_MEMORY, "can't allocate memory"),
])  # fmt: skip
def test_whatever_a_run_raises_is_a_row(
    data: TrainingData, write_module: Callable[[str], str], fault: str, status: TrialStatus, error: str
) -> None:
    module = write_module(WATCHED_MODEL + f"    {fault}\n")
    worker: Any = SimpleNamespace(data=data, device=CPU, share=0.0)
    run = run_job(worker, make_job(f"{module}:net"), TEST)
    assert (run.trial_id, run.seed, run.status) == ("a", 1000, status)
    assert error in (run.error or "")


@pytest.mark.parametrize(("fault", "status", "again"), [
    (MemoryError("no room"), TrialStatus.OUT_OF_MEMORY, False),
    (InputError("classes: 3, not 10"), TrialStatus.FAILED, True),
])  # fmt: skip
def test_data_that_cannot_be_placed_are_a_row_as_well(fault: Exception, status: TrialStatus, again: bool) -> None:
    class Worker:
        device, share = CPU, 0.0

        @property
        def data(self) -> TrainingData:
            raise fault

    run = run_job(Worker(), make_job(), TEST)  # type: ignore[arg-type]
    assert (run.status, run.device) == (status, "cpu")
    assert str(fault) in (run.error or "")
    assert (attempt().plan_retry(run, died=False) is not None) is again


def test_gpu_that_other_programs_fill_is_not_the_fault_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        device, share = torch.device("cuda"), 0.5

        @property
        def data(self) -> TrainingData:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr("tune_amp.confirm.slots.name_device", str)
    run = run_job(Worker(), make_job(), TEST)  # type: ignore[arg-type]
    assert run.status is TrialStatus.FAILED
    assert MEMORY_HELD_SIGN in (run.error or "")


# Attempts


def attempt(share: float = 0.0, **changes: Any) -> Attempt:
    return Attempt(job=make_job(), share=share, **changes)


FAILED = make_run("a", status=TrialStatus.FAILED, error="E: first")
FULL = make_run("a", status=TrialStatus.OUT_OF_MEMORY, error="E: full")


def test_a_worker_that_dies_costs_two_more_attempts_at_most() -> None:
    tried: list[Attempt | None] = [attempt()]
    while (last := tried[-1]) is not None:
        tried.append(last.plan_retry(FAILED, died=True))
    assert len(tried) == 4


def test_a_lost_node_costs_an_attempt_nothing_until_it_is_one_of_many() -> None:
    lost = make_run("a", status=TrialStatus.FAILED, error="the actor's node was terminated")
    tried: list[Attempt | None] = [attempt(deaths=1)]
    while (last := tried[-1]) is not None:
        tried.append(last.plan_retry(lost, died=True))
    assert len(tried) == 1 + NODE_RETRIES + 1 + 1  # the first, those that cost nothing, the last, none
    assert tried[NODE_RETRIES] == attempt(deaths=1, losses=NODE_RETRIES)


def test_memory_held_by_others_costs_an_attempt_nothing_until_it_stays_held() -> None:
    held = make_run("a", status=TrialStatus.FAILED, error=f"the node's {MEMORY_HELD_SIGN}: 3.00 of 4.00 GiB")
    tried: list[Attempt | None] = [attempt()]
    while (last := tried[-1]) is not None:
        tried.append(last.plan_retry(held, died=True))
    assert len(tried) == 1 + MEMORY_RETRIES + WORKER_RETRIES + 1  # the last of them is None


def test_an_exception_costs_one_more_attempt_and_the_last_word_names_both() -> None:
    second = attempt().plan_retry(FAILED, died=False)
    assert second is not None
    assert second.plan_retry(FAILED, died=False) is None
    assert second.conclude(FAILED) == FAILED
    assert second.conclude(dataclasses.replace(FAILED, error="E: second")).error == "E: second; before that, E: first"
    assert second.conclude(make_run("a")).error is None


@pytest.mark.parametrize(("share", "next_share"), [(0.25, 0.5), (0.5, 1.0), (0.0, None), (1.0, None)])
def test_out_of_memory_is_tried_again_where_there_is_a_larger_share(share: float, next_share: float | None) -> None:
    again = attempt(share).plan_retry(FULL, died=False)
    assert (again.share if again else None) == next_share
    if again:
        assert again.plan_retry(FULL, died=False) is None


@pytest.mark.parametrize("status", [TrialStatus.COMPLETED, TrialStatus.DIVERGED])
def test_what_the_settings_decide_is_not_tried_again(status: TrialStatus) -> None:
    assert attempt(0.5).plan_retry(make_run("a", status=status), died=False) is None


# The whole, followed


class Watcher(Observer):
    """Keeps what it is told, and what the run folder holds at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[tuple[int, ConfirmedRun | None, int, bool]] = []

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        path = self.folder / "confirm.parquet"
        kept = len(load_confirmed(path)) if path.exists() else 0
        confirmed = load_best_rows(self.folder / "best.parquet")[0].confirmation is not None
        self.told.append((progress.done, ended, kept, confirmed))


def train_here(jobs: Sequence[ConfirmJob], stop_after: int = 99) -> Generator[tuple[ConfirmJob, ConfirmedRun]]:
    """The later the trial, the better; ends by Ctrl-C after so many."""
    for number, job in enumerate(jobs):
        if number == stop_after:
            raise KeyboardInterrupt
        score = 0.5 + job.config.lr * 10 + job.config.seed % 7 / 1000
        yield job, make_run(job.trial_ids[0], job.config.seed, val_accuracy=score)


def follow(folder: Path, plan: ConfirmPlan, observer: Any = None, stop_after: int = 99) -> ConfirmResult:
    write_best(folder, rank_trials(plan.ranked), PROVENANCE)
    return confirm(
        plan,
        functools.partial(train_here, stop_after=stop_after),
        folder=folder,
        provenance=PROVENANCE,
        num_threads=2,
        observer=observer or Observer(),
    )


def test_every_run_is_on_disk_before_it_is_told_and_best_is_rewritten_at_the_end(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path)
    plan = make_plan(*make_ranked(0.99, 0.98), default=TrialConfig())
    result = follow(tmp_path, plan, watcher)
    assert [(done, kept, confirmed) for done, _, kept, confirmed in watcher.told] == [(n, n, False) for n in range(10)]
    assert [ended.trial_id for _, ended, _, _ in watcher.told[1:4] if ended] == ["a", "b", DEFAULT_ID]
    written = [(row.rank, row.trial.trial_id, row.confirmation) for row in load_best_rows(tmp_path)]
    assert written == [(row.rank, row.trial.trial_id, row.confirmation) for row in result.rows]
    assert ids(result.rows) == "b1 a2 default3"
    assert load_confirmed(tmp_path) == list(result.runs)
    assert [(run.trial_id, run.seed) for run in result.runs] == [(t, s) for t in ("a", "b", DEFAULT_ID) for s in SEEDS]
    assert not result.interrupted
    default = result.rows[-1].trial
    assert (default.status, default.epochs, default.num_threads) == (TrialStatus.COMPLETED, (), 2)


def test_shared_runs_stand_under_each_id(tmp_path: Path) -> None:
    plan = make_plan(make_scored("a", 0.9, config=TrialConfig(seed=5)), default=TrialConfig())
    result = follow(tmp_path, plan)
    assert result.progress.total == result.progress.done == 3
    assert [run.trial_id for run in load_confirmed(tmp_path)] == ["a"] * 3 + [DEFAULT_ID] * 3
    default, searched = (row.confirmation for row in load_best_rows(tmp_path))
    assert searched is not None
    assert default is not None
    assert searched == dataclasses.replace(default, optimism=searched.optimism, verdict=None, verdict_kind=None)
    assert default.verdict == "no gain over the defaults: keep them; the search found the default configuration itself"


@pytest.mark.parametrize("after", [0, 4])
def test_ctrl_c_keeps_what_finished_and_leaves_best_as_the_search_wrote_it(tmp_path: Path, after: int) -> None:
    plan = make_plan(*make_ranked(0.99, 0.98), default=TrialConfig())
    result = follow(tmp_path, plan, stop_after=after)
    assert result.interrupted
    assert (len(result.runs), result.progress.done) == (after, after)
    assert (len(load_confirmed(tmp_path)) if after else (tmp_path / "confirm.parquet").exists()) == after
    assert [row.confirmation for row in load_best_rows(tmp_path)] == [None, None]


def test_ctrl_c_while_a_run_is_told_stops_those_that_go_on_and_keeps_it(tmp_path: Path) -> None:
    class Impatient(Observer):
        def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
            if progress.done == 2:
                raise KeyboardInterrupt

    stopped = []

    def train(jobs: Sequence[ConfirmJob]) -> Generator[tuple[ConfirmJob, ConfirmedRun]]:
        try:
            yield from train_here(jobs)
        finally:
            stopped.append(True)

    plan = make_plan(*make_ranked(0.99, 0.98))
    write_best(tmp_path, rank_trials(plan.ranked), PROVENANCE)
    result = confirm(plan, train, folder=tmp_path, provenance=PROVENANCE, num_threads=1, observer=Impatient())
    assert result.interrupted
    assert stopped == [True]
    assert len(load_confirmed(tmp_path)) == 2


def test_a_default_that_fails_says_so_in_its_row(tmp_path: Path) -> None:
    plan = make_plan(*make_ranked(0.99), default=TrialConfig())
    write_best(tmp_path, rank_trials(plan.ranked), PROVENANCE)

    def train(jobs: Sequence[ConfirmJob]) -> Generator[tuple[ConfirmJob, ConfirmedRun]]:
        for job, run in train_here(jobs):
            fails = job.trial_ids == (DEFAULT_ID,) and run.seed == 1001
            yield job, dataclasses.replace(run, status=TrialStatus.DIVERGED, error="E: no") if fails else run

    result = confirm(plan, train, folder=tmp_path, provenance=PROVENANCE, num_threads=1, observer=Observer())
    [_, row] = result.rows
    assert (row.rank, row.trial.status, row.trial.error) == (2, TrialStatus.DIVERGED, "E: no")
    first = result.rows[0].confirmation
    assert first is not None
    assert first.verdict == "rank 1 is better than the defaults: the defaults did not complete on 1 of 3 seeds"


TEN = tuple(range(1000, 1010))


def test_further_seeds_go_to_the_default_and_the_best_other_if_it_leads(tmp_path: Path) -> None:
    plan = make_plan(*make_ranked(0.99, 0.98), default=TrialConfig(), seeds=TEN)
    watcher = Watcher(tmp_path)
    result = follow(tmp_path, plan, watcher)
    trained = {name: [run.seed for run in result.runs if run.trial_id == name] for name in ("a", "b", DEFAULT_ID)}
    assert trained == {"a": [*SEEDS], "b": [*TEN], DEFAULT_ID: [*TEN]}
    assert (result.progress.total, result.progress.done) == (23, 23)
    assert [done for done, ended, _, _ in watcher.told if ended is None] == [0, 9]
    assert ids(result.rows) == "b1 a2 default3"
    first = result.rows[0].confirmation
    assert first is not None
    assert first.confirm_seeds == TEN


def test_a_default_that_leads_gets_no_further_seeds(tmp_path: Path) -> None:
    slow = [make_scored("a", 0.99, config=TrialConfig(lr=1e-4))]  # `train_here`: the larger, the better
    result = follow(tmp_path, make_plan(*slow, default=TrialConfig(), seeds=TEN))
    assert {run.seed for run in result.runs} == {*SEEDS}
    assert ids(result.rows) == "default1 a2"


@pytest.mark.parametrize(("budget", "further"), [(0.0, 0), (1.9, 0), (2.0, 1), (7.0, 3), (1e9, 7)])
def test_further_seeds_keep_to_their_budget(budget: float, further: int) -> None:
    plan = make_plan(*make_ranked(0.99, 0.98), default=TrialConfig(), seeds=TEN, budget=budget)
    runs = [dataclasses.replace(run, train_seconds=1.0) for _, run in train_here(plan.first_jobs)]
    jobs = plan.list_further_jobs(runs)
    assert [(job.trial_ids, job.config.seed) for job in jobs] == [
        ((name,), seed) for seed in TEN[3 : 3 + further] for name in ("b", DEFAULT_ID)
    ]


@pytest.mark.parametrize("after", [0, 5, 9, 12])
def test_a_confirmation_that_was_cut_off_at_either_stage_makes_only_what_is_left(tmp_path: Path, after: int) -> None:
    plan = make_plan(*make_ranked(0.99, 0.98), default=TrialConfig(), seeds=TEN)
    write_best(tmp_path, rank_trials(plan.ranked), PROVENANCE)
    whole = [run for _, run in train_here(plan.first_jobs)]
    whole += [run for _, run in train_here(plan.list_further_jobs(whole))]
    made: list[tuple[str, int]] = []

    def train(jobs: Sequence[ConfirmJob]) -> Generator[tuple[ConfirmJob, ConfirmedRun]]:
        made.extend((job.trial_ids[0], job.config.seed) for job in jobs)
        yield from train_here(jobs)

    result = confirm(
        plan,
        train,
        done=[*whole[:after], make_run("z", 1000)],
        folder=tmp_path,
        provenance=PROVENANCE,
        num_threads=1,
        observer=Observer(),
    )
    assert made == [(run.trial_id, run.seed) for run in whole[after:]]
    assert {(run.trial_id, run.seed) for run in result.runs} == {(run.trial_id, run.seed) for run in whole}
    assert (result.progress.total, result.progress.done) == (23, 23)


# With Ray


TREACHEROUS_MODEL = """
import math
import os
import pathlib
import torch

class Net(torch.nn.Linear):
    def __init__(self, shape, classes):
        self.seed = torch.initial_seed()
        super().__init__(math.prod(shape), classes)
        with pathlib.Path({marker!r}).with_name("built").open("a") as file:
            print(self.seed, os.getpid(), file=file)

    def forward(self, images):
        logits = super().forward(images.flatten(1))
        marker = pathlib.Path({marker!r})
        if self.seed == 1000 and len(images) == 64 and not marker.exists():
            marker.touch()
            os._exit(1)
        if self.training and self.seed == 1001 and len(images) == 110:
            return logits * math.nan
        return logits
"""


@pytest.mark.slow
def test_a_search_is_confirmed_on_its_slots_whatever_happens_there(
    digits: Dataset, write_module: Callable[[str], str], tmp_path: Path
) -> None:
    """Batch 110 diverges on one fresh seed, batch 64 kills its worker once; the first trial is the default itself."""
    marker = tmp_path / "died"
    module = write_module(TREACHEROUS_MODEL.format(marker=str(marker)))
    (tmp_path / "space.yaml").write_text("parameters:\n  batch_size: {choices: [64, 110]}\n")
    (tmp_path / "run").mkdir()
    options = SearchOptions(
        model=f"{module}:Net", num_samples=4, max_epochs=2, top_k=4, confirm_seeds=3, scheduler="none", sampler="random"
    )
    with ray_session(num_cpus=2, num_gpus=0, preload=("tune_amp.cluster.preload",), workers=2):
        plan = plan_search(load_space(str(tmp_path / "space.yaml")), digits, options, folder=tmp_path / "run")
        result = run_search(plan, Observer())
    assert marker.exists()
    assert not (Path.home() / "ray_results").exists()  # where a new worker would make a folder for itself
    built = [line.split() for line in (tmp_path / "built").read_text().splitlines()]
    of_trials = {pid for seed, pid in built if seed == "0"}
    assert [pid in of_trials for seed, pid in built if seed == "1000"][:2] == [True, True]  # until one dies
    confirmation = result.confirmation
    assert confirmation is not None
    assert confirmation.progress.total == 6  # two configurations, though four trials and the default have them
    rows = load_best_rows(tmp_path / "run")
    assert rows == list(confirmation.rows)
    assert [row.trial for row in rows] == list(result.ranked)
    assert [row.rank for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0].trial.trial_id == DEFAULT_ID
    sizes = [row.trial.config.batch_size for row in rows]
    assert sizes == [64] * sizes.count(64) + [110] * sizes.count(110)
    assert 110 in sizes
    for row in rows:
        assert row.confirmation is not None
        assert row.confirmation.confirm_seeds == (1000, 1001, 1002)
        if row.trial.config.batch_size == 110:
            assert row.confirmation.confirm_failures == ("seed 1001: diverged: weights are not finite",)
            assert row.confirmation.val_accuracy_mean is None
    shared = [row.confirmation for row in rows if row.trial.config.batch_size == 64]
    assert {c.test_accuracy_mean for c in shared if c} == {shared[0].test_accuracy_mean if shared[0] else NAN}

    # What the slots trained is what is trained here, to the last bit.
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    job = ConfirmJob(trial_ids=(DEFAULT_ID,), config=dataclasses.replace(rows[0].trial.config, seed=1000))
    here = train_and_test(job, TrainingData(digits.train, digits.validation, 10, CPU), digits.test)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    [there] = [run for run in load_confirmed(tmp_path / "run") if (run.trial_id, run.seed) == (DEFAULT_ID, 1000)]
    assert dataclasses.replace(here, train_seconds=0.0) == dataclasses.replace(there, train_seconds=0.0)


@pytest.mark.slow
@pytest.mark.long
def test_runs_that_wait_for_another_job_do_not_hang(digits: Dataset) -> None:
    limit = 4.0
    jobs = [make_job(seed=seed, dataset="digits") for seed in (1000, 1001)]
    resources = TrialResources(cpus=1, gpus=0.0, max_concurrent=2, reason="")
    with ray_session(num_cpus=2, num_gpus=0):
        other = ray.remote(num_cpus=2)(lambda: time.sleep(2.5 * limit)).remote()
        while ray.available_resources().get("CPU", 0.0):
            time.sleep(0.1)
        began = time.monotonic()
        trainable = tune.with_parameters(AmpTrainable, worker_setup=build_worker_setup(digits, resources))
        with ConfirmSlots(trainable, digits.test, resources, time_limit=limit) as slots:
            ended = list(slots.train(jobs))
        ray.get(other)
    assert time.monotonic() - began > 1.5 * limit  # they did wait
    assert [(run.status, run.error) for _, run in ended] == [(TrialStatus.COMPLETED, None)] * 2


@pytest.mark.slow
def test_sigusr1_in_a_confirmation_keeps_its_runs_and_the_searchs_ranking(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "quick", "--dataset", "digits", "--json"]
    command += ["--num-samples", "2", "--max-epochs", "2", "--confirm-seeds", "1000", "--name", "cut"]
    command += ["--max-concurrent", "1", "--dashboard", "off"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        told = [json.loads(process.stdout.readline()) for _ in range(5)]
        assert [event["event"] for event in told] == ["start", "trial", "trial", "confirmed_run", "confirmed_run"]
        os.kill(process.pid, signal.SIGUSR1)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    events = told + [json.loads(line) for line in rest.splitlines()]
    assert events[-1]["confirmation"]["interrupted"] is True
    assert events[-1]["best"]
    assert errors.startswith("cut off  SIGUSR1\n")
    run = tmp_path / "results" / "cut"
    shown = {(event["trial_id"], event["seed"]) for event in events if event["event"] == "confirmed_run"}
    kept = {(one.trial_id, one.seed) for one in load_confirmed(run)}
    assert shown <= kept  # a run is on disk before it is told of; the signal may come between
    assert len(kept - shown) <= 1
    assert {row.confirmation for row in load_best_rows(run)} == {None}
