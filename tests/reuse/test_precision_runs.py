"""Every precision gets the same weights, data and order; what is measured is what the epochs said."""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch
from small_runs import make_split

import tune_amp.reuse.precision_runs
from tune_amp.cli.comparison import Comparison
from tune_amp.results.parquet import read_file
from tune_amp.reuse.precision_page import SCHEMAS, write_comparison
from tune_amp.reuse.precision_runs import (
    TURNS,
    ComparisonPlan,
    choose_arms,
    compare_runs,
    fit_epochs,
    fresh_seeds,
    in_precision,
    measure_map,
    plan_comparison,
    train_arm,
)
from tune_amp.reuse.precision_verdicts import ComparedRun, ComparisonOrigin, MapCell
from tune_amp.training.data import Dataset
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import PRECISIONS, SCALER_DEFAULTS, EpochMetrics, InputError, TrialConfig, TrialStatus

CPU = torch.device("cpu")
# Notes the weights it is made with, and the pixels of every batch that it is trained on.
# Its weights are NumPy's; a batch is noted with the numbers that Python and NumPy draw for it.
WATCHED_MODEL = """
import random
import numpy as np
import torch
from torch import nn
SEEN = []
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 3)
        with torch.no_grad():
            self.layer.weight.copy_(torch.from_numpy(np.random.normal(0, 0.1, (3, 16))))
        SEEN.append(("weights", self.layer.weight.sum().item()))
    def forward(self, images):
        if len(images) == 40:
            SEEN.append(("batch", images.double().sum().item() + random.random() + np.random.random()))
        return self.layer(images.flatten(1))
def net(input_shape, num_classes):
    return Net()
"""


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    train, validation, test = (make_split(count, seed=count) for count in (120, 60, 30))
    return Dataset(name="small", num_classes=3, content_hash="0", train=train, validation=validation, test=test)


def make_config(**settings: Any) -> TrialConfig:
    return TrialConfig(**{"lr": 0.01, "batch_size": 40, "max_epochs": 3, **settings})


def make_plan(config: TrialConfig, seeds: tuple[int, ...] = (1, 2), epochs: int = 3) -> ComparisonPlan:
    arms = choose_arms(config, PRECISIONS, CPU)
    return ComparisonPlan(arms=arms, left_out={}, seeds=seeds, epochs=epochs, seconds=1.0)


# ---- what is compared ----


def test_tf32_is_an_arm_on_a_gpu_and_none_on_the_cpu() -> None:
    assert list(choose_arms(make_config(), PRECISIONS, CPU)) == ["fp32", "bf16", "fp16"]
    assert list(choose_arms(make_config(), PRECISIONS, torch.device("cuda"))) == list(PRECISIONS)


def test_fp32_is_always_there_and_first() -> None:
    assert list(choose_arms(make_config(), ("bf16", "fp32"), CPU)) == ["fp32", "bf16"]
    assert list(choose_arms(make_config(), ("tf32",), CPU)) == ["fp32"]


def test_scaler_settings_are_those_of_an_fp16_configuration_else_the_defaults() -> None:
    found = make_config(precision="fp16", init_scale=128.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    assert in_precision(found, "fp16") == found
    assert in_precision(found, "bf16") == make_config(precision="bf16")
    fp16 = in_precision(make_config(precision="bf16"), "fp16")
    assert {name: getattr(fp16, name) for name in SCALER_DEFAULTS} == SCALER_DEFAULTS


def test_seeds_are_not_the_one_that_chose_the_configuration() -> None:
    assert fresh_seeds(make_config(seed=7), 3) == (8, 9, 10)
    assert fresh_seeds(make_config(seed=2**63 - 1), 2) == (0, 1)


def test_order_is_shuffled_within_each_seed() -> None:
    runs = make_plan(make_config(), tuple(range(20))).runs
    orders = [[precision for seed, precision in runs if seed == wanted] for wanted in range(20)]
    assert [seed for seed, _ in runs] == [seed for seed in range(20) for _ in range(3)]
    assert all(sorted(order) == ["bf16", "fp16", "fp32"] for order in orders)
    assert {order[0] for order in orders} == {"bf16", "fp16", "fp32"}
    assert runs == make_plan(make_config(), tuple(range(20))).runs


# ---- how long it takes ----


@pytest.mark.parametrize(("fp32", "bf16", "fp16", "wanted", "budget", "expected"), [
    (1.0, 1.0, 1.0, 8, 1000.0, (8, [])),
    (1.0, 1.0, 1.0, 8, 45.0, (5, [])),
    (1.0, 1.0, 4.0, 8, 36.0, (2, [])),
    (1.0, 1.0, 4.1, 8, 36.0, (6, ["fp16"])),  # not even two epochs of all: the slowest goes, the others gain
    (9.0, 8.0, 4.0, 8, 36.0, (2, ["bf16"])),  # a comparison of two is always made
    (99.0, 1.0, 2.0, 8, 36.0, (2, ["fp16"])),  # fp32 never goes
])  # fmt: skip
def test_epochs_are_fitted_to_the_budget(
    fp32: float, bf16: float, fp16: float, wanted: int, budget: float, expected: tuple[int, list[str]]
) -> None:
    seconds = {"fp32": fp32, "bf16": bf16, "fp16": fp16}
    assert fit_epochs(seconds, seeds=3, wanted=wanted, budget=budget) == expected


def test_plan_keeps_the_configurations_epochs_where_they_fit(dataset: Dataset) -> None:
    arms = choose_arms(make_config(max_epochs=5), PRECISIONS, CPU)
    plan = plan_comparison(arms, dataset, CPU, seeds=(1, 2), budget=1e9)
    assert (plan.epochs, list(plan.arms), plan.left_out) == (5, ["fp32", "bf16", "fp16"], {})
    assert 0 < plan.seconds < 60


def test_plan_leaves_out_what_takes_too_long_unless_epochs_are_asked_for(dataset: Dataset) -> None:
    arms = choose_arms(make_config(max_epochs=5), PRECISIONS, CPU)
    plan = plan_comparison(arms, dataset, CPU, seeds=(1, 2), budget=1e-9)
    assert (plan.epochs, len(plan.arms), len(plan.left_out)) == (2, 2, 1)
    asked = plan_comparison(arms, dataset, CPU, seeds=(1, 2), budget=1e-9, max_epochs=9)
    assert (asked.epochs, asked.left_out) == (9, {})


def test_warm_up_needs_no_class_in_its_few_images(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_amp.reuse.precision_runs, "WARM_UP_BATCHES", 1)
    config = make_config(
        batch_size=2, class_weighting="balanced", curriculum="linear"
    )  # classes take turns: two of three
    plan = plan_comparison({"fp32": config}, dataset, CPU, seeds=(1, 2))
    assert plan.arms == {"fp32": config}


# ---- the runs ----


def test_all_precisions_start_from_the_same_weights_and_see_the_same_batches_and_random_numbers(
    dataset: Dataset, write_module: Callable[[str], str]
) -> None:
    name = write_module(WATCHED_MODEL)
    runs = compare_runs(make_plan(make_config(model=f"{name}:net")), dataset, CPU, lambda _: None)
    seen: dict[tuple[int, str], list[tuple[str, float]]] = {}
    before = 0
    for run in runs:
        assert run.status is TrialStatus.COMPLETED, run.error
        noted = sys.modules[name].SEEN
        seen[run.seed, run.precision] = noted[before:]
        before = len(noted)
    for seed in (1, 2):
        assert seen[seed, "fp32"] == seen[seed, "bf16"] == seen[seed, "fp16"]
        assert [what for what, _ in seen[seed, "fp32"]] == ["weights", *["batch"] * 9]
        assert len(set(seen[seed, "fp32"])) == 10  # each epoch in another order
    assert not set(seen[1, "fp32"]) & set(seen[2, "fp32"])


def test_first_losses_differ_by_rounding_only(dataset: Dataset) -> None:
    first: dict[str, float] = {}
    for precision, config in choose_arms(make_config(batch_size=120), PRECISIONS, CPU).items():
        losses: list[float] = []
        data = TrainingData(dataset.train, dataset.validation, 3, CPU)
        train_arm(config, data, on_epoch=lambda metrics, losses=losses: losses.append(metrics.train_loss))  # type: ignore[misc]
        first[precision] = losses[0]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=1e-2)
    assert first["fp16"] == pytest.approx(first["fp32"], rel=1e-3)
    assert len(set(first.values())) == 3  # each in its own arithmetic


def test_row_is_what_the_epochs_said_the_first_left_out_of_the_times(dataset: Dataset) -> None:
    epochs: list[EpochMetrics] = []
    data = TrainingData(dataset.train, dataset.validation, 3, CPU)
    run = train_arm(make_config(max_epochs=4, precision="fp16", seed=5), data, place=3, on_epoch=epochs.append)
    rates = [metrics.samples_per_second for metrics in epochs]
    seconds = [120 / rate for rate in rates]
    assert (run.place, run.seed, run.precision, run.epochs, run.steps) == (3, 5, "fp16", 4, 12)
    assert run.epoch_rates == tuple(rates)
    assert run.samples_per_second == statistics.median(rates[1:])
    assert run.epoch_seconds == pytest.approx(statistics.median(seconds[1:]))
    assert (run.val_accuracy, run.val_loss) == (epochs[-1].val_accuracy, epochs[-1].val_loss)
    assert run.loss_scale == 65536.0
    assert run.peak_memory_bytes is None


def test_the_test_set_is_not_read(dataset: Dataset) -> None:
    unread = dataclasses.replace(dataset, test=None)  # type: ignore[arg-type]
    arms = choose_arms(make_config(), ("fp32",), CPU)
    plan = plan_comparison(arms, unread, CPU, seeds=(1, 2), max_epochs=2)
    assert {run.status for run in compare_runs(plan, unread, CPU, lambda _: None)} == {TrialStatus.COMPLETED}


def test_a_diverged_run_is_a_diverged_run(dataset: Dataset) -> None:
    data = TrainingData(dataset.train, dataset.validation, 3, CPU)
    run = train_arm(make_config(optimizer="sgd", lr=1e30), data)
    assert run.status is TrialStatus.DIVERGED
    assert run.error is not None
    assert run.error.startswith("diverged: ")
    assert run.epochs < 3


@pytest.mark.parametrize(("raised", "status"), [
    ("RuntimeError('no luck')", TrialStatus.FAILED),
    ("torch.OutOfMemoryError('all gone')", TrialStatus.OUT_OF_MEMORY),
    ("RuntimeError(\"DefaultCPUAllocator: can't allocate memory\")", TrialStatus.OUT_OF_MEMORY),
])  # fmt: skip
def test_a_run_that_fails_is_a_row(
    raised: str, status: TrialStatus, dataset: Dataset, write_module: Callable[[str], str]
) -> None:
    name = write_module(f"import torch\ndef net(input_shape, num_classes):\n    raise {raised}\n")
    plan = dataclasses.replace(make_plan(config := make_config(model=f"{name}:net")), arms={"fp32": config})
    runs = list(compare_runs(plan, dataset, CPU, lambda _: None))
    assert [run.status for run in runs] == [status] * 2
    assert runs[0].error is not None
    assert runs[0].error.startswith(raised.split("(", maxsplit=1)[0].removeprefix("torch."))


# ---- the map ----


def test_map_times_every_precision_in_every_cell(dataset: Dataset, write_module: Callable[[str], str]) -> None:
    config = make_config(curriculum="linear", class_weighting="balanced")
    mine = f"{write_module(WATCHED_MODEL)}:net"
    arms = choose_arms(config, ("fp16",), CPU)
    found = measure_map(arms, dataset, CPU, ("simple_net", mine), (16, 120), turn_seconds=0.001)
    cells = [cell for row in found for cell in row]
    assert [(cell.model, cell.batch_size, cell.precision) for cell in cells] == [
        (model, size, precision)
        for model in ("simple_net", mine)
        for size in (16, 120)
        for precision in ("fp32", "fp16")
    ]
    assert all(len(cell.turn_rates) == TURNS and min(cell.turn_rates) > 0 and not cell.reason for cell in cells)


def test_a_cell_that_would_take_too_long_says_so(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_amp.reuse.precision_runs, "LONGEST_CELL_SECONDS", 0.0)
    arms = choose_arms(make_config(), (), CPU)
    [[cell]] = measure_map(arms, dataset, CPU, ("simple_net",), (16,), turn_seconds=0.001)
    assert cell.turn_rates == ()
    assert cell.reason.startswith("skipped: 9 steps would take about ")


def test_a_model_that_fails_leaves_the_other_precisions_their_cell(
    dataset: Dataset, write_module: Callable[[str], str]
) -> None:
    text = WATCHED_MODEL.replace(
        "return self.layer(", "assert not torch.is_autocast_enabled('cpu')\n        return self.layer("
    )
    name = write_module("import torch\n" + text)
    arms = choose_arms(make_config(), ("bf16",), CPU)
    [[fp32, bf16]] = measure_map(arms, dataset, CPU, (f"{name}:net",), (16,), turn_seconds=0.001)
    assert len(fp32.turn_rates) == TURNS
    assert (bf16.turn_rates, bf16.reason[:14]) == ((), "not available:")


# ---- files ----

ORIGIN = ComparisonOrigin(
    run="demo", rank=1, trial_id="7422e802", command=("compare",), created="2026-03-01T12:30:00Z",
    config=dataclasses.asdict(TrialConfig()), scaler={}, precisions=("fp32",), left_out={"tf32": "no"}, seeds=(1, 2),
    epochs=2, dataset="small", data_hash="0", train_images=120, validation_images=60, data_bytes=9, device="cpu",
    num_threads=1, notices=(), versions={"torch": "2.15.0"},
)  # fmt: skip


def test_files_hold_the_rows_and_where_they_come_from(tmp_path: Path) -> None:
    runs = [
        ComparedRun(precision="fp32", seed=2, place=1, status=TrialStatus.DIVERGED, error="x", epoch_rates=(1.5, 2.5))
    ]
    cells = [
        MapCell(model="vit", batch_size=64, precision=precision, turn_rates=(3.0,), peak_memory_bytes=7)
        for precision in ("bf16", "fp32")
    ]
    write_comparison(tmp_path, ORIGIN, runs, cells)
    [row], origin, _ = read_file(tmp_path / "compare.parquet", "compare", SCHEMAS["compare"])
    assert row == vars(runs[0]) | {"epoch_rates": [1.5, 2.5]}
    assert origin["left_out"] == {"tf32": "no"}
    table = pd.read_parquet(tmp_path / "compare_map.parquet")
    assert table[["model", "batch_size", "precision", "peak_memory_bytes"]].values.tolist() == [
        ["vit", 64, "bf16", 7],
        ["vit", 64, "fp32", 7],
    ]
    assert table["turn_rates"][0].tolist() == [3.0]


@pytest.mark.parametrize("name", ["compare.parquet", "compare_map.parquet", "compare.md"])
def test_file_that_was_put_there_before_the_first_was_written_is_left_alone(name: str, tmp_path: Path) -> None:
    unused: Any = None
    names = ("arguments", "arms", "dataset", "device", "console")
    comparison = Comparison(**dict.fromkeys(names, unused), origin=ORIGIN, folder=tmp_path)
    comparison.runs.append(ComparedRun(precision="fp32", seed=2, place=1, status=TrialStatus.DIVERGED, error="x"))
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: was put there by another program, and is left alone"):
        comparison._write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}
    (tmp_path / name).unlink()
    for _ in range(2):
        comparison._write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.md", "compare.parquet"]


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_measures_the_memory_of_every_precision(mnist: Dataset) -> None:
    device = torch.device("cuda")
    config = TrialConfig(batch_size=4096, max_epochs=2)
    plan = plan_comparison(choose_arms(config, PRECISIONS, device), mnist, device, seeds=(1, 2), max_epochs=2)
    runs = list(compare_runs(plan, mnist, device, lambda _: None))
    assert {run.status for run in runs} == {TrialStatus.COMPLETED}
    memory = {p: {run.peak_memory_bytes for run in runs if run.precision == p} for p in PRECISIONS}
    assert all(len(peaks) == 1 for peaks in memory.values())  # of each precision the same on every seed, in any order
    [fp32], [fp16] = memory["fp32"], memory["fp16"]
    assert fp32 is not None
    assert fp16 is not None
    assert 0 < fp16 < fp32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_map_charges_no_precision_for_the_others(mnist: Dataset) -> None:
    device = torch.device("cuda")
    arms = choose_arms(TrialConfig(), ("bf16",), device)
    [together] = measure_map(arms, mnist, device, ("conv_net",), (512,), turn_seconds=0.1)
    [alone] = measure_map({"bf16": arms["bf16"]}, mnist, device, ("conv_net",), (512,), turn_seconds=0.1)
    assert together[1].peak_memory_bytes == pytest.approx(alone[0].peak_memory_bytes, rel=0.05)
