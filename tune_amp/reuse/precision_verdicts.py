"""The rows of a comparison of precisions, and the statistics and verdicts computed from them.

Imports nothing heavy: the columns of ``compare.parquet`` and ``compare_map.parquet`` can be read without torch.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from tune_amp.results.statistics import (
    EQUIVALENCE_CONFIDENCE,
    Equivalence,
    MeanInterval,
    judge_equivalence,
    mean_interval,
    paired_interval,
)
from tune_amp.trial.config import TrialStatus, described

BASELINE = "fp32"
"""Precision that the others are compared with: strict fp32, not PyTorch's mixture of TF32 and fp32."""
CLAIMED = ("bf16", "fp16")
"""Precisions that the tutorial's claims are about."""
LEAST_SEEDS, CPU_SEEDS, CUDA_SEEDS = 2, 3, 5
"""Fewest seeds, and those of a comparison on a CPU and on a GPU."""

MARGIN_POINTS = 0.2
"""Percentage points of accuracy within which two precisions are the same: the effect of one seed on MNIST."""
CLAIMED_SPEED = 1.5
"""Lower end of "1.5 to 3 times"."""
CLAIMED_MEMORY = 0.55
"""Largest memory ratio that counts as half: a half, and a tenth of it for what autocast keeps in fp32."""
CLAIMED_LOSS_POINTS = 1.0

SPEED_CLAIM, MEMORY_CLAIM, ACCURACY_CLAIM = "1.5 to 3 times faster", "half the memory", "under 1 % accuracy lost"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """The chosen configuration in one precision on one seed: one row of ``compare.parquet``."""

    precision: str = described("fp32 (strict), tf32, bf16 or fp16 autocast")
    seed: int = described("of weights and data order; the same seeds for every precision")
    place: int = described("place in the order in which the runs were made, from 1; shuffled within each seed")
    status: TrialStatus = described("how the run ended: completed, diverged, out_of_memory or failed")  # noqa: RUF009 (a field)
    error: str | None = described("one line: why it did not complete", default=None)
    epochs: int = described("epochs trained", unit="epochs", default=0)
    val_accuracy: float | None = described(
        "share of validation images classified correctly after the last epoch, in fp32", default=None
    )
    val_loss: float | None = described("mean validation loss after the last epoch, in fp32", unit="nats", default=None)
    epoch_seconds: float | None = described(
        "training time of an epoch, the median of those after the first; null where there is none",
        unit="s",
        default=None,
    )
    samples_per_second: float | None = described(
        "training images a second, the median of the epochs after the first; null where there is none",
        unit="1/s",
        default=None,
    )
    epoch_rates: tuple[float, ...] = described("training images a second of each epoch", unit="1/s", default=())
    peak_memory_bytes: int | None = described(
        "peak CUDA memory of training, the resident data set left out; null without CUDA", unit="B", default=None
    )
    steps: int = described("training steps taken, skipped ones included", unit="steps", default=0)
    skipped_steps: int = described("steps skipped because a gradient overflowed", unit="steps", default=0)
    loss_scale: float | None = described("loss scale after the last step; null unless fp16", default=None)
    loop: str = described("how steps were taken: graph (replays of a CUDA graph), or eager: and why", default="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapCell:
    """A model at a batch size in one precision, timed briefly: one row of ``compare_map.parquet``."""

    model: str = described("built-in model, or module:function")
    batch_size: int = described("images a training step", unit="images")
    precision: str = described("fp32 (strict), tf32, bf16 or fp16 autocast")
    reason: str = described("why there is no figure", default="")
    turn_rates: tuple[float, ...] = described(
        "training images a second of each turn; the precisions of a cell take turns", unit="1/s", default=()
    )
    peak_memory_bytes: int | None = described(
        "peak CUDA memory of training, the resident data set left out; null without CUDA", unit="B", default=None
    )
    loop: str = described("how steps were taken: graph (replays of a CUDA graph), or eager: and why", default="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonOrigin:
    """The origin of a comparison, stored as JSON in its files' metadata. It holds no host or user names."""

    run: str
    """Name of the search's run."""
    rank: int
    trial_id: str
    command: tuple[str, ...]
    created: str
    """Date and time, ISO 8601, UTC."""
    config: Mapping[str, Any]
    """The chosen configuration, as in the search."""
    scaler: Mapping[str, float | int]
    """Settings of GradScaler in fp16; empty if fp16 is not measured."""
    precisions: tuple[str, ...]
    left_out: Mapping[str, str]
    """Precisions that were requested but not measured, each with its reason."""
    seeds: tuple[int, ...]
    epochs: int
    dataset: str
    data_hash: str
    train_images: int
    validation_images: int
    data_bytes: int
    """Bytes of both splits, as they stay on the device; 0 for data sets of torch, which are streamed."""
    device: str
    """cpu, or the GPU's name."""
    num_threads: int
    notices: tuple[str, ...]
    """Notices for the reader, such as what the device lacks."""
    versions: Mapping[str, str]

    @property
    def place(self) -> str:
        """The device, in the words with which a figure is quoted."""
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        return f"cpu, {threads}" if self.device == "cpu" else self.device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two quantities, measured in pairs."""

    ratio: float
    """Geometric mean of the ratios over seeds, or their median over turns."""
    low: float
    """Lower end of the interval in which it is expected over further seeds, or the smallest of the turns."""
    high: float
    n: int
    """Number of pairs."""

    @property
    def word(self) -> str:
        """What all of the interval, or all turns, agree on about a speed."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "undecided"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """A precision over its seeds, and against fp32 on the seeds on which both completed.

    Ratios and differences are None for fp32 itself, and if fewer than two seeds can be paired.
    """

    precision: str
    runs: int
    completed: int
    diverged_alone: int
    """Number of runs that diverged while fp32 completed on the same seed."""
    epoch_seconds: float | None
    """Seconds of an epoch, median over the seeds."""
    samples_per_second: float | None
    peak_memory_bytes: float | None
    accuracy: MeanInterval | None
    """Accuracy in per cent."""
    speed: Ratio | None
    """Images a second divided by those of fp32."""
    memory: Ratio | None
    """Peak memory divided by that of fp32."""
    difference: Equivalence | None
    """Accuracy minus that of fp32, in points."""
    loss: MeanInterval | None
    """Points of accuracy lost to fp32, with a 90 % interval: each end is a one-sided bound of 95 %."""


class Answer(StrEnum):
    """The answer of the numbers to a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNKNOWN = "undecided"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClaimVerdict:
    """A claim of the tutorial, judged for one precision."""

    claim: str
    precision: str
    answer: Answer
    evidence: str
    """The numbers that the answer follows from."""


# ---- statistics ----


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> Ratio:
    """Return the geometric mean of the paired ``values / others``, with Student's 95 % interval of the mean log ratio.

    It is the mean for ratios (Fleming & Wallace 1986, "How not to lie with statistics", doi:10.1145/5666.5673): for the
    inverted ratio, mean and interval are the reciprocals.
    """
    logs = mean_interval([math.log(value / other) for value, other in zip(values, others, strict=True)])
    return Ratio(ratio=math.exp(logs.mean), low=math.exp(logs.low), high=math.exp(logs.high), n=logs.n)


def summarise_arm(runs: Sequence[ComparedRun], precision: str) -> ArmSummary:
    """Summarise ``precision`` over ``runs``, which include those of fp32."""
    own = [run for run in runs if run.precision == precision]
    completed = [run for run in own if run.status is TrialStatus.COMPLETED]
    baseline = {run.seed: run for run in runs if run.precision == BASELINE and run.status is TrialStatus.COMPLETED}

    def median(name: str) -> float | None:
        values = [value for run in completed if (value := getattr(run, name)) is not None]
        return statistics.median(values) if values else None

    def pair(name: str) -> tuple[list[float], list[float]]:
        """Return the known values of ``name`` and those of fp32; empty if there are too few, or for fp32 itself."""
        both = [(run, baseline[run.seed]) for run in completed if run.seed in baseline and precision != BASELINE]
        pairs = [(getattr(run, name), getattr(other, name)) for run, other in both]
        known = [values for values in pairs if None not in values]
        return ([a for a, _ in known], [b for _, b in known]) if len(known) >= LEAST_SEEDS else ([], [])

    rates, memory = pair("samples_per_second"), pair("peak_memory_bytes")
    ours, theirs = ([100 * value for value in values] for values in pair("val_accuracy"))
    accuracies = [100 * run.val_accuracy for run in completed if run.val_accuracy is not None]
    return ArmSummary(
        precision=precision,
        runs=len(own),
        completed=len(completed),
        diverged_alone=sum(run.status is TrialStatus.DIVERGED and run.seed in baseline for run in own),
        epoch_seconds=median("epoch_seconds"),
        samples_per_second=median("samples_per_second"),
        peak_memory_bytes=median("peak_memory_bytes"),
        accuracy=mean_interval(accuracies) if len(accuracies) >= LEAST_SEEDS else None,
        speed=ratio_interval(*rates) if rates[0] else None,
        memory=ratio_interval(*memory) if memory[0] else None,
        difference=judge_equivalence(ours, theirs, MARGIN_POINTS) if ours else None,
        loss=paired_interval(theirs, ours, EQUIVALENCE_CONFIDENCE) if ours else None,
    )


def map_ratio(cell: MapCell, baseline: MapCell) -> Ratio | None:
    """Return how much faster ``cell`` trains than ``baseline``, turn by turn; None if one of them has no figure."""
    if not cell.turn_rates or not baseline.turn_rates:
        return None
    ratios = [rate / other for rate, other in zip(cell.turn_rates, baseline.turn_rates, strict=True)]
    return Ratio(ratio=statistics.median(ratios), low=min(ratios), high=max(ratios), n=len(ratios))


def memory_ratio(cell: MapCell, baseline: MapCell) -> float | None:
    """Return the peak memory of ``cell`` divided by that of ``baseline``; None if one of them is not known."""
    if not cell.peak_memory_bytes or not baseline.peak_memory_bytes:
        return None
    return cell.peak_memory_bytes / baseline.peak_memory_bytes


# ---- verdicts ----


def judge_speed(ratio: Ratio | None) -> Answer:
    """Judge the claim on speed: it holds if the whole interval is at 1.5 or above, and fails if all of it is below.

    Above 3 it holds too, since the promise is exceeded.
    """
    if ratio is None or ratio.low < CLAIMED_SPEED <= ratio.high:
        return Answer.UNKNOWN
    return Answer.HOLDS if ratio.low >= CLAIMED_SPEED else Answer.FAILS


def judge_memory(ratio: Ratio | None) -> Answer:
    """Judge the claim on memory: it holds if all of the interval is at most ``CLAIMED_MEMORY``, fails if none is."""
    if ratio is None or ratio.low <= CLAIMED_MEMORY < ratio.high:
        return Answer.UNKNOWN
    return Answer.HOLDS if ratio.high <= CLAIMED_MEMORY else Answer.FAILS


def judge_accuracy(loss: MeanInterval | None, diverged_alone: int = 0) -> Answer:
    """Judge the claim on accuracy: it holds if the loss is shown to be under 1 point, and fails if shown to be over.

    Each is a one-sided test at 5 %, of non-inferiority and its counterpart: see ``statistics.judge_equivalence``. A run
    that diverged while fp32 completed on the same seed fails the claim: it lost all accuracy, and the mean over the
    other runs does not make up for that.

    Args:
        loss: points of accuracy lost, with its 90 % interval.
        diverged_alone: number of runs that diverged while fp32 completed.
    """
    if diverged_alone:
        return Answer.FAILS
    if loss is None or loss.low <= CLAIMED_LOSS_POINTS <= loss.high:
        return Answer.UNKNOWN
    return Answer.HOLDS if loss.high < CLAIMED_LOSS_POINTS else Answer.FAILS


def judge_claims(runs: Sequence[ComparedRun], device: str) -> list[ClaimVerdict]:
    """Judge the tutorial's three claims for bf16 and fp16 by ``runs`` on ``device``."""
    return [verdict for precision in CLAIMED for verdict in _judge_arm(summarise_arm(runs, precision), device)]


def _judge_arm(arm: ArmSummary, device: str) -> list[ClaimVerdict]:
    missing = f"on fewer than {LEAST_SEEDS} seeds did both {arm.precision} and fp32 complete ({device})"
    if not arm.runs:
        missing = f"{arm.precision} was not measured ({device})"
    speed = memory = loss = missing
    if arm.speed is not None:
        speed = f"{arm.speed.ratio:.2f} times the images a second of fp32 ({_quote(arm.speed, device)})"
        memory = f"memory is measured with CUDA only (n = {arm.speed.n} seeds, {device})"
    if arm.memory is not None:
        memory = f"{arm.memory.ratio:.2f} times the peak memory of fp32 ({_quote(arm.memory, device)})"
    if arm.diverged_alone:
        loss = f"{arm.diverged_alone} of {arm.runs} runs diverged where fp32 completed ({device})"
    elif arm.loss is not None:
        bounds = f"one-sided 95 % bounds {arm.loss.low:+.2f} and {arm.loss.high:+.2f}, n = {arm.loss.n} seeds"
        loss = f"{arm.loss.mean:+.2f} points lost to fp32 ({bounds}, {device})"
    verdicts = (
        (SPEED_CLAIM, judge_speed(arm.speed), speed),
        (MEMORY_CLAIM, judge_memory(arm.memory), memory),
        (ACCURACY_CLAIM, judge_accuracy(arm.loss, arm.diverged_alone), loss),
    )
    return [
        ClaimVerdict(claim=claim, precision=arm.precision, answer=answer, evidence=evidence)
        for claim, answer, evidence in verdicts
    ]


def _quote(ratio: Ratio, device: str) -> str:
    return f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}, n = {ratio.n} seeds, {device}"
