"""Makes the optimizers that a configuration can name."""

import functools
import inspect
import sys
import types
from typing import Any

import torch
from torch import nn

from tune_amp.trial.config import TrialConfig

SGD_MOMENTUM = 0.9


def build_optimizer(config: TrialConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the trial's optimizer, fused: one kernel, and no host synchronisation to skip an overflowed step."""
    _leave_compiler_out()
    parameters = list(model.parameters())
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer != "sgd":
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        return _unwrap_step(kind(parameters, **settings))
    sgd = torch.optim.SGD(parameters, momentum=SGD_MOMENTUM, **settings)
    for parameter in parameters:
        # torch 2.15 leaves the buffer uninitialised if the first step is skipped; zeros give the same first update.
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return _unwrap_step(sgd)


@functools.cache
def _leave_compiler_out() -> None:
    """Keep PyTorch from importing its compiler when the first optimizer is made: 0.9 to 1.1 s CPU of a worker's start.

    These methods import it to exclude themselves from compiled code (``torch/_compile.py``), unless they find the
    result of an earlier exclusion. Here no optimizer is part of compiled code; a compiled model imports it itself.
    """
    if "torch._dynamo" in sys.modules:
        return
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        bare = getattr(method, "__wrapped__", method)
        bare.__dict__.setdefault("__dynamo_disable", bare)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether functions are registered that each step of the optimizer calls."""
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks  # noqa: SLF001 - no public name
    return any(hooks)


def _unwrap_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return ``optimizer`` with a ``step`` without PyTorch's wrapper, which imports the compiler as well.

    The wrapper calls the hooks that a user's task has registered: then it is needed.
    """
    bare = inspect.unwrap(type(optimizer).step)

    def step(self: torch.optim.Optimizer) -> None:
        if has_step_hooks(self):
            type(self).step(self)
            return
        with torch.no_grad():
            bare(self)

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]  # a method, as schedules need
    return optimizer
