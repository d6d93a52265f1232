"""The completion works in a real bash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tune_amp.cli.main import main

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.mark.parametrize(("typed", "expected"), [
    (["se"], ["search"]),
    (["s"], ["search", "show"]),
    (["search", "--obj"], ["--objective"]),
    (["search", "mnist"], ["mnist_amp"]),
    (["train", "de"], ["demo"]),
    (["train", "--rep"], ["--replay"]),
    (["search", "de"], []),
])  # fmt: skip
def test_what_is_typed_is_completed(
    typed: list[str], expected: list[str], enter_folder: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("results/demo").mkdir(parents=True)
    Path("results/$(touch harmed)").mkdir()
    assert main(["completion"]) == 0
    script = capsys.readouterr().out
    words = " ".join(["tune-amp", *typed])
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _tune_amp; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected
    assert not Path("results/harmed").exists()
    assert not Path("harmed").exists()


def test_an_argument_that_it_does_not_take_is_refused_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    expected = "error: unrecognized arguments: fish (see tune-amp completion --help)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("arguments", ["completion", "grafana", "--help", "--version"])
def test_what_cannot_be_printed_leaves_no_traceback(arguments: str) -> None:
    program = [sys.executable, "-m", "tune_amp", arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
