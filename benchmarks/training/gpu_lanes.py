"""Trials that share a GPU within one process: each replays its own graph on a stream of its own."""

import contextlib
import time
from collections.abc import Sequence

import torch

from benchmarks.training.gpu_checks import MOST_LOSS_DIFFERENCE
from benchmarks.training.gpu_rows import GpuRow, summarise_row
from benchmarks.training.loop_programs import LONG, train_until_captured, wait_for
from tune_amp.training.cuda_graph import Capture
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig

BATCH_SIZES = (64, 1024)
COUNTS = (8, 4, 2, 1)
"""Numbers of lanes. The largest is first, while all lanes have trained the same epochs and must agree."""
REPEATS = 3


class Lane:
    """A trial whose steps are captured.

    Args:
        config: configuration of the trial.
        data: training images.
        capture: function that captures a step.
    """

    def __init__(self, config: TrialConfig, data: TrainingData, capture: Capture) -> None:
        self._run = TrainingRun(config, data, capture=capture)
        train_until_captured(self._run)
        loop = self._run._loop  # noqa: SLF001 - a run itself replays on one stream only
        assert loop is not None
        assert loop._replay is not None  # noqa: SLF001
        self._batches, self._replay = loop._batches, loop._replay  # noqa: SLF001
        self._stream = torch.cuda.Stream(data.device) if data.device.type == "cuda" else None

    def begin_epoch(self) -> int:
        """Draw the batches of an epoch, and return their number."""
        batches = self._run._draw_batches()  # noqa: SLF001
        self._batches[: len(batches)].copy_(batches)
        return len(batches)

    def take_step(self) -> None:
        """Start the next step."""
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._replay()

    def end_epoch(self) -> float:
        """Return the mean loss of the epoch's steps."""
        return self._run._amp.read_epoch()  # noqa: SLF001


def measure_lanes(
    data: TrainingData,
    capture: Capture,
    deadline: float,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    counts: Sequence[int] = COUNTS,
    repeats: int = REPEATS,
) -> list[GpuRow]:
    """Return the images per second of all lanes together, by batch size and number of lanes.

    Args:
        data: training images, which the lanes share.
        capture: function that captures a step.
        deadline: no measurement starts after this moment of ``time.monotonic``.
        batch_sizes: batch sizes of the lanes.
        counts: numbers of lanes, the largest first.
        repeats: measurements of each number, in turn.
    """
    rows = []
    for batch_size in batch_sizes:
        if time.monotonic() < deadline:
            config = TrialConfig(precision="fp16", batch_size=batch_size, max_epochs=LONG)
            rows += _measure_batch_size(config, data, capture, deadline, counts=counts, repeats=repeats)
    return rows


def _measure_batch_size(
    config: TrialConfig,
    data: TrainingData,
    capture: Capture,
    deadline: float,
    *,
    counts: Sequence[int],
    repeats: int,
) -> list[GpuRow]:
    lanes = [Lane(config, data, capture) for _ in range(max(counts))]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    losses: list[float] = []
    for _ in range(repeats):
        for count in counts:
            if time.monotonic() < deadline:
                steps, seconds, found = train_together(lanes[:count], data)
                rates[count].append(count * steps * config.batch_size / seconds)
                losses = losses or found
    subject = f"simple_net, fp16, batch {config.batch_size}"
    rows = [_judge_agreement(f"{subject}, lanes {max(counts)}", losses)] if losses else []
    for count, values in sorted(rates.items()):
        if values:
            about = {"subject": f"{subject}, lanes {count}", "quantity": "images a second of all"}
            rows.append(summarise_row(values, part="lanes", unit="1/s", **about))
    return rows


def train_together(lanes: Sequence[Lane], data: TrainingData) -> tuple[int, float, list[float]]:
    """Train an epoch of each lane at the same time.

    Returns:
        Steps of a lane, seconds of all steps together, and the mean loss of each lane.
    """
    [steps] = {lane.begin_epoch() for lane in lanes}
    wait_for(data.device)
    started = time.perf_counter()
    for _ in range(steps):
        for lane in lanes:
            lane.take_step()
    wait_for(data.device)
    seconds = time.perf_counter() - started
    return steps, seconds, [lane.end_epoch() for lane in lanes]


def _judge_agreement(subject: str, losses: Sequence[float]) -> GpuRow:
    """Lanes of the same configuration must train alike: a lane that wrote into another's memory would not."""
    difference = (max(losses) - min(losses)) / abs(losses[0])
    most = MOST_LOSS_DIFFERENCE["fp16"]
    return GpuRow(
        part="lanes",
        subject=subject,
        quantity="relative difference of the mean loss between lanes",
        value=difference,
        verdict="met" if difference <= most else "failed",  # NaN fails
        note=f"at most {most:g}",
    )
