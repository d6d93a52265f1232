import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from curve_tables import make_stress_table

from benchmarks.__main__ import main
from benchmarks.quality import search_quality
from benchmarks.quality.curves import load_curves, write_curves
from benchmarks.training import gpu, telemetry
from benchmarks.training.floor import take_again
from benchmarks.training.gpu import make_images
from benchmarks.training.gpu_rows import GpuRow
from benchmarks.training.telemetry import measure_probe, measure_telemetry, render_telemetry
from tune_amp.training.data import Dataset
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import EpochMetrics, TrialConfig

CPU = torch.device("cpu")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which arguments are refused."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    return run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: NAME"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["record"], "required: SPACE"),
        (["record", "stress", "--count", "0"], "--count: must be at least 1, got 0"),
        (["record", "stress", "--count", "many"], "--count: invalid"),
        (["record", "stress", "--seed", "-1"], "--seed: must be between 0 and 2^32 - 1, got -1"),
        (["record", "no_such_space"], "no_such_space: is neither a file nor a bundled search space"),
        (["search_quality", "--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["search_speed", "--data-dir", "x", "--precisions", "tf32"], "--precisions: invalid choice: 'tf32'"),
        (["telemetry", "--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    ],
)
def test_wrong_arguments_are_answered_with_one_line_and_exit_code_2(
    refuse: Callable[..., str], arguments: list[str], complaint: str
) -> None:
    assert complaint in refuse(*arguments)


def test_folder_without_curves_is_refused(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "--curves: must hold curves-*.parquet" in refuse("search_quality", "--curves", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_made_is_refused_before_anything_runs(refuse: Callable[..., str], tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    line = refuse("telemetry", "--dataset", "digits", "--output", str(taken / "below"))
    assert "cannot be made" in line


BARE_MACHINE = """
import importlib.abc, importlib.util, pathlib, runpy, sys
lacking = {"cmaes", "optuna", "plotly", "ray"}
class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in lacking:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Lacking())
sys.path[:] = [path for path in sys.path if not pathlib.Path(path, "tune_amp", "__init__.py").exists()]
sys.argv = [sys.argv[1], "gpu", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    import benchmarks.training.gpu
"""


def test_gpu_suite_starts_where_neither_this_package_nor_ray_and_optuna_are_installed() -> None:
    """On a lent GPU machine there is a checkout and torch, and nobody has installed anything."""
    command = [sys.executable, "-I", "-c", BARE_MACHINE, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m benchmarks gpu [-h]" in done.stdout


def test_gpu_suite_that_is_cut_off_leaves_the_parts_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cpu"

    def tell(suite: gpu.Suite, left: float) -> tuple[list[GpuRow], str]:
        return [GpuRow(part="first", subject="a figure", quantity="seconds", value=1.0)], ""

    def hang(suite: gpu.Suite, left: float) -> tuple[list[GpuRow], str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "PARTS", {"first": tell, "second": hang})
    monkeypatch.setattr(gpu, "LEAST_SECONDS", {"first": 0.0, "second": 0.0})
    monkeypatch.setattr(gpu, "MOST_SECONDS", dict.fromkeys(gpu.PARTS, 60.0))
    monkeypatch.setattr(gpu, "make_images", lambda: make_images(120))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.device", lambda name: CPU)
    assert main(["gpu", "--output", str(tmp_path)]) == 130
    assert pq.read_table(folder / "gpu.parquet")["subject"].to_pylist() == ["a figure"]
    assert "a figure" in (folder / "gpu.md").read_text()


@pytest.mark.slow  # starts processes
def test_recording_leaves_curves_of_every_configuration_at_their_full_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made" / "curves-stress.parquet"
    size = ["--count", "3", "--max-epochs", "2", "--seed", "4", "--workers", "1"]
    assert main(["record", "stress", *size, "--dataset", "digits", "--output", str(output)]) == 0
    curves = load_curves(output)
    assert (len(curves.configs), curves.max_epochs, curves.origin["seed"]) == (3, 2, 4)
    assert f"saved {output}" in capsys.readouterr().out


@pytest.mark.slow  # starts processes
@pytest.mark.long
def test_search_quality_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = make_stress_table(16)
    write_curves(tmp_path / "curves-stress.parquet", curves.configs, curves.epochs, curves.origin)
    output = tmp_path / "made"
    folders = ["--curves", str(tmp_path), "--output", str(output)]
    assert main(["search_quality", *folders, "--seeds", "2", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed == (output / "search-quality.md").read_text()
    assert all(f"| {arm.name} |" in printed for arm in search_quality.ARMS)
    assert (output / "search-quality.parquet").exists()


def test_probe_is_measured_beside_steps_that_are_captured_as_in_a_search(digits: Dataset) -> None:
    data = TrainingData(digits.train, None, digits.num_classes, CPU)
    share = measure_probe(TrialConfig(batch_size=512, max_epochs=3), data, 3, capture=take_again)
    assert (share.loop, share.count) == ("graph", 2)


def test_cost_of_a_seldom_probe_is_measured_from_one_probe_to_the_next(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[EpochMetrics] = []

    class SeldomProbed(TrainingRun):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.probe_every = 5

        def train_epoch(self) -> EpochMetrics:
            reports.append(super().train_epoch())
            return reports[-1]

    monkeypatch.setattr(telemetry, "TrainingRun", SeldomProbed)
    data = TrainingData(digits.train.select(range(600)), None, digits.num_classes, CPU)  # two steps an epoch
    share = measure_probe(TrialConfig(precision="fp16", batch_size=256), data, 3)
    assert share.count == 2
    probed = [report.epoch for report in reports if report.underflow_share is not None]
    assert probed == [1, 4, 7] == list(range(1, len(reports) + 1, 3))


def test_telemetry_costs_are_measured_for_every_precision_and_batch_size(digits: Dataset) -> None:
    cost = measure_telemetry(digits, epochs=3, blocks=2, precisions=("fp16", "fp32"), batch_sizes=(256, 512))
    settings = [("fp16", 256), ("fp16", 512), ("fp32", 256), ("fp32", 512)]
    for shares, count in ((cost.probes, 2), (cost.logs, 2)):
        assert [(share.precision, share.batch_size) for share in shares] == settings
        assert all(share.count == count and share.low <= share.median <= share.high for share in shares)
    assert all(share.low > 0 for share in cost.probes)
    text = render_telemetry(cost)
    assert text.count("\n| ") == 5
    assert "| fp16 | 256 | eager |" in text
    assert "n = 2 epochs" in text
