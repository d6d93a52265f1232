"""Trains a chosen configuration again: for use, on the whole training set; or as a replay of its trial, bit for bit."""

import contextlib
import dataclasses
import functools
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from tune_amp.results.files import write_atomically
from tune_amp.training.amp import name_device
from tune_amp.training.data import Dataset, Split, make_long_tail, thin_classes
from tune_amp.training.own_loop import OwnRun
from tune_amp.training.run import TrainingRun
from tune_amp.training.runs import Run, start_run
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import EpochMetrics, InputError, TrialConfig
from tune_amp.trial.text import describe_error, dump_json, one_line

METRICS_FILE = "metrics.json"
CARD_FILE = "card.md"

# Fields that a clock or an allocator measured. All other fields of a replay must be equal to the last bit.
MEASURED_FIELDS = (
    "train_seconds",
    "val_seconds",
    "probe_seconds",
    "data_seconds",
    "samples_per_second",
    "peak_memory_bytes",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalResult:
    """A configuration trained on the whole training set and tested once."""

    config: TrialConfig
    epochs: Sequence[EpochMetrics]
    """Metrics of each epoch, without validation, since the validation images were trained on."""
    test_loss: float
    test_accuracy: float
    """Share of the test images classified correctly, in strict fp32."""
    test_recalls: tuple[float, ...]
    """The same share within each class; NaN for a class without a test image."""
    train_images: int
    test_images: int
    device: str
    data_hash: str
    input_shape: tuple[int, ...]
    """Channels, height and width of an image; the shape of another input."""
    input_dtype: str
    """Dtype of the inputs that weights expect: ``uint8`` images are scaled, ``float32`` and ``int64`` are not."""
    num_classes: int
    input_shift: float
    """Shift of pixels: the weights expect ``(pixel - input_shift) * input_factor`` in float32."""
    input_factor: float
    num_parameters: int
    """Number of parameters, frozen ones included; one that two layers share counts once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnResult:
    """What the user's own loop or task measured."""

    config: TrialConfig
    epochs: Sequence[EpochMetrics]
    tested: Mapping[str, float]
    """Metrics of the test set after the last epoch; empty if the user's own loop yields none while confirming."""
    device: str


class Training:
    """A run whose epochs are kept."""

    def __init__(self, config: TrialConfig, dataset: Dataset, device: torch.device, run: Run) -> None:
        self._config, self._dataset, self._device, self._run = config, dataset, device, run
        self._epochs: list[EpochMetrics] = []
        if not isinstance(run, OwnRun):
            with contextlib.suppress(OSError, SafetensorError):  # a full disk, which may have room later
                write_weights(run.model, io.BytesIO())  # what cannot be saved is refused before it is trained

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train, and yield the metrics of each epoch."""
        for metrics in self._run.epochs():
            self._epochs.append(metrics)
            yield metrics

    @property
    def divergence(self) -> str | None:
        """The reason why the training cannot recover, or None."""
        return self._run.hopeless

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """The trained models, by name: several, or none, if the user's own loop keeps them."""
        return self._run.models if isinstance(self._run, OwnRun) else {"model": self._run.model}

    def save(self, folder: Path, result: "FinalResult | OwnResult", source: dict[str, Any], card: str) -> list[str]:
        """Write the fp32 weights (safetensors), metrics with configuration and ``source`` as JSON, and the card.

        Return the names of the files.

        Raises:
            InputError: a file cannot be written, or exists already; the contents of ``folder`` are unchanged.
        """
        metrics = dump_json({**source, **dataclasses.asdict(result)}, indent=2) + "\n"
        writers: dict[str, Writer] = {
            f"{name}.safetensors": functools.partial(write_weights, model) for name, model in self.models.items()
        }
        writers[METRICS_FILE] = lambda file: file.write(metrics.encode())
        writers[CARD_FILE] = lambda file: file.write(card.encode())
        write_together(folder, writers)
        return list(writers)


class FinalTraining(Training):
    """Trains ``config`` on training and validation images together, then reads the test set once.

    Args:
        config: from ``results.load_best``.
        dataset: the data set that ``config`` was chosen on, as loaded.
        device: where to train.
    """

    def __init__(self, config: TrialConfig, dataset: Dataset, device: torch.device) -> None:
        whole = join_for_training(dataset, config.imbalance)
        self._train_images = len(whole)
        data = TrainingData(whole, None, dataset.num_classes, device)
        self._scaling = data.input_scaling(config.input_scaling)
        self._input_dtype = "uint8" if whole.is_scaled else str(data.input_dtype).removeprefix("torch.")
        super().__init__(config, dataset, device, TrainingRun(config, data))

    def test(self) -> FinalResult:
        """Evaluate the test set, once, after the last epoch."""
        assert len(self._epochs) == self._config.max_epochs  # epochs() ended, without divergence
        tested = self._run.test(self._dataset.test)
        return FinalResult(
            config=self._config,
            epochs=self._epochs,
            test_loss=tested["test_loss"],
            test_accuracy=tested["test_accuracy"],
            test_recalls=tested["test_recalls"],
            train_images=self._train_images,
            test_images=len(self._dataset.test),
            device=name_device(self._device),
            data_hash=self._dataset.content_hash,
            input_shape=self._dataset.input_shape,
            input_dtype=self._input_dtype,
            num_classes=self._dataset.num_classes,
            input_shift=self._scaling.shift,
            input_factor=self._scaling.factor,
            num_parameters=sum(parameter.numel() for parameter in self.models["model"].parameters()),
        )


class OwnTraining(Training):
    """Trains the user's own task on training and validation data together, or the user's own loop on what it has.

    ``objectives`` are metrics that a loop must yield; see ``FinalTraining``.
    """

    def __init__(
        self, config: TrialConfig, dataset: Dataset, device: torch.device, objectives: Sequence[str] = ()
    ) -> None:
        train = dataset.train if config.train else join_for_training(dataset, config.imbalance)
        data = TrainingData(train, None, dataset.num_classes, device)
        super().__init__(config, dataset, device, start_run(config, data, objectives=objectives, confirming=True))

    def test(self) -> OwnResult:
        """Return the metrics of the test set, which was read once, after the last epoch."""
        columns = self._run.test(self._dataset.test)
        tested = {name: value for name, value in columns.items() if isinstance(value, float)} | columns["metrics"]
        return OwnResult(config=self._config, epochs=self._epochs, tested=tested, device=name_device(self._device))


Writer = Callable[[BinaryIO], object]
"""Writes the content of a file."""


def write_together(folder: Path, writers: Mapping[str, Writer]) -> None:
    """Write all files of ``writers``, by name, or none.

    Raises:
        InputError: a file cannot be written, or exists already; the contents of ``folder`` are unchanged.
    """
    with contextlib.ExitStack() as undo:
        for path, write in ((folder / name, write) for name, write in writers.items()):
            try:
                write_atomically(path, write, replace=False)
            except (OSError, SafetensorError) as error:  # a full disk, most likely
                raise InputError(f"--output: {path} cannot be written ({one_line(str(error))})") from error
            undo.callback(path.unlink, missing_ok=True)
        undo.pop_all()


def write_weights(model: nn.Module, file: BinaryIO) -> None:
    """Write the weights of a model as safetensors.

    Raises:
        InputError: its state is not of dense tensors.
    """
    with tempfile.TemporaryDirectory() as folder:  # safetensors needs a path, and writes beside it
        path = Path(folder, "weights")
        try:
            save_model(model, str(path))
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # an extra state, a sparse buffer
            rule = "must be of dense tensors, as safetensors stores it"
            raise InputError(f"model: the state of {type(model).__name__} {rule} ({describe_error(error)})") from error
        file.write(path.read_bytes())


def replay_trial(config: TrialConfig, dataset: Dataset, device: torch.device) -> Iterator[EpochMetrics]:
    """Train as the trial did: with the same split, seed and data order, and validation after every epoch."""
    train = dataset.train if config.train else make_long_tail(dataset, config.imbalance).train
    return start_run(config, TrainingData(train, dataset.validation, dataset.num_classes, device)).epochs()


EPOCH_FIELDS = tuple(field.name for field in dataclasses.fields(EpochMetrics) if field.metadata["epoch_only"])
"""Fields that only ``epochs.parquet`` has."""


def find_differences(recorded: EpochMetrics, again: EpochMetrics, left_out: Sequence[str] = ()) -> list[str]:
    """Return the fields in which a replayed epoch differs from the recorded one, except times and memory."""
    passed = (*MEASURED_FIELDS, *left_out)
    names = [field.name for field in dataclasses.fields(EpochMetrics) if field.name not in passed]
    return [name for name in names if not _equal(getattr(recorded, name), getattr(again, name))]


def join_for_training(dataset: Dataset, imbalance: float) -> Split:
    """Join training and validation images, the classes of both as imbalanced as in the search's trials."""
    train = make_long_tail(dataset, imbalance).train
    return train.join(thin_classes(dataset.validation, dataset.num_classes, imbalance))


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(value, second[name]) for name, value in first.items())
    both_nan = isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second)
    return both_nan or first == second
