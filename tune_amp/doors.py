"""Doors of the rooms: names that are imported when they are first used, because much of it takes long to load."""

import importlib
from collections.abc import Callable
from typing import Any


def open_door(room: str, **names: tuple[str, ...]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a room (PEP 562).

    Args:
        room: name of the package.
        names: module of the room -> what others may import of it.
    """
    modules = {name: module for module, of_module in names.items() for name in of_module}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{room}.{modules[name]}"), name)

    return load
