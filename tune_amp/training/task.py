"""What is trained: a task of the user's own, or image classification, which is the default task."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tune_amp.training.batches import Batch
from tune_amp.training.data import Dataset, build_task_dataset
from tune_amp.training.memory import is_out_of_memory
from tune_amp.training.models import build_model
from tune_amp.training.optimizers import build_optimizer
from tune_amp.training.own_code import exits_as_errors, import_function, unchanged_process
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import RESERVED_NAMES, InputError, TrialConfig
from tune_amp.trial.text import describe_error, shown

Averages = Mapping[str, float | tuple[float, ...]]


class TaskError(RuntimeError):
    """A method of the user's own task failed. The message is one line that names the method."""


class Task:
    """What is trained: data, model, loss and score. A subclass defines only what differs from the defaults.

    ``--task module:Class`` names it. Each trial has an object of its own, made without arguments.
    """

    metric: tuple[str, str] = ("accuracy", "max")
    """Name of the first value of ``score`` and its better direction, ``max`` or ``min``: the column ``val_NAME``."""
    config: TrialConfig
    """The trial's configuration, known from ``model`` on."""
    training_data: TrainingData
    """The trial's data on its device, known from ``model`` on."""

    def bind(self, config: TrialConfig, data: TrainingData) -> None:
        """Connect the task with a trial. Called before ``model``."""
        self.config, self.training_data = config, data

    def read_state(self) -> dict[str, Any]:
        """Return the attributes that a subclass sets: a step that changes them is not captured as a CUDA graph."""
        return {name: value for name, value in vars(self).items() if name not in ("config", "training_data")}

    def data(self) -> tuple[Any, Any, Any]:
        """Return training, validation and test data, each a pair (inputs, targets) or a ``torch.utils.data.Dataset``.

        Inputs and targets are arrays or tensors of any shape, [n, ...]. uint8 images [n, channels, height, width] are
        scaled by ``input_scaling``; floats and integer tokens are passed as they are.
        """
        raise InputError("must be defined, or a data set be named by --dataset")

    def model(self, **own: Any) -> nn.Module:
        """Return the model, with float32 weights on the CPU; ``own`` are the trial's own parameters."""
        if self.config.model == self.config.task:
            raise InputError("must be defined, or a model be named by --model")
        data = self.training_data
        if not data.num_classes:
            raise InputError("must be defined: the data of this task have no classes")
        return build_model(self.config.model, data.input_shape, data.num_classes, own, dtype=data.input_dtype)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, 0-dim; in training, under autocast. Default: cross entropy."""
        inputs, targets = batch
        logits = model(inputs)
        return nn.functional.cross_entropy(_put_classes_second(logits, targets), targets)

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return sums over a batch by name, in strict fp32 without gradients: scalars or vectors. Default: accuracy.

        Without a sum called ``loss``, ``val_loss`` is the mean of ``loss``.
        """
        inputs, targets = batch
        hits = _put_classes_second(model(inputs), targets).argmax(dim=1) == targets
        return {"accuracy": hits.to(torch.float64).flatten(1).mean(dim=1).sum() if hits.ndim > 1 else hits.sum()}

    def average(self, sums: Mapping[str, float | list[float]], count: int) -> Averages:
        """Return the values of a split from its sums. Default: each sum divided by the ``count`` of items."""
        return {
            name: tuple(value / count for value in total) if isinstance(total, list) else total / count
            for name, total in sums.items()
        }

    def optimizer(self, model: nn.Module, config: TrialConfig) -> torch.optim.Optimizer:
        """Return the optimizer. Default: ``config.optimizer`` of all parameters, fused."""
        return build_optimizer(config, model)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler | None:
        """Return the schedule of the learning rate over ``steps``, or None. It advances at applied steps only."""
        return None

    def baseline(self) -> float | None:
        """Return the loss of a model that ignores its inputs.

        If it is None, a trial ends early only because a value is not finite or no loss scale is left.
        """
        return None

    def has_learned(self, loss: float, averages: Averages) -> bool | None:
        """Return whether a model with this loss is better than the baseline by 5 %; None without a baseline."""
        baseline = self.baseline()
        return None if baseline is None else loss < baseline - 0.05 * abs(baseline)

    def easy_to_hard(self) -> Tensor | None:
        """Return the indices of the training items by increasing difficulty, for a curriculum; None if unknown."""
        return None


class ImageClassification(Task):
    """The default task: inputs into classes, with the class weights, curricula and recalls that need classes."""

    _class_weights: Tensor | None = None

    def bind(self, config: TrialConfig, data: TrainingData) -> None:
        """Connect the task with a trial."""
        super().bind(config, data)
        self._class_weights = data.class_weights(config.class_weighting)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy, weighted by class."""
        images, labels = batch
        return nn.functional.cross_entropy(model(images), labels, weight=self._class_weights)

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the sum of the unweighted cross entropy, and the correctly classified and all images of each class."""
        images, labels = batch
        logits = model(images)
        # Not bincount, which waits for the device to find the length of its result.
        none = torch.zeros(logits.shape[1], dtype=torch.float64, device=labels.device)
        answers = (logits.argmax(dim=1) == labels).to(torch.float64)
        return {
            "loss": nn.functional.cross_entropy(logits, labels, reduction="sum"),
            "hits": none.index_add(0, labels, answers),
            "images": none.index_add(0, labels, torch.ones_like(answers)),
        }

    def average(self, sums: Mapping[str, float | list[float]], count: int) -> Averages:
        """Return loss, accuracy, and the accuracy within each class: NaN for a class without an image."""
        loss, hits, images = sums["loss"], sums["hits"], sums["images"]
        assert isinstance(loss, float)
        assert isinstance(hits, list)
        assert isinstance(images, list)
        recalls = tuple(hit / each if each else math.nan for hit, each in zip(hits, images, strict=True))
        return {"loss": loss / count, "accuracy": sum(hits) / count, "recalls": recalls}

    def baseline(self) -> float:
        """Return the entropy of the labels, in nats."""
        return self.training_data.guessing.loss

    def has_learned(self, loss: float, averages: Averages) -> bool:
        """Return whether the model is clearly better than guessing, by its loss or by its accuracy."""
        accuracy = averages.get("accuracy")
        assert not isinstance(accuracy, tuple)
        return self.training_data.guessing.is_beaten(loss, accuracy)

    def easy_to_hard(self) -> Tensor:
        """Return the indices of the training images by increasing difficulty."""
        return self.training_data.easy_to_hard


def _put_classes_second(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the logits of a sequence [n, length, classes] as [n, classes, length], others as they are."""
    is_sequence = logits.ndim == 3 and targets.ndim == 2 and logits.shape[:2] == targets.shape
    return logits.transpose(1, 2) if is_sequence else logits


def make_task(config: TrialConfig) -> Task:
    """Return the trial's task: the user's own, or image classification."""
    return ImageClassification() if config.task is None else load_task(config.task)


def load_task(name: str) -> Task:
    """Return an object of the class ``module:Class``, whose methods name themselves in errors.

    Raises:
        InputError: the user has not consented to it, or it cannot be imported or made, or is no task.
    """
    made = import_function(name)
    if not (isinstance(made, type) and issubclass(made, Task)):
        got = made.__name__ if isinstance(made, type) else type(made).__name__
        raise InputError(f"{name}: must be a class derived from tune_amp.training.Task, got {got}")
    try:
        with exits_as_errors():
            task = made()
    except Exception as error:  # user code may raise anything
        raise InputError(f"{name}: must be made without arguments ({describe_error(error)})") from error
    metric: Any = task.metric
    if not (isinstance(metric, tuple) and len(metric) == 2 and _is_name(metric[0]) and metric[1] in ("max", "min")):
        raise InputError(
            f'{name}.metric: must be (name, "max" or "min"), a name of letters, digits and _, got {shown(metric)}'
        )
    for method in _RESULTS:
        setattr(task, method, _name_failures(f"{name}.{method}", getattr(task, method)))
    return task


def load_task_dataset(name: str) -> Dataset:
    """Return the data of the task ``module:Class``.

    Raises:
        InputError: its ``data`` fails or returns something else than data.
    """
    task = load_task(name)
    try:
        with exits_as_errors(), unchanged_process():
            result = task.data()
    except TaskError as error:
        raise InputError(str(error)) from error
    return build_task_dataset(name, result, has_classes=isinstance(task, ImageClassification))


def _name_failures(place: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``method`` with its errors as one line that names it, and its result checked."""
    # Those that are called for every batch run within the exits_as_errors() of an epoch.
    guard = contextlib.nullcontext if place.endswith((".loss", ".score")) else exits_as_errors

    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            with guard():
                result = method(*arguments, **named)
        except (TaskError, torch.AcceleratorError):
            raise
        except InputError as error:
            if str(error).startswith(place.partition(":")[0]):
                raise
            raise InputError(f"{place}: {error}") from None  # a cause would excuse the settings
        except Exception as error:  # user code may raise anything
            if is_out_of_memory(error):
                raise
            raise TaskError(f"{place} failed ({describe_error(error)})") from error
        rule = _find_broken_rule(place.rpartition(".")[2], result)
        if rule is not None:
            raise TaskError(f"{place}: must return {rule}, got {_describe(result)}")
        return result

    return call


def _describe(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"{result.dtype} {list(result.shape)}"
    return shown(result) if isinstance(result, int | float | str | None) else type(result).__name__


def _is_name(name: Any) -> bool:
    """Return whether a metric may have this name: that of no other column."""
    is_free = name == "recalls" or f"val_{name}" not in RESERVED_NAMES
    return isinstance(name, str) and name.isidentifier() and is_free


_RESULTS: Mapping[str, tuple[Any, str]] = {
    "data": (object, "data"),
    "model": (nn.Module, "a torch.nn.Module"),
    "loss": (Tensor, "a 0-dim float tensor, the mean over the batch"),
    "score": (Mapping, "a dict of sums by name"),
    "average": (Mapping, "a dict of values by name"),
    "optimizer": (torch.optim.Optimizer, "a torch.optim.Optimizer"),
    "schedule": (LRScheduler | None, "a torch.optim.lr_scheduler.LRScheduler that needs no metric, or None"),
    "baseline": (int | float | None, "a finite number or None"),
    "has_learned": (bool | None, "a bool or None"),
    "easy_to_hard": (Tensor | None, "a tensor of indices or None"),
}
"""Method of a task -> type of its result, and the rule for messages."""


def _find_broken_rule(method: str, result: Any) -> str | None:
    """Return what a method must return; None if ``result`` is that."""
    kind, rule = _RESULTS[method]
    fits = isinstance(result, kind)
    if fits and method == "score":
        fits = bool(result)
        if not all(isinstance(value, Tensor) and value.ndim < 2 for value in result.values()):
            return "a dict of tensors, each a sum or a vector of sums"
        if not all(map(_is_name, result)):
            return "sums with names of letters, digits and _, each a new column val_NAME"
    elif fits and method == "loss":
        fits = result.ndim == 0 and result.is_floating_point()
    elif fits and method == "schedule":
        fits = not isinstance(result, ReduceLROnPlateau)
    elif fits and method == "baseline":
        fits = result is None or math.isfinite(result)
    return None if fits else rule
