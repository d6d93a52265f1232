"""Replaces a part of a library for the length of a ``with`` block, where the library has no setting for it."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """In the ``with`` block, ``owner`` (a module or a class) has ``replacement`` under ``name``."""
    stock = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, stock)
