"""Images a second of the training loop: the tutorial's, ours step by step, ours as a CUDA graph, ours compiled.

All programs of a cell (model, precision, batch size) are prepared and warmed up first, then take turns, so that
whatever else the machine does falls on all of them; ratios are paired by turn. Beside them stands the floor that
``floor`` works out from rates measured in the same run. Ours is timed as ``EpochMetrics.train_seconds`` tells it: what
the probe after an epoch costs is in ``results/reference/telemetry.md``.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, describe_versions, machine_line
from benchmarks.markdown import render_table
from benchmarks.rows import describe_measurement, write_rows
from benchmarks.training.floor import (
    FloorMeter,
    Rate,
    StepFloor,
    count_operations,
    measure_step_floor,
    one_thread,
)
from benchmarks.training.loop_programs import (
    COMPILED,
    COMPILED_GRAPH,
    EAGER,
    LONG,
    MEANINGS,
    PREPARE,
    TUTORIAL,
    Cell,
    Prepared,
    Turn,
    take,
)
from tune_amp.training.data import Dataset
from tune_amp.training.memory import release_memory
from tune_amp.training.run import estimate_epoch_seconds
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import MODELS, TrialConfig, described
from tune_amp.trial.text import describe_error

CPU_PRECISIONS = ("fp32", "bf16", "fp16")
CUDA_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
BATCH_SIZES = (64, 512, 4096)
REPEATS = 3
SECONDS = 1.0
"""Each program's turn, as long as its steps are not longer."""
LONGEST_CELL_SECONDS = 10.0
"""A cell that would need more for its fewest steps is left out: fp16 convolutions on a CPU without fp16 units."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopRow:
    """One program in one cell."""

    device: str = described("cpu (one thread) or cuda")
    model: str = described("built-in model")
    precision: str = described("fp32 (strict), tf32, bf16 or fp16 autocast")
    batch_size: int = described("images a training step", unit="images")
    program: str = described("; ".join(f"{name}: {meaning}" for name, meaning in MEANINGS.items()))
    reason: str = described("why there is no figure, or no floor", default="")
    samples_per_second: float | None = described("median of the turns", unit="1/s", default=None)
    samples_per_second_low: float | None = described("of the slowest turn", unit="1/s", default=None)
    samples_per_second_high: float | None = described("of the fastest turn", unit="1/s", default=None)
    turns: int = described("how often it was measured", default=0)
    turn_images: int | None = described("trained on in a turn", unit="images", default=None)
    ratio: float | None = described("samples a second over the tutorial's; median of the pairs", default=None)
    ratio_low: float | None = described("of the pairs, the smallest", default=None)
    ratio_high: float | None = described("of the pairs, the largest", default=None)
    floor_seconds: float | None = described(
        "least time of a step: the larger of FLOPs over rate and bytes over bandwidth", unit="s", default=None
    )
    floor_share: float | None = described(
        "the floor over the median time of a step; 1 would be the floor", default=None
    )
    operations: int | None = described("kernels and copies of one of our steps; on the CPU calls", default=None)
    launch_seconds: float | None = described(
        "time to start them: in a graph's replay, or called", unit="s", default=None
    )
    launch_ratio: float | None = described("median time of a step over launch_seconds", default=None)
    compile_seconds: float | None = described("first epoch minus a later one", unit="s", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopResult:
    """The result of the benchmark."""

    rows: tuple[LoopRow, ...]
    rates: tuple[Rate, ...]
    """Of the machine, from which the floors are made."""
    machine: str
    about: Mapping[str, Any]


def measure_loop(
    dataset: Dataset,
    *,
    device: torch.device | None = None,
    models: Sequence[str] = MODELS,
    precisions: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = REPEATS,
    images: int | None = None,
    seconds: float = SECONDS,
    programs: Sequence[str] | None = None,
    deadline: float = math.inf,
    report: Callable[[LoopRow], None] = lambda _: None,
) -> LoopResult:
    """Measure every program in every cell.

    Args:
        dataset: its training split is trained on.
        device: CUDA where there is one.
        models: built-in ones.
        precisions: all that the device tells apart.
        batch_sizes: those above the number of images are left out.
        repeats: turns of each program.
        images: most that are trained on; all where None.
        seconds: of a turn.
        programs: all that the device can run.
        deadline: cells that would begin after this moment of ``time.perf_counter`` are skipped.
        report: told of each row as soon as it is known.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = take(dataset.train, len(dataset.train) if images is None else images)
    meter = FloorMeter(device)
    rows = []
    cells = itertools.product(
        models, [size for size in batch_sizes if size <= len(train)], precisions or list_precisions(device)
    )
    with one_thread(device):
        for model, batch_size, precision in cells:
            config = TrialConfig(model=model, precision=precision, batch_size=batch_size, max_epochs=LONG)
            cell = Cell(config=config, train=train, num_classes=dataset.num_classes, device=device)
            chosen = programs or list_programs(device)
            for row in measure_cell(cell, meter, chosen, repeats=repeats, seconds=seconds, deadline=deadline):
                rows.append(row)
                report(row)
    return LoopResult(
        rows=tuple(rows),
        rates=tuple(meter.rates),
        machine=machine_line(device),
        about=describe_measurement(
            describe_machine(device),
            describe_versions(),
            dataset=dataset.name,
            train_images=len(train),
            threads=1 if device.type == "cpu" else torch.get_num_threads(),
            rates=[dataclasses.asdict(rate) for rate in meter.rates],
        ),
    )


def list_precisions(device: torch.device) -> tuple[str, ...]:
    """Those that the device tells apart: on the CPU tf32 is fp32."""
    return CUDA_PRECISIONS if device.type == "cuda" else CPU_PRECISIONS


def list_programs(device: torch.device) -> tuple[str, ...]:
    """Those that the device can run: the CPU has no graphs."""
    return tuple(MEANINGS) if device.type == "cuda" else (TUTORIAL, EAGER, COMPILED)


def build_row(cell: Cell, program: str, **values: Any) -> LoopRow:
    """A row of a cell."""
    config = cell.config
    return LoopRow(
        device=cell.device.type,
        model=config.model,
        precision=config.precision,
        batch_size=config.batch_size,
        program=program,
        **values,
    )


def measure_cell(
    cell: Cell, meter: FloorMeter, programs: Sequence[str], *, repeats: int, seconds: float, deadline: float = math.inf
) -> list[LoopRow]:
    """One row for each program; those that cannot run say why."""
    if time.perf_counter() > deadline:
        return [build_row(cell, program, reason="skipped: no time is left") for program in programs]
    too_long = explain_too_long(cell, (repeats + 2) * len(programs))
    if too_long is not None:
        return [build_row(cell, program, reason=too_long) for program in programs]
    try:
        floor, no_floor = _measure_floor(cell, meter), ""
    except Exception as error:  # a profiler or a capture that fails: the loops can be timed without
        floor, no_floor = None, f"no floor: {describe_error(error)}"
    prepared, reasons = _prepare_all(cell, programs, seconds, deadline)
    turns = take_turns(prepared, repeats)
    rows = []
    for program in programs:
        if program in reasons:
            rows.append(build_row(cell, program, reason=reasons[program]))
        else:
            row = _summarise(cell, program, prepared[program], turns, floor)
            rows.append(dataclasses.replace(row, reason=no_floor))
    prepared.clear()
    release_memory(cell.device)  # graphs keep theirs
    return rows


def explain_too_long(cell: Cell, steps: int) -> str | None:
    """Why the cell shall be left out; None where ``steps`` of its steps can be waited for.

    Asked on the CPU only: a GPU takes hardly longer for a batch than for the few images that are tried.
    """
    if cell.device.type != "cpu":
        return None
    epoch_seconds = estimate_epoch_seconds(cell.config, cell.train, cell.num_classes, cell.device)
    step_seconds = epoch_seconds / len(cell.train) * cell.config.batch_size
    fits = step_seconds * steps <= LONGEST_CELL_SECONDS
    return None if fits else f"skipped: an epoch would take about {epoch_seconds:.0f} s"


def take_turns(prepared: Mapping[str, Prepared], repeats: int) -> dict[str, list[Turn]]:
    """Each program's turns; who begins rotates."""
    names = list(prepared)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % max(1, len(names))
        for name in names[first:] + names[:first]:
            turns[name].append(prepared[name].take_turn())
    return turns


def _prepare_all(
    cell: Cell, programs: Sequence[str], seconds: float, deadline: float
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """The programs that can run, and why the others cannot."""
    prepared: dict[str, Prepared] = {}
    reasons: dict[str, str] = {}
    for program in programs:
        compiles = program in (COMPILED, COMPILED_GRAPH)
        if compiles and time.perf_counter() > deadline:
            reasons[program] = "skipped: no time is left"
            continue
        try:
            prepared[program] = PREPARE[program](cell, seconds)
        except Exception as error:  # no compiler, no torchvision, no memory: the others still run
            reasons[program] = f"not available: {describe_error(error)}"
    return prepared, reasons


def _measure_floor(cell: Cell, meter: FloorMeter) -> StepFloor:
    data = TrainingData(take(cell.train, cell.config.batch_size), None, cell.num_classes, cell.device)
    operations = count_operations(cell.config, data)
    return measure_step_floor(cell.config, data.input_shape, cell.num_classes, meter, operations)


def _summarise(
    cell: Cell, program: str, prepared: Prepared, turns: Mapping[str, Sequence[Turn]], floor: StepFloor | None
) -> LoopRow:
    rates = [turn.rate for turn in turns[program]]
    median = statistics.median(rates)
    step_seconds = cell.config.batch_size / median
    ratios = [turn.rate / other.rate for turn, other in zip(turns[program], turns.get(TUTORIAL, ()), strict=False)]
    return build_row(
        cell,
        program,
        samples_per_second=median,
        samples_per_second_low=min(rates),
        samples_per_second_high=max(rates),
        turns=len(rates),
        turn_images=turns[program][0].images,
        ratio=statistics.median(ratios) if ratios else None,
        ratio_low=min(ratios, default=None),
        ratio_high=max(ratios, default=None),
        compile_seconds=prepared.compile_seconds,
        **({} if floor is None else _compare_with_floor(step_seconds, floor)),
    )


def _compare_with_floor(step_seconds: float, floor: StepFloor) -> dict[str, Any]:
    launches = floor.launch_seconds
    return {
        "floor_seconds": floor.seconds,
        "floor_share": floor.seconds / step_seconds,
        "operations": floor.operations,
        "launch_seconds": launches,
        "launch_ratio": None if launches is None else step_seconds / launches,
    }


# ---- the table ----


def render_loop(result: LoopResult) -> str:
    """Markdown: the rates, a table, and what its figures mean."""
    turns = max((row.turns for row in result.rows), default=0)
    parts = [
        f"{result.machine}. {_describe_data(result.about)}",
        f"Images a second in training, median of {turns} turns (slowest to fastest); against the tutorial's loop, "
        "paired by turn (smallest to largest); share of the floor: 100 % would be the larger of FLOPs over the best "
        "measured rate and bytes over the best measured bandwidth; launches: the step's time over that which starting "
        "its operations takes.",
        "\n".join(f"- {name}: {meaning}" for name, meaning in MEANINGS.items()),
        _render_rates(result.rates),
        _render_rows(result.rows),
    ]
    return "\n\n".join(parts) + "\n"


def _describe_data(about: Mapping[str, Any]) -> str:
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    return f"{about['dataset']}, {about['train_images']:,} images, {threads}."


def _render_rates(rates: Sequence[Rate]) -> str:
    best: dict[str, Rate] = {}
    for rate in rates:
        if rate.what not in best or rate.value > best[rate.what].value:
            best[rate.what] = rate
    cells = [f"{rate.what} {render_quantity(rate.value, rate.unit)} ({rate.size})" for rate in best.values()]
    return "Best rates: " + "; ".join(cells) + "."


def render_quantity(value: float, unit: str) -> str:
    """``1.45 TFLOP/s``, ``1.72 us``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1, ""), (1e-3, "m"), (1e-6, "u")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _render_rows(rows: Sequence[LoopRow]) -> str:
    titles = ("model", "precision", "batch", "program", "images/s", "/ tutorial", "of the floor", "launches", "compile")
    return render_table(titles, [_render_row(row) for row in rows])


def _render_row(row: LoopRow) -> tuple[str, ...]:
    head = (row.model, row.precision, str(row.batch_size), row.program)
    if row.samples_per_second is None:
        return (*head, row.reason, "", "", "", "")
    assert row.samples_per_second_low is not None
    assert row.samples_per_second_high is not None
    spread = f"({row.samples_per_second_low:,.0f} to {row.samples_per_second_high:,.0f})"
    return (
        *head,
        f"{row.samples_per_second:,.0f} {spread}",
        "" if row.ratio is None else f"{row.ratio:.1f} ({row.ratio_low:.1f} to {row.ratio_high:.1f})",
        row.reason if row.floor_share is None else f"{row.floor_share:.0%}",
        "" if row.launch_ratio is None else f"{row.launch_ratio:.1f} x {row.operations}",
        "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s",
    )


def write_loop(path: Path, result: LoopResult) -> None:
    """Write the rows, with what they rest on in the metadata."""
    write_rows(path, "loop", LoopRow, result.rows, result.about)
