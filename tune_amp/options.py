"""How much is searched, with what, and into which folder. Imports nothing heavy: a wrong flag is answered at once."""

import contextlib
import dataclasses
import datetime
import importlib.util
import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_amp.config import (
    OBJECTIVES,
    RANKING_OBJECTIVES,
    SAMPLERS,
    SCHEDULERS,
    InputError,
    TrialConfig,
    checked_type,
    shown,
)
from tune_amp.files import claim_folder

MOST_OBJECTIVES = 3
"""With more, most trials are best in some way, and nothing is found."""

MOST_SEEDS = 1_000
"""Fresh seeds of a confirmation or a comparison."""

COMPLETED_ONLY = ("gp", "nsga2")
"""Samplers of Optuna's that learn nothing from a trial that was stopped early."""

TRACKERS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {"tensorboard": ("tensorboardX",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}
)
"""What can be told of a search, and the modules that it takes. The extra to install has the tracker's name."""
DEFAULT_RESULTS_DIR = Path("results")
NONE = "none"
"""Takes back what a run that goes on was begun with."""
HIDDEN = "***"
"""Stands where a secret stood."""

# A user with a password, behind a scheme or without one. Azure's `blob_storage_authority` is no secret.
_USER = re.compile(r"(://)[^?\s]*@|(?<![^\s='\"])[^\s/@:=]+:[^\s/@]+@")
_SECRET = re.compile(
    r"(?<![\w.%-])([\w.%-]*(?:auth(?!or(?!iz))|cookie|cred|jwt|key|pass|pwd|sas|secret|sig|token)[\w.%-]*)=[^&\s]*",
    re.IGNORECASE,
)


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
    """One trial in so many goes on from rung to rung, of ASHA and HyperBand."""
    objective: str = "val_accuracy"
    """What is searched for, one of ``config.OBJECTIVES`` or several joined by commas. Of ``val_accuracy`` more is
    better, of the others less. The first is one of ``config.RANKING_OBJECTIVES``."""
    sampler: str = "auto"
    """One of ``config.SAMPLERS``; ``auto`` becomes ``tpe`` for one objective, ``nsga2`` for several."""
    scheduler: str = "auto"
    """One of ``config.SCHEDULERS``; ``auto`` becomes ``asha``, but ``none`` for several objectives, and for samplers
    that learn from completed trials only."""
    seed: int = 0
    """Of the sampler, and of every trial."""
    gpus_per_trial: float | None = None
    """Share of a GPU, or None to choose."""
    cpus_per_trial: int | None = None
    max_concurrent: int | None = None
    """Most trials at a time, or None for as many as fit."""
    time_budget: float | None = None
    """Seconds after which trials are interrupted, or None."""
    trial_time_limit: float | None = None
    """Seconds that a trial may take before it is ended as failed, or None for any time."""
    max_failures: int = 5
    """Trials that fail with the same error, before any has reported an epoch, until the search stops."""
    top_k: int = 3
    """Configurations written to ``best.parquet``."""
    confirm_seeds: int = 10
    """Most fresh seeds on which the best are trained again; 0: they are not."""

    def __post_init__(self) -> None:
        with naming_flags():
            TrialConfig(model=self.model, max_epochs=self.max_epochs, seed=self.seed)
        _check_flag("--num-samples", self.num_samples, self.num_samples >= 1, "must be at least 1")
        in_range = 1 <= self.grace_period <= self.max_epochs
        _check_flag("--grace-period", self.grace_period, in_range, f"must be 1 to --max-epochs ({self.max_epochs})")
        _check_flag("--reduction-factor", self.reduction_factor, self.reduction_factor > 1, "must be greater than 1")
        self._check_objectives()
        self._choose_algorithms()
        for flag, count in (("--cpus-per-trial", self.cpus_per_trial), ("--max-concurrent", self.max_concurrent)):
            _check_flag(flag, count, count is None or count >= 1, "must be at least 1")
        positive = self.time_budget is None or self.time_budget > 0
        _check_flag("--time-budget", self.time_budget, positive, "must be greater than 0")
        positive = self.trial_time_limit is None or self.trial_time_limit > 0
        _check_flag("--trial-time-limit", self.trial_time_limit, positive, "must be greater than 0")
        for flag, count in (("--max-failures", self.max_failures), ("--top-k", self.top_k)):
            _check_flag(flag, count, count >= 1, "must be at least 1")
        rule = "must be 0, or at least 2: one seed has no interval"
        _check_flag("--confirm-seeds", self.confirm_seeds, self.confirm_seeds == 0 or self.confirm_seeds >= 2, rule)
        rule = f"must be at most {MOST_SEEDS:,}: each trains --top-k configurations"
        _check_flag("--confirm-seeds", self.confirm_seeds, self.confirm_seeds <= MOST_SEEDS, rule)
        with naming_flags():
            for name, hint in _OPTION_TYPES.items():
                checked_type(name, getattr(self, name), hint)

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is searched for, the first of which ranks the trials."""
        return tuple(name.strip() for name in self.objective.split(","))

    def _check_objectives(self) -> None:
        names = self.objectives
        for name in names:
            rule = f"must be one of {', '.join(OBJECTIVES)}, or several joined by commas"
            _check_flag("--objective", name, name in OBJECTIVES, rule)
        _check_flag("--objective", self.objective, len(set(names)) == len(names), "must name none twice")
        rule = f"must name {MOST_OBJECTIVES} at most"
        _check_flag("--objective", len(names), len(names) <= MOST_OBJECTIVES, rule)
        rule = f"must begin with {' or '.join(RANKING_OBJECTIVES)}"
        _check_flag("--objective", names[0], names[0] in RANKING_OBJECTIVES, rule)
        object.__setattr__(self, "objective", ",".join(names))

    def _choose_algorithms(self) -> None:
        several = len(self.objectives) > 1
        self._choose("sampler", SAMPLERS, "nsga2" if several else "tpe")
        self._choose("scheduler", SCHEDULERS, "none" if several or self.sampler in COMPLETED_ONLY else "asha")
        if several:
            rule = "must not be cmaes for several objectives (it knows one)"
            _check_flag("--sampler", self.sampler, self.sampler != "cmaes", rule)
            rule = "must be none for several objectives (Optuna knows no pruned trials there)"
            _check_flag("--scheduler", self.scheduler, self.scheduler == "none", rule)

    def _choose(self, field: str, known: tuple[str, ...], fitting: str) -> None:
        """Put ``fitting`` in the place of ``auto``."""
        name = getattr(self, field)
        _check_flag(f"--{field}", name, name in ("auto", *known), f"must be auto or one of {', '.join(known)}")
        if name == "auto":
            object.__setattr__(self, field, fitting)


_OPTION_TYPES = typing.get_type_hints(SearchOptions)


def build_options(arguments: Mapping[str, Any]) -> SearchOptions:
    """The options among the arguments of the command line."""
    return SearchOptions(**{field.name: arguments[field.name] for field in dataclasses.fields(SearchOptions)})


def name_flag(field: str) -> str:
    """The flag that sets a field: ``max_epochs`` -> ``--max-epochs``."""
    return f"--{field.replace('_', '-')}"


def check_trackers(texts: Sequence[str]) -> list[str]:
    """The names of ``--tracker``, which may be given several times and hold several joined by commas; none twice.

    Raises:
        InputError: a name is not known, or what it takes is not installed.
    """
    if list(texts) == [NONE]:
        return []
    names = list(dict.fromkeys(name.strip() for text in texts for name in text.split(",")))
    for name in names:
        rule = f"must be one of {', '.join(TRACKERS)}, or several joined by commas"
        _check_flag("--tracker", name, name in TRACKERS, rule)
        if any(importlib.util.find_spec(module) is None for module in TRACKERS[name]):
            raise InputError(f"--tracker: {name} is not installed: pip install 'tune_amp[{name}]'")
    return names


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Errors about a field of ``TrialConfig`` speak of the flag that sets it: ``max_epochs:`` -> ``--max-epochs:``."""
    try:
        yield
    except InputError as error:
        field, _, rule = str(error).partition(":")
        raise InputError(f"{name_flag(field)}:{rule}") from None


def is_run_name(name: str) -> bool:
    """Return whether a name can be typed without quotes: letters and digits of any script, ``_``, ``.`` and ``-``."""
    return name[:1] not in ("", ".", "-") and f"a{re.sub('[.-]', '', name)}".isidentifier()


def make_run_name(space: str) -> str:
    """Return the name of a run that its user leaves unnamed: the space and the time, in seconds."""
    stem = "".join(character if is_run_name(f"a{character}") else "_" for character in Path(space).stem).lstrip(".-")
    return f"{stem or 'search'}-{datetime.datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005


@contextlib.contextmanager
def run_folder(results_dir: Path, run: str, *, numbered: bool = False) -> Iterator[Path]:
    """Make ``results_dir/run``, which must not exist or be empty: of two searches that want it, one gets it.

    Args:
        results_dir: made where it is not there; ``~`` is the home folder.
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
                    told = "already holds a run" if isinstance(error, FileExistsError) else "is another search's"
                    raise InputError(f"--name: {folder} {told}; choose another name") from None
            except OSError as error:
                raise InputError(f"--results-dir: {folder} cannot be made ({error.strerror})") from error
        yield folder


def name_run(folder: Path, default_dir: Path) -> str:
    """Return how a command line names a run: by its name if it is in ``default_dir``, else by its path."""
    return folder.name if folder.parent == default_dir and is_run_name(folder.name) else name_path(folder)


def name_path(path: Path) -> str:
    """Return how a command line names a path: it must not look like a flag, or like a home folder."""
    return f"./{path}" if str(path).startswith(("-", "~")) else str(path)


def _check_flag(flag: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise InputError(f"{flag}: {rule}, got {shown(value)}")


def hide_credentials(text: str) -> str:
    """``text`` without users, passwords and keys, of URLs and of assignments: for messages, and for the record."""
    return _SECRET.sub(rf"\1={HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))
