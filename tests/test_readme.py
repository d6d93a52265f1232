"""What the README shows works: its spaces load, its Python runs, its commands exist and do what it says."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tune_amp.cli.main import main
from tune_amp.results.records import load_best, load_trials
from tune_amp.space.space import load_space
from tune_amp.trial.config import TrialStatus

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS_PAGE = (ROOT / "docs" / "reading-results.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def entry_point(program: str) -> list[str]:
    """What the installed script of that name runs, without the current folder on the path (``-P``), as it does."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[program].partition(":")
    return [sys.executable, "-P", "-c", f"import sys, {module}; sys.exit({module}.{function}())"]


def test_the_first_screen_is_short() -> None:
    assert len(README.split()) <= 1500
    assert "](docs/report.png)" in README


def test_the_example_space_loads(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    (tmp_path / "space.yaml").write_text(text)
    space = load_space(str(tmp_path / "space.yaml"))
    assert [parameter.name for parameter in space.parameters] == ["lr", "optimizer", "precision", "init_scale"]
    assert space.is_conditional


def test_every_make_target_and_flag_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", README)) | {"search", "test"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    help_texts = [
        subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout
        for script in scripts
        if script.stem != "benchmark"
    ]
    assert len(help_texts) == 4
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert "--data-dir" in flags
    assert {flag for flag in flags if not any(flag in text for text in help_texts)} == set()


def test_the_table_of_statuses_is_complete() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", RESULTS_PAGE, re.MULTILINE)) == set(TrialStatus)


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README


@pytest.mark.slow
def test_your_own_model_and_data_are_eight_lines(
    tmp_path: Path, enter_folder: None, capsys: pytest.CaptureFixture[str]
) -> None:
    [mine] = [text for text in blocks("python") if "def net(" in text]
    assert len([line for line in mine.splitlines() if line]) <= 8
    (tmp_path / "mine.py").write_text(mine)
    lines = [line for text in blocks("bash") for line in text.splitlines() if "--model mine:net" in line]
    program, *arguments = shlex.split(lines[0])
    assert program == "tune-amp"
    command = [*entry_point(program), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "results" / "mine"
    assert [trial.config.model for trial in load_trials(run)] == ["mine:net"] * 4
    assert load_best(run).dataset == "mine:data"

    # The printed command names both functions, which is the consent to run them.
    reuse = shlex.split(re.search(r"^reuse +(.*)$", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert reuse[0] == program
    assert main([*reuse[1:], "--max-epochs", "1"]) == 0
    trained = capsys.readouterr().out
    assert "test accuracy" in trained
    assert "on 300 images" in trained
