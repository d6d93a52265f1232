"""How much of a device a trial should get: what 1, 2, 4, ... trials side by side achieve, and where the knee is.

On the CPU each trial has one thread, so that the table tells how trials share the cores.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.machine import machine_line
from benchmarks.markdown import render_table
from benchmarks.spread import render_spread
from tune_amp.training.data import Dataset
from tune_amp.trial.config import TrialConfig

if TYPE_CHECKING:
    from tune_amp.cluster.gpu_sharing import ShareMeasurement

COUNTS = (1, 2, 4, 8, 16)
SECONDS = 3.0
REPEATS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareRow:
    """So many trials side by side, once."""

    model: str
    precision: str
    batch_size: int
    trials: int
    repeat: int
    """Number of the measurement, from 0."""
    samples_per_second: float
    """Images of all trials together."""
    relative: float
    """``samples_per_second`` over that of the fewest trials in the same repeat."""
    efficiency: float
    """``relative`` over the number of trials: 1 where no trial slows another."""
    trial_memory_bytes: int | None
    """Device memory of the largest process, its context included; None on the CPU."""
    is_knee: bool
    """Whether more trials at a time gain little, by the medians."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareResult:
    """The result of the benchmark."""

    rows: tuple[ShareRow, ...]
    seconds: float
    """Of a measurement."""
    machine: str
    dataset: str


def measure_share_table(
    dataset: Dataset,
    *,
    device_type: str,
    configs: Sequence[TrialConfig] = (),
    counts: Sequence[int] = COUNTS,
    seconds: float = SECONDS,
    repeats: int = REPEATS,
) -> ShareResult:
    """Measure each of ``configs`` with 1, 2, 4, ... trials side by side.

    Args:
        dataset: its training split is trained on.
        device_type: ``cuda`` or ``cpu``.
        configs: ``simple_net`` at batch 64 and 1,024 where none is given; fp16 on CUDA, bf16 on the CPU.
        counts: trials at a time.
        seconds: of a measurement.
        repeats: measurements of each number, in turn, by the same processes.
    """
    from tune_amp.cluster.gpu_sharing import measure_shares

    device = torch.device(device_type)
    rows: list[ShareRow] = []
    for config in configs or list_configs(device_type):
        measured = measure_shares(
            config, dataset.train, dataset.num_classes, device_type, counts=counts, seconds=seconds, repeats=repeats
        )
        rows += build_rows(config, measured)
    return ShareResult(rows=tuple(rows), seconds=seconds, machine=machine_line(device), dataset=dataset.name)


def list_configs(device_type: str) -> tuple[TrialConfig, ...]:
    """What is measured where nothing else is asked for."""
    precision = "fp16" if device_type == "cuda" else "bf16"
    return tuple(TrialConfig(precision=precision, batch_size=size, max_epochs=1_000) for size in (64, 1024))


def build_rows(config: TrialConfig, measured: "Sequence[ShareMeasurement]") -> list[ShareRow]:
    """A row for each measurement, the fewest trials first.

    Args:
        config: what was trained.
        measured: of each number of trials as many as it was repeated, in the order of the repeats.
    """
    by_trials: dict[int, list[ShareMeasurement]] = {}
    for measurement in sorted(measured, key=lambda measurement: measurement.trials):
        by_trials.setdefault(measurement.trials, []).append(measurement)
    fewest, knee = min(by_trials), _find_median_knee(by_trials)
    rows = []
    for trials, repeats in by_trials.items():
        for repeat, (measurement, first) in enumerate(zip(repeats, by_trials[fewest], strict=False)):
            relative = measurement.samples_per_second / first.samples_per_second
            rows.append(
                ShareRow(
                    model=config.model,
                    precision=config.precision,
                    batch_size=config.batch_size,
                    trials=trials,
                    repeat=repeat,
                    samples_per_second=measurement.samples_per_second,
                    relative=relative,
                    efficiency=relative * fewest / trials,
                    trial_memory_bytes=measurement.trial_memory_bytes,
                    is_knee=trials == knee,
                )
            )
    return rows


def _find_median_knee(by_trials: "Mapping[int, Sequence[ShareMeasurement]]") -> int:
    from tune_amp.cluster.gpu_sharing import find_knee

    medians = [
        dataclasses.replace(
            repeats[0], samples_per_second=statistics.median(repeat.samples_per_second for repeat in repeats)
        )
        for repeats in by_trials.values()
    ]
    return find_knee(medians)


def group_repeats(rows: Sequence[ShareRow]) -> list[list[ShareRow]]:
    """The repeats of each configuration and number of trials."""
    groups: dict[tuple[Any, ...], list[ShareRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.precision, row.batch_size, row.trials), []).append(row)
    return list(groups.values())


def render_shares(result: ShareResult) -> str:
    """Markdown: a table and what its figures mean."""
    titles = ("model", "precision", "batch", "trials", "n", "images/s", "times one", "a trial", "memory of a trial", "")
    lines = [
        f"{result.machine}. {result.dataset}.",
        f"Trials that train the same configuration at the same moment, each in a process of its own with one CPU "
        f"thread: images a second of all together, relative to the fewest, and what is left of a trial's own speed. "
        f"Medians of n measurements of {result.seconds:g} s, in turn, by the same processes; the smallest and largest "
        "in brackets.",
        render_table(titles, [_render_repeats(rows) for rows in group_repeats(result.rows)]),
    ]
    return "\n\n".join(lines) + "\n"


def _render_repeats(rows: Sequence[ShareRow]) -> tuple[str, ...]:
    first = rows[0]
    memory = "" if first.trial_memory_bytes is None else f"{first.trial_memory_bytes / 2**20:,.0f} MiB"
    return (
        first.model,
        first.precision,
        str(first.batch_size),
        str(first.trials),
        str(len(rows)),
        render_spread([row.samples_per_second for row in rows], "{:,.0f}"),
        render_spread([row.relative for row in rows], "{:.2f}"),
        f"{statistics.median(row.efficiency for row in rows):.0%}",
        memory,
        "knee" if first.is_knee else "",
    )
