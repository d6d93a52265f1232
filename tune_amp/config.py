"""The words every other file uses: what a trial depends on, what it reports, and how it can end.

Needs nothing but the standard library, so that a Parquet file can be read without torch, Ray or Optuna.
"""

import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
MODELS = ("simple_net", "conv_net", "vit")
DATASETS = ("mnist", "fashion_mnist", "kmnist", "digits")
OPTIMIZERS = ("adam", "adamw", "sgd")
INPUT_SCALINGS = ("minmax", "standard")
CLASS_WEIGHTINGS = ("none", "balanced")
CURRICULA = ("none", "linear", "root", "step")
RANKING_OBJECTIVES = ("val_accuracy", "val_loss")
OBJECTIVES = (*RANKING_OBJECTIVES, "train_seconds", "peak_memory_bytes")
MORE_IS_BETTER = ("val_accuracy",)
SAMPLERS = ("tpe", "random", "gp", "cmaes", "nsga2")
SCHEDULERS = ("asha", "hyperband", "median", "none")
PICKLING_SAMPLERS = ("cmaes",)
"""Samplers that keep their state in the study as a pickle, which Optuna loads when a search is resumed."""

MOST_SECONDS = 1e12
"""That a file can hold: far more than a search takes, and a number that fills no line."""
LARGEST_SHARE = 100.0
"""That a file can hold: an accuracy is 1 at most, but the interval of a mean over two seeds goes beyond."""

# torch.amp.GradScaler's own defaults: what fp16 gets where nothing else is said.
SCALER_DEFAULTS: Mapping[str, float | int] = types.MappingProxyType(
    {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
)

# GradScaler keeps its scale in fp32: outside the normal range the scale or its inverse overflows, and weights turn NaN.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**127

_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?", re.IGNORECASE)


_FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class InputError(ValueError):
    """Something a user can get wrong: one line that names the place, the rule and the value. Exit code 2."""


class TrialStatus(StrEnum):
    """How a trial ended."""

    COMPLETED = "completed"
    """Trained to its full budget."""
    STOPPED = "stopped"
    """Ended early by the scheduler."""
    DIVERGED = "diverged"
    """Ended as soon as training was past saving: see ``HOPELESS_STATES``."""
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    """Ended by any other exception, or by the death of its worker."""
    INTERRUPTED = "interrupted"
    """Still training when the search ended: by Ctrl-C, a signal or the time budget."""


RUNNING = "running"
"""``status`` in the reports of a trial that goes on. Every other value is a ``TrialStatus``."""

HOPELESS_STATUSES = (TrialStatus.DIVERGED, TrialStatus.OUT_OF_MEMORY)
"""Ends that the trial's settings are to blame for."""


class TrainingState(StrEnum):
    """How loss scaling and training stand after an epoch."""

    CALIBRATING = "calibrating"
    """Most steps of the epoch were skipped while the scale came down to where gradients do not overflow."""
    STEADY = "steady"
    STARVED = "starved"
    """Gradients underflow: they are zero in fp16 where those of fp32 are not. A growing scale can mend that."""
    COLLAPSED = "collapsed"
    """Nothing learned, and no scale within reach lets it, or no weight gets a gradient even in fp32."""
    DIVERGED = "diverged"
    """Weights, or the validation loss, are no longer finite."""


HOPELESS_STATES = (TrainingState.COLLAPSED, TrainingState.DIVERGED)


def described(doc: str, *, unit: str = "", default: Any = dataclasses.MISSING, epoch_only: bool = False) -> Any:
    """A dataclass field that carries its description and unit, from which the Arrow schema is built.

    ``epoch_only`` keeps a field out of ``trials.parquet``, whose rows are trials.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "unit": unit, "epoch_only": epoch_only})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that one trial depends on, checked on construction.

    The four scaler fields are None unless ``precision`` is ``fp16``; one left out there gets GradScaler's default.

    Raises:
        InputError: a field breaks its rule; the message says which field, the rule and the value.
    """

    lr: float = described("learning rate", default=1e-3)
    batch_size: int = described("images a training step", unit="images", default=64)
    precision: str = described("fp32 (strict), tf32, bf16 or fp16 autocast", default="fp32")
    init_scale: float | None = described("initial loss scale of GradScaler", default=None)
    growth_factor: float | None = described("factor by which the loss scale grows", default=None)
    backoff_factor: float | None = described("factor applied to the loss scale after an overflow", default=None)
    growth_interval: int | None = described(
        "steps without overflow before the loss scale grows", unit="steps", default=None
    )
    model: str = described("built-in model, or module:function", default="simple_net")
    dataset: str = described("built-in data set, or module:function", default="mnist")
    imbalance: float = described(
        "images of the most frequent training class for one of the rarest; 1: the data as they are", default=1.0
    )
    optimizer: str = described("adam, adamw or sgd (momentum 0.9)", default="adam")
    weight_decay: float = described("weight decay", default=0.0)
    grad_clip: float | None = described("largest L2 norm of the unscaled gradients", default=None)
    input_scaling: str = described(
        "minmax: [0, 1]; standard: mean 0, deviation 1 of the training split", default="minmax"
    )
    class_weighting: str = described(
        "none, or balanced: inverse class frequency in the whole training split", default="none"
    )
    curriculum: str = described("none; or from easy images to all, at the pace of: linear, root, step", default="none")
    max_epochs: int = described("epochs of a trial that is not stopped", unit="epochs", default=5)
    seed: int = described("seed of weights and data order", default=0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked_type(field.name, getattr(self, field.name), FIELD_TYPES[field.name])
            object.__setattr__(self, field.name, value)
        _check_range("lr", self.lr, self.lr > 0, "must be greater than 0")
        _check_range("batch_size", self.batch_size, self.batch_size >= 1, "must be at least 1")
        _check_choice("precision", self.precision, PRECISIONS)
        self._check_scaler()
        _check_choice("model", self.model, MODELS, function=True)
        _check_choice("dataset", self.dataset, DATASETS, function=True)
        _check_range("imbalance", self.imbalance, self.imbalance >= 1, "must be at least 1")
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_range("weight_decay", self.weight_decay, self.weight_decay >= 0, "must be at least 0")
        _check_range(
            "grad_clip", self.grad_clip, self.grad_clip is None or self.grad_clip > 0, "must be greater than 0"
        )
        _check_choice("input_scaling", self.input_scaling, INPUT_SCALINGS)
        _check_choice("class_weighting", self.class_weighting, CLASS_WEIGHTINGS)
        _check_choice("curriculum", self.curriculum, CURRICULA)
        _check_range("max_epochs", self.max_epochs, self.max_epochs >= 1, "must be at least 1")
        _check_range("seed", self.seed, 0 <= self.seed < 2**63, "must be between 0 and 2^63 - 1")

    def _check_scaler(self) -> None:
        """Rules that GradScaler itself does not check: it takes 0, negative, infinite and NaN scales without a word."""
        for name, default in SCALER_DEFAULTS.items():
            value = getattr(self, name)
            if self.precision != "fp16":
                _check_range(name, value, value is None, "must be left out unless precision is fp16")
            elif value is None:
                object.__setattr__(self, name, default)
        if self.precision != "fp16":
            return
        assert self.init_scale is not None  # filled above, as are the other three
        assert self.growth_factor is not None
        assert self.backoff_factor is not None
        assert self.growth_interval is not None
        in_range = SMALLEST_SCALE <= self.init_scale <= LARGEST_SCALE
        _check_range("init_scale", self.init_scale, in_range, "must be between 2^-126 and 2^127 (fp32's normal range)")
        _check_range("growth_factor", self.growth_factor, self.growth_factor > 1, "must be greater than 1")
        _check_range(
            "backoff_factor", self.backoff_factor, 0 < self.backoff_factor < 1, "must be between 0 and 1, both excluded"
        )
        _check_range("growth_interval", self.growth_interval, self.growth_interval >= 1, "must be at least 1")


def list_settings(config: TrialConfig) -> dict[str, Any]:
    """The fields of a configuration that do something; what is off is left out."""
    off: tuple[tuple[str, Any], ...] = (("class_weighting", "none"), ("curriculum", "none"), ("imbalance", 1.0))
    return {name: value for name, value in vars(config).items() if value is not None and (name, value) not in off}


FIELD_TYPES: Mapping[str, Any] = types.MappingProxyType(typing.get_type_hints(TrialConfig))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What a trial reports after an epoch.

    Counts and seconds are cumulative, so that the last report tells the whole trial: Tune keeps no other.
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
    peak_memory_bytes: int | None = described("peak CUDA memory allocated by the trial; null without CUDA", unit="B")
    state: str = described("how training stands: " + ", ".join(TrainingState))
    underflow_share: float | None = described(
        "share of the gradient's elements that are zero in fp16 where they are not in fp32, on a few training images; "
        "null unless precision is fp16, and where gradients overflow"
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


def checked_type(name: str, value: Any, expected: Any) -> Any:
    """``value`` as the field's type: an int becomes a float where a float is due; nothing else is converted.

    Raises:
        InputError: the value has another type, or is a float that is not finite.
    """
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if value is None and types.NoneType in options:
        return None
    if float in options and isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(name, value, _is_finite(value), "must be a finite number")
        return float(value)
    if int in options and isinstance(value, int) and not isinstance(value, bool):
        _check_range(name, value, -(2**63) <= value < 2**63, "must fit in 64 bits")  # as Arrow stores it
        return value
    if str in options and isinstance(value, str):
        return value
    kinds = {float: "a number", int: "a whole number", str: "a text", types.NoneType: "null"}
    rule = " or ".join(kinds[option] for option in options)
    raise InputError(f"{name}: must be {rule}, got {shown(value)}")


def shown(value: Any) -> str:
    """``repr`` of a user's value for a one-line message, shortened where it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print an int of more than 4,300 digits
        return f"<{type(value).__name__} too long to show>"


def format_scale(scale: float | None) -> str:
    """A loss scale as people say it: ``2^16`` where it is a power of two."""
    if scale is None:
        return ""
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{scale:.4g}"


def is_function_name(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:function``."""
    return _FUNCTION_NAME.fullmatch(name) is not None


def one_line(text: str, limit: int = 300) -> str:
    """``text`` with every white space as one blank, cut to ``limit`` characters where it is longer.

    What a terminal would act on, and what no encoding knows (file names can hold it), becomes a replacement character.
    """
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def code_span(text: str) -> str:
    """``text`` of a file as Markdown shows it: on one line, as inline code, in which neither Markdown nor HTML acts."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if not line or "`" in (line[0], line[-1]) else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def describe_error(error: BaseException) -> str:
    """An exception's type and text on one line: some libraries write paragraphs."""
    return one_line(f"{type(error).__name__}: {error}")


def generalize_error(text: str) -> str:
    """The text of an error without numbers and addresses: errors that differ in nothing else are the same error."""
    return _NUMBER.sub("#", text)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def _check_range(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise InputError(f"{name}: {rule}, got {shown(value)}")


def _check_choice(name: str, value: str, known: tuple[str, ...], *, function: bool = False) -> None:
    if value in known or (function and is_function_name(value)):
        return
    names = ", ".join(known) + (", or module:function" if function else "")
    raise InputError(f"{name}: must be one of {names}, got {shown(value)}")
