"""The programs that ``loop`` measures, ready to take their turns: the tutorial's loop, and ours in four forms."""

import contextlib
import dataclasses
import itertools
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tune_amp.training.amp import AUTOCAST_DTYPES, fp32_arithmetic
from tune_amp.training.cuda_graph import WARM_UP_STEPS, Capture, capture_cuda_graph
from tune_amp.training.data import Split
from tune_amp.training.models import build_model
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig

TUTORIAL, EAGER, GRAPH, COMPILED, COMPILED_GRAPH = "tutorial", "eager", "graph", "compiled", "compiled graph"
MEANINGS = {
    TUTORIAL: "`DataLoader` over a torchvision-like data set (on CUDA with a worker and pinned memory), unfused Adam, "
    "`GradScaler`, `.item()` at every step",
    EAGER: "ours, one step after the other",
    GRAPH: "ours, a whole step captured as a CUDA graph",
    COMPILED: "ours, one step after the other, the model through `torch.compile`",
    COMPILED_GRAPH: "both",
}
LONG = 1_000_000
"""Epochs of a trial without an end: our run captures its steps only where enough of them are left."""
MEAN, DEVIATION = 0.1307, 0.3081
"""Of MNIST's pixels: the two numbers in every tutorial."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """What all programs of a cell train."""

    config: TrialConfig
    train: Split
    num_classes: int
    device: torch.device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What a program did in its turn."""

    images: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A program that is warmed up."""

    take_turn: Callable[[], Turn]
    compile_seconds: float | None = None


# ---- the tutorial's program ----


class TutorialImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images as ``torchvision.datasets.MNIST`` serves them: one PIL image at a time, through the transforms.

    Args:
        split: the images.
        transform: of a PIL image.
    """

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]) -> None:
        self.data = torch.tensor(split.images[:, 0])
        self.targets = torch.tensor(split.labels)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.data[index].numpy())), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.data)


def list_loader_options(device: torch.device) -> dict[str, Any]:
    """What PyTorch's MNIST example gives its loader where there is a GPU; that the worker lives on is ours."""
    return {"num_workers": 1, "pin_memory": True, "persistent_workers": True} if device.type == "cuda" else {}


def _prepare_tutorial(cell: Cell, seconds: float) -> Prepared:
    """What PyTorch's tutorials show, put together.

    The loaders' options on CUDA are those of its MNIST example, as in ``obvious``; ``.item()`` at every step is from
    "Training a Classifier", autocast and ``GradScaler`` from the AMP recipe.
    """
    from torchvision import transforms  # type: ignore[import-untyped]

    config, device = cell.config, cell.device
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (DEVIATION,))])
    loader = torch.utils.data.DataLoader(
        TutorialImages(cell.train, transform),
        batch_size=config.batch_size,
        shuffle=True,
        **list_loader_options(device),
    )
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    torch.manual_seed(config.seed)
    model = build_model(config.model, cell.train.images.shape[1:], cell.num_classes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    criterion = nn.CrossEntropyLoss()
    dtype = AUTOCAST_DTYPES.get(config.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def train(steps: int) -> Turn:
        started = time.perf_counter()
        running_loss, count = 0.0, 0
        for images, labels in itertools.islice(batches, steps):
            images, labels = images.to(device), labels.to(device)  # noqa: PLW2901 - as the tutorials write it
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                loss = criterion(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            running_loss += loss.item()
            count += len(labels)
        wait_for(device)
        return Turn(images=count, seconds=time.perf_counter() - started)

    def train_as_told(steps: int) -> Turn:
        with fp32_arithmetic(config.precision):  # the same arithmetic as ours: PyTorch's own default is a mixture
            return train(steps)

    train_as_told(1)
    steps = math.ceil(seconds * train_as_told(1).rate / config.batch_size)
    return Prepared(take_turn=lambda: train_as_told(steps))


# ---- ours ----


def _prepare_eager(cell: Cell, seconds: float) -> Prepared:
    data = _place_share(cell, seconds)
    run = TrainingRun(cell.config, data, capture=None)
    run.train_epoch()
    return Prepared(take_turn=lambda: take_epochs(run, len(data.train), seconds))


def _prepare_graph(cell: Cell, seconds: float) -> Prepared:
    data = _place_share(cell, seconds)
    run = TrainingRun(cell.config, data)
    train_until_captured(run)
    return Prepared(take_turn=lambda: take_epochs(run, len(data.train), seconds))


def _prepare_compiled(cell: Cell, seconds: float, *, capture: Capture | None = None) -> Prepared:
    data = _place_share(cell, seconds)
    run = TrainingRun(cell.config, data, capture=capture)
    run.model = CompiledForBatches(run.model, cell.config.batch_size)
    with _fresh_compiler_cache(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about its own parts
        first, second = run.train_epoch(), run.train_epoch()
        if capture is not None:
            train_until_captured(run)
    later = second.train_seconds - first.train_seconds
    return Prepared(
        take_turn=lambda: take_epochs(run, len(data.train), seconds),
        compile_seconds=max(0.0, first.train_seconds - later),
    )


def _prepare_compiled_graph(cell: Cell, seconds: float) -> Prepared:
    return _prepare_compiled(cell, seconds, capture=capture_cuda_graph)


def train_until_captured(run: TrainingRun) -> None:
    """Take the eager steps, and the capture after them.

    Raises:
        RuntimeError: there was none; the message is the run's own.
    """
    for _ in range(WARM_UP_STEPS + 1):  # of one step each at least
        loop = run.train_epoch().loop
        if loop == GRAPH:
            return
    raise RuntimeError(loop)


class CompiledForBatches(nn.Module):
    """A model compiled for training batches; the probe's few images take the plain one, which costs no compilation.

    Args:
        model: shares its parameters.
        batch_size: of training.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.model = model
        self._batch_size = batch_size
        self._compiled = torch.compile(model.forward, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ``images``."""
        forward = self._compiled if len(images) == self._batch_size and self.training else self.model
        logits: Tensor = forward(images)
        return logits


PREPARE: Mapping[str, Callable[[Cell, float], Prepared]] = {
    TUTORIAL: _prepare_tutorial,
    EAGER: _prepare_eager,
    GRAPH: _prepare_graph,
    COMPILED: _prepare_compiled,
    COMPILED_GRAPH: _prepare_compiled_graph,
}


def take_epochs(run: TrainingRun, epoch_images: int, seconds: float) -> Turn:
    """Train whole epochs until so many seconds of training are over: at least one.

    Also what is past saving: only its time is of interest.

    Args:
        run: in training.
        epoch_images: that it trains on in an epoch.
        seconds: of the turn.
    """
    images, trained = 0, 0.0
    while trained < seconds:
        images += epoch_images
        trained += epoch_images / run.train_epoch().samples_per_second
    return Turn(images=images, seconds=trained)


def _place_share(cell: Cell, seconds: float) -> TrainingData:
    """As many images as one epoch of about ``seconds`` needs, in whole batches, at least a few and all at most."""
    pilot = TrainingRun(
        cell.config,
        TrainingData(take(cell.train, 2 * cell.config.batch_size), None, cell.num_classes, cell.device),
        capture=None,
    )
    pilot.train_epoch()
    rate = pilot.train_epoch().samples_per_second
    batches = max(WARM_UP_STEPS + 2, int(seconds * rate / cell.config.batch_size))
    return TrainingData(take(cell.train, batches * cell.config.batch_size), None, cell.num_classes, cell.device)


def take(split: Split, count: int) -> Split:
    """The first images."""
    return Split(images=split.images[:count], labels=split.labels[:count])


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _fresh_compiler_cache() -> Iterator[None]:
    """Compile anew: what an earlier run left on disk would make the compile time look small."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    torch.compiler.reset()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
