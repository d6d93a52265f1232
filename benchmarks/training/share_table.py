"""How much of a device a trial should get: what 1, 2, 4, ... trials side by side achieve, and where the knee is.

On the CPU each trial has one thread, so that the table tells how trials share the cores.
"""

import dataclasses
import datetime
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch

from benchmarks.machine import describe_machine, describe_versions, machine_line
from benchmarks.markdown import render_table
from benchmarks.spread import render_spread
from tune_amp.config import TrialConfig, described
from tune_amp.data import Dataset
from tune_amp.parquet import build_columns, build_table, write_parquet

if TYPE_CHECKING:
    from tune_amp.shares import ShareMeasurement

COUNTS = (1, 2, 4, 8, 16)
SECONDS = 3.0
REPEATS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareRow:
    """So many trials side by side, once."""

    model: str = described("built-in model")
    precision: str = described("fp32 (strict), tf32, bf16 or fp16 autocast")
    batch_size: int = described("images a training step", unit="images")
    trials: int = described("training at the same moment")
    repeat: int = described("number of the measurement, from 0")
    samples_per_second: float = described("of all trials together", unit="1/s")
    relative: float = described("samples a second over those of the fewest trials in the same repeat")
    efficiency: float = described("relative over the number of trials; 1: nobody is in anybody's way")
    trial_memory_bytes: int | None = described(
        "device memory of the hungriest process, its context included; null on the CPU", unit="B"
    )
    is_knee: bool = described("whether more trials at a time gain little, by the medians")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareResult:
    """The result of the benchmark."""

    rows: tuple[ShareRow, ...]
    seconds: float
    """Of a measurement."""
    machine: str
    about: Mapping[str, Any]


def measure_share_table(
    dataset: Dataset,
    *,
    device_type: str | None = None,
    configs: Sequence[TrialConfig] = (),
    counts: Sequence[int] = COUNTS,
    seconds: float = SECONDS,
    repeats: int = REPEATS,
) -> ShareResult:
    """Measure each of ``configs`` with 1, 2, 4, ... trials side by side.

    Args:
        dataset: its training split is trained on.
        device_type: ``cuda`` where there is one, else ``cpu``.
        configs: ``simple_net`` at batch 64 and 1,024 where none is given; fp16 on CUDA, bf16 on the CPU.
        counts: trials at a time.
        seconds: of a measurement.
        repeats: measurements of each number, in turn, by the same processes.
    """
    from tune_amp.shares import measure_shares

    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device_type)
    rows: list[ShareRow] = []
    for config in configs or list_configs(device_type):
        measured = measure_shares(
            config, dataset.train, dataset.num_classes, device_type, counts=counts, seconds=seconds, repeats=repeats
        )
        rows += build_rows(config, measured)
    return ShareResult(
        rows=tuple(rows),
        seconds=seconds,
        machine=machine_line(device),
        about={
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(device),
            "versions": describe_versions(),
            "dataset": dataset.name,
            "seconds": seconds,
        },
    )


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
    from tune_amp.shares import find_knee

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
        f"{result.machine}. {result.about['dataset']}.",
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


def write_shares(path: Path, result: ShareResult) -> None:
    """Write the rows, with what they rest on in the metadata."""
    schema = pa.schema(build_columns(ShareRow))
    write_parquet(build_table("shares", schema, [vars(row) for row in result.rows], result.about), path)
