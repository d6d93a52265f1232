"""Refuses a space, a data set and a model that do not fit together, before anything starts."""

import contextlib
import io
import time
import types
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tune_amp.search.options import SearchOptions
from tune_amp.training.batches import pick_few
from tune_amp.training.data import Dataset
from tune_amp.training.memory import release_memory
from tune_amp.training.own_code import import_function, unchanged_process
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import PRECISIONS, InputError, OwnValue, TrialConfig, is_function_name
from tune_amp.trial.text import describe_error

if TYPE_CHECKING:  # it imports Optuna, which training a winner does not need
    from tune_amp.space.space import SearchSpace

CHECK_EPOCHS = 1_000
"""Epochs of a checked run, of which one is trained: a schedule that warms up expects more steps than one."""
CHECK_SECONDS = 10.0
"""Seconds after which the remaining precisions and optimizers are not checked: their first trials will show."""


def check_fit(
    space: "SearchSpace",
    dataset: Dataset,
    options: SearchOptions,
    *,
    may_use_gpus: bool = False,
) -> dict[str, str]:
    """Refuse what would make trials fail: a batch larger than the data set, a model that cannot be trained on it.

    Args:
        space: its precisions and optimizers are tried.
        dataset: two of its images are used.
        options: name the model.
        may_use_gpus: whether trials may train on a GPU. The check never does, since a process that has used a GPU
            keeps some of its memory. So precisions are not refused if only fp32 works on this machine's CPU.

    Returns:
        For each precision in which the model cannot be trained on this machine's CPU, the reason.

    Raises:
        InputError: the message says what does not fit.
    """
    if options.train is not None:
        import_function(options.train)
        for parameter in space.parameters:
            if parameter.fraction_of_trial:
                rule = "must not be a fraction of the trial beside --train, whose steps are unknown: give steps"
                raise InputError(f"{space.source}: parameters.{parameter.name}: {rule}")
        return {}
    images = f"the {len(dataset.train):,} training images of {dataset.name}"
    bounds, batches = space.bounds("batch_size"), space.bounds("accumulate")
    if bounds is not None and bounds[1] > len(dataset.train):
        raise InputError(f"{space.source}: batch_size: must be at most {images}, got {bounds[1]}")
    largest = TrialConfig().batch_size if bounds is None else bounds[1]
    if batches is not None and batches[1] * largest > len(dataset.train) >= largest:
        rule = f"batch_size times accumulate must be at most {images}"
        raise InputError(f"{space.source}: accumulate: {rule}, got {largest} times {batches[1]}")
    if len(dataset.train) < TrialConfig().batch_size and bounds is None:
        raise InputError(f"--dataset: {dataset.name} has fewer training images than the default batch_size")
    unfit = check_training(
        options.model,
        dataset,
        precisions={*space.precisions, *(("fp32",) if may_use_gpus else ())},
        optimizers=space.list_possible("optimizer"),
        device=torch.device("cpu"),
        task=options.task,
        own=space.own_defaults,
    )
    return {precision: reason for precision, reason in unfit.items() if precision in space.precisions}


def check_training(
    model: str,
    dataset: Dataset,
    *,
    precisions: Collection[str],
    optimizers: Sequence[str],
    device: torch.device,
    task: str | None = None,
    own: Mapping[str, OwnValue] = types.MappingProxyType({}),
) -> dict[str, str]:
    """Train ``model`` on two images for one step in each precision and with each optimizer, and validate on them.

    This runs the code of a trial: with the user's ``task`` and ``own`` parameters, if there are any. The model's output
    is suppressed, and no generator or setting is changed.

    Returns:
        For each precision in which this fails, the reason.

    Raises:
        InputError: it fails in all of them or with an optimizer, or the outputs are not logits.
    """
    users_own = [name for name in (model, task) if name is not None and is_function_name(name)]
    for name in users_own:
        import_function(name)  # not silenced: what a module prints when imported is for the user
    two = pick_few(dataset.train, 2)
    shape = ", ".join(map(str, dataset.input_shape))
    subject = f"model: {model}" if task is None else f"task: {task}"
    rule = f"{subject} must train on {'images' if two.is_scaled else 'inputs'} of shape [batch, {shape}]"
    settings: dict[str, Any] = {"model": model, "task": task, "own": own, "batch_size": 2, "max_epochs": CHECK_EPOCHS}
    fit: list[str] = []
    unfit: dict[str, str] = {}
    deadline = time.monotonic() + CHECK_SECONDS
    # Built-in models are not silenced: they are checked in a thread, beside others.
    with _silence() if users_own else contextlib.nullcontext(), unchanged_process():
        data = TrainingData(two, two, dataset.num_classes, device, workers=0)
        for precision in sorted(precisions, key=PRECISIONS.index):  # fp16 last: a CPU may take long for it
            if time.monotonic() < deadline:
                reason = _try_step(TrialConfig(precision=precision, optimizer=optimizers[0], **settings), data)
                if reason is None:
                    fit.append(precision)
                else:
                    unfit[precision] = reason
        if len(unfit) == len(precisions):
            precision, reason = next(iter(unfit.items()))
            raise InputError(f"{rule}, got {reason} (in {precision})")
        for optimizer in optimizers[1:]:
            if fit and time.monotonic() < deadline:
                reason = _try_step(TrialConfig(precision=fit[0], optimizer=optimizer, **settings), data)
                if reason is not None:
                    raise InputError(f"{rule} with {optimizer}, got {reason}")
    if device.type == "cuda":
        release_memory(device)
    return unfit


def _try_step(config: TrialConfig, data: TrainingData) -> str | None:
    """Return why an epoch of one step fails; None if it does not, or if only the device is at fault."""
    try:
        run = TrainingRun(config, data, capture=None, probed=False)
        if config.task is None:
            run.model = _CheckedModel(run.model, config.model, data.num_classes)
        run.train_epoch()
    except InputError:
        raise
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # memory that others hold is not the model's fault
        return None
    except Exception as error:  # a user's model may raise anything
        return describe_error(error)
    return None


class _CheckedModel(nn.Module):
    """Checks that every output of ``model`` is logits. A hook would do the same, but not for scripted models.

    Raises:
        InputError: an output is something else.
    """

    def __init__(self, model: nn.Module, name: str, num_classes: int) -> None:
        super().__init__()
        self._model = model
        self._name = name
        self._num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        logits = self._model(images)
        expected = (len(images), self._num_classes)
        if isinstance(logits, Tensor) and tuple(logits.shape) == expected and logits.is_floating_point():
            return logits
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        mode = "training" if self.training else "evaluation"
        rule = f"must return float logits of shape {list(expected)} for {expected[0]} images"
        raise InputError(f"model: {self._name} {rule}, got {got} in {mode} mode")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the output of a user's own model or task in the ``with`` block."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
