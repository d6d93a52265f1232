"""How much is searched, with what, and into which folder. Imports nothing heavy: a wrong flag is answered at once."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tune_amp.config import OBJECTIVES, InputError, TrialConfig, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How much is searched, and with what. What is searched stands in the search space.

    Raises:
        InputError: an option breaks its rule; the message names the flag.
    """

    model: str = "simple_net"
    """Built-in model or ``module:function``."""
    num_samples: int = 32
    """Trials of the search."""
    max_epochs: int = 8
    """Full budget of a trial, in epochs."""
    grace_period: int = 1
    """Epochs that every trial gets before it can be stopped."""
    reduction_factor: float = 2.0
    """One trial in so many goes on from rung to rung."""
    objective: str = "val_accuracy"
    """``val_accuracy`` (higher is better) or ``val_loss`` (lower is better)."""
    seed: int = 0
    """Of the sampler, and of every trial."""
    gpus_per_trial: float | None = None
    """Share of a GPU, or None to choose."""
    cpus_per_trial: int | None = None
    max_concurrent: int | None = None
    """Most trials at a time, or None for as many as fit."""
    time_budget: float | None = None
    """Seconds after which trials are interrupted, or None."""
    top_k: int = 3
    """Configurations written to ``best.parquet``."""

    def __post_init__(self) -> None:
        with naming_flags():
            TrialConfig(model=self.model, max_epochs=self.max_epochs, seed=self.seed)
        _check_flag("--num-samples", self.num_samples, self.num_samples >= 1, "must be at least 1")
        in_range = 1 <= self.grace_period <= self.max_epochs
        _check_flag("--grace-period", self.grace_period, in_range, f"must be 1 to --max-epochs ({self.max_epochs})")
        _check_flag("--reduction-factor", self.reduction_factor, self.reduction_factor > 1, "must be greater than 1")
        known = self.objective in OBJECTIVES
        _check_flag("--objective", self.objective, known, f"must be one of {', '.join(OBJECTIVES)}")
        for flag, count in (("--cpus-per-trial", self.cpus_per_trial), ("--max-concurrent", self.max_concurrent)):
            _check_flag(flag, count, count is None or count >= 1, "must be at least 1")
        positive = self.time_budget is None or self.time_budget > 0
        _check_flag("--time-budget", self.time_budget, positive, "must be greater than 0")
        _check_flag("--top-k", self.top_k, self.top_k >= 1, "must be at least 1")


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Errors about a field of ``TrialConfig`` speak of the flag that sets it: ``max_epochs:`` -> ``--max-epochs:``."""
    try:
        yield
    except InputError as error:
        field, _, rule = str(error).partition(":")
        raise InputError(f"--{field.replace('_', '-')}:{rule}") from None


@contextlib.contextmanager
def run_folder(results_dir: Path, run: str) -> Iterator[Path]:
    """Make ``results_dir/run``, which must not exist: two runs never share a folder.

    Left empty, it is removed again, with the parents that were made for it.

    Raises:
        InputError: the name is no plain folder name, is taken, or the folder cannot be made.
    """
    if not run or Path(run).name != run or run.startswith(".") or not run.isprintable():
        raise InputError(f"--name: must be a plain folder name, got {shown(run)}")
    folder = results_dir / run
    made = [folder, *(parent for parent in folder.parents if not parent.exists())]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if folder.exists():
            raise InputError(f"--name: {folder} already holds a run; choose another name") from None
        raise InputError(f"--results-dir: must be a folder, got the file {results_dir}") from None
    except OSError as error:
        raise InputError(f"--results-dir: {folder} cannot be made ({error.strerror})") from error
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # not empty: the first of them that is ends it
            for empty in made:
                empty.rmdir()


def _check_flag(flag: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise InputError(f"{flag}: {rule}, got {shown(value)}")
