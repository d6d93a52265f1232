"""The argument of a user's own training loop: device, settings, autocast, and a loss scaler that records its telemetry.

Everything else is the loop's own: models, optimizers, data, schedules.

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

import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
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
)
from tune_amp.training.generators import write_generators
from tune_amp.training.probe import all_finite
from tune_amp.trial.config import InputError, TrialConfig

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
        self._updates = 0
        self.telemetry = start_telemetry(config)
        """Telemetry as of the last ``read``."""

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Update the scale as ``torch.amp.GradScaler.update`` does, and record the step."""
        if not self.is_enabled():
            self._updates += 1
            return
        flags = [
            flag for state in self._per_optimizer_states.values() for flag in state["found_inf_per_device"].values()
        ]
        super().update(new_scale)
        scale = self._get_scale_async()
        assert scale is not None
        if len(flags) != 1:  # several optimizers or devices, or a scale that the user sets
            flags = [torch.stack([torch.zeros_like(scale), *(flag.to(scale.device) for flag in flags)]).amax()]
        if self._updates == len(self._places):
            self._full.append(self._log.clone())
            self._updates = 0
        for place, value in zip(self._places[self._updates], (flags[0], scale), strict=True):
            place.copy_(value)
        self._updates += 1

    def read(self) -> ScalerTelemetry:
        """Add the steps since the last call to the telemetry, and return it. Waits for the device."""
        if self.is_enabled():
            overflows, scales = torch.cat([*self._full, self._log[:, : self._updates]], dim=1).cpu().numpy()
            self.telemetry = summarise_steps(self.telemetry, scales, overflows != 0)
        else:
            self.telemetry = count_unscaled(self.telemetry, self._updates)
        self._full, self._updates = [], 0
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
        self.lr = config.lr
        """Learning rate."""
        self.batch_size = config.batch_size
        """Examples in a training step."""
        self.max_epochs = config.max_epochs
        """Epochs of a trial that is not stopped."""
        self.seed = config.seed
        """Seed of the trial. The global generators of torch, NumPy and Python are seeded with it before the loop."""
        self.own: Mapping[str, Any] = types.MappingProxyType(config.own)
        """The user's own parameters, from the section ``own`` of the search space."""
        self.scaler = TelemetryScaler(config, self.device)
        """A ``torch.amp.GradScaler`` with the trial's settings, disabled unless it trains in fp16."""
        self.kept: dict[str, Any] = {}
        """What checkpoints hold, by name: see ``keep``."""
        self.probed: tuple[nn.Module, Callable[[], Tensor]] | None = None
        """The model whose gradients are probed, and its loss; None if there is none."""
        self.checkpoint: Mapping[str, Any] | None = None
        """The state to resume from, until ``epochs`` has restored it."""
        self._first_epoch = 0
        self._has_begun = False
        self._watched: list[nn.Module] = []
        self._initial: dict[Tensor, Tensor] = {}

    def autocast(self) -> torch.autocast:
        """Return the context for forward pass and loss: fp16 or bf16 where safe, else fp32; off for fp32 and tf32."""
        return autocast_of(self.config.precision, self.device)

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs to train, from 0; after a checkpoint was restored, those that are left."""
        if self.checkpoint is not None:  # what draws random numbers before the first epoch has drawn them again
            left = self.checkpoint["kept"].keys() - self.kept.keys()
            if left:
                names = join_sorted(left)
                raise InputError(f"trial.keep: must keep {names} before trial.epochs(), as the checkpoint does")
            write_generators(self.checkpoint["generators"], self.device)
            self.checkpoint = None
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
            names = join_sorted(named)
            raise InputError(f"trial.keep: must be called before trial.epochs(), got {names} after its begin")
        for name, value in named.items():
            is_generator = isinstance(value, torch.Generator)
            if not is_generator and not hasattr(value, "load_state_dict"):
                rule = "must have state_dict and load_state_dict, or be a torch.Generator"
                raise InputError(f"trial.keep: {name}: {rule}, got {type(value).__name__}")
            if isinstance(value, nn.Module):
                self.watch(value)  # before it is restored: a resumed trial compares with the first weights too
            if self.checkpoint is not None:
                states = self.checkpoint["kept"]
                if name not in states:
                    held = join_sorted(states)
                    raise InputError(f"trial.keep: {name}: is not in the checkpoint, which holds {held}")
                (value.set_state if is_generator else value.load_state_dict)(states[name])
            self.kept[name] = value

    def watch(self, model: nn.Module, loss: Callable[[], Tensor] | None = None) -> None:
        """End the trial as diverged once a weight of ``model`` is not finite; find out whether any weight moves.

        Args:
            model: the model; kept models are watched anyway.
            loss: returns the loss of ``model`` on some training examples, computed without autocast. With it, the
                gradients are probed after each epoch in fp16: ``underflow_share`` tells how much of them is lost.

        Raises:
            InputError: with ``loss``, no weight of ``model`` requires a gradient.
        """
        if loss is not None:
            if not any(weight.requires_grad for weight in model.parameters()):
                rule = "must have a parameter that requires a gradient if loss is given, got none"
                raise InputError(f"trial.watch: model: {rule}")
            self.probed = model, loss
        if model not in self._watched:
            self._watched.append(model)
            self._initial |= {weight: weight.detach().to("cpu", copy=True) for weight in _list_weights([model])}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``read_state``, called before the loop starts."""
        self.checkpoint, self._first_epoch = state, state["epoch"]
        self.scaler.telemetry = ScalerTelemetry(**state["telemetry"])
        self.scaler.load_state_dict(state["scaler"])

    def read_state(self, epoch: int, generators: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state after ``epoch`` epochs, as tensors and plain values."""
        kept = {
            name: value.get_state() if isinstance(value, torch.Generator) else value.state_dict()
            for name, value in self.kept.items()
        }
        telemetry = dataclasses.asdict(self.scaler.telemetry)
        scaler = self.scaler.state_dict()
        return {"epoch": epoch, "kept": kept, "scaler": scaler, "telemetry": telemetry, "generators": generators}

    def are_weights_finite(self) -> bool:
        """Return whether every weight of the watched models is finite."""
        weights = _list_weights(self._watched)
        return not weights or all_finite(weights)

    def have_weights_moved(self) -> bool:
        """Return whether a weight of a watched model differs from its first value; without models, it is assumed."""
        if not self._initial or any(not torch.equal(now.detach().cpu(), then) for now, then in self._initial.items()):
            self._initial = {}  # until a weight moves, every epoch compares them
        return not self._initial


def join_sorted(names: Iterable[object]) -> str:
    """Return the names for a message."""
    return ", ".join(sorted(map(str, names))) or "nothing"


def _list_weights(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the weights that have a shape already."""
    weights = (weight for model in models for weight in model.parameters())
    return [weight for weight in weights if not isinstance(weight, UninitializedParameter)]
