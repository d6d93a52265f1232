"""What the tutorial's extensions change: each on against off, trained on the same seeds and compared pair by pair.

Everything else is the tutorial's default configuration, but for a precision and a batch size that are quick on a CPU. A
null is a result: the table says where the interval of an effect holds 0.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, describe_versions, machine_line
from benchmarks.markdown import render_table
from benchmarks.rows import describe_measurement, write_rows
from tune_amp.results.statistics import CONFIDENCE, paired_interval
from tune_amp.training.data import Dataset, make_long_tail
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import EpochMetrics, TrialConfig, described
from tune_amp.trial.curricula import PACING, curriculum_fraction

SEEDS = 10
COMMON: Mapping[str, Any] = {"precision": "bf16", "batch_size": 256, "max_epochs": 4}
"""Of every run: with fewer than 4 epochs the three curricula would be one."""
LONG_TAIL = 100.0
NEVER = 1_000_000
"""Steps: a growth interval that no run here is long enough for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """An extension, on and off."""

    extension: str
    on: Mapping[str, Any]
    """Settings besides ``COMMON``; without them it is off."""
    both: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of either side, besides ``COMMON``."""


COMPARISONS = (
    Comparison(extension="input_scaling standard, not minmax", on={"input_scaling": "standard"}),
    Comparison(extension="curriculum linear", on={"curriculum": "linear"}),
    Comparison(extension="curriculum root", on={"curriculum": "root"}),
    Comparison(extension="curriculum step", on={"curriculum": "step"}),
    Comparison(extension="class_weighting balanced", on={"class_weighting": "balanced"}),
    Comparison(extension="class_weighting balanced", on={"class_weighting": "balanced"}, both={"imbalance": LONG_TAIL}),
    Comparison(
        extension="static loss scale 128, not from 65,536",
        on={"init_scale": 128.0, "growth_interval": NEVER},
        both={"precision": "fp16"},
    ),
)

METRICS: Mapping[str, Callable[[EpochMetrics], float]] = {
    "val_accuracy": lambda metrics: metrics.val_accuracy or 0.0,
    "mean_recall": lambda metrics: statistics.fmean(metrics.val_recalls),
    "worst_recall": lambda metrics: min(metrics.val_recalls),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionRow:
    """The effect of one extension on one metric."""

    extension: str = described("what is on, or off")
    imbalance: float = described("of the training split: most frequent class to rarest")
    precision: str = described("fp32 (strict), tf32, bf16 or fp16 autocast")
    metric: str = described(
        "after the last epoch, on validation: val_accuracy; mean_recall: mean over the classes; worst_recall: of the "
        "class with the lowest"
    )
    on: tuple[float, ...] = described("the metric where it is on, by seed from 0")
    off: tuple[float, ...] = described("the metric where it is off, by seed from 0")
    effect: float = described("mean of on minus off, seed by seed")
    low: float = described("lower end of its 95 % interval (Student's t)")
    high: float = described("upper end of its 95 % interval")

    @property
    def is_null(self) -> bool:
        """Whether the effect cannot be told from none."""
        return self.low <= 0 <= self.high


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionResult:
    """The result of the benchmark."""

    rows: tuple[ExtensionRow, ...]
    """For each comparison one of each metric."""
    machine: str
    about: Mapping[str, Any]


def measure_extensions(
    dataset: Dataset,
    *,
    seeds: int = SEEDS,
    comparisons: Sequence[Comparison] = COMPARISONS,
    common: Mapping[str, Any] = COMMON,
    announce: Callable[[str], None] = lambda _: None,
) -> ExtensionResult:
    """Train both sides of each comparison on ``seeds`` seeds; on the CPU in one thread, as trials train.

    Args:
        dataset: its test split is not read.
        seeds: 0, 1, ...; at least two.
        comparisons: what is compared.
        common: settings of every run.
        announce: is told the effects of an extension as they come.
    """
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @functools.cache
    def place(imbalance: float) -> TrainingData:
        return TrainingData(make_long_tail(dataset, imbalance).train, dataset.validation, dataset.num_classes, device)

    @functools.cache  # what is off is the same run for many an extension
    def train(config: TrialConfig) -> EpochMetrics:
        *_, last = TrainingRun(config, place(config.imbalance)).epochs()
        assert last.epoch == config.max_epochs  # nothing here diverges
        return last

    rows: list[ExtensionRow] = []
    for comparison in comparisons:
        off = TrialConfig(**{**common, "dataset": dataset.name, **comparison.both})
        sides = [
            [train(dataclasses.replace(config, seed=seed)) for seed in range(seeds)]
            for config in (dataclasses.replace(off, **comparison.on), off)
        ]
        found = [compare(comparison.extension, off, metric, *sides) for metric in METRICS]
        announce(f"{comparison.extension}: " + ", ".join(f"{row.metric} {render_effect(row)}" for row in found))
        rows += found
    about = {"dataset": dataset.name, "data_hash": dataset.content_hash, "common": dict(common), "seeds": seeds}
    about = describe_measurement(describe_machine(device), describe_versions(), **about)
    return ExtensionResult(rows=tuple(rows), machine=machine_line(device), about=about)


def compare(
    extension: str, off: TrialConfig, metric: str, on_runs: Sequence[EpochMetrics], off_runs: Sequence[EpochMetrics]
) -> ExtensionRow:
    """The effect on ``metric``, of runs that are in the order of their seeds."""
    on_values, off_values = (tuple(map(METRICS[metric], runs)) for runs in (on_runs, off_runs))
    interval = paired_interval(on_values, off_values)
    return ExtensionRow(
        extension=extension,
        imbalance=off.imbalance,
        precision=off.precision,
        metric=metric,
        on=on_values,
        off=off_values,
        effect=interval.mean,
        low=interval.low,
        high=interval.high,
    )


def render_extensions(result: ExtensionResult) -> str:
    """Markdown: a table and what its figures mean."""
    titles = ("extension", "classes", "val_accuracy off", "effect", "mean recall: effect", "worst recall off", "effect")
    common = ", ".join(f"{name} {value}" for name, value in result.about["common"].items())
    confidence = f"{CONFIDENCE:.0%}".replace("%", " %")
    nulls = sum(row.is_null for row in result.rows)
    groups = [result.rows[start : start + len(METRICS)] for start in range(0, len(result.rows), len(METRICS))]
    lines = [
        f"{result.machine}. {result.about['dataset']}.",
        f"Validation after the last epoch, each extension on against off; besides that the default configuration with "
        f"{common} (fp16 for the loss scale). Effects are in percentage points: the mean over n = "
        f"{result.about['seeds']} seeds of on minus off, pair by pair, and its {confidence} interval. null: the "
        f"interval holds 0, and these runs show no effect ({nulls} of {len(result.rows)}). Where there is none, one "
        f"interval in {round(1 / (1 - CONFIDENCE))} leaves 0 out by chance.",
        "A curriculum takes fewer steps, as its first epochs have fewer images, and that is part of its effect: "
        f"{_describe_savings(result.about['common']['max_epochs'])}.",
        render_table(titles, [_render_group(*group) for group in groups]),
    ]
    return "\n\n".join(lines) + "\n"


def _describe_savings(max_epochs: int) -> str:
    """How many steps each curriculum leaves out."""
    shares = {
        name: statistics.fmean(curriculum_fraction(name, epoch, max_epochs) for epoch in range(max_epochs))
        for name in PACING
    }
    return ", ".join(f"{name} {1 - share:.0%} fewer".replace("%", " %") for name, share in shares.items())


def _render_group(accuracy: ExtensionRow, mean: ExtensionRow, worst: ExtensionRow) -> tuple[str, ...]:
    return (
        accuracy.extension,
        "as given" if accuracy.imbalance == 1 else f"long tail {accuracy.imbalance:g}:1",
        f"{statistics.fmean(accuracy.off):.2%}",
        render_effect(accuracy),
        render_effect(mean),
        f"{statistics.fmean(worst.off):.2%}",
        render_effect(worst),
    )


def render_effect(row: ExtensionRow) -> str:
    """In percentage points: ``+0.31 (+0.10 to +0.52)``; a null says so."""
    effect, low, high = (100 * value for value in (row.effect, row.low, row.high))
    return f"{effect:+.2f} ({low:+.2f} to {high:+.2f}){', null' if row.is_null else ''}"


def write_extensions(path: Path, result: ExtensionResult) -> None:
    """Write the rows, every run's metrics among them, with what they rest on in the metadata."""
    write_rows(path, "extensions", ExtensionRow, result.rows, result.about)
