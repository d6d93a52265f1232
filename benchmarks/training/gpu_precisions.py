"""What mixed precision gains: speed, memory and accuracy beside fp32, paired over seeds."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence

from benchmarks.markdown import judge
from benchmarks.training.gpu_rows import GpuRow, summarise_row
from tune_amp.reuse.precision_verdicts import CLAIMED, CLAIMED_LOSS_POINTS, CLAIMED_MEMORY, CLAIMED_SPEED
from tune_amp.training.cuda_graph import LEAST_STEPS, Capture
from tune_amp.training.memory import release_memory
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig
from tune_amp.trial.text import describe_error

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SEEDS = 3
LEAST_EPOCHS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A configuration trained in one precision on one seed."""

    epoch_seconds: float
    """Training time of an epoch, without the first, which captures the graph."""
    peak_bytes: int | None
    accuracy: float


def compare_precisions(
    data: TrainingData,
    cells: Sequence[tuple[str, int]],
    capture: Capture,
    deadline: float,
    *,
    seeds: int = SEEDS,
    precisions: Sequence[str] = PRECISIONS,
) -> list[GpuRow]:
    """Train each cell in every precision on the same seeds, and return the ratios over fp32.

    Args:
        data: training and validation images.
        cells: model and batch size of each.
        capture: function that captures a step.
        deadline: a cell that lacks runs at this moment of ``time.monotonic`` is left out.
        seeds: seeds of each precision.
        precisions: fp32, and those compared with it.
    """
    rows = []
    for model, batch_size in cells:
        config = TrialConfig(model=model, precision="fp32", batch_size=batch_size)
        subject = f"{model}, batch {batch_size}"
        try:
            outcomes = _train_cell(config, data, capture, deadline, seeds=seeds, precisions=precisions)
        except Exception as error:  # out of memory, or a kernel that fails: the other cells have something to tell
            note = describe_error(error)
            rows.append(GpuRow(part="precisions", subject=subject, quantity="", verdict="failed", note=note))
            continue
        if outcomes is None:
            rows.append(GpuRow(part="precisions", subject=subject, quantity="", note="skipped: no time is left"))
        else:
            rows += build_rows(subject, outcomes)
    return rows


def _train_cell(
    config: TrialConfig,
    data: TrainingData,
    capture: Capture,
    deadline: float,
    *,
    seeds: int,
    precisions: Sequence[str],
) -> dict[str, list[Outcome]] | None:
    """Return the outcomes of each precision by seed; None if time is up before the last of them."""
    outcomes: dict[str, list[Outcome]] = {precision: [] for precision in precisions}
    for seed, precision in itertools.product(range(seeds), precisions):
        if time.monotonic() > deadline:
            return None
        chosen = dataclasses.replace(config, precision=precision, seed=seed)
        outcomes[precision].append(train_to_end(chosen, data, capture))
        release_memory(data.device)
    return outcomes


def train_to_end(config: TrialConfig, data: TrainingData, capture: Capture) -> Outcome:
    """Train as many epochs as a capture needs in order to pay, three at least."""
    steps = len(data.train) // config.batch_size
    epochs = max(LEAST_EPOCHS, 1 + LEAST_STEPS // steps)
    run = TrainingRun(dataclasses.replace(config, max_epochs=epochs), data, capture=capture)
    told = [run.train_epoch() for _ in range(epochs)]
    last = told[-1]
    assert last.val_accuracy is not None
    return Outcome(
        epoch_seconds=(last.train_seconds - told[0].train_seconds) / (epochs - 1),
        peak_bytes=last.peak_memory_bytes,
        accuracy=last.val_accuracy,
    )


def build_rows(subject: str, outcomes: Mapping[str, Sequence[Outcome]]) -> list[GpuRow]:
    """Return speed, memory and accuracy of each precision beside fp32: medians of the pairs, and their ranges.

    Args:
        subject: model and batch size.
        outcomes: of each precision, fp32 among them, in the order of the seeds.
    """
    rows = []
    for precision, found in outcomes.items():
        if precision == "fp32":
            continue
        pairs = list(zip(found, outcomes["fp32"], strict=True))
        speeds = [base.epoch_seconds / own.epoch_seconds for own, base in pairs]
        points = [100 * (own.accuracy - base.accuracy) for own, base in pairs]
        memory = [own.peak_bytes / base.peak_bytes for own, base in pairs if own.peak_bytes and base.peak_bytes]
        for quantity, values, target, sign in (
            ("speed over fp32", speeds, CLAIMED_SPEED, 1),
            ("peak memory over fp32, workspaces included", memory, CLAIMED_MEMORY, -1),
            ("accuracy minus fp32, points", points, -CLAIMED_LOSS_POINTS, 1),
        ):
            if not values:
                continue
            median, is_judged = statistics.median(values), precision in CLAIMED
            rows.append(
                summarise_row(
                    values,
                    part="precisions",
                    subject=f"{subject}, {precision}",
                    quantity=quantity,
                    verdict=judge(sign * median >= sign * target) if is_judged else "",
                    note=f"claim: {'at least' if sign == 1 else 'at most'} {target:g}" if is_judged else "",
                )
            )
    return rows
