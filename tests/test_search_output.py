import argparse
import contextlib
import io
import os
import pty

import pytest
from rich.console import Console

from tune_amp.monitoring import JsonLines, LiveTable, PlainLines, Quiet
from tune_amp.search_output import choose_observer


def choose(console: Console, *, json: bool = False, quiet: bool = False) -> type:
    arguments = argparse.Namespace(json=json, quiet=quiet)
    chosen = choose_observer(arguments, console, io.StringIO())
    return type(chosen.enter_result if isinstance(chosen, contextlib.nullcontext) else chosen)


@pytest.mark.parametrize("colour", ["FORCE_COLOR", "TTY_COMPATIBLE", "none is asked for"])
def test_a_log_gets_a_line_a_trial_and_only_a_terminal_a_live_table(
    colour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(colour, "1")
    assert choose(Console(file=io.StringIO())) is PlainLines
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        assert choose(Console(file=terminal)) is LiveTable
        assert choose(Console(file=terminal), json=True) is JsonLines
        assert choose(Console(file=terminal), quiet=True) is Quiet
    os.close(ours)
