"""A user's own training loop, task and parameters go the whole way: search, kill, resume, confirm, train the winner."""

import importlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from small_runs import untimed
from torch import nn

import tune_amp
from tune_amp.cli.main import main
from tune_amp.cluster.session import ray_session
from tune_amp.results.journal import read_journal
from tune_amp.results.records import load_best_rows, load_confirmed, load_trials
from tune_amp.results.run_folder import RunFolder
from tune_amp.training.own_loop import OwnRun
from tune_amp.training.runs import load_data, place_data, start_run
from tune_amp.trial.config import InputError, TrialConfig, TrialStatus
from tune_amp.trial.consent import consent_to

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CPU = torch.device("cpu")

LOOPS: Mapping[str, Mapping[str, Any]] = {
    "char_lm": {"own": {"dropout": 0.1}, "precision": "bf16", "batch_size": 16, "lr": 3e-3},
    "gan": {"own": {"width": 64, "critic_lr": 1.0}, "precision": "fp16"},
    "fine_tuning": {"own": {"backbone_lr": 0.1, "dropout": 0.1}, "batch_size": 32},
    "amp_tutorial": {"own": {"num_layers": 2}, "precision": "fp16", "lr": 0.3},
}
TASKS: Mapping[str, Mapping[str, Any]] = {
    "tabular:Diabetes": {"own": {"width": 16, "dropout": 0.0}, "precision": "fp16", "batch_size": 32, "lr": 0.01},
    "segmentation:Discs": {"own": {"width": 4}, "precision": "bf16", "batch_size": 16, "lr": 0.01},
}


@pytest.fixture(autouse=True)
def _examples_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    with ray_session(num_cpus=2, run="test_own_training"):
        yield


def load_train(name: str) -> Any:
    return importlib.import_module(f"examples.{name}").train


# ---- the examples ----


def test_every_example_is_a_short_file_with_its_space_and_command() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert {file.stem for file in files} == {*LOOPS, *(name.partition(":")[0] for name in TASKS)}
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) <= 60, file
        assert file.with_suffix(".yaml").exists()
        assert f"tune-amp search examples/{file.stem}.yaml --" in text


@pytest.mark.parametrize("name", LOOPS)
def test_an_example_s_loop_learns_and_measures_its_test_set_when_confirming(name: str) -> None:
    config = TrialConfig(train=f"examples.{name}:train", max_epochs=2, **LOOPS[name])
    run = OwnRun(config, load_train(name), CPU, confirming=True)
    first, last = run.epochs()
    assert run.hopeless is None
    assert last.steps == 2 * first.steps > 0
    assert last.train_loss < first.train_loss or name == "gan"
    assert run.tested
    assert all(metric.startswith("test_") for metric in run.tested)
    assert run.state_dict() is not None


@pytest.mark.parametrize("name", TASKS)
def test_an_example_s_task_learns(name: str) -> None:
    task = f"examples.{name}"
    consent_to(task)
    data = load_data(task, None, task=task)
    config = TrialConfig(task=task, model=task, dataset=task, max_epochs=2, **TASKS[name])
    run = start_run(config, place_data(data.train, data.validation, data.num_classes, CPU))
    first, last = run.epochs()
    assert last.train_loss < first.train_loss
    assert last.val_accuracy is None
    [metric] = last.metrics
    assert run.test(data.test)["metrics"].keys() == {metric.replace("val", "test")}


def test_a_scale_at_which_a_language_model_never_takes_a_step_is_named() -> None:
    settings = {**LOOPS["char_lm"], "precision": "fp16", "batch_size": 2}
    config = TrialConfig(train="examples.char_lm:train", max_epochs=1, init_scale=2.0**120, **settings)
    run = OwnRun(config, load_train("char_lm"), CPU)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step"):  # PyTorch's, as no step came before the schedule's
        [last] = run.epochs()
    assert (last.steps, last.skipped_steps, last.state) == (30, 30, "collapsed")
    assert run.hopeless == "no step was applied: all 30 were skipped"


def test_a_learning_rate_at_which_a_language_model_diverges_is_named() -> None:
    settings = {**LOOPS["char_lm"], "lr": 1e30}
    config = TrialConfig(train="examples.char_lm:train", max_epochs=1, **settings)
    run = OwnRun(config, load_train("char_lm"), CPU, objectives=["val_loss"])
    [last] = run.epochs()
    assert last.state == "diverged"
    assert run.hopeless in ("weights are not finite", "val_loss is nan")


# ---- the whole way ----

SEARCH = ("search", str(EXAMPLES / "amp_tutorial.yaml"), "--train", "examples.amp_tutorial:train")
SIZE = ("--objective", "val_loss", "--num-samples", "4", "--max-epochs", "3", "--top-k", "1", "--confirm-seeds", "2")


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
def test_a_loop_is_searched_confirmed_shown_and_trained_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SEARCH, *SIZE, "--name", "own"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "examples.amp_tutorial:train: your own training loop and data" in printed.out
    run = Path("results/own")
    trials = load_trials(run)
    assert {trial.status for trial in trials} <= {TrialStatus.COMPLETED, TrialStatus.STOPPED}
    assert {trial.config.train for trial in trials} == {"examples.amp_tutorial:train"}
    table = pq.read_table(run / "trials.parquet")
    assert set(table["own.num_layers"].to_pylist()) <= {2, 3, 4}
    assert table["val_accuracy"].null_count == 4
    assert not any(math.isnan(value) for value in table["val_loss"].to_pylist())

    rows = load_best_rows(run)
    assert {row.rank for row in rows} == {1, 2}
    assert all(row.confirmation and row.confirmation.find_mean("test_loss") is not None for row in rows)
    assert all(run.test_loss is not None for run in load_confirmed(run))
    assert rows[0].confirmation
    assert rows[0].confirmation.verdict
    assert "val_loss" in rows[0].confirmation.verdict
    assert "nats" not in rows[0].confirmation.verdict  # the unit of a user's own loss is unknown

    report = (run / "report.html").read_text()
    assert "num_layers" in report
    assert main(["show", "own"]) == 0
    assert "num_layers" in capsys.readouterr().out

    best = str(run / "best.parquet")
    assert main(["train", best, "--train", "examples.amp_tutorial:train"]) == 0
    assert re.search(r"^test_loss [\d.]+, measured after", capsys.readouterr().out, re.MULTILINE)
    [saved] = run.glob("train-*")
    assert {file.name for file in saved.iterdir()} == {"net.safetensors", "card.md", "metrics.json"}
    searched = next(row.rank for row in rows if not row.is_default)
    replay = ("--rank", str(searched), "--replay", "--train", "examples.amp_tutorial:train")
    assert main(["train", best, *replay]) == 0
    assert "equal to the record, bit for bit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
def test_a_task_is_searched_by_its_own_metric_and_trained_again(capsys: pytest.CaptureFixture[str]) -> None:
    task = ("--task", "examples.tabular:Diabetes")
    size = ("--num-samples", "3", "--max-epochs", "2", "--top-k", "1", "--confirm-seeds", "2", "--name", "own")
    assert main(["search", str(EXAMPLES / "tabular.yaml"), *task, *size]) == 0
    rows = load_best_rows("results/own")
    maes = [row.confirmation.find_mean("val_mae") for row in rows if row.confirmation]
    assert None not in maes
    assert all(row.confirmation and row.confirmation.find_mean("test_mae") for row in rows)
    table = pq.read_table("results/own/trials.parquet")
    assert {"own.width", "own.dropout", "val_mae"} <= {*table.column_names}
    capsys.readouterr()
    assert main(["train", "results/own", *task]) == 0
    assert re.search(r"^test_mae [\d.]+, measured after", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
@pytest.mark.parametrize(("body", "message"), [
    ("return None", "mine:train: must yield its metrics after every epoch, but returns NoneType"),
    ("yield {'val_loss': 'low'}", "mine:train: epoch 1: 'val_loss': must be a number, got 'low'"),
    ("yield {'val_f1': 0.5}", "mine:train: epoch 1: must yield the objective val_loss, got val_f1"),
    ("raise KeyError('hidden')\n    yield", "KeyError: 'hidden'"),
])  # fmt: skip
def test_a_loop_that_cannot_be_searched_is_one_line(
    body: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(f"def train(trial):\n    {body}\n")
    size = ("--objective", "val_loss", "--num-samples", "4", "--max-epochs", "1", "--max-failures", "1", "--quiet")
    assert main(["search", "quick", "--train", "mine:train", *size, "--name", "own"]) == 1
    assert load_trials("results/own")[0].error == message
    assert f"all failed with the same error: {message}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_search_of_a_loop_resumes_from_its_checkpoints(tmp_path: Path) -> None:
    """Its trials end as those of a search that ran through."""
    slow = "import time\nfrom examples.amp_tutorial import train as fast\n\n\ndef train(trial):\n"
    slow += "    for metrics in fast(trial):\n        time.sleep(0.4)\n        yield metrics\n"
    (tmp_path / "mine.py").write_text(slow)
    command = [sys.executable, "-m", "tune_amp", "search", str(EXAMPLES / "amp_tutorial.yaml"), "--train", "mine:train"]
    size = ("--objective", "val_loss", "--num-samples", "2", "--max-epochs", "6", "--scheduler", "none")
    options = (*size, "--max-concurrent", "1", "--confirm-seeds", "0")
    about: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True}
    subprocess.run([*command, *options, "--name", "through"], check=True, timeout=240, **about)

    about.pop("capture_output")
    process = subprocess.Popen([*command, *options, "--name", "killed"], stdout=subprocess.DEVNULL, **about)
    journal = RunFolder(tmp_path / "results" / "killed").journal
    deadline = time.monotonic() + 240
    while not journal.exists() or sum(event["event"] == "report" for event in read_journal(journal)) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resume = [*command[:4], "--resume", "killed", "--train", "mine:train"]
    subprocess.run(resume, check=True, timeout=240, capture_output=True, **about)
    through, killed = (load_trials(tmp_path / "results" / name) for name in ("through", "killed"))
    assert [trial.config for trial in killed] == [trial.config for trial in through]
    for ours, theirs in zip(killed, through, strict=True):
        assert [untimed(epoch) for epoch in ours.epochs] == [untimed(epoch) for epoch in theirs.epochs]


# ---- from Python ----

SPACE: Mapping[str, Any] = {
    "parameters": {"lr": {"low": 0.01, "high": 1.0, "log": True}, "precision": {"choices": ["fp32", "bf16"]}},
    "own": {"hidden": {"choices": [2, 4]}},
}


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
def test_functions_of_a_notebook_are_searched_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    def train(trial: tune_amp.Trial) -> Iterator[Mapping[str, Any]]:
        model = nn.Linear(2, trial.own["hidden"])
        for epoch in trial.epochs():
            yield {"reading": float(epoch) + model.out_features}

    for number in (1, 2):
        result = tune_amp.tune(
            SPACE,
            train=train,
            objective="reading",
            mode="max",
            num_samples=3,
            max_epochs=2,
            confirm_seeds=0,
            name=f"n{number}",
        )
        assert result.folder == Path(f"results/n{number}")
        assert not result.interrupted
        assert result.best.own == {"hidden": 4}
        columns = (result.trials_table[name].to_pylist() for name in ("reading", "epoch", "own.hidden"))
        assert all(reading == epoch - 1 + hidden for reading, epoch, hidden in zip(*columns, strict=True))
        assert len(result.epochs) == sum(result.trials["epoch"])
    assert result.verdict is None
    assert "<iframe" in result.report._repr_html_()
    assert result.folder.name in result._repr_html_()
    assert "reuse    tune_amp.load_best('results/n2/best.parquet')" in capsys.readouterr().out


@pytest.mark.usefixtures("enter_folder")
@pytest.mark.parametrize(("arguments", "message"), [
    ({"space": "quik"}, r"^quik: is neither a file nor a bundled search space"),
    ({"space": {"parameters": {}}}, r"^space: parameters: must name at least one field"),
    ({"space": 3}, r"^space: must be a name, a path, YAML text or a mapping, got 3$"),
    ({"lr": 3}, r"^lr: is no argument of tune_amp.tune: a setting of trials is searched or fixed by the space"),
    ({"epochs": 3}, r"^epochs: is no argument of tune_amp.tune; did you mean max_epochs\?$"),
    ({"anything": 3}, r"^anything: is no argument of tune_amp.tune$"),
    ({"train": 5}, r"^5: must be a function or a class with a name$"),
    ({"train": "mine:train", "dataset": "digits"}, r"^--dataset: must be left out beside --train"),
    ({"num_samples": 0}, r"^--num-samples: must be at least 1, got 0$"),
    ({"objective": "f1"}, r"^--objective: must be one of val_accuracy"),
    ({"resume": "nothing"}, r"must be the folder of a run"),
])  # fmt: skip
def test_a_wrong_argument_of_tune_is_an_error_of_ours(arguments: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune_amp.tune(**arguments)
    assert not [path for path in Path().glob("results/*") if any(path.iterdir())]


def test_the_package_loads_quickly_and_explains_itself() -> None:
    assert tune_amp.tune.__doc__
    for name in ("train", "objective", "num_samples", "InputError", "tune_amp.Trial", "tune_amp.Task"):
        assert name in tune_amp.tune.__doc__
    assert tune_amp.Task.__mro__[1] is object
