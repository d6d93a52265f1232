"""The page docs/notebook.md in a real Jupyter kernel, cell by cell, and the interrupt of a kernel."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager  # type: ignore[import-not-found,unused-ignore]

from tune_amp.results.journal import read_journal
from tune_amp.results.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
CELLS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "notebook.md").read_text(), re.MULTILINE | re.DOTALL)
DEADLINE = 240
"""Seconds of a cell."""

LOOP = """
import time
import tune_amp

def train(trial):
    for epoch in trial.epochs():
        time.sleep(0.5)
        yield {"reading": epoch + trial.own["size"]}

space = {"parameters": {"lr": {"low": 1e-3, "high": 1e-1}}, "own": {"size": {"choices": [2, 4]}}}
"""
SEARCH = """
result = tune_amp.tune(
    space, train=train, objective="reading", mode="max", num_samples=3, max_epochs=8, confirm_seeds=0, name="cells"
)
print(result.interrupted, result.reason, result.folder)
result
"""


class Kernel:
    """A Jupyter kernel in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder))
        self._client = self.manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    def run(self, cell: str, watch: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
        """Run a cell, and call ``watch`` after each of its messages. Return what it has shown, message by message."""
        shown: list[dict[str, Any]] = []

        def keep(message: dict[str, Any]) -> None:
            if message["msg_type"] not in ("status", "execute_input"):
                shown.append({"kind": message["msg_type"], **message["content"]})
            watch()

        reply = self._client.execute_interactive(cell, timeout=DEADLINE, output_hook=keep)
        assert reply["content"]["status"] == "ok", reply["content"]
        return shown

    def close(self) -> None:
        self._client.stop_channels()
        self.manager.shutdown_kernel()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = Kernel(tmp_path)
    yield started
    started.close()


def pick(shown: list[dict[str, Any]], kind: str, form: str = "text/html") -> list[str]:
    return [message["data"].get(form, "") for message in shown if message["kind"] == kind]


def streamed(shown: list[dict[str, Any]], name: str) -> str:
    return "".join(message["text"] for message in shown if message["kind"] == "stream" and message["name"] == name)


@pytest.mark.slow
def test_the_page_runs_in_a_kernel_and_shows_what_it_says(kernel: Kernel) -> None:
    loop, search, result, best, trials, again, wrong, resumed = CELLS
    assert kernel.run(loop) == []
    shown = kernel.run(search)
    assert streamed(shown, "stderr") == ""
    drawn = pick(shown, "update_display_data")
    assert any("of 4 trials ended" in text for text in drawn)
    assert drawn[-1] == ""  # the table leaves nothing behind
    assert any("verdict" in text for text in pick(shown, "display_data", "text/plain"))
    [page] = pick(kernel.run(result), "execute_result")
    assert page.startswith("<p><b>cells</b> ")
    assert "<iframe srcdoc=" in page
    [config] = pick(kernel.run(best), "execute_result", "text/plain")
    assert config.startswith("TrialConfig(lr=")
    [table] = pick(kernel.run(trials), "execute_result", "text/plain")
    assert len(table.splitlines()) == 5
    [table] = pick(kernel.run(again), "execute_result", "text/plain")
    assert len(table.splitlines()) == 3
    error = re.search(r"# (epochs: .*)", wrong)
    assert error
    assert streamed(kernel.run(wrong), "stdout") == f"{error[1]}\n"
    assert pick(kernel.run(resumed), "execute_result", "text/plain") == ["False"]


@pytest.mark.slow
@pytest.mark.long
def test_the_interrupt_of_a_kernel_leaves_a_result_that_resumes(kernel: Kernel) -> None:
    journal = RunFolder(kernel.folder / "results" / "cells").journal
    interrupts: list[float] = []

    def interrupt_once() -> None:
        if not interrupts and journal.exists() and sum(e["event"] == "report" for e in read_journal(journal)) >= 2:
            interrupts.append(time.monotonic())
            kernel.manager.interrupt_kernel()

    kernel.run(LOOP)
    shown = kernel.run(SEARCH, interrupt_once)
    assert interrupts
    assert streamed(shown, "stdout") == "True SIGINT results/cells\n"
    call = "tune_amp.tune(resume='results/cells')"
    assert any(f"cut off  SIGINT: {call} resumes it" in text for text in pick(shown, "display_data", "text/plain"))
    [page] = pick(shown, "execute_result")
    assert page.startswith("<p><b>cells</b> cut off")
    shown = kernel.run(
        f"result = {call[:-1]}, train=train)\nprint(result.interrupted, result.trials['epoch'].tolist())"
    )
    assert streamed(shown, "stdout").startswith("False [8")
