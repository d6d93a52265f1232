"""Runs the tests marked ``gpu`` on a machine that may lack what the others need."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.training.gpu_rows import GpuRow
from tune_amp.trial.text import one_line

NOT_NEEDED = ("ray", "optuna", "hypothesis", "sklearn")
"""Packages that a GPU machine may lack: test files that cannot be imported without them are left out."""


def run_gpu_tests(left: float) -> list[GpuRow]:
    """The tests marked ``gpu``, of the files that can be imported here: some need Ray, or what imports it."""
    files = list_gpu_tests(Path("tests"))
    if not files:
        note = "skipped: no tests/ in the current folder"
        return [GpuRow(part="tests", subject="", quantity="", note=note)]
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        settings = Path(name) / "pytest.ini"
        # Not pyproject's: it names plugins that may not be installed here, and is strict about them.
        settings.write_text(
            f"[pytest]\npythonpath = {Path.cwd()} {Path('tests').resolve()}\nmarkers =\n  slow: \n  gpu: \n",
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--import-mode=importlib", "-c", str(settings)]
        command += ["--rootdir", str(Path.cwd()), "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += [f"--junitxml={report}", *map(str, files)]
        search_path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        # No plugins: the machine's own may want packages and settings of theirs, and no test here needs one.
        environment = {**os.environ, "PYTHONPATH": search_path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        try:
            done = subprocess.run(  # noqa: S603 - our own command
                command, check=False, capture_output=True, text=True, timeout=left, env=environment
            )
        except subprocess.TimeoutExpired:
            note = f"not done within {left:.0f} s"
            return [GpuRow(part="tests", subject="", quantity="", verdict="failed", note=note)]
        if not report.exists():
            note = f"pytest left no report: {one_line(done.stderr[-250:] or done.stdout[-250:])}"
            return [GpuRow(part="tests", subject="", quantity="", verdict="failed", note=note)]
        return read_test_report(report)


def list_gpu_tests(folder: Path) -> list[Path]:
    """Test files with tests that need a GPU."""
    return [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def read_test_report(report: Path) -> list[GpuRow]:
    """Outcomes in a JUnit report of pytest: their number, and a row for each failure and each file left out."""
    rows = []
    outcomes = {"passed": 0, "skipped": 0, "failed": 0}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - our own file
        problem = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        name = case.get("name", "")
        if problem is not None and (lacking := _find_lacking(problem.text or "")):
            rows.append(GpuRow(part="tests", subject=name, quantity="", note=f"left out: {lacking} is not installed"))
            continue
        outcome = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
        outcomes[outcome] += 1
        if problem is not None:
            note = (problem.get("message") or "").strip().partition("\n")[0][:300]
            rows.append(GpuRow(part="tests", subject=name, quantity="outcome", verdict="failed", note=note))
    counts = [
        GpuRow(part="tests", subject="", quantity=outcome, value=float(count)) for outcome, count in outcomes.items()
    ]
    if not any(outcomes.values()):
        counts.append(GpuRow(part="tests", subject="", quantity="", verdict="failed", note="no test was run"))
    return counts + rows


def _find_lacking(traceback: str) -> str | None:
    """The package of ``NOT_NEEDED`` that an import did not find; None where something else went wrong."""
    found = re.search(r"ModuleNotFoundError: No module named '(\w+)", traceback)
    return found[1] if found and found[1] in NOT_NEEDED else None
