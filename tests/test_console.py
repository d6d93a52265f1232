import os
import pty
import sys
from pathlib import Path

import pytest

from tune_amp.console import LastingConsole, find_file, open_console, show_cursor


def test_console_prints_into_the_void_once_its_reader_is_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        console = LastingConsole(file=file)
        console.print("unheard")  # rich's own would end the process
        console.print("unheard too")
        file.write("neither is what others print there")
        file.flush()


def test_console_that_is_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    open_console(quiet=True).print("nothing")
    open_console(stderr=True).print("something")
    assert capsys.readouterr() == ("", "something\n")


def test_terminal_gets_its_cursor_back_and_a_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        show_cursor()
        assert os.read(ours, 100) == b"\x1b[?25h"
    os.close(ours)
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        show_cursor()
    assert (tmp_path / "log").read_text() == ""
    show_cursor()  # nor does what is closed


def test_a_run_is_named_by_its_name_its_folder_or_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = Path("results")
    (results / "old").mkdir(parents=True)
    assert find_file("old", results) == results / "old"
    assert find_file("results/old/best.parquet", results) == results / "old" / "best.parquet"
    assert find_file("elsewhere", results) == Path("elsewhere")  # and is refused under the name that was given
    Path("old").mkdir()
    assert find_file("old", results) == Path("old")
