"""The vocabulary of all other files: what a trial depends on, what it reports, and how it can end.

It needs only the standard library, so that a Parquet file can be read without torch, Ray or Optuna.
"""

import dataclasses
import functools
import math
import re
import signal
import types
import typing
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple, TypeGuard

from tune_amp.trial.text import shown

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that end a command: Ctrl-C, a job scheduler, a closed terminal, and SLURM's warning before the end."""
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
MODELS = ("simple_net", "conv_net", "vit")
DATASETS = ("mnist", "fashion_mnist", "kmnist", "digits")
OPTIMIZERS = ("adam", "adamw", "sgd")
INPUT_SCALINGS = ("minmax", "standard")
CLASS_WEIGHTINGS = ("none", "balanced")
CURRICULA = ("none", "linear", "root", "step")
RANKING_OBJECTIVES = ("val_accuracy", "val_loss")
COST_OBJECTIVES = ("train_seconds", "peak_memory_bytes")
OBJECTIVES = (*RANKING_OBJECTIVES, *COST_OBJECTIVES)
SAMPLERS = ("tpe", "random", "gp", "cmaes", "nsga2")
SCHEDULERS = ("asha", "hyperband", "median", "none")
KEEPS_NOTHING = "own: keeps nothing, starts again if interrupted"
"""``EpochMetrics.loop`` of a user's own loop that keeps nothing for a checkpoint."""
# torch.amp.GradScaler's own defaults, which fp16 uses unless a value is given.
SCALER_DEFAULTS: Mapping[str, float | int] = types.MappingProxyType(
    {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
)

SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**127


class InputError(ValueError):
    """An error in the user's input; its one-line message names the place, the rule and the value. Exit code 2."""


class TrialStatus(StrEnum):
    """How a trial ended."""

    COMPLETED = "completed"
    """Trained to its full budget."""
    STOPPED = "stopped"
    """Ended early by the scheduler."""
    DIVERGED = "diverged"
    """Ended as soon as training was beyond recovery: see ``HOPELESS_STATES``."""
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    """Ended by any other exception, or by the death of its worker."""
    INTERRUPTED = "interrupted"
    """Still training when the search ended: by Ctrl-C, a signal or the time budget."""


RUNNING = "running"
"""``status`` in the reports of a trial that continues. Every other value is a ``TrialStatus``."""

HOPELESS_STATUSES = (TrialStatus.DIVERGED, TrialStatus.OUT_OF_MEMORY)
"""Statuses that the trial's settings cause."""


class TrainingState(StrEnum):
    """State of loss scaling and training after an epoch."""

    CALIBRATING = "calibrating"
    """Most steps of the epoch were skipped while the scale dropped to a value at which gradients do not overflow."""
    STEADY = "steady"
    STARVED = "starved"
    """Gradients underflow: they are zero in fp16 where those of fp32 are not. A growing scale can fix that."""
    COLLAPSED = "collapsed"
    """The trial learned nothing, and no scale within reach lets it learn, or no weight gets a gradient even in fp32."""
    DIVERGED = "diverged"
    """Weights, or the validation loss, are no longer finite."""


HOPELESS_STATES = (TrainingState.COLLAPSED, TrainingState.DIVERGED)


def is_function_name(name: str) -> bool:
    """Return whether ``name`` has the form ``package.module:function``."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name) is not None


class Rule(NamedTuple):
    """A condition that a value must fulfil, in addition to its type."""

    text: str
    """The condition as messages state it."""
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    """Return the rule of a number with an included lower bound."""
    return Rule(f"must be at least {least}", lambda value: value >= least)


def more_than(bound: float) -> Rule:
    """Return the rule of a number with an excluded lower bound."""
    return Rule(f"must be greater than {bound}", lambda value: value > bound)


def one_of(*known: str, function: bool = False) -> Rule:
    """Return the rule of a name; with ``function``, the user's own ``module:function`` is allowed too."""
    names = ", ".join(known) + (", or module:function" if function else "")
    return Rule(f"must be one of {names}", lambda value: value in known or (function and is_function_name(value)))


MODEL_RULE = one_of(*MODELS, function=True)
OWN_CODE_RULE = Rule("must have the form module:name", is_function_name)
SEED_RULE = Rule("must be between 0 and 2^63 - 1", lambda seed: 0 <= seed < 2**63)
_FRACTION_RULE = Rule("must be between 0 and 1, both excluded", lambda fraction: 0 < fraction < 1)
# GradScaler keeps its scale in fp32: outside the normal range the scale or its inverse overflows, and weights turn NaN.
# It does not check that, and silently accepts 0, negative, infinite and NaN scales.
_SCALE_RULE = Rule(
    "must be between 2^-126 and 2^127 (fp32's normal range)", lambda scale: SMALLEST_SCALE <= scale <= LARGEST_SCALE
)


def described(
    doc: str, default: Any = dataclasses.MISSING, rule: Rule | None = None, *, unit: str = "", epoch_only: bool = False
) -> Any:
    """Return a dataclass field with its rule, and its description and unit, from which the Arrow schema is built.

    ``epoch_only`` excludes a field from ``trials.parquet``, whose rows are trials.
    """
    metadata = {"doc": doc, "rule": rule, "unit": unit, "epoch_only": epoch_only}
    return dataclasses.field(default=default, metadata=metadata)


def spread(doc: str) -> Any:
    """Return a dataclass field that holds values by name, each of which is a column; by default it holds none.

    It does not count for the hash of a frozen dataclass, which a mapping does not have.
    """
    return dataclasses.field(default_factory=dict, hash=False, metadata=described(doc).metadata)


OwnValue = float | int | str
"""A value of a user's own parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that one trial depends on, checked on construction.

    The four scaler fields are None unless ``precision`` is ``fp16``; in fp16, an omitted one gets GradScaler's default.

    Raises:
        InputError: a field breaks its rule; the message says which field, the rule and the value.
    """

    lr: float = described("learning rate", 1e-3, more_than(0))
    batch_size: int = described("images a training step", 64, at_least(1), unit="images")
    precision: str = described("fp32 (strict), tf32, bf16 or fp16 autocast", "fp32", one_of(*PRECISIONS))
    init_scale: float | None = described("initial loss scale of GradScaler", None, _SCALE_RULE)
    growth_factor: float | None = described("factor by which the loss scale grows", None, more_than(1))
    backoff_factor: float | None = described("factor applied to the loss scale after an overflow", None, _FRACTION_RULE)
    growth_interval: int | None = described(
        "steps without overflow before the loss scale grows", None, at_least(1), unit="steps"
    )
    model: str = described("built-in model, or module:function", "simple_net", MODEL_RULE)
    dataset: str = described("built-in data set, or module:function", "mnist", one_of(*DATASETS, function=True))
    imbalance: float = described(
        "images of the most frequent training class for one of the rarest; 1: the data as they are", 1.0, at_least(1)
    )
    optimizer: str = described("adam, adamw or sgd (momentum 0.9)", "adam", one_of(*OPTIMIZERS))
    weight_decay: float = described("weight decay", 0.0, at_least(0))
    grad_clip: float | None = described("largest L2 norm of the unscaled gradients", None, more_than(0))
    input_scaling: str = described(
        "minmax: [0, 1]; standard: mean 0, deviation 1 of the training split", "minmax", one_of(*INPUT_SCALINGS)
    )
    class_weighting: str = described(
        "none, or balanced: inverse class frequency in the whole training split", "none", one_of(*CLASS_WEIGHTINGS)
    )
    curriculum: str = described(
        "none; or from easy images to all, at the pace of: linear, root, step", "none", one_of(*CURRICULA)
    )
    max_epochs: int = described("epochs of a trial that is not stopped", 5, at_least(1), unit="epochs")
    seed: int = described("seed of weights and data order", 0, SEED_RULE)
    accumulate: int = described("batches whose gradients are summed before a step", 1, at_least(1), unit="batches")
    task: str | None = described("the user's own task, module:Class", None, OWN_CODE_RULE)
    train: str | None = described("the user's own training loop, module:function", None, OWN_CODE_RULE)
    own: Mapping[str, OwnValue] = spread("the user's own parameters: columns own.NAME")

    @property
    def step_images(self) -> int:
        """Images of a training step: those of ``accumulate`` batches."""
        return self.batch_size * self.accumulate

    def count_full_steps(self, train_images: int) -> int:
        """Return the training steps of a trial whose epochs all draw from all images, as without a curriculum."""
        return train_images // self.step_images * self.max_epochs

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in self.own.items():
            checked_type(f"own.{name}", value, OwnValue)
        for name, default in SCALER_DEFAULTS.items():
            value = getattr(self, name)
            if self.precision != "fp16":
                check(name, value, value is None, "must be left out unless precision is fp16")
            elif value is None:
                object.__setattr__(self, name, default)


def read_setting(config: TrialConfig, name: str) -> Any:
    """Return a setting by the name of its column; None for an own parameter that the configuration does not have."""
    return config.own.get(name.removeprefix(OWN)) if name.startswith(OWN) else getattr(config, name)


def list_values(record: object) -> dict[str, Any]:
    """Return the columns of a ``TrialConfig`` or ``EpochMetrics`` with their values, own ones after the others."""
    values = dict(vars(record))
    for name, prefix in SPREAD.items():
        values |= {f"{prefix}{key}": value for key, value in values.pop(name, {}).items()}
    return values


OWN = "own."
"""Prefix of the columns of a user's own parameters."""

SPREAD = types.MappingProxyType({"own": OWN, "metrics": "", "means": ""})
"""Fields that hold values by name -> prefix of the columns of these values."""


@functools.cache
def field_types(owner: type) -> Mapping[str, Any]:
    """Return the type of each field of a dataclass that is one column."""
    hints = typing.get_type_hints(owner)
    return types.MappingProxyType({name: hint for name, hint in hints.items() if name not in SPREAD})


FIELD_TYPES = field_types(TrialConfig)


def value_type(name: str, owner: type = TrialConfig) -> type:
    """Return the field's type without null: ``float``, ``int`` or ``str``."""
    expected = field_types(owner)[name]
    return next(option for option in (float, int, str) if option in (typing.get_args(expected) or (expected,)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What a trial reports after an epoch.

    Counts and seconds are cumulative, so that the last report covers the whole trial: Tune keeps no other.
    """

    epoch: int = described("epochs trained", unit="epochs")
    train_loss: float = described(
        "mean training loss of this epoch's steps (cross entropy), without skipped steps whose loss was not finite; "
        "not a number where none is left",
        unit="nats",
    )
    val_loss: float | None = described("mean validation loss, in fp32", unit="nats")
    val_accuracy: float | None = described("share of validation images classified correctly, in fp32")
    steps: int = described("training steps taken, skipped ones included", unit="steps")
    applied_steps: int = described("steps whose update was applied", unit="steps")
    skipped_steps: int = described("steps that GradScaler skipped because a gradient overflowed", unit="steps")
    growths: int = described("times the loss scale grew")
    first_applied_step: int | None = described("first step (from 1) whose update was applied", unit="steps")
    loss_scale: float | None = described("loss scale after the last step")
    min_loss_scale: float | None = described("smallest loss scale so far")
    max_loss_scale: float | None = described("largest loss scale so far")
    train_seconds: float = described("time in training steps", unit="s")
    val_seconds: float = described("time in validation", unit="s")
    data_seconds: float = described(
        "time placing the data on the device (and sorting it for a curriculum); 0 where the worker held it", unit="s"
    )
    samples_per_second: float = described("training images a second, this epoch", unit="1/s")
    peak_memory_bytes: int | None = described(
        "peak CUDA memory allocated by the trial, workspaces of cuBLAS included; null without CUDA", unit="B"
    )
    state: str = described("how training stands: " + ", ".join(TrainingState))
    underflow_share: float | None = described(
        "share of the gradient's elements that are zero in fp16 where they are not in fp32, on a few training images; "
        "null unless precision is fp16, where gradients overflow, and in epochs without a probe, as most are on a GPU"
    )
    probe_seconds: float = described("time measuring state and underflow_share", unit="s")
    loop: str = described("how steps were taken: graph (replays of a CUDA graph), or eager: and why")
    loss_scale_steps: tuple[int, ...] = described(
        "steps (from 1) from which each of loss_scale_values was in force", unit="steps", default=(), epoch_only=True
    )
    loss_scale_values: tuple[float, ...] = described(
        "loss scales in force during this epoch", default=(), epoch_only=True
    )
    val_recalls: tuple[float, ...] = described(
        "share of each class's validation images classified correctly, in fp32; empty without validation",
        default=(),
        epoch_only=True,
    )
    metrics: Mapping[str, float] = spread("values that the user's own task or training loop measured, a column each")

    def find_value(self, objective: str) -> float | None:
        """Return the value of an objective; None if it was not measured."""
        name = objective.partition(":")[0]
        value: float | None = self.metrics.get(name, getattr(self, name, None))
        return value


COMMON_METRICS = ("train_loss", "val_loss", "val_accuracy")
"""Metrics that have a column in every run, and that a user's own training may report too."""

MEAN_PARTS = ("mean", "std", "low", "high")
"""Suffixes of the columns that hold the mean of a metric over fresh seeds, its deviation and its interval."""

RESERVED_NAMES = frozenset({*field_types(TrialConfig), *field_types(EpochMetrics)} - {*COMMON_METRICS}) | {
    *("trial_id", "status", "trial_name", "error", "config_fault", "inert", "started", "wall_seconds", "setup_seconds"),
    *("checkpoint_seconds", "worker", "device", "num_threads", "rank", "confirm_seeds", "confirm_failures"),
    *("tied_with_best", "optimism", "verdict", "verdict_kind", "gain", "gain_low", "gain_high", "test_recalls"),
    *(f"{name}_{part}" for name in ("val_loss", "val_accuracy", "test_accuracy") for part in MEAN_PARTS),
    *SPREAD,
    # Ray Tune's
    *("report", "config", "done", "date", "timestamp", "pid", "hostname", "node_ip", "experiment_tag"),
    *("training_iteration", "time_this_iter_s", "time_total_s", "time_since_restore", "iterations_since_restore"),
}
"""Names that a user's own metric must not have: columns of the run's files, and keys of Ray Tune's results."""


def check_fields(record: object) -> None:
    """Check each field of a dataclass as ``checked_field`` does; an int becomes a float if the field is a float."""
    owner: type = type(record)
    for name in field_types(owner):
        object.__setattr__(record, name, checked_field(name, getattr(record, name), owner, name))


def checked_field(place: str, value: Any, owner: type, name: str) -> Any:
    """Return ``value`` as the field ``name`` of the dataclass ``owner``; raise InputError if it breaks type or rule."""
    value = checked_type(place, value, field_types(owner)[name])
    rule = owner.__dataclass_fields__[name].metadata["rule"]  # type: ignore[attr-defined]
    if rule is not None and value is not None:
        check(place, value, rule.holds(value), rule.text)
    return value


def checked_type(place: str, value: Any, expected: Any) -> Any:
    """Return ``value`` as the type: an int becomes a float if a float is expected; nothing else is converted.

    Raises:
        InputError: the value has another type, or is a float that is not finite; the message names ``place``.
    """
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if value is None and types.NoneType in options:
        return None
    if float in options and isinstance(value, int | float) and not isinstance(value, bool):
        check(place, value, is_finite(value), "must be a finite number")
        return float(value)
    if int in options and isinstance(value, int) and not isinstance(value, bool):
        check(place, value, -(2**63) <= value < 2**63, "must fit in 64 bits")  # as Arrow stores it
        return value
    if str in options and isinstance(value, str):
        return value
    kinds = {float: "a number", int: "a whole number", str: "a text", types.NoneType: "null"}
    raise InputError(f"{place}: must be {' or '.join(kinds[option] for option in options)}, got {shown(value)}")


def check(place: str, value: Any, holds: bool, rule: str) -> None:
    """Raise InputError with the place, the rule and the value unless the rule holds."""
    if not holds:
        raise InputError(f"{place}: {rule}, got {shown(value)}")


def is_finite(value: float | None) -> TypeGuard[float]:
    """Return whether a value is not None and is a finite number."""
    try:
        return value is not None and math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False
