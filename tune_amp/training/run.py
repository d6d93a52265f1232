"""Trains and evaluates one configuration. It does not use Ray: a trial, a replay and a script run the same code."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tune_amp.training.amp import AmpStep, ScalerTelemetry, flushing_denormals, training_arithmetic
from tune_amp.training.batches import Batch, DeviceSplit, batch_indices, pick_few
from tune_amp.training.buffers import FiniteBuffers
from tune_amp.training.cuda_graph import (
    LEAST_STEPS,
    Capture,
    Step,
    StepLoop,
    capturable,
    capture_cuda_graph,
    explain_change,
)
from tune_amp.training.data import Split
from tune_amp.training.evaluation import Evaluation, evaluate
from tune_amp.training.generators import Generators
from tune_amp.training.memory import MemoryMeter
from tune_amp.training.models import check_model
from tune_amp.training.optimizers import has_step_hooks
from tune_amp.training.own_code import exits_as_errors
from tune_amp.training.probe import all_finite, probe_gradients
from tune_amp.training.streams import StreamedBatches
from tune_amp.training.task import make_task
from tune_amp.training.training_data import TrainingData
from tune_amp.training.verdict import (
    PROBE_EVERY_STEPS,
    STARVED_SHARE,
    EpochEvidence,
    GradientProbe,
    is_probe_needed,
    judge_epoch,
)
from tune_amp.trial.config import EpochMetrics, InputError, TrainingState, TrialConfig
from tune_amp.trial.curricula import count_drawn_images

ESTIMATE_IMAGES = 32


class TrainingRun:
    """One configuration in training: everything that changes from epoch to epoch, checkpointed as a whole.

    Args:
        config: configuration to train. Its seed sets the generator of the data order and, while the model is made,
            trained or evaluated, the global ones of torch, NumPy and Python, whose states are restored afterwards.
        data: resident training data; validation metrics are None if it holds no validation split.
        capture: function that captures a step if that pays, which ``EpochMetrics.loop`` records; None to never capture.
        probed: whether gradients are probed after an epoch.
    """

    @exits_as_errors()
    @torch.enable_grad()  # a user's module may have turned gradients off for its own use
    def __init__(
        self,
        config: TrialConfig,
        data: TrainingData,
        *,
        capture: Capture | None = capture_cuda_graph,
        probed: bool = True,
    ) -> None:
        self._config = config
        self._data = data
        self._order = torch.Generator().manual_seed(config.seed)
        self._generators = Generators(config.seed, data.device)
        self._scaling = data.input_scaling(config.input_scaling)
        self._task = make_task(config)
        self._task.bind(config, data)
        # Sorted now, so that it counts as placing the data, not as the first epoch's training time.
        self._easy_to_hard = None if config.curriculum == "none" else self._task.easy_to_hard()
        if config.curriculum != "none" and self._easy_to_hard is None:
            raise InputError(f"curriculum: must be none unless the task defines easy_to_hard, got {config.curriculum}")
        self._memory = MemoryMeter(data.device)
        with self._generators.in_use():
            self.model = self._task.model(**config.own).to(data.device)
            if config.task is not None:
                check_model(f"{config.task}.model:", self.model, self._run_dry)
            self._optimizer = self._task.optimizer(self.model, config)
            self._max_steps = self._count_steps()
            self._schedule = self._task.schedule(self._optimizer, self._max_steps * config.max_epochs)
        self._amp = AmpStep(config, data.device, max_steps=self._max_steps)
        # With any other precision no step is skipped, and an overflow destroys the weights as well.
        self._buffers = FiniteBuffers(self.model.buffers() if config.precision == "fp16" else ())
        self._capture = capture
        # Chosen in the first epoch of a run, and again after it resumes from a checkpoint.
        self._loop: StepLoop | None = None
        self._why_eager: str | None = None
        self._can_be_probed = probed
        self.probe_every = PROBE_EVERY_STEPS if data.device.type == "cuda" else 0
        """Fewest steps between two probes, unless the end of the trial depends on one."""
        self._next_probe = 0  # in steps since the trial began; counted, not timed, so that a replay probes alike
        # Kept until a weight has moved, and on the host, so that no device memory is charged for it.
        self._initial = {name: value.detach().to("cpu", copy=True) for name, value in self.model.named_parameters()}
        self.epoch = 0
        """Number of epochs trained so far."""
        self.hopeless: str | None = None
        """Reason why training is past saving after the last epoch; None while it may still get better."""
        self._seconds: dict[str, Any] = {"train_seconds": 0.0, "val_seconds": 0.0, "probe_seconds": 0.0}
        self._seconds["data_seconds"] = data.claim_placing_seconds()

    def _count_steps(self) -> int:
        """Return the largest number of steps in an epoch."""
        count, config = len(self._data.train), self._config
        if config.batch_size <= count < config.step_images:
            rule = f"batch_size times accumulate must not exceed the {count} training images"
            raise InputError(f"accumulate: {rule}, got {config.batch_size} times {config.accumulate}")
        return count // config.step_images

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train the epochs left of ``max_epochs``, and stop early if the run is past saving."""
        while self.epoch < self._config.max_epochs and self.hopeless is None:
            yield self.train_epoch()

    @exits_as_errors()
    @torch.enable_grad()
    def train_epoch(self) -> EpochMetrics:
        """Train one epoch and validate.

        Raises:
            InputError: ``batch_size`` exceeds the number of training images, so that no step is possible.
        """
        before, seconds = self._amp.telemetry, self._seconds["train_seconds"]
        validated = None
        with self._generators.in_use():
            with self._timed("train_seconds"):
                batches = self._draw_batches()  # timed: other programs' loaders draw batches within the loop
                with self._memory.measure():  # without validation, which is in fp32 whatever the precision
                    train_loss = self._train(batches)
            self.epoch += 1
            if self._data.validation is not None:
                with self._timed("val_seconds"):
                    validated = self._evaluate(self._data.validation)
            with self._timed("probe_seconds"):
                state, probe = self._judge(batches, before, train_loss, validated)
        return EpochMetrics(
            epoch=self.epoch,
            train_loss=train_loss,
            **({"val_loss": None, "val_accuracy": None} if validated is None else validated.columns("val")),
            **vars(self._amp.telemetry),
            **self._seconds,
            samples_per_second=batches.numel() / (self._seconds["train_seconds"] - seconds),
            peak_memory_bytes=self._memory.peak_bytes,
            state=str(state),
            underflow_share=probe.underflow_share,
            loop=f"eager: {self._why_eager}" if self._loop is None else self._loop.describe(),
        )

    @exits_as_errors()
    @torch.enable_grad()
    def time_training(self) -> float:
        """Train an epoch without validation and verdict, and return its seconds."""
        with self._generators.in_use():
            started = time.perf_counter()
            self._train(self._draw_batches())
            return time.perf_counter() - started

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def _list_parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self._optimizer, "amp": self._amp, "schedule": self._schedule}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from bit for bit, as tensors and plain values (``weights_only=True`` loads it)."""
        return {name: part.state_dict() for name, part in self._list_parts().items()} | {
            "epoch": self.epoch,
            "next_probe": self._next_probe,
            "order": self._order.get_state(),
            "generators": self._generators.state,
            "seconds": list(self._seconds.values()),
            "peak_memory_bytes": self._memory.peak_bytes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the ``state_dict`` of a run of the same configuration."""
        self._loop = self._why_eager = self._amp.position = None  # a graph would keep using tensors replaced here
        for name, part in self._list_parts().items():
            part.load_state_dict(state[name])
        self.epoch, self._next_probe = state["epoch"], state["next_probe"]
        self._order.set_state(state["order"])
        self._generators.state = state["generators"]
        placing_seconds = self._seconds["data_seconds"]
        self._seconds = dict(zip(self._seconds, state["seconds"], strict=True))
        self._seconds["data_seconds"] += placing_seconds
        self._memory.peak_bytes = state["peak_memory_bytes"]

    def test(self, split: Split) -> dict[str, Any]:
        """Return the fields ``test_loss``, ``test_accuracy``, ``test_recalls`` and ``metrics`` of a test split."""
        with self._generators.in_use():
            return self._evaluate(self._data.place_test(split)).columns("test")

    def _evaluate(self, split: DeviceSplit | StreamedBatches) -> Evaluation:
        return evaluate(self._task, self.model, split, self._scaling, batch_size=self._config.batch_size)

    def _run_dry(self) -> None:
        """Give lazy layers their shapes, by the loss of a batch in evaluation mode."""
        was_training = self.model.training
        few = torch.arange(min(2, len(self._data.train)), device=self._data.device)
        with torch.no_grad():
            self._task.loss(self.model.eval(), self._data.train.take(few, self._scaling))
        self.model.train(was_training)

    def _train(self, batches: Tensor) -> float:
        """Train on ``batches``, int64 [steps, accumulate * batch_size], and return the mean loss of the steps."""
        self.model.train()
        if self._loop is None and self._why_eager is None:
            self._choose_loop()
        with training_arithmetic(self._config.precision, self._data.device), flushing_denormals():
            if self._loop is not None:
                self._loop.take(batches)
            elif isinstance(self._data.train, StreamedBatches):
                split = batches.view(-1, self._config.batch_size)
                read = self._data.train.stream(split, self._config.seed + self.epoch + 1, self._scaling)
                for _ in batches:
                    self._take_step(itertools.islice(read, self._config.accumulate))
            else:
                for indices in batches:
                    self._step(indices)
            return self._amp.read_epoch()  # waits for the device, so that the caller's timing is right

    def _choose_loop(self) -> None:
        """Prepare to capture a step, or note why not."""
        if isinstance(self._data.train, StreamedBatches):
            self._why_eager = self._data.train.reason
        elif self._schedule is not None:
            self._why_eager = "a schedule sets the learning rate on the host"
        elif self._capture is None:
            self._why_eager = "graphs are not allowed"
        elif self._capture is capture_cuda_graph and self._data.device.type != "cuda":
            self._why_eager = "the CPU has no CUDA graphs"
        elif has_step_hooks(self._optimizer):
            self._why_eager = "the optimizer has hooks, which a graph would not call"
        elif (self._config.max_epochs - self.epoch) * self._max_steps < LEAST_STEPS:
            self._why_eager = f"a capture pays from {LEAST_STEPS} steps"
        else:
            self._loop = StepLoop(
                self._step,
                (self._max_steps, self._config.step_images),
                self._data.device,
                find_change=lambda step: explain_change(step, self.model, self._data.device, self._task.read_state),
                capture=self._capture_step,
            )
            self._amp.position = self._loop.position

    def _capture_step(self, step: Step) -> Step:
        assert self._capture is not None
        try:
            with capturable(self._optimizer):
                return self._capture(step)
        except Exception:
            self._amp.abandon_step(self._optimizer)
            raise

    def _step(self, indices: Tensor) -> None:
        parts = (indices,) if self._config.accumulate == 1 else indices.split(self._config.batch_size)
        self._take_step(self._data.train.take(part, self._scaling) for part in parts)

    def _take_step(self, batches: Iterable[Batch]) -> None:
        """Take one step, with the summed gradients of ``accumulate`` batches."""
        with self._buffers.kept_finite():  # includes backward(), which needs the buffers as forward() left them
            for number, batch in enumerate(batches, 1):
                with self._amp.autocast():
                    loss = self._compute_loss(batch)
                if number < self._config.accumulate:
                    self._amp.accumulate(self._optimizer, loss)
                else:
                    self._amp.step(self._optimizer, loss)
        if self._schedule is not None and self._amp.wait_whether_applied():
            self._schedule.step()

    def _compute_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch as its share of a step."""
        loss = self._task.loss(self.model, batch)
        return loss if self._config.accumulate == 1 else loss / self._config.accumulate

    def _draw_batches(self) -> Tensor:
        """Return the indices of this epoch's training items, int64 [steps, accumulate * batch_size] on the device."""
        config, count = self._config, len(self._data.train)
        drawn = count_drawn_images(
            config.curriculum, self.epoch, config.max_epochs, batch_size=config.step_images, train_images=count
        )
        device = torch.device("cpu") if isinstance(self._data.train, StreamedBatches) else self._data.device
        batches = batch_indices(drawn, config.step_images, self._order, device)
        if drawn == count:
            return batches
        assert self._easy_to_hard is not None
        return self._easy_to_hard[batches]

    def _judge(
        self, batches: Tensor, before: ScalerTelemetry, train_loss: float, validated: Evaluation | None
    ) -> tuple[TrainingState, GradientProbe]:
        """Judge how training stands after an epoch that began with the telemetry ``before``; probe if needed."""
        telemetry = self._amp.telemetry
        steps, skipped = telemetry.steps - before.steps, telemetry.skipped_steps - before.skipped_steps
        loss, averages = (train_loss, {}) if validated is None else (validated.number("loss"), validated.averages)
        has_learned, moved = self._task.has_learned(loss, averages), self._weights_moved()
        needed = self._can_be_probed and is_probe_needed(
            precision=self._config.precision,
            has_learned=has_learned,
            weights_moved=moved,
            skipped=skipped,
            is_due=telemetry.steps >= self._next_probe,
        )
        probe = self._probe(batches.flatten(), all_skipped=skipped == steps) if needed else GradientProbe()
        validation = {}
        if validated is not None:
            validation = {f"val_{name}": validated.number(name) for name in ("loss", self._task.metric[0])}
        is_lost = not all(map(math.isfinite, validation.values()))
        state, self.hopeless = judge_epoch(
            EpochEvidence(
                weights_finite=all_finite(self.model.parameters()),
                weights_moved=moved,
                validation=validation,
                nan_buffer=self._find_nan_buffer() if is_lost else None,
                has_learned=has_learned,
                probe=probe,
                epoch_steps=steps,
                epoch_skipped=skipped,
                applied_steps=telemetry.applied_steps,
                skipped_steps=telemetry.skipped_steps,
                is_last_epoch=self.epoch >= self._config.max_epochs,
            )
        )
        return state, probe

    def _probe(self, images: Tensor, *, all_skipped: bool) -> GradientProbe:
        """Probe the gradients on ``images`` (indices, int64 [n]). If that fails, there is no probe from then on.

        ``all_skipped`` is whether every step of the epoch was skipped.
        """
        try:
            probe = probe_gradients(
                self._config,
                self._amp.scaler,
                self._amp.telemetry,
                self.model,
                self._compute_probe_loss,
                images,
                batch_size=self._config.batch_size,
                steps_left=(self._config.max_epochs - self.epoch) * self._max_steps,
                all_skipped=all_skipped,
            )
        except torch.AcceleratorError:
            raise
        except Exception:  # a user's model may require backward() (reentrant checkpoints do), or memory run out
            self._can_be_probed = False
            return GradientProbe()
        if (probe.underflow_share or 0.0) <= STARVED_SHARE:
            self._next_probe = self._amp.telemetry.steps + self.probe_every
        return probe

    def _compute_probe_loss(self, images: Tensor) -> Tensor:
        """Return the loss of ``images`` (indices, int64), weighted as in a batch."""
        loss = self._compute_loss(self._data.train.take(images, self._scaling))
        return loss * (len(images) / self._config.batch_size)

    def _weights_moved(self) -> bool:
        if self._initial:  # by name: a model may replace a parameter
            now, then = dict(self.model.named_parameters()), self._initial
            if now.keys() != then.keys() or any(not torch.equal(now[name].detach().cpu(), then[name]) for name in now):
                self._initial = {}
        return not self._initial

    def _find_nan_buffer(self) -> str | None:
        """Return the name of the first buffer with a NaN. Infinity may be intended, as in a mask."""
        return next((name for name, buffer in self.model.named_buffers() if buffer.isnan().any()), None)


def estimate_epoch_seconds(config: TrialConfig, train: Split, num_classes: int, device: torch.device) -> float:
    """Estimate an epoch's training seconds, roughly, from the second of two steps on ``ESTIMATE_IMAGES`` images.

    The optimizer's step is counted once for so many images. Validation and probes are not included.
    """
    few = pick_few(train, ESTIMATE_IMAGES)
    plain = dataclasses.replace(config, class_weighting="none", curriculum="none")  # a class may be missing in so few
    steps = max(2, config.count_full_steps(len(train)))  # what a task's schedule expects, with a step an epoch
    plain = dataclasses.replace(plain, accumulate=1, batch_size=len(few), max_epochs=steps)
    run = TrainingRun(plain, TrainingData(few, None, num_classes, device, workers=0), capture=None, probed=False)
    run.time_training()
    return run.time_training() / len(few) * len(train)
