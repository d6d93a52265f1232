"""Near-instant trials: their data and their space, and an observer that samples the driver as they end."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tune_amp.results.progress import Observer, SearchProgress
from tune_amp.results.records import TrialRecord
from tune_amp.space.space import SearchSpace, load_space
from tune_amp.trial.consent import consent_to

if TYPE_CHECKING:
    from tune_amp.training.data import Dataset

TRAIN_IMAGES = 300

# The four parameters of the default space, with batches that fit a few hundred images.
SPACE = """\
parameters:
  lr: {low: 1.0e-4, high: 3.0e-2, log: true}
  batch_size: {low: 64, high: 128, power_of_two: true}
  init_scale: {low: 2^0, high: 2^24, power_of_two: true}
  growth_interval: {low: 0.02, high: 0.5, log: true, fraction_of_trial: true}
fixed:
  precision: fp16
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The driver when a trial ended."""

    ended: int
    """Trials so far."""
    clock: float
    """Seconds, of a clock that only moves forward."""
    driver: float
    """CPU seconds of the driver so far, all threads."""
    memory_bytes: int | None
    """Resident; None but on Linux."""


class Sampler(Observer):
    """An observer of a search that samples the driver whenever a trial ends.

    Args:
        keep: is given each sample.
    """

    def __init__(self, keep: Callable[[Sample], object]) -> None:
        self._keep = keep

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """Take a sample where a trial ended."""
        if ended is not None:
            self._keep(
                Sample(
                    ended=progress.count_ended(),
                    clock=time.perf_counter(),
                    driver=time.process_time(),
                    memory_bytes=read_memory(),
                )
            )


def read_memory() -> int | None:
    """Resident memory of this process; None but on Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def read_peak_memory() -> int | None:
    """The most that was resident of this process; None but on Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    # Not getrusage: that begins with what the parent had.
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def make_images() -> tuple[npt.NDArray[Any], ...]:
    """Training and test images [n, 1, 8, 8] with their labels: noise, with a bright row for each of 4 classes."""
    random = np.random.default_rng(0)

    def make(count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        labels = np.arange(count) % 4
        images = random.integers(0, 128, (count, 1, 8, 8), dtype=np.uint8)
        images[np.arange(count), 0, labels] += 100
        return images, labels

    return (*make(TRAIN_IMAGES), *make(40))


def load_images() -> "Dataset":
    """``make_images`` as a data set, here and in the workers of a search."""
    from tune_amp.training.data import load_dataset

    name = f"{__name__}:{make_images.__name__}"
    consent_to(name)
    return load_dataset(name)


def load_small_space(folder: Path) -> SearchSpace:
    """The space of near-instant trials, from a file in ``folder``."""
    path = folder / "small.yaml"
    path.write_text(SPACE, encoding="utf-8")
    return load_space(str(path))
