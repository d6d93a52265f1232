"""Pauses Python's cycle collector while it would only cost time, or would do harm."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Disable the cycle collector in the ``with`` block.

    Importing PyTorch and Ray Tune makes a million objects that stay: with the collector at work, that takes 2.05 s of
    CPU time, and 1.57 s without.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
