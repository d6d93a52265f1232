"""Options of a search and its run folder. Imports nothing heavy, so that a wrong flag is reported at once."""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_amp.results.files import claim_folder
from tune_amp.results.statistics import FEWEST_PAIRS
from tune_amp.trial.config import (
    COST_OBJECTIVES,
    MODEL_RULE,
    MODELS,
    OBJECTIVES,
    OWN_CODE_RULE,
    RANKING_OBJECTIVES,
    SAMPLERS,
    SCHEDULERS,
    SEED_RULE,
    InputError,
    Rule,
    at_least,
    check,
    check_fields,
    more_than,
    one_of,
)
from tune_amp.trial.objectives import MODES, metric_of, read_objectives
from tune_amp.trial.text import shown

MOST_OBJECTIVES = 3
"""Largest number of objectives. With more, most trials are best in some way, and the search singles out none."""

MOST_SEEDS = 1_000
"""Largest number of fresh seeds of a confirmation or a comparison."""

COMPLETED_ONLY = ("gp", "nsga2")
"""Optuna's samplers that learn nothing from a trial that was stopped early."""

TRACKERS = {"tensorboard": ("tensorboardX",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}
"""Experiment trackers that a search can report to, and the modules that each needs. The extra to install has the
tracker's name."""
DEFAULT_RESULTS_DIR = Path("results")
NONE = "none"
"""Value of a flag that, when a run resumes, clears what the run was started with."""


def option(text: str, default: Any, rule: Rule | None = None, **about: Any) -> Any:
    """Return a field of ``SearchOptions``, from which argparse builds its flag.

    Args:
        text: help text, which also describes the field.
        default: default of the field and of the flag.
        rule: rule for a value that is not None.
        about: ``fixed``: a resumed run must keep the value, which all its trials or rungs share. ``unset``: meaning of
            None, for the help. ``metavar`` and ``read`` (text -> value): only if the type does not give them.
    """
    return dataclasses.field(default=default, metadata={"help": text, "rule": rule, **about})


def _read_gpu_share(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number, got {text!r}") from None


_SHARE_RULE = Rule(
    "must be 0, 0.0001 (Ray's smallest) to 1, or a whole number",
    lambda share: share == 0 or 1e-4 <= share <= 1 or (share > 1 and share == int(share)),
)
_SEEDS_RULE = Rule(
    f"must be 0, or {FEWEST_PAIRS} to {MOST_SEEDS:,} (fewer decide nothing)",
    lambda count: count == 0 or FEWEST_PAIRS <= count <= MOST_SEEDS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How much is searched, and with what. The search space defines what is searched.

    Raises:
        InputError: an option breaks its rule; the message names the flag.
    """

    model: str = option(f"{', '.join(MODELS)} or MODULE:FUNCTION", "simple_net", MODEL_RULE, fixed=True)
    task: str | None = option(
        "your own task: what differs from image classification",
        None,
        OWN_CODE_RULE,
        fixed=True,
        metavar="MODULE:CLASS",
        unset="images into classes",
    )
    train: str | None = option(
        "your own training loop, which has its own model and data",
        None,
        OWN_CODE_RULE,
        fixed=True,
        metavar="MODULE:FUNCTION",
        unset="the loop of tune_amp",
    )
    num_samples: int = option("number of trials", 32, at_least(1))
    max_epochs: int = option("epochs of a trial that is not stopped early", 8, at_least(1), fixed=True)
    grace_period: int = option(
        "epochs before the scheduler can stop a trial; a diverged one ends at once", 1, fixed=True
    )
    reduction_factor: float = option("one trial in X passes a rung of ASHA or HyperBand", 2.0, more_than(1), fixed=True)
    objective: str = option(
        f"{', '.join(OBJECTIVES)}, a metric of your own, or several joined by commas; the first ranks the trials",
        "val_accuracy",
        fixed=True,
    )
    mode: str | None = option(
        "max or min: which values of the objective are better",
        None,
        one_of(*MODES),
        fixed=True,
        unset="by its name: val_f1 max, val_mae min",
    )
    sampler: str = option(
        f"{', '.join(SAMPLERS)} or auto: tpe, for several objectives nsga2",
        "auto",
        one_of("auto", *SAMPLERS),
        fixed=True,
    )
    scheduler: str = option(
        f"{', '.join(SCHEDULERS)} or auto: asha; none for several objectives, gp and nsga2",
        "auto",
        one_of("auto", *SCHEDULERS),
        fixed=True,
    )
    seed: int = option("seed of the sampler and of every trial", 0, SEED_RULE, fixed=True)
    gpus_per_trial: float | None = option(
        "GPUs a trial: 0.25 lets four share one; 2 or more only with --train",
        None,
        _SHARE_RULE,
        unset="auto",
        metavar="auto|X",
        read=_read_gpu_share,
    )
    mps: str = option(
        "NVIDIA MPS, by which trials that share a GPU compute at the same time",
        "auto",
        one_of("auto", "on", "off"),
        metavar="auto|on|off",
    )
    cpus_per_trial: int | None = option("CPU threads of a trial", None, at_least(1), unset="1")
    max_concurrent: int | None = option("largest number of trials at a time", None, at_least(1), unset="as many as fit")
    time_budget: float | None = option(
        "seconds after which trials are interrupted; confirmation comes on top", None, more_than(0), unset="no limit"
    )
    trial_time_limit: float | None = option(
        "seconds after which a trial is ended as failed, because it hangs", None, more_than(0), unset="no limit"
    )
    max_failures: int = option("stop the search where its first N trials all fail with the same error", 5, at_least(1))
    top_k: int = option(
        "configurations in best.parquet; for several objectives it holds the Pareto set", 3, at_least(1)
    )
    confirm_seeds: int = option(
        "most fresh seeds to confirm the best on: the top k and the defaults are trained on 3; then the best of them "
        "and the defaults on the others, if these can show a gain; 0: none",
        10,
        _SEEDS_RULE,
    )

    def __post_init__(self) -> None:
        with naming_flags():
            check_fields(self)
        in_range = 1 <= self.grace_period <= self.max_epochs
        check("--grace-period", self.grace_period, in_range, f"must be 1 to --max-epochs ({self.max_epochs})")
        self._check_objectives()
        self._choose_algorithms()

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives; the first one ranks the trials."""
        return tuple(self.objective.split(","))

    @property
    def is_own(self) -> bool:
        """Whether the user's own task or training loop is trained."""
        return self.task is not None or self.train is not None

    @property
    def may_share_gpus(self) -> bool:
        """Whether a trial may get less than a GPU."""
        return self.gpus_per_trial is None or 0 < self.gpus_per_trial < 1

    def _check_objectives(self) -> None:
        """Check the objectives, and write them in their shortest form.

        The unit of a user's own loss is unknown, so its direction is always written: ``val_loss:min``.
        """
        if self.train is not None and self.task is not None:
            raise InputError(f"--train: must not be given with --task, got {shown(self.train)} and {shown(self.task)}")
        if (self.gpus_per_trial or 0) > 1 and self.train is None:
            rule = "must be at most 1: only a loop of your own (--train) can use several GPUs"
            raise InputError(f"--gpus-per-trial: {rule}, got {self.gpus_per_trial:g}")
        if self.mps == "on" and not self.may_share_gpus:
            rule = "must be auto or off where no trials share a GPU"
            raise InputError(f"--mps: {rule} (--gpus-per-trial {self.gpus_per_trial:g}), got on")
        text = read_objectives("--objective", self.objective, self.mode, () if self.is_own else OBJECTIVES)
        names = text.split(",")
        check("--objective", len(names), len(names) <= MOST_OBJECTIVES, f"must name {MOST_OBJECTIVES} at most")
        rule = f"must begin with {' or '.join(RANKING_OBJECTIVES)}{', or a metric of your own' if self.is_own else ''}"
        check("--objective", names[0], metric_of(names[0]) not in COST_OBJECTIVES, rule)
        if self.is_own:
            names = ["val_loss:min" if name == "val_loss" else name for name in names]
        object.__setattr__(self, "objective", ",".join(names))

    def _choose_algorithms(self) -> None:
        """Replace ``auto`` by the sampler and the scheduler that fit the objectives."""
        several = len(self.objectives) > 1
        if self.sampler == "auto":
            object.__setattr__(self, "sampler", "nsga2" if several else "tpe")
        if self.scheduler == "auto":
            fitting = "none" if several or self.sampler in COMPLETED_ONLY else "asha"
            object.__setattr__(self, "scheduler", fitting)
        if several:
            rule = "must not be cmaes for several objectives (it knows one)"
            check("--sampler", self.sampler, self.sampler != "cmaes", rule)
            rule = "must be none for several objectives (Optuna knows no pruned trials there)"
            check("--scheduler", self.scheduler, self.scheduler == "none", rule)


def build_options(arguments: Mapping[str, Any]) -> SearchOptions:
    """Return the options among the arguments of the command line."""
    return SearchOptions(**{field.name: arguments[field.name] for field in dataclasses.fields(SearchOptions)})


def name_flag(field: str) -> str:
    """Return the flag that sets a field: ``max_epochs`` -> ``--max-epochs``."""
    return f"--{field.replace('_', '-')}"


def check_trackers(texts: Sequence[str]) -> list[str]:
    """Return the names given by ``--tracker``, each once.

    The flag may be repeated, and may hold several names joined by commas.

    Raises:
        InputError: a name is unknown, or a module that it needs is not installed.
    """
    if list(texts) == [NONE]:
        return []
    names = list(dict.fromkeys(name.strip() for text in texts for name in text.split(",")))
    for name in names:
        rule = f"must be one of {', '.join(TRACKERS)}, or several joined by commas"
        check("--tracker", name, name in TRACKERS, rule)
        if any(importlib.util.find_spec(module) is None for module in TRACKERS[name]):
            raise InputError(f"--tracker: {name} is not installed: pip install 'tune_amp[{name}]'")
    return names


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Replace the field in an error's message by the flag that sets it: ``max_epochs:`` -> ``--max-epochs:``."""
    try:
        yield
    except InputError as error:
        field, _, rule = str(error).partition(":")
        raise InputError(f"{name_flag(field)}:{rule}") from None


def is_run_name(name: str) -> bool:
    """Return whether a name can be typed without quotes: letters and digits of any script, ``_``, ``.`` and ``-``."""
    return name[:1] not in ("", ".", "-") and f"a{re.sub('[.-]', '', name)}".isidentifier()


def make_run_name(space: str) -> str:
    """Return the default name of a run: the space and the time, to the second."""
    stem = "".join(character if is_run_name(f"a{character}") else "_" for character in Path(space).stem).lstrip(".-")
    return f"{stem or 'search'}-{datetime.datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005


@contextlib.contextmanager
def run_folder(results_dir: Path, run: str, *, numbered: bool = False) -> Iterator[Path]:
    """Make ``results_dir/run``, which must be missing or empty. If two searches request it, one gets it.

    Args:
        results_dir: created if it is missing; ``~`` is the home folder.
        run: name of the run.
        numbered: whether a name that is taken gets a number (``run-2``) instead of being refused.

    Raises:
        InputError: the name breaks the rule of ``is_run_name``, is taken, or the folder cannot be made.
    """
    if not is_run_name(run):
        rule = "must be of letters, digits, _, . and -, and begin with neither . nor -"
        raise InputError(f"--name: {rule}, got {shown(run)}")
    with contextlib.ExitStack() as stack:
        for number in itertools.count(1):
            folder = results_dir.expanduser() / (run if number == 1 else f"{run}-{number}")
            try:
                claim_folder(folder, stack)
                break
            except (FileExistsError, BlockingIOError) as error:
                if not numbered:
                    reason = "already holds a run" if isinstance(error, FileExistsError) else "is another search's"
                    raise InputError(f"--name: {folder} {reason}; choose another name") from None
            except OSError as error:
                raise InputError(f"--results-dir: {folder} cannot be made ({error.strerror})") from error
        yield folder


def name_run(folder: Path, default_dir: Path) -> str:
    """Return how a command line names a run: by its name if it is in ``default_dir``, else by its path."""
    return folder.name if folder.parent == default_dir and is_run_name(folder.name) else name_path(folder)


def name_path(path: Path) -> str:
    """Return how a command line names a path: it must not look like a flag, or like a home folder."""
    return f"./{path}" if str(path).startswith(("-", "~")) else str(path)
