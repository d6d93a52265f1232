"""``scripts/compare.py`` as a user runs it: what it refuses, what it prints, what it leaves when it is interrupted."""

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from records import PROVENANCE, make_epoch, make_trial
from rich.console import Console
from scipy import stats  # type: ignore[import-untyped]

from tune_amp.cli.compare import compare_command
from tune_amp.cli.comparison import Progress
from tune_amp.cli.main import main
from tune_amp.results.records import rank_trials, write_best
from tune_amp.results.statistics import judge_equivalence
from tune_amp.reuse.precision_page import render_comparison
from tune_amp.reuse.precision_runs import ComparisonPlan
from tune_amp.reuse.precision_verdicts import ComparedRun, ComparisonOrigin
from tune_amp.training.data import Dataset, load_dataset, make_long_tail
from tune_amp.trial.config import TrialConfig, TrialStatus
from tune_amp.trial.consent import consent_to

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Dataset) -> Path:
    """A ``best.parquet`` of a search on the digits, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_run(digits.content_hash)


def write_run(data_hash: str, **settings: Any) -> Path:
    config = TrialConfig(
        **{"dataset": "digits", "max_epochs": 3, "precision": "fp16", "growth_interval": 5, **settings}
    )
    trial = make_trial(config=config, num_threads=1)
    write_best(Path(), rank_trials([trial]), dataclasses.replace(PROVENANCE, dataset="digits", data_hash=data_hash))
    return Path("best.parquet")


def refusal(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    code = compare_command(arguments.split())
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(("flags", "message"), [
    ("--precisions fp32,fp8", "--precisions: must be one of fp32, tf32, bf16, fp16, got 'fp8'"),
    ("--precisions fp16,fp16", "--precisions: must name none twice, got 'fp16,fp16'"),
    ("--precisions fp16,", "--precisions: must be names joined by commas, got 'fp16,'"),
    ("--seeds 1", "--seeds: must be at least 2 (one run does not show the noise), got 1"),
    ("--seeds 1000000000000000000", "--seeds: must be at most 1,000, got 1000000000000000000"),
    (f"--max-epochs {2**63}", "--max-epochs: must fit in 64 bits, got 9223372036854775808"),
    ("--seeds few", "argument --seeds: invalid int value: 'few' (see scripts/compare.py --help)"),
    ("--max-epochs 1", "--max-epochs: must be at least 2 (the first epoch is not timed), got 1"),
    ("--models resnet", "--models: must be one of simple_net, conv_net, vit, or module:function, got 'resnet'"),
    ("--batch-sizes 64,many", "--batch-sizes: must be whole numbers joined by commas, got 'many'"),
    ("--batch-sizes 0", "--batch-sizes: must be at least 1, got 0"),
    ("--batch-sizes 64,4096", "--batch-sizes: must be at most the 1,413 training images of digits, got 4096"),
    ("--rank 2", "best.parquet: rank: must be one of 1..1, got 2"),
    ("--model mine:net", "--model: must be simple_net, which best.parquet was searched with, got mine:net"),
    ("--output .", "--output: . already exists and is no empty folder; choose another"),
    ("--output best.parquet/x", "--output: best.parquet/x cannot be made (Not a directory)"),
])  # fmt: skip
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    flags: str, message: str, best: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, f"{best} {flags}") == message
    assert list(Path().iterdir()) == [best]


def test_a_file_is_refused_that_is_missing_or_of_other_data(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "nowhere.parquet").startswith("nowhere.parquet: must be a Parquet file")
    write_run("sha256:0123")
    assert refusal(capsys, str(best)).startswith("--data-dir: must hold the data that the search used")


def test_the_arms_train_on_the_long_tail_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(digits.content_hash, imbalance=10.0)
    images = len(make_long_tail(digits, 10.0).train)
    assert images < 800
    message = refusal(capsys, "best.parquet --batch-sizes 64,1024")
    assert message == f"--batch-sizes: must be at most the {images} training images of digits, got 1024"


def test_code_that_only_a_file_names_never_runs(
    best: Path, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    write_run(digits.content_hash, model="evil:net")
    assert refusal(capsys, str(best)) == f"{best}: model: names your own code; to run it, add --model evil:net"
    assert not Path("ran").exists()


def test_flags_are_answered_without_importing_the_heavy_libraries() -> None:
    code = (
        "import sys; from tune_amp.cli.compare import compare_command\n"
        "try: compare_command(['--help'])\nexcept SystemExit: pass\n"
        "compare_command(['x', '--seeds', '1'])\n"
        "print(sorted({'torch', 'ray', 'optuna', 'scipy', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: scripts/compare.py")
    assert done.stdout.endswith("\n[]\n")


# ---- the whole command ----


def rows_under(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table below ``heading``, without its titles."""
    lines = page[page.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def show(numbers: Iterable[float], form: str) -> str:
    mean, low, high = (format(number, form) for number in numbers)
    return f"{mean} ({low} to {high})"


def t_interval(values: Any, confidence: float = 0.95) -> tuple[float, float, float]:
    values = np.asarray(values)
    low, high = stats.t.interval(confidence, len(values) - 1, values.mean(), stats.sem(values))
    return values.mean(), low, high


def test_every_number_on_the_page_follows_from_the_files(
    best: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_amp.cli.comparison.TURN_SECONDS", 0.01)
    assert compare_command([str(best), "--batch-sizes", "64,1024", "--precisions", "fp32,tf32,fp16"]) == 0
    printed = capsys.readouterr().out
    page = Path("compare-rank1/compare.md").read_text()
    assert printed.count("tf32 needs an NVIDIA GPU") == printed.count("says nothing about a GPU") == 1
    for line in page[page.index("## Speed and memory") :].splitlines():
        if "|" not in line and not line.startswith("#"):
            assert " ".join(line.replace("**", "").split()) in " ".join(printed.split())
    shown = printed[printed.index("\nSpeed and memory\n") :]
    assert "|" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if re.match(r"(fp32|fp16|[123]) ", line))
    for heading in ("## Speed and memory", "## Accuracy", "| accuracy, % by seed", "## Where AMP is"):
        for row in rows_under(page, heading):
            cells = [word for cell in row for word in cell.split()]
            assert set(cells) <= set(shown.split()), row
    assert "tf32 is left out: tf32 needs an NVIDIA GPU" in page
    assert "says nothing about a GPU" in page
    assert "init_scale 65536, growth_factor 2, backoff_factor 0.5, growth_interval 5" in page
    assert re.search(r"6 runs of 3 epochs, one at a time: about \d+s; then a map of 2 cells", printed)
    assert re.search(r"run 6 of 6  seed 3  fp(32|16) +epoch [\d.]+ s  [\d,]+ images/s  val accuracy [\d.]+ %", printed)

    runs = pd.read_parquet("compare-rank1/compare.parquet")
    assert sorted(zip(runs.seed, runs.precision, strict=True)) == [(s, p) for s in (1, 2, 3) for p in ("fp16", "fp32")]
    assert set(runs.status) == {"completed"}
    assert list(runs.place) == [1, 2, 3, 4, 5, 6]
    assert [np.median(rates[1:]) for rates in runs.epoch_rates] == pytest.approx(list(runs.samples_per_second))
    of = {precision: part.sort_values("seed") for precision, part in runs.groupby("precision")}

    speed = t_interval(np.log(of["fp16"].samples_per_second.values / of["fp32"].samples_per_second.values))
    ratio = np.exp(speed)
    assert rows_under(page, "## Speed and memory") == [
        [p, f"{of[p].epoch_seconds.median():.3g} s", f"{of[p].samples_per_second.median():,.0f}", told, "", ""]
        for p, told in (("fp32", ""), ("fp16", show(ratio, ".2f")))
    ]
    points = {precision: 100 * part.val_accuracy.values for precision, part in of.items()}
    gap = judge_equivalence(points["fp16"].tolist(), points["fp32"].tolist(), 0.2)
    fp32, fp16 = rows_under(page, "## Accuracy")
    assert fp32 == ["fp32", show(t_interval(points["fp32"]), ".2f"), "", "", "", "3 of 3"]
    difference = t_interval(points["fp16"] - points["fp32"])
    assert fp16[:3] == ["fp16", show(t_interval(points["fp16"]), ".2f"), show(difference, "+.2f")]
    assert fp16[4:] == [f"{gap.smallest_effect:.2f}", "3 of 3"]
    assert rows_under(page, "| accuracy, % by seed") == [
        [str(seed), f"{points['fp32'][seed - 1]:.2f}", f"{points['fp16'][seed - 1]:.2f}"] for seed in (1, 2, 3)
    ]

    loss = t_interval(points["fp32"] - points["fp16"], 0.9)
    claims = [line for line in page.splitlines() if line.startswith('- fp16, "')]
    answer = "holds" if ratio[1] >= 1.5 else "does not hold" if ratio[2] < 1.5 else "undecided"
    assert claims[0] == (
        f'- fp16, "1.5 to 3 times faster": **{answer}**: {ratio[0]:.2f} times the images a second of fp32 '
        f"(95 % interval {ratio[1]:.2f} to {ratio[2]:.2f}, n = 3 seeds, cpu, 1 thread)."
    )
    assert claims[1].startswith('- fp16, "half the memory": **undecided**: ')
    answer = "holds" if loss[2] < 1 else "does not hold" if loss[1] > 1 else "undecided"
    assert claims[2] == (
        f'- fp16, "under 1 % accuracy lost": **{answer}**: {loss[0]:+.2f} points lost to fp32 '
        f"(one-sided 95 % bounds {loss[1]:+.2f} and {loss[2]:+.2f}, n = 3 seeds, cpu, 1 thread)."
    )

    cells = pd.read_parquet("compare-rank1/compare_map.parquet")
    assert cells[["model", "batch_size", "precision"]].values.tolist() == [
        ["simple_net", size, precision] for size in (64, 1024) for precision in ("fp32", "fp16")
    ]
    for number, (size, row) in enumerate(zip((64, 1024), rows_under(page, "## Where AMP is")[1::2], strict=True)):
        baseline, own = cells.turn_rates[2 * number], cells.turn_rates[2 * number + 1]
        ratios = own / baseline
        word = "faster" if ratios.min() > 1 else "slower" if ratios.max() < 1 else "undecided"
        told = show((np.median(ratios), ratios.min(), ratios.max()), ".2f")
        assert row == ["simple_net", str(size), "fp16", f"{np.median(own):,.0f}", told, "", word]
        assert re.search(rf"^- fp16: .*{word}: [^;]*simple_net at {size}\b", page, re.MULTILINE)


def test_the_page_can_be_made_again_from_the_file(best: Path) -> None:
    assert (
        main(["compare", str(best), "--seeds", "2", "--max-epochs", "2", "--precisions", "fp32", "--output", "out"])
        == 0
    )
    table = pq.read_table("out/compare.parquet")
    origin = json.loads(table.schema.metadata[b"tune_amp"])["provenance"]
    assert origin["command"][:2] == ["tune-amp compare", str(best)]
    assert (origin["run"], origin["rank"], origin["device"], origin["num_threads"]) == (PROVENANCE.run, 1, "cpu", 1)
    assert origin["config"]["growth_interval"] == 5
    rows = [ComparedRun(**row | {"status": TrialStatus(row["status"])}) for row in table.to_pylist()]
    assert render_comparison(ComparisonOrigin(**origin), rows) == Path("out/compare.md").read_text()
    hostile = render_comparison(ComparisonOrigin(**origin | {"run": "x\n\n## Owned <script>\x1b[2J"}), rows)
    assert hostile.splitlines()[0] == "# Precisions compared: rank 1 of `x ## Owned <script>\ufffd[2J`"


def test_tf32_alone_on_a_cpu_is_said_and_no_error(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        compare_command([str(best), "--seeds", "2", "--max-epochs", "2", "--precisions", "tf32", "--device", "cpu"])
        == 0
    )
    assert "left out: tf32: tf32 needs an NVIDIA GPU" in capsys.readouterr().out
    assert set(pd.read_parquet("compare-rank1/compare.parquet").precision) == {"fp32"}


# A signal comes while the first run on a seed begins: a run makes its model after it has set torch's seed. The search's
# seed is 70, of its own: another test may have left torch's at any small number.
INTERRUPTED_MODEL = """
import signal
import torch
from torch import nn
def net(input_shape, num_classes):
    if torch.initial_seed() == {seed}:
        signal.raise_signal(signal.{name})
    return nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))
"""


def test_sigusr1_keeps_the_runs_that_ended(
    best: Path, digits: Dataset, write_module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"{write_module(INTERRUPTED_MODEL.format(seed=72, name='SIGUSR1'))}:net"
    write_run(digits.content_hash, model=model, seed=70)
    assert compare_command([str(best), "--model", model, "--max-epochs", "2"]) == 130
    printed = capsys.readouterr()
    assert printed.err == "interrupted: 3 runs are kept in compare-rank1\n"
    runs = pd.read_parquet("compare-rank1/compare.parquet")
    assert sorted(zip(runs.seed, runs.precision, strict=True)) == [(71, "bf16"), (71, "fp16"), (71, "fp32")]
    page = Path("compare-rank1/compare.md").read_text()
    assert "3 of 9 runs of 2 epochs" in page
    assert page.count("**undecided**") == 6
    assert sorted(path.name for path in Path("compare-rank1").iterdir()) == ["compare.md", "compare.parquet"]


def test_ctrl_c_before_the_first_run_leaves_nothing(
    best: Path, digits: Dataset, write_module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"{write_module(INTERRUPTED_MODEL.format(seed=71, name='SIGINT'))}:net"
    write_run(digits.content_hash, model=model, seed=70)
    assert compare_command([str(best), "--model", model, "--max-epochs", "2"]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was measured yet\n"
    assert not Path("compare-rank1").exists()


STREAMED = """
import math, torch
from torch import nn
from torch.utils.data import TensorDataset
def data():
    inputs = torch.linspace(-1, 1, 60)[:, None]
    part = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    return part, part, part
def net(input_shape, num_classes, hidden):
    return nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
"""


def test_a_model_with_own_parameters_and_a_data_set_of_torch_are_compared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_module: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    module = write_module(STREAMED)
    model, data = f"{module}:net", f"{module}:data"
    consent_to(data)
    write_run(load_dataset(data).content_hash, dataset=data, model=model, own={"hidden": 4}, batch_size=20)
    flags = f"best.parquet --model {model} --dataset {data} --max-epochs 2 --seeds 2 --precisions bf16"
    assert compare_command([*flags.split(), "--models", f"{model},simple_net"]) == 0
    assert set(pd.read_parquet("compare-rank1/compare.parquet").status) == {"completed"}
    assert set(pd.read_parquet("compare-rank1/compare_map.parquet").reason) == {""}
    assert "4 of 4" in capsys.readouterr().out


FAILING_MODEL = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
    def forward(self, images):
        assert len(images) < 64 or not self.training
        return self.layer(images.flatten(1))
def net(input_shape, num_classes):
    return Net()
"""


def test_a_comparison_without_fp32_has_no_result(
    best: Path, digits: Dataset, write_module: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"{write_module(FAILING_MODEL)}:net"
    write_run(digits.content_hash, model=model)
    assert compare_command([str(best), "--model", model, "--max-epochs", "2", "--seeds", "2"]) == 1
    assert set(pd.read_parquet("compare-rank1/compare.parquet").status) == {"failed"}
    assert "run 6 of 6" in capsys.readouterr().out


def test_long_runs_report_their_epochs() -> None:
    now, text = 0.0, io.StringIO()
    plan = ComparisonPlan(arms={"fp32": TrialConfig()}, left_out={}, seeds=(7, 8), epochs=3, seconds=60.0)
    progress = Progress(Console(file=text, width=200), plan, clock=lambda: now)
    for epoch, now in ((1, 9.0), (2, 18.0), (3, 60.0)):  # noqa: B007 - the clock reads it
        progress.on_epoch(make_epoch(epoch, samples_per_second=1234.5))
    progress.on_end(ComparedRun(precision="fp32", seed=7, place=1, status=TrialStatus.COMPLETED, val_accuracy=0.5))
    with contextlib.suppress(ValueError):
        text.seek(0)
    assert [line.split() for line in text.read().splitlines()] == [
        ["run", "1", "of", "2", "seed", "7", "fp32", "epoch", "2/3", "1,234", "images/s"],
        ["run", "1", "of", "2", "seed", "7", "fp32", "val", "accuracy", "50.00", "%"],
    ]
