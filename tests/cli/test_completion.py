"""The completion works in a real bash."""

import shutil
import subprocess
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
