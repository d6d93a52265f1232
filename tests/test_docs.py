"""Every command, every piece of Python, every space and every link of the pages in ``docs`` works, page by page."""

import difflib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tune_amp.cli.main import main
from tune_amp.cluster.session import ray_session
from tune_amp.space.space import load_space

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LONG_PAGES = ("choosing-a-space", "own-model-and-data", "own-training", "trackers")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHERS_FLAGS = {"--logdir", "--backend-store-uri", "--runtime-env-json", "--working-dir", "--profile"}
"""Of TensorBoard and MLflow, in the commands that show what they were told, of Ray's that submits a job, and of the
benchmarks."""
OTHER_PROGRAMS = "sh"
"""The language of blocks that test_dashboard.py tries: what they run is not on every machine."""
FILE_NAME = re.compile(r"# (\w+\.(?:py|yaml))\n")


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """One Ray for the searches of all pages: it takes longer to start than they do."""
    with ray_session(num_cpus=1, run="test_docs"):
        yield


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block, in order."""
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]


def commands(language: str, text: str) -> list[str]:
    if language == "bash":
        return text.splitlines()
    return [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]


def test_there_are_pages() -> None:
    names = [
        "choosing-a-space",
        "cluster",
        "monitoring",
        "moving-over",
        "notebook",
        "own-model-and-data",
        "own-training",
        "performance",
        "reading-results",
        "resuming",
        "trackers",
        "trust",
    ]
    assert [page.stem for page in PAGES] == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_kind_that_is_tried(page: Path) -> None:
    assert {language for language, _ in blocks(page)} <= {"bash", "console", "python", "yaml", OTHER_PROGRAMS}
    assert page.read_text().count("```") == 2 * len(blocks(page))
    assert "@@" not in page.read_text()


def test_the_site_builds_with_every_link_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """MkDocs knows the links and anchors of the pages as a browser finds them, and of README, SECURITY and others."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path): page.read_text() for page in tmp_path.rglob("*.html")}
    assert {Path("index.html"), Path("SECURITY.html"), *(Path(f"docs/{page.stem}.html") for page in PAGES)} <= {*pages}
    loaded = re.compile(
        r"""<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="(?:https?:)?//"""
    )
    assert not [path for path, text in pages.items() if loaded.search(text)]
    found = json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]
    assert any("stop button" in entry["text"] and entry["location"].startswith("docs/notebook.html") for entry in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_space_loads(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(text for language, text in blocks(page) if language == "yaml"):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert load_space(str(path)).parameters


def test_every_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("search", "train", "compare", "report", "show", "grafana"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    ours = [re.sub(rf"^```{OTHER_PROGRAMS}\n.*?^```$", "", page.read_text(), flags=re.M | re.S) for page in PAGES]
    used = {flag for text in ours for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}
    assert len(used) >= 10
    assert used - known == OTHERS_FLAGS


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.long] * (page.stem in LONG_PAGES), id=page.stem)
        for page in PAGES
        if page.stem != "notebook"  # test_notebook.py runs it in a kernel
    ],
)
def test_a_page_works_from_its_first_line_to_its_last(
    page: Path, tmp_path: Path, enter_folder: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks that begin with the name of a file are that file; all others are run."""
    names: dict[str, object] = {}
    for language, text in blocks(page):
        named = FILE_NAME.match(text)
        if named:
            (tmp_path / named[1]).write_text(text)
        elif language == "python":
            exec(text, names)
        elif language not in ("yaml", OTHER_PROGRAMS):
            for line in commands(language, text):
                program, *arguments = shlex.split(line)
                assert program == "tune-amp"
                capsys.readouterr()
                assert main(arguments) == 0, capsys.readouterr().err
            check_output(text, capsys.readouterr().out)


def check_output(shown: str, printed: str) -> None:
    """What a page shows of a command's output has the parts that it has here, and those that no clock changes alike."""
    parts = [pick_parts(text) for text in (shown, printed)]
    if parts[0]:
        assert parts[0] == parts[1]


def pick_parts(text: str) -> list[str]:
    """Of each line that begins a part of the output: the line, or its first word where numbers follow."""
    found = re.findall(r"^(?:(?:space|searched|files|reuse) .*|#|run|importance|slot)(?= |$)", text, re.MULTILINE)
    return [" ".join(line.split()) for line in found]


def test_moving_over_from_ray_tune_takes_ten_lines_of_the_function() -> None:
    page = (ROOT / "docs" / "moving-over.md").read_text()
    theirs, ours = re.findall(
        r"^```python\n# (?:ray_tune_script|digits)\.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    functions = [text[text.index("def train_digits") :].partition("\n\nif __name__")[0] for text in (theirs, ours)]
    lines = difflib.ndiff(*(text.strip().splitlines() for text in functions))
    assert sum(line.startswith("+ ") for line in lines) == 10
    assert "In the function ten lines differ" in page
