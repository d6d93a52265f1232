import argparse
import errno
import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tune_amp.cli.compare import _compare_parser
from tune_amp.cli.console import (
    LastingConsole,
    answer_bad_input,
    find_run,
    find_run_folder,
    is_screen,
    mend_streams,
    open_console,
    read_path,
    read_place,
    say,
    show_cursor,
)
from tune_amp.cli.grafana import _grafana_parser
from tune_amp.cli.report import _report_parser
from tune_amp.cli.search_arguments import search_parser
from tune_amp.cli.show import _show_parser
from tune_amp.cli.train import _train_parser
from tune_amp.trial.config import InputError


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
    open_console(stderr=True).print("something of my:train: itself")
    assert capsys.readouterr() == ("", "something of my:train: itself\n")


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
    for run in (results / "old", results / "new", Path("new")):
        run.mkdir(parents=True)
        (run / "best.parquet").touch()
    assert find_run("old", results) == find_run("results/old", results) == results / "old"
    for named in ("results/old/best.parquet", "old/best.parquet"):
        assert find_run(named, results) == results / "old" / "best.parquet"
        assert find_run_folder(named, results, "RUN") == results / "old"
    assert find_run("new", results) == Path("new")  # a path, as it stands there
    assert find_run("elsewhere", results) == Path("elsewhere")  # and is refused under the name that was given
    with pytest.raises(InputError) as caught:
        find_run_folder("elsewhere", results, "RUN")
    assert str(caught.value) == "RUN: must be the folder of a run, or its name in results, got elsewhere"
    Path("notes.txt").touch()
    for no_run in ("x" * 300, "notes.txt"):
        with pytest.raises(InputError, match=no_run):
            find_run_folder(no_run, results, "RUN")


def test_a_file_is_preferred_to_a_folder_that_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("demo", "results"):
        Path(folder).mkdir()
    Path("results/demo").touch()
    assert find_run("demo", Path("results")) == Path("results/demo")


def test_a_path_that_is_too_long_is_bad_input_and_another_fault_of_the_system_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(number: int) -> int:
        raise OSError(number, "no")

    assert answer_bad_input(lambda: fail(errno.ENAMETOOLONG)) == 2
    assert capsys.readouterr().err == f"error: OSError: [Errno {errno.ENAMETOOLONG}] no\n"
    with pytest.raises(OSError, match="no"):
        answer_bad_input(lambda: fail(errno.EIO))


@pytest.mark.parametrize("kind", ["file", "empty", "project"])
def test_what_is_no_run_does_not_hide_the_run_of_its_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "file":
        Path("demo").write_text("notes")
    else:
        Path("demo").mkdir()
    if kind == "project":
        Path("demo/space.yaml").write_text("parameters: {}")
    results = Path("results")
    assert find_run("demo", results) == Path("demo")
    (results / "demo").mkdir(parents=True)
    (results / "demo" / "reports.journal").touch()
    assert find_run("demo", results) == find_run_folder("demo", results, "RUN") == results / "demo"


def test_path_in_the_home_folder_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_path("~/runs") == tmp_path / "runs"
    assert read_place("~/runs") == f"{tmp_path}/runs"
    assert read_place("./~/runs") == "./~/runs"  # kept as it is: without ./ it could be a name
    assert read_place("quick") == "quick"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must not be empty"),
        (
            "~nobody-has-this-name/x",
            "~nobody-has-this-name/x names an unknown home folder; set HOME, give the full path, "
            "or write ./~nobody-has-this-name/x for that very name",
        ),
    ],
)
def test_path_that_leads_nowhere_is_refused(text: str, message: str) -> None:
    for read in (read_path, read_place):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            read(text)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (search_parser, "~/x --data-dir=~/x --warm-start=~/x --resume=~/x --results-dir=~/x"),
        (_train_parser, "~/x --output=~/x --data-dir=~/x --results-dir=~/x"),
        (_compare_parser, "~/x --output=~/x --data-dir=~/x --results-dir=~/x"),
        (_report_parser, "~/x --output=~/x --results-dir=~/x"),
        (_show_parser, "~/x --results-dir=~/x"),
        (_grafana_parser, "~/x"),
    ],
)
def test_every_path_of_a_command_may_begin_with_the_home_folder(
    build: Callable[[str], argparse.ArgumentParser], arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = build("x")
    expanded = {
        name for name, value in vars(parser.parse_args(arguments.split())).items() if str(value) == f"{tmp_path}/x"
    }
    kinds = ("DIR", "FILE", "RUN", "SPACE")
    assert expanded == {action.dest for action in parser._actions if action.metavar in kinds} - {"name"}


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"96.1 +-0.5 l?uf ... ? \xff\n"),
        ("latin-1", b"96.1 \xb10.5 l\xe4uf ... ? \xff\n"),
        ("utf-8", "96.1 \u00b10.5 l\u00e4uf \u2026 \u8dd1 ".encode() + b"\xff\n"),
    ],
)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_an_encoding_does_not_have_is_printed_in_another_way(
    name: str, encoding: str, printed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding))
    mend_streams()
    open_console(stderr=name == "stderr").print("96.1 \u00b10.5 l\u00e4uf \u2026 \u8dd1 \udcff")
    getattr(sys, name).flush()
    assert written.getvalue() == printed


def test_file_that_is_opened_beside_closed_streams_gets_nothing_that_is_printed(tmp_path: Path) -> None:
    """As ``>&-`` closes them: the file would get number 1, and all that others print there."""
    code = (
        "import os, subprocess, sys; from tune_amp.cli.console import mend_streams; mend_streams(); "
        "file = open('kept', 'w'); print('printed'); print('an error', file=sys.stderr); "
        "subprocess.run(['sh', '-c', 'echo by another; echo and its error >&2'], check=True); "
        "[os.write(number, b'by a library') for number in (1, 2)]; file.write(sys.stdin.read() if sys.stdin else 'all')"
    )
    shell = 'exec "$0" -c "$1" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable, code], cwd=tmp_path, check=False)
    assert (done.returncode, (tmp_path / "kept").read_text()) == (0, "all")


def test_log_is_no_screen_though_colour_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    log = io.StringIO()
    console = Console(file=log, width=20)
    assert not is_screen(console)
    say(console, "a sentence of more than twenty letters", style="red")
    assert log.getvalue() == "\x1b[31ma sentence of more than twenty letters\x1b[0m\n"  # on one line
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        assert is_screen(Console(file=terminal))
        monkeypatch.setenv("TERM", "dumb")
        assert not is_screen(Console(file=terminal))  # it could not redraw a table
    os.close(ours)


LEAVING = """
import atexit, sys, threading, time, types
from tune_amp.cli.console import leave

if "search" in sys.argv:
    sys.modules["ray"] = types.ModuleType("ray")  # as after a search
from tune_amp.trial.consent import consent_to

consent_to("mnist", "simple_net", "mine:net" if "own" in sys.argv else "tpe")

def end():
    time.sleep(0.2)
    print("thread", flush=True)

class Noisy:
    def __del__(self):
        print("collected", flush=True)

kept = Noisy()
atexit.register(print, "at exit")
threading.Thread(target=end).start()
sys.stdout.write("written ")
leave(3)
"""


@pytest.mark.parametrize(
    ("arguments", "collected"), [(["search"], ""), (["search", "own"], "collected\n"), ([], "collected\n")]
)
def test_a_process_leaves_with_its_code_when_threads_and_what_is_registered_have_ended(
    arguments: list[str], collected: str
) -> None:
    """After a search without the user's own code, no object is looked at once more."""
    done = subprocess.run([sys.executable, "-c", LEAVING, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"written thread\nat exit\n{collected}"


@pytest.mark.parametrize(("code", "place", "expected"), [
    (0, "pipe", 0), (3, "pipe", 3), (0, "closed", 0), (0, "/dev/full", 1), (3, "/dev/full", 3),
])  # fmt: skip
def test_a_process_whose_output_goes_nowhere_leaves_with_its_code(code: int, place: str, expected: int) -> None:
    """But for a full disk: what was printed is lost, which no code of success hides."""
    text = "import sys; from tune_amp.cli.console import leave; sys.modules['ray'] = sys; sys.stdin.read(); "
    text += f"print('lost') if sys.stdout else 0; leave({code})"
    command = ["/bin/sh", "-c", 'exec "$0" "$@" >&-' if place == "closed" else 'exec "$0" "$@"']
    with open(os.devnull if place in ("pipe", "closed") else place, "w") as file:  # noqa: PTH123
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [*command, sys.executable, "-c", text],
            stdin=subprocess.PIPE,
            stdout=writing if place == "pipe" else file,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
            text=True,
        )
        os.close(writing)
        os.close(reading)
        _, said = process.communicate("")
    assert (process.returncode, said) == (expected, "")
