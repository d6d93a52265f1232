"""Trains a configuration by the user's own loop: a generator that yields its metrics after every epoch.

The loop gets a ``Trial``; ``own_trial.py`` has an example.
"""

import contextlib
import io
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tune_amp.training.amp import ScalerTelemetry, training_arithmetic
from tune_amp.training.generators import Generators
from tune_amp.training.memory import MemoryMeter
from tune_amp.training.own_code import exits_as_errors
from tune_amp.training.own_trial import Trial, join_sorted
from tune_amp.training.probe import find_outlook, probe_gradients
from tune_amp.training.verdict import EpochEvidence, GradientProbe, judge_epoch
from tune_amp.trial.config import (
    COMMON_METRICS,
    COST_OBJECTIVES,
    KEEPS_NOTHING,
    MEAN_PARTS,
    RESERVED_NAMES,
    EpochMetrics,
    InputError,
    TrialConfig,
    check,
)
from tune_amp.trial.text import one_line, shown

TrainFunction = Callable[[Trial], Any]
"""A user's own loop: a generator of mappings from names to numbers."""

TEST_PREFIX = "test_"
"""Prefix of the metrics of the test set, which a loop yields only if ``Trial.confirming``."""


class OwnRun:
    """A configuration that trains by a user's own loop: the same interface as ``TrainingRun``.

    Args:
        config: the configuration.
        function: the user's loop; ``config.train`` is its name in messages.
        device: device to train on.
        objectives: metrics that the loop must yield.
        confirming: whether the loop may yield metrics of the test set.
    """

    def __init__(
        self,
        config: TrialConfig,
        function: TrainFunction,
        device: torch.device,
        *,
        objectives: Sequence[str] = (),
        confirming: bool = False,
    ) -> None:
        self._config = config
        self._function = function
        self._device = device
        self._objectives = objectives
        self._generators = Generators(config.seed, device)
        self._memory = MemoryMeter(device)
        self._trial = Trial(config, device, confirming=confirming)
        self._loop: Any = None
        self._names: frozenset[str] | None = None
        self._is_state_checked = False
        self._seconds = self._probe_seconds = 0.0
        self.epoch = 0
        """Number of epochs trained so far."""
        self.hopeless: str | None = None
        """Reason why training is past saving after the last epoch; None while it may still get better."""
        self.tested: Mapping[str, float] = {}
        """Metrics of the test set after the last epoch; empty unless confirming."""

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train the epochs left of ``max_epochs``, and stop early if the run is past saving."""
        while self.epoch < self._config.max_epochs and self.hopeless is None:
            yield self.train_epoch()

    @exits_as_errors()
    def train_epoch(self) -> EpochMetrics:
        """Run the loop until it yields the metrics of an epoch.

        Raises:
            InputError: the loop is no generator, ends too early, or yields something else than metrics.
        """
        config, trial = self._config, self._trial
        before = trial.scaler.telemetry
        started = time.perf_counter()
        arithmetic = training_arithmetic(config.precision, self._device)
        with self._generators.in_use(), self._memory.measure(), arithmetic:
            with torch.enable_grad():
                yielded = self._advance()
            telemetry = trial.scaler.read()
        seconds = time.perf_counter() - started
        self._seconds += seconds
        metrics = self._check(yielded)
        self.epoch += 1
        self.tested = {name: value for name, value in metrics.items() if name.startswith(TEST_PREFIX)}
        started = time.perf_counter()
        steps, skipped = telemetry.steps - before.steps, telemetry.skipped_steps - before.skipped_steps
        probe = self._probe(telemetry, steps, skipped)
        self._probe_seconds += time.perf_counter() - started
        evidence = EpochEvidence(
            weights_finite=trial.are_weights_finite(),
            weights_moved=trial.have_weights_moved(),
            probe=probe,
            validation={name: metrics[name] for name in (*self._objectives, "val_loss") if name in metrics},
            epoch_steps=steps,
            epoch_skipped=skipped,
            applied_steps=telemetry.applied_steps,
            skipped_steps=telemetry.skipped_steps,
            is_last_epoch=self.epoch >= config.max_epochs,
        )
        state, self.hopeless = judge_epoch(evidence)
        return EpochMetrics(
            epoch=self.epoch,
            train_loss=metrics.get("train_loss", math.nan),
            val_loss=metrics.get("val_loss"),
            val_accuracy=metrics.get("val_accuracy"),
            **vars(telemetry),
            train_seconds=self._seconds,
            val_seconds=0.0,
            data_seconds=0.0,
            samples_per_second=steps * config.step_images / seconds,
            peak_memory_bytes=self._memory.peak_bytes,
            state=str(state),
            underflow_share=probe.underflow_share,
            probe_seconds=self._probe_seconds,
            loop="own" if trial.kept else KEEPS_NOTHING,
            metrics={name: metrics[name] for name in metrics if name not in (*COMMON_METRICS, *self.tested)},
        )

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models among what the loop keeps, by name."""
        return {name: value for name, value in self._trial.kept.items() if isinstance(value, nn.Module)}

    def test(self, split: object = None) -> dict[str, Any]:
        """Return the fields ``test_loss``, ``test_accuracy`` and ``metrics`` of what the loop yielded of its test set.

        Args:
            split: ignored; the loop has its own data.
        """
        common = {name: self.tested.get(name) for name in ("test_loss", "test_accuracy")}
        return {**common, "metrics": {name: value for name, value in self.tested.items() if name not in common}}

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state to resume from, as tensors and plain values; None if the loop keeps nothing."""
        if not self._trial.kept:
            return None
        state = self._trial.read_state(self.epoch, self._generators.state)
        if not self._is_state_checked:
            _check_loads(state["kept"])
            self._is_state_checked = True
        seconds = [self._seconds, self._probe_seconds]
        return state | {"seconds": seconds, "peak_memory_bytes": self._memory.peak_bytes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state_dict``, before the first epoch."""
        self.epoch, (self._seconds, self._probe_seconds) = state["epoch"], state["seconds"]
        self._memory.peak_bytes = state["peak_memory_bytes"]
        self._trial.restore(state)

    def close(self) -> None:
        """End the loop, so that it releases what it holds, such as the workers of a DataLoader."""
        with contextlib.suppress(Exception):  # the user's own clean-up; the trial has ended
            if hasattr(self._loop, "close"):
                self._loop.close()

    def _advance(self) -> Any:
        name = self._config.train
        if self._loop is None:
            self._loop = self._function(self._trial)
            if not isinstance(self._loop, Iterator):
                got = type(self._loop).__name__
                raise InputError(f"{name}: must yield its metrics after every epoch, but returns {got}")
        try:
            yielded = next(self._loop)
        except StopIteration:
            rule = f"must yield once for each of trial.epochs(), {self._config.max_epochs} times"
            raise InputError(f"{name}: {rule}, got {self.epoch}") from None
        if self._trial.checkpoint is not None:
            raise InputError(f"{name}: must iterate over trial.epochs(), which a resumed trial needs")
        return yielded

    def _check(self, yielded: Any) -> dict[str, float]:
        """Return the metrics of an epoch as numbers.

        Raises:
            InputError: a name or a value is not allowed, the objective is missing, or the names have changed.
        """
        place = f"{self._config.train}: epoch {self.epoch + 1}"
        check(place, yielded, isinstance(yielded, Mapping), "must yield a mapping of names to numbers")
        metrics = {name: _read_number(f"{place}: {shown(name)}", value) for name, value in yielded.items()}
        for name in metrics:
            if not isinstance(name, str) or not name.isidentifier():
                raise InputError(f"{place}: {shown(name)}: must be a name of letters, digits and _")
            stem, _, part = name.rpartition("_")
            if name in RESERVED_NAMES or (part in MEAN_PARTS and stem in metrics):
                raise InputError(f"{place}: {name}: is the name of another column, choose another name")
            if name.startswith(TEST_PREFIX) and not self._trial.confirming:
                rule = "must be yielded only if trial.confirming: no choice sees the test set"
                raise InputError(f"{place}: {name}: {rule}")
        accuracy = metrics.get("val_accuracy", 0.0)
        if accuracy < 0 or accuracy > 1:  # NaN is judged like any other value
            raise InputError(f"{place}: val_accuracy: must be a share between 0 and 1, got {accuracy:g}")
        got = join_sorted(metrics)
        for objective in self._objectives:
            if objective not in metrics and objective not in COST_OBJECTIVES:
                raise InputError(f"{place}: must yield the objective {objective}, got {got}")
        if self._names is not None and metrics.keys() != self._names:
            raise InputError(f"{place}: must yield the names of epoch 1, {join_sorted(self._names)}, got {got}")
        self._names = frozenset(metrics)
        return metrics

    def _probe(self, telemetry: ScalerTelemetry, steps: int, skipped: int) -> GradientProbe:
        """Probe the gradients if the loop asked for it and the precision is fp16; else find the scale's outlook."""
        config, scaler, probed = self._config, self._trial.scaler, self._trial.probed
        steps_left = steps * (config.max_epochs - self.epoch)
        if probed is None or not scaler.is_enabled():
            return GradientProbe(outlook=find_outlook(scaler, telemetry, steps_left))
        model, loss = probed
        sizes = {"batch_size": 1, "steps_left": steps_left}
        return probe_gradients(
            config, scaler, telemetry, model, lambda _: loss(), torch.zeros(1), **sizes, all_skipped=skipped == steps
        )


def _check_loads(kept: Mapping[str, Any]) -> None:
    """Refuse a state that could be saved, but not loaded again."""
    for name, state in kept.items():
        content = io.BytesIO()
        torch.save(state, content)
        content.seek(0)
        try:
            torch.load(content, weights_only=True)
        except pickle.UnpicklingError as error:
            rule = "its state must be of tensors and plain values, which torch.load(weights_only=True) reads"
            raise InputError(f"trial.keep: {name}: {rule} ({one_line(str(error), limit=120)})") from None


def _read_number(place: str, value: Any) -> float:
    # RuntimeError: a tensor with several elements.
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if not isinstance(value, str):
            return float(value.detach() if isinstance(value, Tensor) else value)
    raise InputError(f"{place}: must be a number, got {shown(value)}")
