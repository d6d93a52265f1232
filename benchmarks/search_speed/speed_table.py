"""What ``speed`` measured of each search: the row, the file, the comparison with the targets and the table."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]

from benchmarks.machine import render_versions
from benchmarks.markdown import judge, render_table
from benchmarks.rows import describe_measurement, write_rows
from benchmarks.spread import Spread, render_spread, summarise
from tune_amp.results.parquet import build_columns, read_file
from tune_amp.trial.config import described

OURS, OBVIOUS = "ours", "obvious"


PROGRAMS = (OURS, OBVIOUS)


TARGET_TRIALS = 64
"""The targets are for searches of so many trials."""


CPU_RATIOS = {"fp32": 10.0, "bf16": 15.0, "fp16": 3.0}


GPU_RATIO = 50.0


LEAST_EFFICIENCY = 0.8


MOST_STARTUP_SECONDS = 6.0


MOST_POINTS_APART = 1.0
"""Of best accuracy: they validate on different 5,000 images (two standard errors: 0.7), with different seeds."""

Setting = tuple[str, int, int, float, int]
"""Precision, trials, full budget, share of a GPU and slots."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One command."""

    program: str = described("ours or obvious")
    precision: str = described("of every trial")
    trials: int = described("trials of the search")
    repeat: int = described("number of the pair, from 0: the seed of our search")
    max_epochs: int = described("full budget of a trial", unit="epochs")
    gpus_per_trial: float = described("share of a GPU that a trial gets; 0: the CPU")
    slots: int = described("trials at a time")
    wall_seconds: float = described("from the command's start to its end", unit="s")
    startup_seconds: float = described("from the command's start to the first trial's first training step", unit="s")
    trial_epochs: int = described("epochs trained, of all trials", unit="epochs")
    train_seconds: float = described("time in training loops, of all trials", unit="s")
    peak_memory_bytes: int | None = described(
        "largest sum of the resident memory of the command's processes, what they share counted in each; null but on "
        "Linux",
        unit="B",
    )
    best_val_accuracy: float = described("best validation accuracy of any epoch")

    @property
    def epochs_per_second(self) -> float:
        """Trial-epochs a second of the whole command."""
        return self.trial_epochs / self.wall_seconds

    @property
    def efficiency(self) -> float:
        """Share of the slots' time that was spent in training loops."""
        return self.train_seconds / (self.slots * self.wall_seconds)

    @property
    def setting(self) -> Setting:
        """What all repeats have in common."""
        return self.precision, self.trials, self.max_epochs, self.gpus_per_trial, self.slots

    @property
    def pair(self) -> tuple[Setting, int]:
        """Setting and repeat, which two rows have in common."""
        return self.setting, self.repeat


SCHEMA = pa.schema(build_columns(SpeedRow))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """The result of the benchmark, or as much of it as there is."""

    rows: tuple[SpeedRow, ...]
    machine: Mapping[str, str]
    versions: Mapping[str, str]


def write_speed(path: Path, result: SpeedResult) -> None:
    """Write the rows."""
    write_rows(path, "speed", SpeedRow, result.rows, describe_measurement(result.machine, result.versions))


def load_speed(path: Path) -> SpeedResult:
    """Read what ``write_speed`` wrote.

    Raises:
        InputError: the file is missing, damaged, or not this benchmark's.
    """
    rows, origin, _ = read_file(path, "speed", SCHEMA)
    return SpeedResult(
        rows=tuple(SpeedRow(**row) for row in rows), machine=origin["machine"], versions=origin["versions"]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All repeats of a setting."""

    ours: tuple[SpeedRow, ...]
    obvious: tuple[SpeedRow, ...]
    """In the order of ``ours``: each with the same repeat."""

    @property
    def first(self) -> SpeedRow:
        """A row that tells the setting."""
        return self.ours[0]

    @property
    def ratios(self) -> list[float]:
        """Our trial-epochs a second over theirs, pair by pair."""
        return [a.epochs_per_second / b.epochs_per_second for a, b in self._pairs()]

    @property
    def ratio(self) -> Spread:
        """Of the pairs."""
        return summarise(self.ratios)

    @property
    def points_apart(self) -> float:
        """Our best accuracy minus theirs, in points: the median of the pairs."""
        return statistics.median(100 * (a.best_val_accuracy - b.best_val_accuracy) for a, b in self._pairs())

    def _pairs(self) -> Iterator[tuple[SpeedRow, SpeedRow]]:
        return zip(self.ours, self.obvious, strict=True)


def compare_rows(rows: Sequence[SpeedRow]) -> list[Comparison]:
    """A comparison for each setting; a row without its counterpart is left out."""
    by_program = {name: {row.pair: row for row in rows if row.program == name} for name in PROGRAMS}
    pairs = sorted(by_program[OURS].keys() & by_program[OBVIOUS].keys(), key=lambda pair: pair[1])
    comparisons = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [pair for pair in pairs if pair[0] == setting]
        if own:
            comparisons.append(
                Comparison(
                    ours=tuple(by_program[OURS][pair] for pair in own),
                    obvious=tuple(by_program[OBVIOUS][pair] for pair in own),
                )
            )
    return comparisons


TITLES = (
    "precision",
    "trials",
    "epochs at most",
    "GPU a trial",
    "slots",
    "n",
    "trial-epochs/s, ratio",
    "wall",
    "trial-epochs/s",
    "start-up",
    "efficiency",
    "memory",
    "best accuracy",
)


def render_speed(result: SpeedResult) -> str:
    """Markdown: a table by setting, and the targets with what became of them."""
    comparisons = compare_rows(result.rows)
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    lines = [
        "Ours / the obvious program, which trains the same configurations for as many epochs. Medians of n pairs, the "
        "smallest and largest in brackets; the ratio is taken pair by pair. Efficiency is the time in training loops "
        "over slots x wall time: the obvious program's loops read and convert images one by one, and that counts as "
        f"training there. {machine}; {render_versions(result.versions)}.",
        "",
        render_table(TITLES, map(_render_comparison, comparisons)),
        "",
        *(line for comparison in comparisons for line in judge_targets(comparison)),
    ]
    return "\n".join(lines) + "\n"


def judge_targets(comparison: Comparison) -> list[str]:
    """A line for each target, met or missed, and one where the programs did not learn alike."""
    first = comparison.first
    where = _describe_setting(first)
    lines = []
    if first.trials == TARGET_TRIALS:
        least = GPU_RATIO if first.gpus_per_trial else CPU_RATIOS[first.precision]
        ratio = comparison.ratio.median
        lines.append(f"- {where}: {ratio:.1f}x trial-epochs/s, target at least {least:g}x: {judge(ratio >= least)}")
        efficiency = statistics.median(row.efficiency for row in comparison.ours)
        text = f"efficiency {efficiency:.0%}, target at least {LEAST_EFFICIENCY:.0%}"
        lines.append(f"- {where}: {text}: {judge(efficiency >= LEAST_EFFICIENCY)}")
    startup = statistics.median(row.startup_seconds for row in comparison.ours)
    text = f"start-up {startup:.1f} s, target under {MOST_STARTUP_SECONDS:g} s"
    lines.append(f"- {where}: {text}: {judge(startup < MOST_STARTUP_SECONDS)}")
    if abs(comparison.points_apart) > MOST_POINTS_APART:
        text = f"best accuracies are {comparison.points_apart:+.2f} points apart, more than {MOST_POINTS_APART:g}"
        lines.append(f"- {where}: {text}: the programs do not train alike")
    return lines


def describe_row(row: SpeedRow) -> str:
    """One line, while the benchmark runs."""
    return (
        f"{_describe_setting(row)}, repeat {row.repeat}, {row.program}: {row.wall_seconds:.1f} s, "
        f"{row.trial_epochs} trial-epochs, start-up {row.startup_seconds:.1f} s, efficiency {row.efficiency:.0%}, "
        f"best accuracy {row.best_val_accuracy:.2%}"
    )


def _describe_setting(row: SpeedRow) -> str:
    share = f", {row.gpus_per_trial:g} GPU" if row.gpus_per_trial else ""
    return f"{row.precision}, {row.trials} trials of at most {row.max_epochs} epochs{share}"


def _render_comparison(comparison: Comparison) -> list[str]:
    def both(render: Callable[[Sequence[SpeedRow]], str]) -> str:
        return f"{render(comparison.ours)} / {render(comparison.obvious)}"

    return [
        comparison.first.precision,
        str(comparison.first.trials),
        str(comparison.first.max_epochs),
        f"{comparison.first.gpus_per_trial:g}",
        str(comparison.first.slots),
        str(comparison.ratio.count),
        render_spread(comparison.ratios, "{:.1f}x"),
        both(lambda rows: render_spread([row.wall_seconds for row in rows], "{:.0f} s")),
        both(lambda rows: f"{statistics.median(row.epochs_per_second for row in rows):.2f}"),
        both(lambda rows: f"{statistics.median(row.startup_seconds for row in rows):.1f} s"),
        both(lambda rows: f"{statistics.median(row.efficiency for row in rows):.0%}"),
        both(_render_memory),
        both(lambda rows: f"{statistics.median(row.best_val_accuracy for row in rows):.2%}"),
    ]


def _render_memory(rows: Sequence[SpeedRow]) -> str:
    known = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
    return f"{statistics.median(known) / 2**30:.1f} GiB" if known else "-"
