"""Seconds of the phases of a short trial in a worker that trains one trial after another."""

import collections
import gc
import itertools
import time
from collections.abc import Sequence

from benchmarks.training.gpu_rows import GpuRow, summarise_row
from benchmarks.training.loop_programs import LONG, wait_for
from tune_amp.training.cuda_graph import Capture, Step
from tune_amp.training.memory import release_memory
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig

BATCH_SIZES = (64, 128, 256, 512, 1024)
TRIALS = 6
"""Trials of each batch size."""


def measure_turnover(
    data: TrainingData,
    capture: Capture,
    deadline: float,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    trials: int = TRIALS,
) -> list[GpuRow]:
    """Train and release trials in one process, and return the median seconds of each phase by batch size.

    Args:
        data: training and validation images.
        capture: function that captures a step.
        deadline: no trial starts after this moment of ``time.monotonic``.
        batch_sizes: batch sizes in turn, as in a search.
        trials: trials of each batch size.
    """
    seconds: dict[tuple[int, str], list[float]] = collections.defaultdict(list)
    gc.freeze()  # as a worker does, so that a release does not search through PyTorch
    try:
        for _, batch_size in itertools.product(range(trials), batch_sizes):
            if time.monotonic() < deadline:
                config = TrialConfig(precision="fp16", batch_size=batch_size, max_epochs=LONG)
                for phase, value in time_trial(config, data, capture).items():
                    seconds[batch_size, phase].append(value)
    finally:
        gc.unfreeze()
    rows = []
    for (batch_size, phase), values in sorted(seconds.items(), key=lambda item: item[0][0]):
        subject = f"simple_net, fp16, batch {batch_size}"
        rows.append(summarise_row(values, part="turnover", subject=subject, quantity=phase, unit="s"))
    return rows


def time_trial(config: TrialConfig, data: TrainingData, capture: Capture) -> dict[str, float]:
    """Train two epochs of a trial, release it, and return the seconds of each phase by its name."""
    captures = []

    def capture_timed(step: Step) -> Step:
        started = time.perf_counter()
        replay = capture(step)
        wait_for(data.device)
        captures.append(time.perf_counter() - started)
        return replay

    started = time.perf_counter()
    run = TrainingRun(config, data, capture=capture_timed)
    wait_for(data.device)
    constructed = time.perf_counter() - started
    first, second = run.train_epoch(), run.train_epoch()
    started = time.perf_counter()
    del run
    release_memory(data.device)
    return {
        "construct": constructed,
        "first epoch but the capture": first.train_seconds - sum(captures),
        "capture": sum(captures),
        "second epoch": second.train_seconds - first.train_seconds,
        "validation": second.val_seconds - first.val_seconds,
        "verdict with a probe": first.probe_seconds,
        "verdict of the second epoch": second.probe_seconds - first.probe_seconds,
        "release": time.perf_counter() - started,
    }
