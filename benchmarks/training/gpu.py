"""All that is to be known of one GPU, in one command of under nine minutes, without Ray, Optuna and scikit-learn.

Parts run one after another, each within its own time and what is left of all: the tests that need a GPU, graphed
against eager training, training on the GPU against the CPU, telemetry against a reference that reads the scaler at
every step, the phases of a short trial, trials side by side in one process and in several, the training loop, memory,
the cost of telemetry, and mixed precision beside fp32. A part that fails is a row with its error, and the others still
run.

On the CPU everything but CUDA itself can be tried: a graph is then a step that is taken again.
"""

import dataclasses
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.machine import describe_machine, describe_versions, machine_line
from benchmarks.markdown import judge, render_table
from benchmarks.rows import describe_measurement, write_rows
from benchmarks.training.floor import take_again
from benchmarks.training.gpu_checks import (
    compare_training,
    early_config,
    expand_scales,
    judge_losses,
    read_every_step,
    train_and_watch,
)
from benchmarks.training.gpu_lanes import measure_lanes
from benchmarks.training.gpu_memory import build_memory_rows, measure_workspace
from benchmarks.training.gpu_precisions import compare_precisions
from benchmarks.training.gpu_rows import GpuRow, count_verdicts, render_row, summarise_row
from benchmarks.training.gpu_tests import run_gpu_tests
from benchmarks.training.gpu_turnover import measure_turnover
from benchmarks.training.loop import LoopRow, measure_loop, render_loop, write_loop
from benchmarks.training.loop_programs import EAGER, GRAPH, LONG, TUTORIAL
from benchmarks.training.share_table import ShareRow, group_repeats, list_configs, measure_share_table
from benchmarks.training.telemetry import measure_telemetry, render_telemetry
from tune_amp.cluster.mps import provide_mps
from tune_amp.training.batches import DeviceSplit
from tune_amp.training.cuda_graph import Capture, capture_cuda_graph
from tune_amp.training.data import Dataset, Split
from tune_amp.training.memory import MemoryMeter, release_memory
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import MODELS, OPTIMIZERS, InputError, TrialConfig
from tune_amp.trial.text import describe_error

SECONDS = 500.0
"""For the whole suite: the machine's start and the transfers come on top."""
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
BATCH_SIZES = (64, 512, 4096)
EARLY_STEPS = 10
"""Equivalent optimizers drift apart later: 2e-4 in loss after 150 steps at lr 1e-3."""
GRAPH_STEPS = 40
"""Three eager steps, and replays enough that in fp16 the scale falls, grows and falls again."""
PROCESSES = (1, 2, 4, 8)
PROCESSES_SECONDS = 15.0
"""Eight processes start and are measured: an estimate."""
LONGEST_LOOP_CELL = 10.0
"""Seconds of a cell that has begun: an estimate."""
LEAST_RATIO, MOST_LAUNCH_RATIO, MOST_TELEMETRY = 50.0, 2.0, 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuResult:
    """The result of the suite."""

    rows: tuple[GpuRow, ...]
    tables: Mapping[str, str]
    """Markdown of the parts that have a table of their own, by part."""
    machine: str
    about: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        """Whether a check or a part failed. A target that is missed is a finding, not a failure."""
        return any(row.verdict == "failed" for row in self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What every part is given."""

    dataset: Dataset
    device: torch.device
    models: Sequence[str]
    folder: Path
    """For the files of parts that write their own."""

    def train(self, images: int, device: torch.device | None = None) -> TrainingData:
        """The first training images, on the suite's device."""
        split = self.dataset.train
        few = Split(images=split.images[:images], labels=split.labels[:images])
        return TrainingData(few, None, self.dataset.num_classes, device or self.device)

    def place(self) -> TrainingData:
        """All training and validation images, on the suite's device."""
        return TrainingData(self.dataset.train, self.dataset.validation, self.dataset.num_classes, self.device)

    @property
    def capture(self) -> Capture:
        """What captures a step, or on the CPU takes its place."""
        return take_again if self.device.type == "cpu" else capture_cuda_graph

    def start(self, config: TrialConfig, data: TrainingData, *, graph: bool) -> TrainingRun:
        """A run that captures its steps, or does not."""
        return TrainingRun(config, data, capture=self.capture if graph else None)


Part = Callable[[Suite, float], tuple[list[GpuRow], str]]
"""Rows and a table of its own, given the seconds that are left."""


def measure_gpu(
    dataset: Dataset,
    folder: Path,
    *,
    device: torch.device,
    models: Sequence[str] = MODELS,
    parts: Sequence[str] | None = None,
    seconds: float = SECONDS,
    announce: Callable[[str], object] = lambda line: None,
    keep: Callable[[GpuResult], object] = lambda result: None,
) -> GpuResult:
    """Run every part.

    Args:
        dataset: from ``load_dataset``, or ``make_images``.
        folder: where parts leave tables of their own as Parquet.
        device: CUDA; on the CPU the suite can be tried.
        models: built-in ones.
        parts: of ``PARTS``; all where None.
        seconds: for all of them together.
        announce: is told of each part's end.
        keep: is given what there is after each part: a later one may hang, or take the machine with it.
    """
    suite = Suite(dataset=dataset, device=device, models=models, folder=folder)
    deadline = time.monotonic() + seconds
    result = GpuResult(
        rows=(),
        tables={},
        machine=machine_line(device),
        about=describe_measurement(
            describe_machine(device), describe_versions(), dataset=dataset.name, train_images=len(dataset.train)
        ),
    )
    for name in parts or PARTS:
        started = time.monotonic()
        rows, table = _run_part(name, suite, min(deadline - started, MOST_SECONDS[name]))
        tables = {name: table} if table else {}
        result = dataclasses.replace(result, rows=(*result.rows, *rows), tables={**result.tables, **tables})
        announce(f"{name}: {time.monotonic() - started:.0f} s, {count_verdicts(rows)}")
        keep(result)
    return result


def _run_part(name: str, suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    if left < LEAST_SECONDS[name]:
        note = f"skipped: {max(0.0, left):.0f} s are left of the time, and it needs {LEAST_SECONDS[name]:g}"
        return [GpuRow(part=name, subject="", quantity="", note=note)], ""
    try:
        found = PARTS[name](suite, left)
        release_memory(suite.device)  # here, because on a device that a kernel has broken this fails as well
    except Exception as error:  # the other parts have something to tell
        return [GpuRow(part=name, subject="", quantity="", verdict="failed", note=describe_error(error))], ""
    return found


# ---- the data ----


def make_images(count: int = 60_000) -> Dataset:
    """Images of MNIST's size that can be learned: for where the files are not at hand, since times are the same."""
    generator = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % 10
    images = generator.integers(0, 100, (count, 1, 28, 28), np.uint8)
    images[np.arange(count), 0, labels * 2] += 100
    whole, kept = Split(images=images, labels=labels), count - count // 12
    return Dataset(
        name="generated images",
        num_classes=10,
        train=whole.select(range(kept)),
        validation=whole.select(range(kept, count)),
        test=whole,
        content_hash="",
    )


# ---- the parts ----


def check_graphs(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """Graphed against eager training: loss, weights, the optimizer's buffers, the path of the loss scale."""
    rows = []
    deadline = time.monotonic() + left
    data = suite.train(GRAPH_STEPS * 64)
    for model, precision, optimizer in itertools.product(suite.models, PRECISIONS, OPTIMIZERS):
        subject = f"{model}, {precision}, {optimizer}"
        if time.monotonic() > deadline:
            rows.append(GpuRow(part="graphs", subject=subject, quantity="", note="skipped: no time is left"))
            continue
        config = early_config(model, precision, optimizer)
        graphed, eager = (train_and_watch(suite.start(config, data, graph=graph)) for graph in (True, False))
        release_memory(suite.device)
        rows += compare_training(subject, precision, graphed, eager)
    return rows, ""


def check_against_cpu(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """Strict fp32 on the device against the CPU, over the first steps."""
    rows = []
    for model in suite.models:
        config = early_config(model, "fp32", "adam")
        here = suite.start(config, suite.train(EARLY_STEPS * 64), graph=False).train_epoch()
        on_cpu = suite.train(EARLY_STEPS * 64, torch.device("cpu"))
        there = TrainingRun(config, on_cpu, capture=None).train_epoch()
        rows.append(judge_losses("against the CPU", f"{model}, fp32", "fp32", here, there))
    return rows, ""


def check_telemetry(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """What an epoch tells against a reference that reads scale and skips at every step: exactly the same."""
    rows = []
    data = suite.train(40 * 64)
    for optimizer in OPTIMIZERS:
        config = dataclasses.replace(early_config("simple_net", "fp16", optimizer), init_scale=2.0**30)
        read = list(read_every_step(suite.start(config, data, graph=False), data))
        told = suite.start(config, data, graph=True).train_epoch()
        scales = expand_scales(told)
        same = scales == [scale for scale, _ in read] and told.skipped_steps == sum(skipped for _, skipped in read)
        rows.append(
            GpuRow(
                part="telemetry",
                subject=f"simple_net, fp16, {optimizer}, {told.loop}",
                quantity="steps whose scale and skip are as read",
                value=float(sum(a == b for a, (b, _) in zip(scales, read, strict=False))),
                count=len(read),
                verdict="met" if same else "failed",
                note=f"all {len(read)} must be; {told.skipped_steps} were skipped",
            )
        )
    return rows, ""


def measure_memory(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """Peak memory of training by model, batch size and precision; resident data and workspaces apart; over fp32."""
    deadline = time.monotonic() + left
    data = suite.train(2 * max(BATCH_SIZES))
    workspaces: dict[str, int] = {}
    for precision in PRECISIONS:
        workspace = measure_workspace(precision, suite.device, MemoryMeter(suite.device))
        if workspace is None:
            return [GpuRow(part="memory", subject="", quantity="", note="measured on GPUs only")], ""
        workspaces[precision] = workspace
    assert isinstance(data.train, DeviceSplit)
    resident = data.train.images.nbytes + data.train.labels.nbytes
    rows = [
        _memory_row("data", f"{len(data.train.labels)} images resident", resident),
        *(_memory_row(precision, "workspace", workspace) for precision, workspace in workspaces.items()),
    ]
    for model, batch_size in itertools.product(suite.models, BATCH_SIZES):
        if time.monotonic() > deadline:
            note = "skipped: no time is left"
            rows.append(GpuRow(part="memory", subject=f"{model}, batch {batch_size}", quantity="", note=note))
            continue
        peaks: dict[str, int] = {}
        for precision in PRECISIONS:
            config = TrialConfig(model=model, precision=precision, batch_size=batch_size, max_epochs=LONG)
            peak = suite.start(config, data, graph=False).train_epoch().peak_memory_bytes
            release_memory(suite.device)
            assert peak is not None
            peaks[precision] = peak
        rows += build_memory_rows(f"{model}, batch {batch_size}", peaks, workspaces)
    return rows, ""


def time_turnover(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """The phases of short trials in one process."""
    return measure_turnover(suite.place(), suite.capture, time.monotonic() + left), ""


def share_one_process(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """Trials side by side in one process."""
    return measure_lanes(suite.train(len(suite.dataset.train)), suite.capture, time.monotonic() + left), ""


def compare_with_fp32(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """Mixed precision beside fp32, the batch size in the middle first."""
    cells = [(model, batch_size) for batch_size in (512, 64, 4096) for model in suite.models]
    return compare_precisions(suite.place(), cells, suite.capture, time.monotonic() + left), ""


def measure_loops(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """The tutorial's loop, ours eager and ours graphed, beside the floor; to compile would take too long here.

    The smallest model at every batch size, the others at the one in the middle.
    """
    deadline = time.perf_counter() + left - LONGEST_LOOP_CELL
    small = [model for model in suite.models if model == "simple_net"]
    others = [model for model in suite.models if model not in small]
    results = [
        measure_loop(
            suite.dataset,
            device=suite.device,
            models=models,
            batch_sizes=batch_sizes,
            seconds=0.25,
            programs=(TUTORIAL, EAGER, GRAPH),
            deadline=deadline,
        )
        for models, batch_sizes in ((small, BATCH_SIZES), (others, BATCH_SIZES[1:2]))
        if models
    ]
    result = dataclasses.replace(
        results[0],
        rows=tuple(row for found in results for row in found.rows),
        rates=tuple(rate for found in results for rate in found.rates),
    )
    write_loop(suite.folder / "loop.parquet", result)
    return [row for found in result.rows for row in _judge_loop(found)], render_loop(result)


def share_processes(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """Trials side by side, each in a process of its own."""
    return _measure_processes("processes", suite, left), ""


def share_processes_under_mps(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """The same under CUDA's Multi-Process Service, if it can be had: a daemon that runs, or a private one."""
    part = "processes, MPS"
    with tempfile.TemporaryDirectory(prefix="mps_", ignore_cleanup_errors=True) as folder:
        try:
            with provide_mps("on", Path(folder)) as mps, patch.dict(os.environ, mps.variables):
                rows = _measure_processes(part, suite, left)
        except InputError as error:
            return [GpuRow(part=part, subject="", quantity="", note=f"skipped: {error}")], ""
    return [GpuRow(part=part, subject="", quantity="", note=mps.description), *rows], ""


def _measure_processes(part: str, suite: Suite, left: float) -> list[GpuRow]:
    deadline = time.monotonic() + left
    rows = []
    for config in list_configs(suite.device.type):
        if time.monotonic() + PROCESSES_SECONDS > deadline:
            subject = f"{config.model}, {config.precision}, batch {config.batch_size}"
            rows.append(GpuRow(part=part, subject=subject, quantity="", note="skipped: no time is left"))
            continue
        result = measure_share_table(
            suite.dataset, device_type=suite.device.type, configs=[config], counts=PROCESSES, seconds=0.5, repeats=2
        )
        rows += [_summarise_share(part, found) for found in group_repeats(result.rows)]
    return rows


def _summarise_share(part: str, rows: Sequence[ShareRow]) -> GpuRow:
    first = rows[0]
    return summarise_row(
        [row.samples_per_second for row in rows],
        part=part,
        subject=f"{first.model}, {first.precision}, batch {first.batch_size}, {first.trials} processes",
        quantity="images a second of all",
        unit="1/s",
        note="knee" if first.is_knee else "",
    )


def measure_telemetry_cost(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """What the probe and the log cost of the training time."""
    cost = measure_telemetry(suite.dataset, deadline=time.monotonic() + left)
    rows = [
        GpuRow(
            part="telemetry cost",
            subject=f"simple_net, {share.precision}, batch {share.batch_size}, {share.loop}",
            quantity=f"{what}, share of training time",
            value=share.median,
            low=share.low,
            high=share.high,
            count=share.count,
            verdict=judge(share.median <= MOST_TELEMETRY),
            note=f"target at most {MOST_TELEMETRY:.0%}",
        )
        for what, shares in (("probe", cost.probes), ("log", cost.logs))
        for share in shares
    ]
    return rows, render_telemetry(cost)


def run_tests(suite: Suite, left: float) -> tuple[list[GpuRow], str]:
    """The tests that need a GPU."""
    return run_gpu_tests(left), ""


PARTS: Mapping[str, Part] = {
    "tests": run_tests,
    "graphs": check_graphs,
    "against the CPU": check_against_cpu,
    "telemetry": check_telemetry,
    "turnover": time_turnover,
    "lanes": share_one_process,
    "processes": share_processes,
    "processes, MPS": share_processes_under_mps,
    "loop": measure_loops,
    "memory": measure_memory,
    "telemetry cost": measure_telemetry_cost,
    "precisions": compare_with_fp32,
}
"""The parts in their order; the last one takes what is left."""
MOST_SECONDS = {
    "tests": 90.0,
    "graphs": 40.0,
    "against the CPU": 10.0,
    "telemetry": 10.0,
    "turnover": 40.0,
    "lanes": 60.0,
    "processes": 40.0,
    "processes, MPS": 40.0,
    "loop": 120.0,
    "memory": 20.0,
    "telemetry cost": 30.0,
    "precisions": 120.0,
}
"""A part ends soon after its time. Estimates: no GPU has run them."""
LEAST_SECONDS = {
    "tests": 30.0,
    "graphs": 5.0,
    "against the CPU": 5.0,
    "telemetry": 5.0,
    "turnover": 5.0,
    "lanes": 5.0,
    "processes": 20.0,
    "processes, MPS": 20.0,
    "loop": 30.0,
    "memory": 10.0,
    "telemetry cost": 10.0,
    "precisions": 10.0,
}
"""A part that has less left is not begun."""


def _judge_loop(row: LoopRow) -> list[GpuRow]:
    subject = f"{row.model}, {row.precision}, batch {row.batch_size}, {row.program}"

    def build(quantity: str, value: float | None, **rest: Any) -> GpuRow:
        return GpuRow(part="loop", subject=subject, quantity=quantity, value=value, **rest)

    low, high = row.samples_per_second_low, row.samples_per_second_high
    speed = build(
        "images a second", row.samples_per_second, low=low, high=high, count=row.turns, unit="1/s", note=row.reason
    )
    found = [speed]
    if row.program == GRAPH and row.ratio is not None:
        target = _target(row.model == "simple_net", row.ratio >= LEAST_RATIO, f"at least {LEAST_RATIO:g}")
        found.append(
            build(
                "over the tutorial's loop", row.ratio, low=row.ratio_low, high=row.ratio_high, count=row.turns, **target
            )
        )
    if row.program == GRAPH and row.launch_ratio is not None:
        counted = row.model == "simple_net" and row.batch_size == 64
        target = _target(counted, row.launch_ratio <= MOST_LAUNCH_RATIO, f"at most {MOST_LAUNCH_RATIO:g}")
        found.append(build(f"step over its {row.operations} launches as counted", row.launch_ratio, **target))
    return found


def _target(applies: bool, holds: bool, target: str) -> dict[str, str]:
    """Verdict and note of a row, empty where there is no target."""
    return {"verdict": judge(holds), "note": f"target {target}"} if applies else {}


def _memory_row(subject: str, quantity: str, size: int) -> GpuRow:
    return GpuRow(part="memory", subject=subject, quantity=quantity, value=size / 2**20, unit="MiB")


# ---- the files ----


def name_folder(device: torch.device) -> str:
    """The device's name as a folder's: ``nvidia-h200``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_gpu(path: Path, result: GpuResult) -> None:
    """Write the rows, with what they rest on in the metadata."""
    write_rows(path, "gpu", GpuRow, result.rows, result.about)


def render_gpu(result: GpuResult) -> str:
    """Markdown: what failed and was missed, every part's rows or its own table."""
    titles = ("part", "subject", "quantity", "value", "verdict", "note")
    told = [row for row in result.rows if row.verdict in ("failed", "missed") or (row.note and not row.quantity)]
    parts = [
        f"{result.machine}. {result.about['dataset']}, {result.about['train_images']:,} training images.",
        f"{count_verdicts(result.rows)}." + (" Not met:" if told else ""),
        *([render_table(titles, [render_row(row) for row in told])] if told else []),
    ]
    for name in dict.fromkeys(row.part for row in result.rows):
        own = [render_row(row)[1:] for row in result.rows if row.part == name]
        parts += [f"## {name}", result.tables.get(name) or render_table(titles[1:], own)]
    return "\n\n".join(parts) + "\n"
