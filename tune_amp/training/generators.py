"""Random numbers of a run: torch's, NumPy's and Python's global generators, seeded and stored together.

Models draw from any of them, for initial weights, dropout or dropped layers. A generator that a model creates itself is
not covered: the model must seed it, and it starts anew when a run resumes from a checkpoint.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


class Generators:
    """The generators of one run, that of its GPU included, separate from those of its process and of other runs."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        with keep_generators(device):
            seed_generators(seed)
            self.state = read_generators(device)
            """State while they are not in use: plain values and tensors (``weights_only=True`` loads it)."""

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the global generators continue this run's sequences in the ``with`` block. Must not be nested."""
        with keep_generators(self._device):
            write_generators(self.state, self._device)
            try:
                yield
            finally:
                self.state = read_generators(self._device)


@contextlib.contextmanager
def keep_generators(device: torch.device) -> Iterator[None]:
    """Restore the state of the global generators after the ``with`` block."""
    state = read_generators(device)
    try:
        yield
    finally:
        write_generators(state, device)


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the generators and the model's running statistics after the forward passes of the ``with`` block."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        with keep_generators(device):
            yield
    finally:
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators. NumPy's uses only the lower 32 bits of ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator that models draw from
    torch.manual_seed(seed)


def read_generators(device: torch.device) -> dict[str, Any]:
    """Return the state of the global generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def write_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore a state from ``read_generators``. A GPU's generator is not changed if the state was read on a CPU."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
