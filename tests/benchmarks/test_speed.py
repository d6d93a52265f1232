"""The search benchmark: its plan, its arithmetic, and that both programs really train."""

import dataclasses
import datetime
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from records import make_epoch, make_trial
from small_mnist import write_mnist

from benchmarks.machine import describe_versions
from benchmarks.search_speed import speed
from benchmarks.search_speed.command_cost import CommandCost, run_measured, sum_memory
from benchmarks.search_speed.speed import (
    Pairing,
    hide_gpus,
    list_our_command,
    list_pairings,
    load_measured,
    measure_speed,
    plan_obvious,
    plan_slots,
    summarise_ours,
    torchvision_folder,
    write_space,
)
from benchmarks.search_speed.speed_table import (
    OBVIOUS,
    OURS,
    SpeedResult,
    SpeedRow,
    compare_rows,
    describe_row,
    judge_targets,
    load_speed,
    render_speed,
    write_speed,
)
from benchmarks.spread import Spread
from tune_amp.space.space import load_space
from tune_amp.trial.config import InputError, TrialConfig


def make_row(program: str = OURS, **changes: Any) -> SpeedRow:
    values: dict[str, Any] = {
        "program": program,
        "precision": "bf16",
        "trials": 64,
        "repeat": 0,
        "max_epochs": 8,
        "gpus_per_trial": 0.0,
        "slots": 2,
        "wall_seconds": 100.0,
        "startup_seconds": 7.0,
        "trial_epochs": 200,
        "train_seconds": 160.0,
        "peak_memory_bytes": 2**30,
        "best_val_accuracy": 0.97,
    }
    return SpeedRow(**{**values, **changes})


def make_pairs(*seconds: tuple[float, float], **changes: Any) -> list[SpeedRow]:
    """Wall times of ours and of the obvious program, a pair a repeat."""
    return [
        make_row(program, repeat=repeat, wall_seconds=wall, **changes)
        for repeat, pair in enumerate(seconds)
        for program, wall in zip((OURS, OBVIOUS), pair, strict=True)
    ]


def make_pairing(**changes: Any) -> Pairing:
    values: dict[str, Any] = {
        "data_dir": Path(),
        "precision": "bf16",
        "trials": 3,
        "repeat": 0,
        "max_epochs": 8,
        "slots": 2,
        "gpus_per_trial": 0.0,
    }
    return Pairing(**{**values, **changes})


def make_result(rows: list[SpeedRow]) -> SpeedResult:
    return SpeedResult(rows=tuple(rows), machine={"processor": "some"}, versions={"torch": "2.15"})


# Arithmetic


def test_ratio_is_taken_pair_by_pair_and_its_median_told() -> None:
    [comparison] = compare_rows(make_pairs((100, 1000), (50, 600), (200, 1800)))
    assert comparison.ratio == Spread(median=10.0, low=9.0, high=12.0, count=3)


def test_row_without_its_counterpart_is_left_out() -> None:
    rows = [*make_pairs((100, 900)), make_row(repeat=7), make_row(precision="fp16")]
    assert [(found.first.precision, found.ratio.count) for found in compare_rows(rows)] == [("bf16", 1)]


@pytest.mark.parametrize("change", [{"max_epochs": 2}, {"gpus_per_trial": 0.25}, {"slots": 4}, {"trials": 16}])
def test_rows_of_different_settings_are_neither_paired_nor_summed_up(change: dict[str, Any]) -> None:
    ours, obvious = make_pairs((100, 1000))
    assert compare_rows([ours, dataclasses.replace(obvious, **change)]) == []
    first, second = compare_rows([*make_pairs((100, 1000)), *make_pairs((100, 400), **change)])
    assert (first.ratio.median, second.ratio.median) == (10.0, 4.0)


def test_efficiency_is_training_time_over_slot_time() -> None:
    row = make_row()
    assert (row.efficiency, row.epochs_per_second) == (0.8, 2.0)


@pytest.mark.parametrize(
    ("precision", "wall", "expected"),
    [("bf16", 1500.0, "met"), ("bf16", 1499.0, "missed"), ("fp16", 300.0, "met"), ("fp16", 299.0, "missed")],
)
def test_target_of_the_ratio_depends_on_the_precision(precision: str, wall: float, expected: str) -> None:
    [comparison] = compare_rows(make_pairs((100.0, wall), precision=precision))
    assert judge_targets(comparison)[0].endswith(expected)


def test_targets_of_efficiency_and_start_up_are_told_from_ours() -> None:
    [comparison] = compare_rows(make_pairs((100, 1000), (100, 1000)))
    lines = judge_targets(comparison)
    assert "efficiency 80%, target at least 80%: met" in lines[1]
    assert "start-up 7.0 s, target under 6 s: missed" in lines[2]
    slow = [dataclasses.replace(row, startup_seconds=6.0, train_seconds=180.0) for row in make_pairs((100, 1000))]
    lines = judge_targets(compare_rows(slow)[0])
    assert [line.rpartition(" ")[2] for line in lines[1:]] == ["met", "missed"]


def test_smaller_searches_and_gpus_have_targets_of_their_own() -> None:
    small = judge_targets(compare_rows(make_pairs((10, 100), trials=16))[0])
    assert len(small) == 1
    assert "start-up" in small[0]
    on_gpu = judge_targets(compare_rows(make_pairs((10, 400), gpus_per_trial=0.25))[0])
    assert "40.0x trial-epochs/s, target at least 50x: missed" in on_gpu[0]


def test_programs_that_do_not_learn_alike_are_told() -> None:
    rows = make_pairs((100, 1000))
    apart = [rows[0], dataclasses.replace(rows[1], best_val_accuracy=0.955)]
    assert "+1.50 points apart" in judge_targets(compare_rows(apart)[0])[-1]
    assert len(judge_targets(compare_rows(rows)[0])) == 3


def test_table_shows_both_programs_with_spread_and_number() -> None:
    text = render_speed(make_result(make_pairs((100, 1000), (50, 600))))
    [row] = [line for line in text.splitlines() if line.startswith("| bf16")]
    assert row.startswith(
        "| bf16 | 64 | 8 | 0 | 2 | 2 | 11.0x (10.0x to 12.0x) | 75 s (50 s to 100 s) / 800 s (600 s to 1"
    )
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {14}
    assert "torch 2.15" in text


# The plan, the space, the file


def test_plan_holds_what_ours_trained_and_for_how_long() -> None:
    pairing = make_pairing(precision="fp16")
    config = TrialConfig(precision="fp16", lr=0.01, batch_size=128, init_scale=256.0, growth_interval=7)
    trials = [
        make_trial("a", config=config, epochs=(make_epoch(1), make_epoch(2))),
        make_trial("b", config=config, epochs=()),
        make_trial("c", config=config, epochs=(make_epoch(1),)),
    ]
    settings = {"lr": 0.01, "batch_size": 128, "init_scale": 256.0, "growth_interval": 7}
    assert plan_obvious(pairing, trials)["configs"] == [{**settings, "epochs": 2}, {**settings, "epochs": 1}]
    without = plan_obvious(dataclasses.replace(pairing, precision="bf16"), trials)["configs"]
    assert without[0] == {"lr": 0.01, "batch_size": 128, "epochs": 2}


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_both_programs_are_told_where_to_train(share: float, tmp_path: Path) -> None:
    """A search that is told nothing takes the GPU that it finds; a trial without a GPU of Ray's sees all of them."""
    pairing = make_pairing(gpus_per_trial=share)
    command = list_our_command(pairing, tmp_path)
    assert command[command.index("--gpus-per-trial") + 1] == str(share)
    assert plan_obvious(pairing, [])["gpus_per_trial"] == share
    assert hide_gpus(pairing) == ({} if share else {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize(
    ("cores", "gpus", "share", "slots"),
    [(16, 1, 0.25, 4), (16, 1, 0.05, 16), (2, 1, 0.25, 2), (16, 2, 0.3333, 6), (16, 2, 0.4, 4), (16, 1, 0.0, 16)],
)
def test_slots_are_as_many_as_cores_and_shares_allow(
    cores: int, gpus: int, share: float, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "count_cpus", lambda: cores)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan_slots(share) == slots


@pytest.mark.parametrize(("gpus", "share"), [(0, 0.5), (1, -0.5), (1, 2.0), (1, math.nan)])
def test_share_that_cannot_be_had_is_refused(gpus: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(InputError, match=rf"--gpus-per-trial: .* torch sees {gpus}, got {share:g}"):
        plan_slots(share)


def test_start_up_ends_with_the_first_training_step_of_any_trial() -> None:
    """Two trials begin 5 and 6 s after the command; making their models takes 3 and 1 s."""
    epochs = (make_epoch(1),)
    slow = make_trial("a", epochs=epochs, setup_seconds=3.0)
    assert slow.started is not None
    fast = make_trial("b", epochs=epochs, setup_seconds=1.0, started=slow.started + datetime.timedelta(seconds=1))
    cost = CommandCost(started=slow.started.timestamp() - 5, wall_seconds=30.0, peak_memory_bytes=None)
    assert summarise_ours(make_pairing(), [slow, fast], cost).startup_seconds == pytest.approx(7.0)


def test_only_on_cuda_do_loaders_have_a_worker() -> None:
    from benchmarks.search_speed import obvious
    from benchmarks.training import loop_programs

    assert obvious.loader_options("cpu") == loop_programs.list_loader_options(torch.device("cpu")) == {}
    on_cuda = obvious.loader_options("cuda")
    assert on_cuda == loop_programs.list_loader_options(torch.device("cuda"))
    assert (on_cuda["num_workers"], on_cuda["pin_memory"]) == (1, True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_space_is_the_default_one_with_the_precision_exchanged(precision: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(write_space(precision))
    space, default = load_space(str(tmp_path / "space.yaml")), load_space("mnist_amp")
    assert space.fixed == {"precision": precision, "input_scaling": "standard"}
    shared = [p for p in default.parameters if precision == "fp16" or p.name in ("lr", "batch_size")]
    assert [(p.name, p.low, p.high, p.log) for p in space.parameters] == [
        (p.name, p.low, p.high, p.log) for p in shared
    ]


def test_file_gives_back_what_was_written_and_refuses_another_machine(tmp_path: Path) -> None:
    result = make_result(make_pairs((100, 1000)))
    path = tmp_path / "speed.parquet"
    assert load_measured(path) == ()
    write_speed(path, result)
    assert load_speed(path) == result
    with pytest.raises(InputError, match=r"processor: must be .*, to be gone on from here, got some"):
        load_measured(path)


def test_measurement_is_gone_on_from_on_the_same_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "speed.parquet"
    rows = tuple(make_pairs((100, 1000)))
    machine = {**speed.describe_here(), "gpu": "H100"}
    write_speed(path, SpeedResult(rows=rows, machine=machine, versions=describe_versions()))
    with pytest.raises(InputError, match=r"gpu: must be absent, to be gone on from here, got H100"):
        load_measured(path)
    monkeypatch.setattr(speed, "describe_here", lambda: machine)
    assert load_measured(path) == rows


def test_line_of_a_command_names_it_and_its_figures() -> None:
    line = describe_row(make_row())
    start = "bf16, 64 trials of at most 8 epochs, repeat 0, ours: 100.0 s, 200 trial-epochs, start-up 7.0 s, efficiency"
    assert line.startswith(f"{start} 80%")


# Commands


def test_command_is_timed_and_its_failure_told_with_its_last_lines(tmp_path: Path) -> None:
    cost = run_measured([sys.executable, "-c", "import time; time.sleep(0.7)"], tmp_path / "log")
    assert 0.7 <= cost.wall_seconds < 20
    if Path("/proc/self").exists():
        assert cost.peak_memory_bytes is not None
        assert 2**20 < cost.peak_memory_bytes < 2**30
    with pytest.raises(RuntimeError, match=r"exit code 3(.|\n)*no more"):
        run_measured([sys.executable, "-c", "print('no more'); raise SystemExit(3)"], tmp_path / "log")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_memory_of_a_command_is_that_of_its_descendants_too() -> None:
    hungry = "import time; block = bytearray(200_000_000); print('ready', flush=True); time.sleep(30)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hungry!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        total = sum_memory(process.pid)
        os.killpg(process.pid, 9)
    assert total is not None
    assert 200_000_000 < total < 400_000_000


def test_torchvision_finds_its_layout(tmp_path: Path) -> None:
    from torchvision import datasets  # type: ignore[import-untyped]

    write_mnist(tmp_path)
    with torchvision_folder(tmp_path) as root:
        images = datasets.MNIST(str(root), train=True)
        assert (len(images), images[13][1]) == (240, 3)
    assert not root.exists()


@pytest.mark.long
@pytest.mark.slow  # starts Ray twice
def test_both_programs_train_the_same_configurations_as_long(tmp_path: Path) -> None:
    write_mnist(tmp_path, train=1_200)
    path = tmp_path / "speed.parquet"
    lines: list[str] = []
    sizes: dict[str, Any] = {"precisions": ("fp16",), "trials": (2,), "repeats": 1, "max_epochs": 2, "slots": 2}
    pairings = list_pairings(tmp_path, **sizes)
    result = measure_speed(pairings, path=path, announce=lines.append)
    ours, obvious = result.rows
    assert (ours.program, obvious.program) == (OURS, OBVIOUS)
    assert ours.trial_epochs == obvious.trial_epochs
    for row in result.rows:
        assert 0 < row.train_seconds < row.slots * row.wall_seconds
        assert 0 < row.startup_seconds < row.wall_seconds
        assert row.best_val_accuracy > 0.1
    assert load_measured(path) == result.rows
    assert len(lines) == 2
    again = measure_speed(pairings, path=path, before=result.rows, announce=lines.append)
    assert again.rows == result.rows
    assert len(lines) == 2


def test_pair_of_another_budget_is_measured_beside_the_known_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path)
    asked: list[Pairing] = []

    def note(pairing: Pairing, root: Path) -> list[SpeedRow]:
        asked.append(pairing)
        return []

    monkeypatch.setattr(speed, "measure_pair", note)
    known = make_pairs((100, 1000))
    sizes: dict[str, Any] = {"precisions": ("bf16", "fp16"), "trials": (64,), "repeats": 1, "slots": 2}
    for max_epochs in (8, 2):
        pairings = list_pairings(tmp_path, max_epochs=max_epochs, **sizes)
        measure_speed(pairings, path=tmp_path / "speed.parquet", before=known)
    assert [(pairing.precision, pairing.max_epochs) for pairing in asked] == [("fp16", 8), ("bf16", 2), ("fp16", 2)]
