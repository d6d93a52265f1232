"""The commands: arguments, calls and printing. The only room that prints."""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.cli.main import main as main

__getattr__ = open_door(__name__, main=("main",))
