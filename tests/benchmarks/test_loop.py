"""The loop benchmark, its floor and its machine: arithmetic by hand, and small real measurements on the CPU."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

from benchmarks.machine import (
    describe_machine,
    describe_versions,
    machine_line,
    read_matrix_flags,
    read_processor,
)
from benchmarks.markdown import render_table
from benchmarks.training import loop
from benchmarks.training.floor import (
    FloorMeter,
    StepFloor,
    count_device_events,
    count_operations,
    count_work,
    measure_step_floor,
    one_thread,
)
from benchmarks.training.gpu import make_images
from benchmarks.training.loop import (
    explain_too_long,
    measure_loop,
    render_loop,
    render_quantity,
    take_turns,
    write_loop,
)
from benchmarks.training.loop_programs import EAGER, TUTORIAL, Cell, Prepared, Turn
from tune_amp.training.data import Split
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig

CPU = torch.device("cpu")
SHAPE = (1, 28, 28)

# The floor


def test_flops_of_the_tutorials_net_are_those_of_its_products() -> None:
    """Forward two products; backward both weights' gradients, and the hidden layer's: none for the images."""
    work = count_work(TrialConfig(batch_size=64), SHAPE, 10)
    first, second = 2 * 64 * 784 * 256, 2 * 64 * 256 * 10
    assert work.flops == 2 * first + 3 * second
    assert work.largest_product == (64, 784, 256)
    weights = 4 * (784 * 256 + 256 + 256 * 10 + 10)
    assert work.bytes == 8 * weights + 64 * 784 + 64 * 8  # weights, gradients and two moments, in and out; the batch


def test_sgd_has_one_state_less_to_move() -> None:
    adam, sgd = (count_work(TrialConfig(optimizer=name), SHAPE, 10).bytes for name in ("adam", "sgd"))
    assert adam - sgd == 2 * 4 * (784 * 256 + 256 + 256 * 10 + 10)


def test_counting_work_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    count_work(TrialConfig(model="vit"), SHAPE, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_floor_is_the_larger_of_computing_and_moving() -> None:
    floor = StepFloor(compute_seconds=2.0, memory_seconds=3.0, operations=None, launch_seconds=None)
    assert floor.seconds == 3.0
    assert floor.epoch_seconds(100, 32) == 9.0


def test_floor_of_a_step_follows_from_the_rates_that_were_measured() -> None:
    with one_thread(CPU):
        meter = FloorMeter(CPU, seconds=0.005)
        config = TrialConfig(batch_size=64)
        floor = measure_step_floor(config, SHAPE, 10, meter, operations=20)
    work = count_work(config, SHAPE, 10)
    products = [rate.value for rate in meter.rates if rate.what == "product fp32"]
    copies = [rate.value for rate in meter.rates if rate.what == "copy"]
    assert floor.compute_seconds == pytest.approx(work.flops / max(products))
    assert floor.memory_seconds == pytest.approx(work.bytes / max(copies))
    assert floor.launch_seconds == pytest.approx(20 * meter.operation_seconds)
    assert 1e9 < max(products) < 1e13
    count = len(meter.rates)
    measure_step_floor(config, SHAPE, 10, meter)
    assert len(meter.rates) == count, "each rate is measured once"


def make_data(count: int = 64) -> TrainingData:
    images = np.zeros((count, *SHAPE), np.uint8)
    images[::2] = 9
    return TrainingData(Split(images=images, labels=np.arange(count, dtype=np.int64) % 10), None, 10, CPU)


def test_operations_of_a_step_do_not_depend_on_what_happens_once_an_epoch() -> None:
    plain = count_operations(TrialConfig(batch_size=8), make_data())
    scaled = count_operations(TrialConfig(batch_size=8, precision="fp16"), make_data())
    assert plain is not None
    assert scaled is not None
    assert 10 < plain < 40
    assert plain < scaled < 3 * plain


def test_events_of_a_trace_are_kernels_copies_and_fills(tmp_path: Path) -> None:
    kinds = ["kernel", "gpu_memcpy", "gpu_memset", "cpu_op", "gpu_user_annotation", "cuda_runtime"]
    trace = {"traceEvents": [*({"cat": kind} for kind in kinds), {"ph": "M"}]}
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    assert count_device_events(tmp_path / "trace.json") == 3


# The loop


def test_programs_take_turns_and_who_begins_rotates() -> None:
    order: list[str] = []

    def prepare(name: str) -> Prepared:
        def take() -> Turn:
            order.append(name)
            return Turn(images=10, seconds=2.0)

        return Prepared(take_turn=take)

    turns = take_turns({name: prepare(name) for name in "abc"}, 2)
    assert "".join(order) == "abcbca"
    assert [turn.rate for turn in turns["b"]] == [5.0, 5.0]


def test_programs_of_a_cell_are_measured_side_by_side(tmp_path: Path) -> None:
    rows: list[Any] = []
    result = measure_loop(
        make_images(2_400),
        device=CPU,
        models=("simple_net",),
        precisions=("fp16",),
        batch_sizes=(64, 100_000),
        repeats=2,
        seconds=0.05,
        programs=(TUTORIAL, EAGER),
        report=rows.append,
    )
    tutorial, eager = result.rows
    assert tuple(rows) == result.rows
    assert (tutorial.program, eager.program, eager.turns) == (TUTORIAL, EAGER, 2)
    assert tutorial.ratio == 1.0
    assert eager.ratio is not None
    assert eager.ratio_low is not None
    assert eager.ratio_high is not None
    assert 0 < eager.ratio_low <= eager.ratio <= eager.ratio_high
    assert eager.samples_per_second is not None
    assert eager.floor_share is not None
    assert eager.floor_seconds is not None
    assert eager.floor_share == pytest.approx(eager.floor_seconds * eager.samples_per_second / 64)
    text = render_loop(result)
    assert text.count("\n| simple_net ") == 2
    write_loop(tmp_path / "loop.parquet", result)
    assert pq.read_table(tmp_path / "loop.parquet").num_rows == 2


def test_cell_without_time_left_says_so() -> None:
    result = measure_loop(
        make_images(240), device=CPU, models=("vit",), precisions=("fp32",), batch_sizes=(64,), deadline=-math.inf
    )
    assert {row.reason for row in result.rows} == {"skipped: no time is left"}
    assert {row.samples_per_second for row in result.rows} == {None}


def test_floor_that_cannot_be_measured_costs_no_other_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("the profiler is taken")

    monkeypatch.setattr(loop, "count_operations", refuse)
    result = measure_loop(
        make_images(480),
        device=CPU,
        models=("simple_net",),
        precisions=("fp32",),
        batch_sizes=(64,),
        repeats=1,
        seconds=0.01,
        programs=(EAGER,),
    )
    [row] = result.rows
    assert row.samples_per_second is not None
    assert row.floor_share is None
    assert row.reason == "no floor: RuntimeError: the profiler is taken"
    assert row.reason in render_loop(result)


def test_only_the_cpu_is_asked_how_long_a_cell_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 32 images take as long as 4,096: what they tell of a larger batch is a hundred times too much."""
    monkeypatch.setattr(loop, "estimate_epoch_seconds", lambda *_: 120.0)
    split = make_images(600).train
    config = TrialConfig(batch_size=len(split) // 2)
    on_cpu, on_gpu = (
        Cell(config=config, train=split, num_classes=10, device=torch.device(name)) for name in ("cpu", "cuda")
    )
    assert explain_too_long(on_cpu, 1) == "skipped: an epoch would take about 120 s"
    assert explain_too_long(on_gpu, 1) is None


def test_quantities_are_told_with_a_prefix() -> None:
    assert [render_quantity(*pair) for pair in ((1.45e12, "FLOP/s"), (1.72e-6, "s"), (12.0, "B/s"))] == [
        "1.45 TFLOP/s",
        "1.72 us",
        "12 B/s",
    ]


def test_bar_in_a_cell_begins_no_new_one() -> None:
    assert render_table(("a", "b"), [("x|y", "z")]).splitlines()[-1] == "| x/y | z |"


# The machine


def test_machine_is_described_without_its_name() -> None:
    import platform

    about = describe_machine()
    assert about["cores"].isdecimal()
    assert about["memory"].endswith(" GiB")
    assert platform.node() not in machine_line() or len(platform.node()) < 4


def test_processor_and_its_matrix_units_are_read(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some  CPU\nflags : sse amx_bf16 avx512f\n")
    assert read_processor(tmp_path / "cpuinfo") == "Some CPU"
    assert read_matrix_flags(tmp_path / "cpuinfo") == ("avx512f", "amx_bf16")
    assert read_processor(tmp_path / "missing")
    assert read_matrix_flags(tmp_path / "missing") == ()


def test_packages_that_are_not_installed_are_left_out() -> None:
    versions = describe_versions(("numpy", "no-such-package-of-ours"))
    assert list(versions) == ["python", "numpy"]
    assert versions["numpy"] == np.__version__
