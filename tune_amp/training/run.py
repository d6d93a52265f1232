"""Trains and evaluates one configuration. It does not use Ray: a trial, a replay and a script run the same code."""

import contextlib
import dataclasses
import functools
import gc
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tune_amp.training.amp import AmpStep, GradientProbe, all_finite, find_nan, flushing_denormals, fp32_arithmetic
from tune_amp.training.batches import (
    DeviceSplit,
    InputScaling,
    batch_indices,
    class_weights,
    difficulty_order,
    fit_input_scaling,
    place_split,
    scale_images,
)
from tune_amp.training.buffers import FiniteBuffers
from tune_amp.training.cuda_graph import (
    Capture,
    StepLoop,
    capturable,
    capture_cuda_graph,
    clear_workspaces,
    explain_eager,
)
from tune_amp.training.data import Split
from tune_amp.training.evaluation import Evaluation, evaluate
from tune_amp.training.generators import Generators, keep_generators, seed_generators
from tune_amp.training.models import InputShape, build_model
from tune_amp.training.own_code import exits_as_errors
from tune_amp.training.verdict import EpochEvidence, Verdict, judge_epoch
from tune_amp.trial.config import EpochMetrics, TrialConfig
from tune_amp.trial.curricula import count_drawn_images

ESTIMATE_IMAGES = 32
ESTIMATE_SCALING = InputScaling(shift=0.0, factor=1 / 255)
SGD_MOMENTUM = 0.9


class TrainingData:
    """A training split, and optionally a validation split, resident on one device and reused by successive trials.

    Args:
        train: the images to train on.
        validation: the images to validate on after every epoch, or None to train without validation.
        num_classes: labels are 0 .. num_classes - 1.
        device: device that holds both splits, as uint8: 47 MB for 60,000 MNIST images, a quarter of float32.
    """

    def __init__(self, train: Split, validation: Split | None, num_classes: int, device: torch.device) -> None:
        started = time.perf_counter()
        self.num_classes = num_classes
        self.device = device
        self.input_shape: InputShape = train.images.shape[1:]
        self.train = place_split(train, device)
        self.validation = None if validation is None else place_split(validation, device)
        self._placing_seconds = time.perf_counter() - started
        self._host_train = train
        self._measured = train if validation is None else validation

    def claim_placing_seconds(self) -> float:
        """Return, once, the seconds spent placing and sorting the data, so that only the waiting trial is charged."""
        seconds, self._placing_seconds = self._placing_seconds, 0.0
        return seconds

    @functools.cache  # noqa: B019 - lives as long as the worker process
    def input_scaling(self, method: str) -> InputScaling:
        """Return the input scaling, fitted to the training split only."""
        return fit_input_scaling(self._host_train, method)

    @functools.cache  # noqa: B019
    def class_weights(self, method: str) -> Tensor | None:
        """Return the loss weights, float32 [num_classes], from the training split's class counts after any thinning."""
        weights = class_weights(self._host_train.labels, self.num_classes, method)
        return None if weights is None else weights.to(self.device)

    @functools.cached_property
    def guessing(self) -> "Guessing":
        """Results of a model that uses the class frequencies and ignores the images.

        The frequencies are those of the split that is measured: validation may be balanced if training is not.
        """
        labels = self._measured.labels
        shares = np.bincount(labels, minlength=self.num_classes) / len(labels)
        entropy = -float(sum(share * math.log(share) for share in shares if share > 0))
        return Guessing(loss=entropy, accuracy=float(shares.max()), images=len(labels))

    @functools.cached_property
    def easy_to_hard(self) -> Tensor:
        """Indices of the training images by increasing difficulty, int64 [n]."""
        started = time.perf_counter()
        order = torch.from_numpy(difficulty_order(self._host_train, self.num_classes)).to(self.device)
        self._placing_seconds += time.perf_counter() - started
        return order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guessing:
    """The best results possible without looking at an image."""

    loss: float
    """Entropy of the labels, in nats."""
    accuracy: float
    """Share of the most frequent class."""
    images: int
    """Number of images that accuracies are measured on."""

    def is_beaten(self, loss: float, accuracy: float | None) -> bool:
        """Return whether a model is clearly better: by 5 % of the loss, or by 3 standard errors of the accuracy."""
        if loss < 0.95 * self.loss:
            return True
        error = math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)
        return accuracy is not None and accuracy > self.accuracy + 3 * error


class MemoryMeter:
    """Peak CUDA memory of a run's training, without evaluation and without memory allocated before the run.

    Args:
        device: device that the run will train on. Memory allocated there now is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes: int | None = None
        """Peak so far, in bytes; None without CUDA, and before the first measurement."""
        if device.type == "cuda":
            clear_workspaces()  # else a worker's first trial would be charged for them, and later trials not
            self._resident_bytes = torch.cuda.memory_allocated(device)

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Record the peak of a ``with`` block."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        yield
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - self._resident_bytes
            self.peak_bytes = max(self.peak_bytes or 0, peak)


class TrainingRun:
    """One configuration in training: everything that changes from epoch to epoch, checkpointed as a whole.

    Args:
        config: configuration to train. Its seed sets the generator of the data order and, while the model is made,
            trained or evaluated, the global ones of torch, NumPy and Python, whose states are restored afterwards.
        data: resident training data; validation metrics are None if it holds no validation split.
        allow_graph: whether steps may be captured as a CUDA graph if that pays. ``EpochMetrics.loop`` records whether
            they were.
        capture: function that captures a step; if None, a CUDA graph on a GPU and no capture on the CPU.
        probed: whether gradients are probed after an epoch.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: TrainingData,
        *,
        allow_graph: bool = True,
        capture: Capture | None = None,
        probed: bool = True,
    ) -> None:
        self._config = config
        self._data = data
        self._order = torch.Generator().manual_seed(config.seed)
        self._generators = Generators(config.seed, data.device)
        self._scaling = data.input_scaling(config.input_scaling)
        self._class_weights = data.class_weights(config.class_weighting)
        # Sorted now, so that it counts as placing the data, not as the first epoch's training time.
        self._easy_to_hard = None if config.curriculum == "none" else data.easy_to_hard
        self._memory = MemoryMeter(data.device)
        with self._generators.in_use():
            self.model = build_model(config.model, data.input_shape, data.num_classes).to(data.device)
        self._optimizer = build_optimizer(config, self.model)
        self._max_steps = len(data.train.labels) // config.batch_size
        self._amp = AmpStep(config, data.device, max_steps=self._max_steps)
        # With any other precision no step is skipped, and an overflow destroys the weights as well.
        self._buffers = FiniteBuffers(self.model.buffers() if config.precision == "fp16" else ())
        self._allow_graph = allow_graph
        self._capture = capture_cuda_graph if capture is None and data.device.type == "cuda" else capture
        # Chosen in the first epoch of a run, and again after it resumes from a checkpoint.
        self._loop: StepLoop | None = None
        self._why_eager: str | None = None
        self._can_be_probed = probed
        # Kept until a weight has moved, and on the host, so that no device memory is charged for it.
        self._initial: list[Tensor] | None = [p.detach().to("cpu", copy=True) for p in self.model.parameters()]
        self._epoch = 0
        self.hopeless: str | None = None
        """Reason why training is past saving after the last epoch; None while it may still get better."""
        self._train_seconds = self._val_seconds = self._probe_seconds = 0.0
        self._data_seconds = data.claim_placing_seconds()

    @property
    def epoch(self) -> int:
        """Number of epochs trained so far."""
        return self._epoch

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train the epochs left of ``max_epochs``, and stop early if the run is past saving."""
        while self._epoch < self._config.max_epochs and self.hopeless is None:
            yield self.train_epoch()

    @exits_as_errors()
    @torch.enable_grad()  # a user's module may have turned gradients off for its own use
    def train_epoch(self) -> EpochMetrics:
        """Train one epoch and validate.

        Raises:
            InputError: ``batch_size`` exceeds the number of training images, so that no step is possible.
        """
        with self._generators.in_use():
            return self._train_epoch()

    def _train_epoch(self) -> EpochMetrics:
        before = self._amp.telemetry
        started = time.perf_counter()
        batches = self._draw_batches()  # timed: other programs' loaders draw batches within the loop
        with self._memory.measure():  # without validation, which is in fp32 whatever the precision
            train_loss = self._train(batches)
            train_seconds = time.perf_counter() - started
        self._train_seconds += train_seconds
        self._epoch += 1
        validated = self._validate()
        val_loss, val_accuracy = (None, None) if validated is None else (validated.loss, validated.accuracy)
        started = time.perf_counter()
        has_learned = self._data.guessing.is_beaten(train_loss if val_loss is None else val_loss, val_accuracy)
        steps = self._amp.telemetry.steps - before.steps
        skipped = self._amp.telemetry.skipped_steps - before.skipped_steps
        probe = self._probe(batches, has_learned=has_learned, all_skipped=skipped == steps)
        verdict = self._judge(probe, val_loss, has_learned=has_learned, steps=steps, skipped=skipped)
        self.hopeless = verdict.hopeless
        self._probe_seconds += time.perf_counter() - started
        return EpochMetrics(
            epoch=self._epoch,
            train_loss=train_loss,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            **vars(self._amp.telemetry),
            train_seconds=self._train_seconds,
            val_seconds=self._val_seconds,
            data_seconds=self._data_seconds,
            samples_per_second=batches.numel() / train_seconds,
            peak_memory_bytes=self._memory.peak_bytes,
            state=str(verdict.state),
            underflow_share=probe.underflow_share,
            probe_seconds=self._probe_seconds,
            loop=self._loop.describe() if self._loop is not None else f"eager: {self._why_eager}",
            val_recalls=() if validated is None else validated.recalls,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from bit for bit, as tensors and plain values (``weights_only=True`` loads it)."""
        return {
            "epoch": self._epoch,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "amp": self._amp.state_dict(),
            "order": self._order.get_state(),
            "generators": self._generators.state,
            "seconds": [self._train_seconds, self._val_seconds, self._probe_seconds, self._data_seconds],
            "peak_memory_bytes": self._memory.peak_bytes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state_dict``. Learning rate, weight decay and scaler settings stay this run's own."""
        self._epoch = state["epoch"]
        self._loop = self._why_eager = None  # a graph would keep using the tensors that are replaced here
        self._amp.follow(None)
        self.model.load_state_dict(state["model"])
        own = {"lr": self._config.lr, "weight_decay": self._config.weight_decay}
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            group.update(own)
        self._amp.load_state_dict(state["amp"])
        self._order.set_state(state["order"])
        self._generators.state = state["generators"]
        self._train_seconds, self._val_seconds, self._probe_seconds, data_seconds = state["seconds"]
        self._data_seconds += data_seconds
        self._memory.peak_bytes = state["peak_memory_bytes"]

    def evaluate(self, split: DeviceSplit) -> Evaluation:
        """Evaluate the model on ``split``, in strict fp32."""
        with self._generators.in_use():
            return self._evaluate(split)

    def _evaluate(self, split: DeviceSplit) -> Evaluation:
        return evaluate(self.model, split, self._scaling, batch_size=self._config.batch_size)

    def _train(self, batches: Tensor) -> float:
        """Train on ``batches``, int64 [steps, batch_size], and return the mean loss of the steps."""
        self.model.train()
        if self._loop is None and self._why_eager is None:
            self._choose_loop()
        with fp32_arithmetic(self._config.precision), flushing_denormals():
            if self._loop is not None:
                self._loop.take(batches)
            else:
                for indices in batches:
                    self._step(indices)
            return self._amp.read_epoch()  # waits for the device, so that the caller's timing is right

    def _choose_loop(self) -> None:
        steps_left = (self._config.max_epochs - self._epoch) * self._max_steps
        has_graphs = self._capture is not None
        self._why_eager = explain_eager(has_graphs=has_graphs, allowed=self._allow_graph, steps_left=steps_left)
        if self._why_eager is None:
            self._loop = StepLoop(
                self._step,
                self.model,
                self._data.device,
                max_steps=self._max_steps,
                batch_size=self._config.batch_size,
                capture=self._capture_step,
            )
            self._amp.follow(self._loop.position)

    def _capture_step(self, step: Callable[[], None]) -> Callable[[], None]:
        assert self._capture is not None
        try:
            with capturable(self._optimizer):
                return self._capture(step)
        except Exception:
            self._amp.abandon_step(self._optimizer)
            raise

    def _step(self, indices: Tensor) -> None:
        with self._buffers.kept_finite():  # includes backward(), which needs the buffers as forward() left them
            with self._amp.autocast():
                loss = self._compute_loss(indices)
            self._amp.step(self._optimizer, loss)

    def _compute_loss(self, indices: Tensor) -> Tensor:
        images = scale_images(self._data.train.images.index_select(0, indices), self._scaling)
        labels = self._data.train.labels.index_select(0, indices)
        return nn.functional.cross_entropy(self.model(images), labels, weight=self._class_weights)

    def _draw_batches(self) -> Tensor:
        """Return the indices of this epoch's training images, int64 [steps, batch_size] on the device."""
        count = len(self._data.train.labels)
        batch_size, max_epochs = self._config.batch_size, self._config.max_epochs
        drawn = count_drawn_images(
            self._config.curriculum, self._epoch, max_epochs, batch_size=batch_size, train_images=count
        )
        batches = batch_indices(drawn, batch_size, self._order, self._data.device)
        if drawn == count:
            return batches
        assert self._easy_to_hard is not None
        return self._easy_to_hard[batches]

    def _validate(self) -> Evaluation | None:
        if self._data.validation is None:
            return None
        started = time.perf_counter()
        evaluation = self._evaluate(self._data.validation)
        self._val_seconds += time.perf_counter() - started
        return evaluation

    def _probe(self, batches: Tensor, *, has_learned: bool, all_skipped: bool) -> GradientProbe:
        """Probe the gradients on images of the epoch, weighted as in its batches; return an empty probe if not needed.

        Args:
            batches: indices of the epoch's images, int64 [steps, batch_size].
            has_learned: whether the model is better than guessing. If so, only underflow is of interest.
            all_skipped: whether every step of the epoch was skipped.
        """
        if not self._can_be_probed or (has_learned and self._config.precision != "fp16"):
            return GradientProbe()
        batch_size = batches.shape[1]
        try:
            with self._undisturbed(), fp32_arithmetic(self._config.precision):
                return self._amp.probe(
                    [parameter for parameter in self.model.parameters() if parameter.requires_grad],
                    lambda images: self._probe_loss(images, batch_size),
                    batches.flatten(),
                    batch_size=batch_size,
                    steps_left=(self._config.max_epochs - self._epoch) * (len(self._data.train.labels) // batch_size),
                    all_skipped=all_skipped,
                )
        except torch.AcceleratorError:
            raise
        except Exception:  # a user's model may require backward() (reentrant checkpoints do), or memory run out
            self._can_be_probed = False
            return GradientProbe()

    def _probe_loss(self, images: Tensor, batch_size: int) -> Tensor:
        """Return the loss of ``images`` (indices, int64) weighted as in a batch, with the same dropout every time."""
        seed_generators(self._config.seed)
        return self._compute_loss(images) * (len(images) / batch_size)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Restore random generators and running statistics after the forward passes of the ``with`` block."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        try:
            with keep_generators(self._data.device):
                yield
        finally:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _weights_moved(self) -> bool:
        if self._initial is not None:
            pairs = zip(self.model.parameters(), self._initial, strict=True)
            if not all(torch.equal(parameter.detach().cpu(), initial) for parameter, initial in pairs):
                self._initial = None
        return self._initial is None

    def _judge(
        self, probe: GradientProbe, val_loss: float | None, *, has_learned: bool, steps: int, skipped: int
    ) -> Verdict:
        is_lost = val_loss is not None and not math.isfinite(val_loss)
        return judge_epoch(
            EpochEvidence(
                weights_finite=all_finite(list(self.model.parameters())),
                weights_moved=self._weights_moved(),
                # Weight decay moves weights that get no gradient, and may revive some.
                **{**vars(probe), "is_dead": probe.is_dead and self._config.weight_decay == 0},
                val_loss=val_loss,
                nan_buffer=find_nan(self.model.named_buffers()) if is_lost else None,
                has_learned=has_learned,
                epoch_steps=steps,
                epoch_skipped=skipped,
                applied_steps=self._amp.telemetry.applied_steps,
                skipped_steps=self._amp.telemetry.skipped_steps,
                is_last_epoch=self._epoch >= self._config.max_epochs,
            )
        )


def build_optimizer(config: TrialConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the trial's optimizer, fused: one kernel, and no host synchronisation to skip an overflowed step."""
    _leave_compiler_out()
    parameters = list(model.parameters())
    if config.optimizer == "adam":
        return _unwrap_step(torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=True))
    if config.optimizer == "adamw":
        return _unwrap_step(torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True))
    sgd = torch.optim.SGD(parameters, config.lr, SGD_MOMENTUM, weight_decay=config.weight_decay, fused=True)
    for parameter in parameters:
        # torch 2.15 leaves the buffer uninitialised if the first step is skipped; zeros give the same first update.
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return _unwrap_step(sgd)


@functools.cache
def _leave_compiler_out() -> None:
    """Keep PyTorch from importing its compiler when the first optimizer is made: 0.8 s of every worker's start.

    These methods import it to exclude themselves from compiled code (``torch/_compile.py``), unless they find the
    result of an earlier exclusion. Here no optimizer is part of compiled code; a compiled model imports it itself.
    """
    if "torch._dynamo" in sys.modules:
        return
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        bare = getattr(method, "__wrapped__", method)
        bare.__dict__.setdefault("__dynamo_disable", bare)


def _unwrap_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return ``optimizer`` with a ``step`` that calls no profiler and looks for no hooks: 40 us less on one core."""
    bare = inspect.unwrap(type(optimizer).step)

    def step() -> None:
        with torch.no_grad():
            bare(optimizer)

    optimizer.step = step  # type: ignore[method-assign, assignment]
    return optimizer


@exits_as_errors()
@torch.enable_grad()
def estimate_epoch_seconds(config: TrialConfig, train: Split, num_classes: int, device: torch.device) -> float:
    """Estimate an epoch's seconds from the second forward and backward pass on ``ESTIMATE_IMAGES`` images.

    The estimate is rough, for a warning: fp16 convolutions on a CPU without fp16 units take 70 times as long as in
    fp32. No optimizer is made, because that imports PyTorch's compiler, which takes longer than all else here.
    """
    few = place_split(Split(images=train.images[:ESTIMATE_IMAGES], labels=train.labels[:ESTIMATE_IMAGES]), device)
    amp = AmpStep(config, device, max_steps=1)

    def run_once() -> float:
        started = time.perf_counter()
        with fp32_arithmetic(config.precision):
            with amp.autocast():
                loss = nn.functional.cross_entropy(model(scale_images(few.images, ESTIMATE_SCALING)), few.labels)
            loss.backward()
        return time.perf_counter() - started

    with keep_generators(device):
        model = build_model(config.model, train.images.shape[1:], num_classes).to(device)
        run_once()
        return run_once() / len(few.labels) * len(train)


def release_memory(device: torch.device) -> None:
    """Release a run's memory on ``device`` to other processes. Call it after the last reference to the run is gone."""
    gc.collect()  # models may hold reference cycles
    if device.type == "cuda":
        clear_workspaces()
        torch.cuda.empty_cache()
