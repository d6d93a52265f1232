"""The suite for one GPU, tried on the CPU: what it checks, that it fails where it must, and what it writes."""

import contextlib
import dataclasses
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from fake_memory import FakeMemory
from records import make_epoch
from small_mnist import write_mnist

from benchmarks.training import gpu
from benchmarks.training.floor import Rate, take_again
from benchmarks.training.gpu import (
    PARTS,
    GpuResult,
    Suite,
    make_images,
    measure_gpu,
    name_folder,
    render_gpu,
    write_gpu,
)
from benchmarks.training.gpu_checks import Watched, compare_training, expand_scales, judge_losses
from benchmarks.training.gpu_lanes import measure_lanes
from benchmarks.training.gpu_memory import build_memory_rows, measure_workspace
from benchmarks.training.gpu_precisions import Outcome, compare_precisions
from benchmarks.training.gpu_precisions import build_rows as build_rows_beside_fp32
from benchmarks.training.gpu_rows import GpuRow
from benchmarks.training.gpu_tests import list_gpu_tests, read_test_report, run_gpu_tests
from benchmarks.training.gpu_turnover import measure_turnover
from benchmarks.training.loop import LoopResult, LoopRow
from benchmarks.training.loop_programs import GRAPH, TUTORIAL
from benchmarks.training.share_table import (
    ShareResult,
    build_rows,
    measure_share_table,
    render_shares,
)
from tune_amp.cluster.gpu_sharing import ShareMeasurement
from tune_amp.cluster.mps import PIPES, Mps
from tune_amp.training.cuda_graph import Step
from tune_amp.training.data import Dataset
from tune_amp.training.memory import MemoryMeter
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import MODELS, EpochMetrics, TrialConfig

CPU = torch.device("cpu")


def measure(tmp_path: Path, *parts: str, seconds: float = math.inf) -> GpuResult:
    """What parts find that may take as long as they like, on however busy a machine."""
    dataset = make_images(6_000)
    with patch.dict(gpu.MOST_SECONDS, dict.fromkeys(PARTS, math.inf)):
        return measure_gpu(dataset, tmp_path, device=CPU, models=("simple_net",), parts=parts, seconds=seconds)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> GpuResult:
    return measure(tmp_path_factory.mktemp("suite"), "graphs", "against the CPU", "telemetry", "memory")


def test_graphs_and_telemetry_are_checked_for_every_precision_and_optimizer(checked: GpuResult) -> None:
    assert not checked.failed
    counts = {part: sum(row.part == part for row in checked.rows) for part in ("graphs", "telemetry")}
    assert counts == {"graphs": 4 * 3 * 2 + 3, "telemetry": 3}
    for row in checked.rows:
        if row.part == "telemetry":
            assert row.value == row.count == 40
            assert "17 were skipped" in row.note, "a reference without skips would show nothing"


def test_scale_that_is_told_wrongly_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(told: Any) -> list[float]:
        return [1.0, *expand_scales(told)[:-1]]

    monkeypatch.setattr(gpu, "expand_scales", shift)
    result = measure(tmp_path, "telemetry")
    assert result.failed
    assert {row.verdict for row in result.rows} == {"failed"}


@pytest.mark.parametrize("loss", [1.1, math.nan])
def test_loss_that_is_another_fails(loss: float) -> None:
    row = judge_losses("graphs", "x", "fp32", make_epoch(train_loss=loss), make_epoch(train_loss=1.0))
    assert row.verdict == "failed"
    same = judge_losses("graphs", "x", "fp32", make_epoch(train_loss=1.0), make_epoch(train_loss=1.0))
    assert same.verdict == "met"


def watch(told: EpochMetrics, moved: float = 1.0, buffer: float = 1.0) -> Watched:
    ones = torch.ones(3, dtype=torch.float64)
    return Watched(told=told, moved=moved * ones, buffers={"exp_avg": buffer * ones})


def test_step_that_was_not_captured_fails() -> None:
    rows = compare_training("x", "fp32", watch(make_epoch(loop="eager: no")), watch(make_epoch()))
    assert [row.verdict for row in rows] == ["met", "met", "failed"]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({}, "met"), ({"moved": 1.02}, "failed"), ({"buffer": 0.98}, "failed"), ({"moved": math.nan}, "failed")],
)
def test_weights_or_buffers_that_are_others_fail(changes: dict[str, float], verdict: str) -> None:
    told = make_epoch(loop=GRAPH)
    assert compare_training("x", "fp32", watch(told, **changes), watch(told))[1].verdict == verdict


def test_weights_that_never_move_show_nothing() -> None:
    told = make_epoch(loop=GRAPH)
    assert compare_training("x", "fp32", watch(told, moved=0.0), watch(told, moved=0.0))[1].verdict == "failed"


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ({}, "met"),
        ({"growths": 0}, "failed"),
        ({"skipped_steps": 0}, "failed"),
        ({"applied_steps": 12}, "failed"),
    ],
)
def test_path_of_the_scale_on_which_nothing_is_to_be_seen_fails(counts: dict[str, int], verdict: str) -> None:
    told = make_epoch(loop=GRAPH, **{"growths": 3, "skipped_steps": 2, "applied_steps": 13, **counts})
    assert [row.verdict for row in compare_training("x", "fp16", watch(told), watch(told))] == ["met", "met", verdict]


def skip_every_fourth(step: Step) -> Step:
    counter = itertools.count(1)

    def replay() -> None:
        if next(counter) % 4:
            step()

    return replay


@pytest.mark.long
def test_graph_that_does_less_than_the_step_fails_in_every_precision_and_with_every_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "take_again", skip_every_fourth)
    rows = [row for row in measure(tmp_path, "graphs").rows if "weights" in row.quantity]
    assert len(rows) == 4 * 3
    assert {row.verdict for row in rows} == {"failed"}


def test_scales_of_steps_follow_from_their_changes() -> None:
    told = make_epoch(steps=5, loss_scale_steps=(1, 2, 4), loss_scale_values=(8.0, 4.0, 2.0))
    assert expand_scales(told) == [8.0, 4.0, 4.0, 2.0, 2.0]


def test_part_that_breaks_is_a_row_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(suite: Suite, left: float) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {**PARTS, "graphs": fail})
    result = measure(tmp_path, "graphs", "against the CPU")
    assert [(row.part, row.verdict) for row in result.rows] == [("graphs", "failed"), ("against the CPU", "met")]
    assert result.rows[0].note == "RuntimeError: no such kernel"
    assert "no such kernel" in render_gpu(result)


def test_part_without_time_left_is_skipped_and_says_so(tmp_path: Path) -> None:
    result = measure(tmp_path, "loop", seconds=1.0)
    assert not result.failed
    assert "and it needs 30" in result.rows[0].note


def test_device_that_cannot_be_cleaned_up_stops_no_other_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "release_memory", refuse)
    result = measure(tmp_path, "against the CPU", "telemetry")
    assert [(row.part, row.verdict) for row in result.rows] == [("against the CPU", "failed"), ("telemetry", "failed")]


def test_what_there_is_can_be_kept_after_each_part(tmp_path: Path) -> None:
    kept: list[GpuResult] = []
    result = measure_gpu(
        make_images(6_000),
        tmp_path,
        device=CPU,
        models=("simple_net",),
        parts=("against the CPU", "loop"),
        seconds=20.0,
        keep=kept.append,
    )
    assert [len(found.rows) for found in kept] == [1, 2]
    assert kept[-1] == result


def test_checks_without_time_left_are_named(tmp_path: Path) -> None:
    suite = Suite(dataset=make_images(700), device=CPU, models=("simple_net",), folder=tmp_path)
    rows, _ = gpu.check_graphs(suite, -1.0)
    assert len(rows) == 4 * 3
    assert {row.note for row in rows} == {"skipped: no time is left"}


def test_file_and_table_hold_every_row(checked: GpuResult, tmp_path: Path) -> None:
    write_gpu(tmp_path / "gpu.parquet", checked)
    assert pq.read_table(tmp_path / "gpu.parquet").num_rows == len(checked.rows)
    text = render_gpu(checked)
    assert text.count("| simple_net, fp16, adam, graph |") == 2  # among the graphs, and in telemetry
    assert "31 met, 0 missed, 0 failed" in text


def test_targets_of_the_loop_are_told_for_the_graph_only() -> None:
    row = LoopRow(
        device="cuda",
        model="simple_net",
        precision="fp16",
        batch_size=64,
        program=GRAPH,
        samples_per_second=1e6,
        samples_per_second_low=9e5,
        samples_per_second_high=1.1e6,
        turns=3,
        ratio=49.0,
        ratio_low=48.0,
        ratio_high=50.0,
        operations=38,
        launch_ratio=2.0,
    )
    assert [found.verdict for found in gpu._judge_loop(row)] == ["", "missed", "met"]
    assert [found.verdict for found in gpu._judge_loop(dataclasses.replace(row, model="vit"))] == ["", "", ""]
    assert len(gpu._judge_loop(dataclasses.replace(row, program=TUTORIAL))) == 1


def test_outcomes_of_tests_are_counted_and_failures_named(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase name="a"/><testcase name="b"><skipped/></testcase>'
        '<testcase name="c"><failure message="assert 1 == 2&#10;more"/></testcase>'
        '<testcase name="d"><error message="no module"/></testcase>'
        "</testsuite></testsuites>"
    )
    rows = read_test_report(report)
    assert {row.quantity: row.value for row in rows if row.value is not None} == {
        "passed": 1,
        "skipped": 1,
        "failed": 2,
    }
    assert [(row.subject, row.note) for row in rows if row.verdict] == [("c", "assert 1 == 2"), ("d", "no module")]
    report.write_text("<testsuites><testsuite/></testsuites>")
    assert [row.note for row in read_test_report(report) if row.verdict == "failed"] == ["no test was run"]


def test_files_that_lack_ray_are_left_out_and_other_errors_fail(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        """<testcase name="a"><error message="collection failure">E   ModuleNotFoundError: No module named 'ray'"""
        "</error></testcase>"
        """<testcase name="b"><error message="collection failure">E   ModuleNotFoundError: No module named 'records'"""
        "</error></testcase></testsuite></testsuites>"
    )
    rows = {row.subject: row for row in read_test_report(report) if row.subject}
    assert (rows["a"].verdict, rows["a"].note) == ("", "left out: ray is not installed")
    assert rows["b"].verdict == "failed"
    assert [row.value for row in read_test_report(report) if row.quantity == "failed"] == [1.0]


def test_files_with_gpu_tests_are_found() -> None:
    names = {path.name for path in list_gpu_tests(Path(__file__).parents[1])}
    assert {"test_amp.py", "test_cuda_graph.py", "test_run.py"} <= names
    assert not {"test_space.py", Path(__file__).name} & names


@pytest.fixture
def small_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with two test files, one of which lacks Ray."""
    folder = tmp_path / "tests"
    folder.mkdir()
    mark = "gpu"  # written apart, so that this file is not taken for one
    marked = f"import pytest\n@pytest.mark.{mark}\ndef test_it(): pass\n"
    (folder / "test_here.py").write_text(marked + "def test_unmarked(): assert False\n")
    (folder / "test_lacking.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')\n" + marked
    )
    monkeypatch.chdir(tmp_path)
    return folder


def test_tests_run_in_a_process_of_their_own(small_project: Path) -> None:
    rows = run_gpu_tests(60.0)
    counts = {row.quantity: row.value for row in rows if row.value is not None}
    assert counts == {"passed": 1, "skipped": 0, "failed": 0}
    assert [row.note for row in rows if row.note] == ["left out: ray is not installed"]
    (small_project / "conftest.py").write_text("raise OSError('broken beyond repair')")
    [row] = run_gpu_tests(60.0)
    assert row.verdict == "failed"
    assert "broken beyond repair" in row.note


def test_suite_needs_neither_ray_nor_optuna_nor_scikit_learn(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
for name in ("ray", "optuna", "sklearn", "yaml"):
    sys.modules[name] = None
import torch
from benchmarks.training import gpu
from benchmarks.training.gpu import PARTS, make_images, measure_gpu
gpu.PRECISIONS, gpu.OPTIMIZERS = ("fp16",), ("adam",)
parts = ["graphs", "lanes", "turnover", "precisions"]
assert set(parts) <= set(PARTS)
found = measure_gpu(make_images(3000), Path(), device=torch.device("cpu"), models=("simple_net",), parts=["graphs"])
assert not found.failed, found
import benchmarks.training.telemetry, tune_amp.cluster.gpu_sharing
from tune_amp.training.data import load_dataset
assert len(load_dataset("mnist", Path()).validation) == 10
"""
    write_mnist(tmp_path, train=60)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_folder_is_named_after_the_device() -> None:
    assert name_folder(CPU) == "cpu"


def test_failure_is_that_of_a_check_and_not_of_a_target() -> None:
    def result(verdict: str) -> GpuResult:
        row = GpuRow(part="x", subject="y", quantity="z", verdict=verdict)
        return GpuResult(rows=(row,), tables={}, machine="", about={"dataset": "", "train_images": 1})

    assert result("failed").failed
    assert not result("missed").failed


# Turnover, lanes, processes


@pytest.fixture(scope="module")
def few_data() -> TrainingData:
    dataset = make_images(720)
    return TrainingData(dataset.train, dataset.validation, dataset.num_classes, CPU)


def test_every_phase_of_a_short_trial_is_timed(few_data: TrainingData) -> None:
    rows = measure_turnover(few_data, take_again, math.inf, batch_sizes=(64, 128), trials=2)
    subjects = dict.fromkeys(row.subject for row in rows)
    assert list(subjects) == ["simple_net, fp16, batch 64", "simple_net, fp16, batch 128"]
    phases = ("construct", "capture", "second epoch", "validation", "verdict with a probe", "release")
    for subject in subjects:
        found = {row.quantity: row for row in rows if row.subject == subject}
        assert found.keys() >= {*phases}
        assert all(row.count == 2 and row.value is not None and row.value > 0 for row in found.values())
    assert measure_turnover(few_data, take_again, -math.inf) == []


def test_lanes_train_at_the_same_time_and_agree(few_data: TrainingData) -> None:
    rows = measure_lanes(few_data, take_again, math.inf, batch_sizes=(64,), counts=(2, 1), repeats=2)
    assert [(row.subject.rpartition(", ")[2], row.verdict, row.count) for row in rows] == [
        ("lanes 2", "met", 1),
        ("lanes 1", "", 2),
        ("lanes 2", "", 2),
    ]
    assert rows[0].value == 0
    assert measure_lanes(few_data, take_again, -math.inf) == []


def test_lane_that_trains_otherwise_than_the_others_fails(few_data: TrainingData) -> None:
    numbers = itertools.count()

    def break_second(step: Step) -> Step:
        return skip_every_fourth(step) if next(numbers) == 1 else step

    rows = measure_lanes(few_data, break_second, math.inf, batch_sizes=(64,), counts=(2,), repeats=1)
    assert rows[0].verdict == "failed"


def measure_as_many(dataset: Dataset, *, configs: Sequence[TrialConfig], **_: Any) -> ShareResult:
    """As many images a second as processes, and a hundred times as many under MPS."""
    factor = 100.0 if PIPES in os.environ else 1.0
    measured = [ShareMeasurement(trials=n, samples_per_second=factor * n, trial_memory_bytes=None) for n in (1, 2)]
    return ShareResult(rows=tuple(build_rows(configs[0], measured)), seconds=0.5, machine="", dataset=dataset.name)


def test_processes_are_measured_with_and_without_mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def provide(wanted: str, home: Path) -> Iterator[Mps]:
        assert (wanted, home.is_dir()) == ("on", True)
        yield Mps(variables={PIPES: str(home / "mps")}, description="private MPS")

    monkeypatch.setattr(gpu, "measure_share_table", measure_as_many)
    monkeypatch.setattr(gpu, "provide_mps", provide)
    result = measure(tmp_path, "processes", "processes, MPS")
    assert not result.failed
    assert [(row.part, row.value or row.note) for row in result.rows] == [
        *[("processes", value) for value in (1, 2, 1, 2)],
        ("processes, MPS", "private MPS"),
        *[("processes, MPS", value) for value in (100, 200, 100, 200)],
    ]
    assert PIPES not in os.environ


def test_mps_that_cannot_be_had_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    [row] = measure(tmp_path, "processes, MPS").rows
    assert row.note == (
        "skipped: --mps: on needs MPS, which cannot be had (nvidia-cuda-mps-control is not on PATH); "
        "auto searches without"
    )


def test_processes_without_time_left_are_named(tmp_path: Path) -> None:
    suite = Suite(dataset=make_images(700), device=CPU, models=("simple_net",), folder=tmp_path)
    rows, _ = gpu.share_processes(suite, 1.0)
    assert [row.note for row in rows] == ["skipped: no time is left"] * 2


# Mixed precision beside fp32


def test_precisions_are_compared_seed_by_seed(few_data: TrainingData) -> None:
    rows = compare_precisions(
        few_data, [("simple_net", 64), ("simple_net", 128)], take_again, math.inf, seeds=2, precisions=("fp32", "bf16")
    )
    assert [(row.subject, row.quantity.partition(" ")[0], row.count) for row in rows] == [
        (f"simple_net, batch {size}, bf16", quantity, 2) for size in (64, 128) for quantity in ("speed", "accuracy")
    ]
    [skipped] = compare_precisions(few_data, [("simple_net", 64)], take_again, -math.inf)
    assert skipped.note == "skipped: no time is left"


def test_precisions_that_cannot_be_compared_are_a_row_and_the_others_are_compared(few_data: TrainingData) -> None:
    cells = [("simple_net", 4096), ("simple_net", 128)]
    rows = compare_precisions(few_data, cells, take_again, math.inf, seeds=1, precisions=("fp32", "bf16"))
    assert [(row.subject, row.verdict) for row in rows if row.verdict == "failed"] == [
        ("simple_net, batch 4096", "failed")
    ]
    assert rows[0].note.startswith("ZeroDivisionError")
    assert {row.subject for row in rows[1:]} == {"simple_net, batch 128, bf16"}


def test_claims_about_mixed_precision_are_judged_by_medians_of_pairs() -> None:
    def outcomes(seconds: float, size: int, *accuracies: float) -> list[Outcome]:
        return [Outcome(epoch_seconds=seconds, peak_bytes=size, accuracy=accuracy) for accuracy in accuracies]

    found = {
        "fp32": outcomes(3.0, 100, 0.97, 0.98, 0.96),
        "tf32": outcomes(3.0, 100, 0.97, 0.98, 0.96),
        "bf16": outcomes(2.0, 55, 0.965, 0.97, 0.95),
        "fp16": outcomes(2.5, 60, 0.95, 0.97, 0.94),
    }
    rows = {(row.subject, row.quantity.partition(" ")[0]): row for row in build_rows_beside_fp32("net", found)}
    assert [rows["net, bf16", quantity].value for quantity in ("speed", "peak")] == [1.5, 0.55]
    assert rows["net, bf16", "accuracy"].value == pytest.approx(-1)
    assert rows["net, bf16", "accuracy"].low == pytest.approx(-1)
    assert {name[1]: row.verdict for name, row in rows.items() if "fp16" in name[0]} == {
        "speed": "missed",
        "peak": "missed",
        "accuracy": "missed",
    }
    assert {rows["net, bf16", quantity].verdict for quantity in ("speed", "peak")} == {"met"}
    assert {rows["net, tf32", quantity].verdict for quantity in ("speed", "peak", "accuracy")} == {""}


def test_every_part_has_its_time_and_the_tests_are_first() -> None:
    assert list(PARTS) == list(gpu.MOST_SECONDS) == list(gpu.LEAST_SECONDS)
    assert next(iter(PARTS)) == "tests"
    assert all(gpu.LEAST_SECONDS[part] <= gpu.MOST_SECONDS[part] for part in PARTS)


def test_loop_of_the_smallest_model_is_measured_at_every_batch_size_and_of_the_others_at_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure_no_loop(dataset: Dataset, *, models: Sequence[str], batch_sizes: Sequence[int], **_: Any) -> LoopResult:
        asked.append((tuple(models), tuple(batch_sizes)))
        rate = Rate(what="copy", size="1 byte", value=1.0, unit="B/s")
        about = {"dataset": dataset.name, "train_images": 1, "threads": 1}
        return LoopResult(rows=(), rates=(rate,), machine="", about=about)

    monkeypatch.setattr(gpu, "measure_loop", measure_no_loop)
    suite = Suite(dataset=make_images(700), device=CPU, models=MODELS, folder=tmp_path)
    gpu.measure_loops(suite, 60.0)
    assert asked == [(("simple_net",), (64, 512, 4096)), (("conv_net", "vit"), (512,))]


# Memory


@pytest.mark.parametrize("keeps_workspace", [True, False])
def test_workspace_of_products_is_measured_whether_torch_keeps_it_or_not(
    keeps_workspace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory(monkeypatch)
    memory.allocated = 1000
    meter = MemoryMeter(torch.device("cuda"))

    def multiply(*_: object) -> None:
        memory.touch(0 if keeps_workspace else 32, workspaces=32 if keeps_workspace else 0)

    hook = torch.nn.modules.module.register_module_forward_hook(multiply)
    try:
        assert measure_workspace("bf16", CPU, meter) == 32
    finally:
        hook.remove()
    assert measure_workspace("bf16", CPU, MemoryMeter(CPU)) is None


def test_memory_ratios_are_shown_with_and_without_the_workspace() -> None:
    mib = 2**20
    rows = build_memory_rows("net", {"fp32": 74 * mib, "fp16": 69 * mib}, {"fp32": 64 * mib, "fp16": 64 * mib})
    values = {(row.subject, row.quantity.partition(",")[0], "workspace" in row.quantity): row.value for row in rows}
    assert values["net, fp32", "peak", False] == 74
    assert values["net, fp16", "peak", True] == 5
    assert values["net, fp16", "over fp32", False] == pytest.approx(69 / 74)
    assert values["net, fp16", "over fp32", True] == 0.5


# Shares


def test_share_table_tells_what_is_left_of_a_trials_own_speed() -> None:
    config = TrialConfig(precision="bf16", batch_size=64)
    measured = [
        ShareMeasurement(trials=4, samples_per_second=300.0, trial_memory_bytes=2**30),
        ShareMeasurement(trials=1, samples_per_second=100.0, trial_memory_bytes=2**30),
    ]
    one, four = build_rows(config, measured)
    assert (one.relative, one.efficiency, one.is_knee) == (1.0, 1.0, False)
    assert (four.relative, four.efficiency, four.is_knee) == (3.0, 0.75, True)


def test_share_table_shows_medians_of_ratios_taken_repeat_by_repeat() -> None:
    """The second repeat fell into a slow moment, which its ratio does not show; the third was cut off before 4."""
    rates = [(1, 100.0), (2, 190.0), (4, 200.0), (1, 50.0), (2, 95.0), (4, 120.0), (1, 110.0), (2, 210.0)]
    measured = [ShareMeasurement(trials=n, samples_per_second=rate, trial_memory_bytes=None) for n, rate in rates]
    rows = build_rows(TrialConfig(precision="bf16", batch_size=64), measured)
    assert [(row.trials, row.repeat) for row in rows] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
        (2, 1),
        (2, 2),
        (4, 0),
        (4, 1),
    ]
    result = ShareResult(rows=tuple(rows), seconds=3.0, machine="", dataset="some")
    one, two, four = [line for line in render_shares(result).splitlines() if line.startswith("| simple_net")]
    assert "| 1 | 3 | 100 (50 to 110) | 1.00 (1.00 to 1.00) | 100% |" in one
    assert "| 2 | 3 | 190 (95 to 210) | 1.90 (1.90 to 1.91) | 95% |  | knee |" in two
    assert "| 4 | 2 | 160 (120 to 200) | 2.20 (2.00 to 2.40) | 55% |" in four


@pytest.mark.slow  # starts processes
@pytest.mark.long
def test_shares_are_measured() -> None:
    result = measure_share_table(
        make_images(1_200),
        device_type="cpu",
        configs=[TrialConfig(max_epochs=9)],
        counts=(1, 2),
        seconds=0.2,
        repeats=2,
    )
    assert [(row.trials, row.repeat) for row in result.rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({row.samples_per_second for row in result.rows}) == 4
    assert len({row.trials for row in result.rows if row.is_knee}) == 1
    assert render_shares(result).count("\n| simple_net ") == 2
