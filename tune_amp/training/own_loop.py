"""Trains a configuration by the user's own loop: a generator that yields its metrics after every epoch.

The loop gets a ``Trial``: device, settings, a loss scaler that records its telemetry, and autocast. Everything else is
the user's own: models, optimizers, data, schedules.

.. code-block:: python

    def train(trial):
        model = Net(trial.own["hidden"]).to(trial.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr)
        trial.keep(model=model, optimizer=optimizer)
        scaler = trial.scaler
        for epoch in trial.epochs():
            for x, y in batches(trial.batch_size):
                optimizer.zero_grad()
                with trial.autocast():
                    loss = loss_function(model(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            yield {"val_loss": ..., "val_f1": ...}
"""

import contextlib
import dataclasses
import io
import math
import pickle
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tune_amp.training.amp import (
    ScalerTelemetry,
    autocast_of,
    count_unscaled,
    scaler_settings,
    start_telemetry,
    summarise_steps,
    training_arithmetic,
)
from tune_amp.training.generators import Generators, seed_generators, undisturbed, write_generators
from tune_amp.training.memory import MemoryMeter
from tune_amp.training.own_code import exits_as_errors
from tune_amp.training.probe import all_finite, find_outlook, probe_gradients
from tune_amp.training.verdict import EpochEvidence, GradientProbe, judge_epoch
from tune_amp.trial.config import (
    COMMON_METRICS,
    COST_OBJECTIVES,
    KEEPS_NOTHING,
    MEAN_PARTS,
    RESERVED_NAMES,
    EpochMetrics,
    InputError,
    TrainingState,
    TrialConfig,
    one_line,
    shown,
)

TrainFunction = Callable[["Trial"], Any]
"""A user's own loop: a generator of mappings from names to numbers."""

TEST_PREFIX = "test_"
"""Prefix of the metrics of the test set, which a loop yields only if ``Trial.confirming``."""

_LOGGED_STEPS = 1024


class TelemetryScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` with a trial's settings, whose ``update`` also records the overflow and the scale.

    Both stay on the device until ``read``, so that recording never waits for it. Each call of ``update`` counts as one
    step, in every precision. The step counts as skipped if a gradient of any optimizer overflowed.

    Args:
        config: source of the precision and the scaler settings. The scaler is disabled unless the precision is fp16.
        device: device of the losses.
    """

    def __init__(self, config: TrialConfig, device: torch.device) -> None:
        super().__init__(device.type, **scaler_settings(config))
        # A place for each step: small tensors that outlive it keep the allocator from reusing what lies beside them.
        self._log = torch.zeros(2, _LOGGED_STEPS if self.is_enabled() else 0, device=device)
        self._places = list(zip(*(row.unbind() for row in self._log), strict=True))
        self._full: list[Tensor] = []
        self._logged = 0
        self._updates = 0
        self.telemetry = start_telemetry(config)
        """Telemetry as of the last ``read``."""

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Update the scale as ``torch.amp.GradScaler.update`` does, and record the step."""
        self._updates += 1
        if not self.is_enabled():
            return
        flags = [
            flag for state in self._per_optimizer_states.values() for flag in state["found_inf_per_device"].values()
        ]
        super().update(new_scale)
        scale = self._get_scale_async()
        assert scale is not None
        if len(flags) != 1:  # several optimizers or devices, or a scale that the user sets
            flags = [torch.stack([torch.zeros_like(scale), *(flag.to(scale.device) for flag in flags)]).amax()]
        overflow_place, scale_place = self._places[self._logged]
        overflow_place.copy_(flags[0])
        scale_place.copy_(scale)
        self._logged += 1
        if self._logged == len(self._places):
            self._full.append(self._log.clone())
            self._logged = 0

    def read(self) -> ScalerTelemetry:
        """Add the steps since the last call to the telemetry, and return it. Waits for the device."""
        if self.is_enabled():
            overflows, scales = torch.cat([*self._full, self._log[:, : self._logged]], dim=1).cpu().numpy()
            self.telemetry = summarise_steps(self.telemetry, scales, overflows != 0)
        else:
            self.telemetry = count_unscaled(self.telemetry, self._updates)
        self._full, self._logged, self._updates = [], 0, 0
        return self.telemetry


class Trial:
    """The arguments of a user's own training loop: one configuration, and what measures it.

    ``list(train(tune_amp.Trial(config)))`` runs a loop without Ray.

    Args:
        config: the configuration. A loop may read any of its fields; a search varies those in its space.
        device: device to train on; None for CUDA if there is a GPU, else the CPU.
        confirming: whether the configuration is being confirmed. Only then a loop yields metrics of the test set.
    """

    def __init__(
        self, config: TrialConfig, device: torch.device | str | None = None, *, confirming: bool = False
    ) -> None:
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.confirming = confirming
        self.scaler = TelemetryScaler(config, self.device)
        """A ``torch.amp.GradScaler`` with the trial's settings, disabled unless it trains in fp16."""
        self.probed: tuple[nn.Module, Callable[[], Tensor]] | None = None
        """The model whose gradients are probed, and its loss; None if there is none."""
        self._has_begun = False
        self._kept: dict[str, Any] = {}
        self._watched: list[nn.Module] = []
        self._initial: dict[Tensor, Tensor] = {}
        self._state: Mapping[str, Any] | None = None  # from a checkpoint, until it is restored
        self._first_epoch = 0

    @property
    def lr(self) -> float:
        """Learning rate."""
        return self.config.lr

    @property
    def batch_size(self) -> int:
        """Examples in a training step."""
        return self.config.batch_size

    @property
    def max_epochs(self) -> int:
        """Epochs of a trial that is not stopped."""
        return self.config.max_epochs

    @property
    def seed(self) -> int:
        """Seed of the trial. The global generators of torch, NumPy and Python are seeded with it before the loop."""
        return self.config.seed

    @property
    def own(self) -> Mapping[str, Any]:
        """The user's own parameters, from the section ``own`` of the search space."""
        return types.MappingProxyType(self.config.own)

    def autocast(self) -> torch.autocast:
        """Return the context for forward pass and loss: fp16 or bf16 where safe, else fp32; off for fp32 and tf32."""
        return autocast_of(self.config.precision, self.device)

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs to train, from 0; after a checkpoint was restored, those that are left."""
        if self._state is not None:  # everything that draws random numbers before the first epoch has drawn them again
            left = self._state["kept"].keys() - self._kept.keys()
            if left:
                raise InputError(f"trial.keep: must keep {_join(left)} before trial.epochs(), as the checkpoint does")
            write_generators(self._state["generators"], self.device)
            self._state = None
        self._has_begun = True
        yield from range(self._first_epoch, self.max_epochs)

    def keep(self, **named: Any) -> None:
        """Keep models, optimizers, schedules or generators in checkpoints; restore them if the trial is resumed.

        Call it once, before ``epochs``. The scaler and the global generators are always kept. A trial that keeps
        nothing starts from its beginning when it is interrupted. Models are watched, see ``watch``.

        Args:
            named: name -> object with ``state_dict`` and ``load_state_dict``, or a ``torch.Generator``.

        Raises:
            InputError: an object has no state, or was not kept when the checkpoint was written.
        """
        if self._has_begun:
            raise InputError(f"trial.keep: must be called before trial.epochs(), got {_join(named)} after its begin")
        for name, value in named.items():
            if not isinstance(value, torch.Generator) and not hasattr(value, "load_state_dict"):
                rule = "must have state_dict and load_state_dict, or be a torch.Generator"
                raise InputError(f"trial.keep: {name}: {rule}, got {type(value).__name__}")
            if self._state is not None:
                if name not in self._state["kept"]:
                    raise InputError(
                        f"trial.keep: {name}: is not in the checkpoint, which holds {_join(self._state['kept'])}"
                    )
                _restore(value, self._state["kept"][name])
            self._kept[name] = value
            if isinstance(value, nn.Module):
                self.watch(value)

    def watch(self, model: nn.Module, loss: Callable[[], Tensor] | None = None) -> None:
        """End the trial as diverged once a weight of ``model`` is not finite; find out whether any weight moves.

        Args:
            model: the model; kept models are watched anyway.
            loss: returns the loss of ``model`` on some training examples, computed without autocast. With it, the
                gradients are probed after each epoch in fp16: ``underflow_share`` tells how much of them is lost.
        """
        if loss is not None:
            self.probed = model, loss
        if model not in self._watched:
            self._watched.append(model)
            if self._first_epoch == 0:
                self._initial |= {p: p.detach().to("cpu", copy=True) for p in _list_weights(model)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``read_state``, called before the loop starts."""
        self._state, self._first_epoch = state, state["epoch"]
        self.scaler.telemetry = ScalerTelemetry(**state["telemetry"])
        if self.scaler.is_enabled():
            current = {name: state["scaler"][name] for name in ("scale", "_growth_tracker")}
            self.scaler.load_state_dict(self.scaler.state_dict() | current)

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models among what is kept, by name."""
        return {name: value for name, value in self._kept.items() if isinstance(value, nn.Module)}

    @property
    def is_restored(self) -> bool:
        """Whether nothing of a checkpoint is left to restore."""
        return self._state is None

    @property
    def keeps_state(self) -> bool:
        """Whether the loop keeps anything, so that the trial can be resumed from a checkpoint."""
        return bool(self._kept)

    def read_state(self, epoch: int, generators: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the state after ``epoch`` epochs, as tensors and plain values; None if the loop keeps nothing."""
        if not self.keeps_state:
            return None
        return {
            "epoch": epoch,
            "kept": {name: _read(value) for name, value in self._kept.items()},
            "scaler": self.scaler.state_dict(),
            "telemetry": dataclasses.asdict(self.scaler.telemetry),
            "generators": generators,
        }

    def are_weights_finite(self) -> bool:
        """Return whether every weight of the watched models is finite."""
        weights = [parameter for model in self._watched for parameter in _list_weights(model)]
        return not weights or all_finite(weights)

    def have_weights_moved(self) -> bool:
        """Return whether a weight of a watched model differs from its first value; without models, it is assumed."""
        if not self._initial or any(not torch.equal(now.detach().cpu(), then) for now, then in self._initial.items()):
            self._initial = {}  # until a weight moves, every epoch compares them
        return not self._initial


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
        before = self._trial.scaler.telemetry
        started = time.perf_counter()
        arithmetic = training_arithmetic(self._config.precision, self._device)
        with self._generators.in_use(), self._memory.measure(), arithmetic:
            with torch.enable_grad():
                yielded = self._advance()
            telemetry = self._trial.scaler.read()
        seconds = time.perf_counter() - started
        self._seconds += seconds
        metrics = self._check(yielded)
        self.epoch += 1
        started = time.perf_counter()
        steps, skipped = telemetry.steps - before.steps, telemetry.skipped_steps - before.skipped_steps
        probe = self._probe(telemetry, steps, skipped)
        self._probe_seconds += time.perf_counter() - started
        self.tested = {name: value for name, value in metrics.items() if name.startswith(TEST_PREFIX)}
        state, self.hopeless = self._judge(metrics, telemetry, steps, skipped, probe)
        return EpochMetrics(
            epoch=self.epoch,
            train_loss=metrics.get("train_loss", math.nan),
            val_loss=metrics.get("val_loss"),
            val_accuracy=metrics.get("val_accuracy"),
            **vars(telemetry),
            train_seconds=self._seconds,
            val_seconds=0.0,
            data_seconds=0.0,
            samples_per_second=steps * self._config.batch_size * self._config.accumulate / seconds,
            peak_memory_bytes=self._memory.peak_bytes,
            state=str(state),
            underflow_share=probe.underflow_share,
            probe_seconds=self._probe_seconds,
            loop="own" if self._trial.keeps_state else KEEPS_NOTHING,
            metrics={name: metrics[name] for name in metrics if name not in (*COMMON_METRICS, *self.tested)},
        )

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models among what the loop keeps, by name."""
        return self._trial.models

    def test(self, split: object = None) -> dict[str, Any]:
        """Return the fields ``test_loss``, ``test_accuracy`` and ``metrics`` of what the loop yielded of its test set.

        Args:
            split: ignored; the loop has its own data.
        """
        common = {name: self.tested.get(name) for name in ("test_loss", "test_accuracy")}
        return {**common, "metrics": {name: value for name, value in self.tested.items() if name not in common}}

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state to resume from, as tensors and plain values; None if the loop keeps nothing."""
        state = self._trial.read_state(self.epoch, self._generators.state)
        if state is None:
            return None
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
        if self._loop is not None and hasattr(self._loop, "close"):
            with contextlib.suppress(Exception):  # the user's own clean-up; the trial has ended
                self._loop.close()

    def _advance(self) -> Any:
        if self._loop is None:
            self._loop = self._function(self._trial)
            if not isinstance(self._loop, Iterator):
                got = type(self._loop).__name__
                raise InputError(f"{self._config.train}: must yield its metrics after every epoch, but returns {got}")
        try:
            yielded = next(self._loop)
        except StopIteration:
            most = self._config.max_epochs
            raise InputError(
                f"{self._config.train}: must yield once for each of trial.epochs(), {most} times, got {self.epoch}"
            ) from None
        if not self._trial.is_restored:
            raise InputError(f"{self._config.train}: must iterate over trial.epochs(), which a resumed trial needs")
        return yielded

    def _check(self, yielded: Any) -> dict[str, float]:
        """Return the metrics of an epoch as numbers.

        Raises:
            InputError: a name or a value is not allowed, the objective is missing, or the names have changed.
        """
        place = f"{self._config.train}: epoch {self.epoch + 1}"
        if not isinstance(yielded, Mapping):
            raise InputError(f"{place}: must yield a mapping of names to numbers, got {shown(yielded)}")
        metrics = {name: _read_number(f"{place}: {shown(name)}", value) for name, value in yielded.items()}
        for name in metrics:
            if not isinstance(name, str) or not name.isidentifier():
                raise InputError(f"{place}: {shown(name)}: must be a name of letters, digits and _")
            stem, _, part = name.rpartition("_")
            if name in RESERVED_NAMES or (part in MEAN_PARTS and stem in metrics):
                raise InputError(f"{place}: {name}: is the name of another column, choose another name")
            if name.startswith(TEST_PREFIX) and not self._trial.confirming:
                raise InputError(
                    f"{place}: {name}: must be yielded only if trial.confirming: no choice sees the test set"
                )
        accuracy = metrics.get("val_accuracy", 0.0)
        if accuracy < 0 or accuracy > 1:  # NaN is judged like any other value
            raise InputError(f"{place}: val_accuracy: must be a share between 0 and 1, got {accuracy:g}")
        for objective in self._objectives:
            if objective not in metrics and objective not in COST_OBJECTIVES:
                raise InputError(f"{place}: must yield the objective {objective}, got {_join(metrics)}")
        if self._names is not None and metrics.keys() != self._names:
            raise InputError(f"{place}: must yield the names of epoch 1, {_join(self._names)}, got {_join(metrics)}")
        self._names = frozenset(metrics)
        return metrics

    def _probe(self, telemetry: ScalerTelemetry, steps: int, skipped: int) -> GradientProbe:
        """Probe the gradients if the loop asked for it and the precision is fp16; else find the scale's outlook."""
        config, scaler, probed = self._config, self._trial.scaler, self._trial.probed
        steps_left = steps * (config.max_epochs - self.epoch)
        if probed is None or not scaler.is_enabled():
            return GradientProbe(outlook=find_outlook(scaler, telemetry, steps_left))
        model, loss = probed

        def compute_loss(_: Tensor) -> Tensor:
            seed_generators(config.seed)  # the same dropout every time
            return loss()

        arithmetic = training_arithmetic(config.precision, self._device)
        with undisturbed(model, self._device), arithmetic, torch.enable_grad():
            return probe_gradients(
                config,
                scaler,
                telemetry,
                model.parameters(),
                compute_loss,
                torch.zeros(1),
                batch_size=1,
                steps_left=steps_left,
                all_skipped=skipped == steps,
            )

    def _judge(
        self,
        metrics: Mapping[str, float],
        telemetry: ScalerTelemetry,
        steps: int,
        skipped: int,
        probe: GradientProbe,
    ) -> tuple[TrainingState, str | None]:
        return judge_epoch(
            EpochEvidence(
                weights_finite=self._trial.are_weights_finite(),
                weights_moved=self._trial.have_weights_moved(),
                probe=probe,
                validation={name: metrics[name] for name in (*self._objectives, "val_loss") if name in metrics},
                epoch_steps=steps,
                epoch_skipped=skipped,
                applied_steps=telemetry.applied_steps,
                skipped_steps=telemetry.skipped_steps,
                is_last_epoch=self.epoch >= self._config.max_epochs,
            )
        )


def _list_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that have a shape already."""
    return [parameter for parameter in model.parameters() if not isinstance(parameter, UninitializedParameter)]


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
    if isinstance(value, str):
        raise InputError(f"{place}: must be a number, got {shown(value)}")
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
    ):  # float() of a tensor with several elements raises RuntimeError
        raise InputError(f"{place}: must be a number, got {shown(value)}") from None


def _read(value: Any) -> Any:
    return value.get_state() if isinstance(value, torch.Generator) else value.state_dict()


def _restore(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(state)
    else:
        value.load_state_dict(state)


def _join(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"
