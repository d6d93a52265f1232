"""Lazy imports for the packages of tune_amp: a module is imported when one of its names is first used.

Some of the modules take long to load.
"""

import importlib
from collections.abc import Callable
from typing import Any


def open_door(room: str, **names: tuple[str, ...]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package (PEP 562).

    Args:
        room: name of the package.
        names: module of the package -> the names that other packages may import from it.
    """
    modules = {name: module for module, of_module in names.items() for name in of_module}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{room}.{modules[name]}"), name)

    return load
