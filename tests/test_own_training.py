"""Own loops, tasks, models, parameters and images go the whole way: search, kill, resume, confirm, replay, train."""

import gzip
import importlib
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from fault_runs import Search, count_events
from numpy.typing import NDArray
from optuna import load_study
from optuna.trial import TrialState
from small_runs import make_split, untimed
from torch import nn

import tune_amp
from tune_amp.cli.main import main
from tune_amp.cluster.session import ray_session
from tune_amp.results.records import load_best, load_best_rows, load_confirmed, load_provenance, load_trials
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.study import open_storage
from tune_amp.training.own_loop import OwnRun
from tune_amp.training.runs import load_data, start_run
from tune_amp.training.training_data import TrainingData
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
    with ray_session(num_cpus=1, run="test_own_training"):
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
    run = start_run(config, TrainingData(data.train, data.validation, data.num_classes, CPU))
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
SIZE = ("--objective", "val_loss", "--num-samples", "4", "--max-epochs", "3", "--top-k", "1", "--confirm-seeds", "3")


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
    size = ("--num-samples", "3", "--max-epochs", "2", "--top-k", "1", "--confirm-seeds", "3", "--name", "own")
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
def test_a_loop_that_cannot_be_searched_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("def train(trial):\n    yield {'val_f1': 0.5}\n")
    size = ("--objective", "val_loss", "--num-samples", "50", "--max-epochs", "1", "--max-failures", "1", "--quiet")
    assert main(["search", "quick", "--train", "mine:train", *size, "--name", "own"]) == 1
    message = "mine:train: epoch 1: must yield the objective val_loss, got val_f1"
    assert load_trials("results/own")[0].error == message
    assert f"all failed with the same error: {message}" in capsys.readouterr().err


BROKEN = """
import math, torch

class Broken(torch.nn.Linear):
    def forward(self, images):
        if len(images) > 2:  # not in the check before the search
            raise ValueError(f'no good\\nat all: {len(images)}')
        return super().forward(images.flatten(1))

def net(shape, classes):
    return Broken(math.prod(shape), classes)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
def test_a_search_whose_first_trials_fail_alike_stops_with_exit_code_1_and_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    command = ["search", "quick", "--dataset", "digits", "--model", "broken:net", "--num-samples", "50", "--name", "x"]
    assert main([*command, "--max-failures", "2", "--max-concurrent", "1", "--json"]) == 1
    printed = capfd.readouterr()
    assert "no trial produced a result" in printed.err
    assert "failed: ValueError: no good at all: 64" in printed.err
    assert "Traceback" not in printed.err
    error = r"ValueError: no good at all: \d+ \(broken\.py:\d+\)"
    reason = f"the first 2 trials all failed with the same error: {error}; fix its cause and resume"
    assert re.search(
        rf"^cut off  {reason}, or resume with a larger --max-failures\nresume   .*--resume x", printed.err, re.M
    )
    result = json.loads(printed.out.splitlines()[-1])
    assert re.match(reason, result["reason"])
    assert "--resume x" in result["resume"]
    run = tmp_path / "results" / "x"
    trials = load_trials(run)
    assert [trial.status for trial in trials[:2]] == [TrialStatus.FAILED] * 2
    assert {trial.status for trial in trials[2:]} <= {TrialStatus.FAILED, TrialStatus.INTERRUPTED}
    assert len(trials) <= 3
    assert not (run / "best.parquet").exists()


SLOW_LOOP = """
import pathlib
import time
from examples.amp_tutorial import train as fast

def train(trial):
    for metrics in fast(trial):
        time.sleep(0.5 * pathlib.Path(PATH).exists())
        yield metrics
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
def test_a_killed_search_of_a_loop_resumes_from_its_checkpoints(tmp_path: Path) -> None:
    """Its trials end as those of a search that ran through."""
    slow = tmp_path / "slow"
    (tmp_path / "mine.py").write_text(SLOW_LOOP.replace("PATH", repr(str(slow))))
    command = [str(EXAMPLES / "amp_tutorial.yaml"), "--train", "mine:train", "--objective", "val_loss"]
    command += ["--num-samples", "2", "--max-epochs", "6", "--scheduler", "none", "--max-concurrent", "1"]
    command += ["--confirm-seeds", "0", "--name"]
    assert main(["search", *command, "through"]) == 0

    slow.touch()
    run = tmp_path / "results" / "killed"
    search = Search(tmp_path, [*command, "killed"])
    search.wait_until(lambda: count_events(run, "report") >= 4 and count_events(run, "checkpoint"))
    search.destroy()
    slow.unlink()
    before = count_events(run, "report")
    assert main(["search", "--resume", "killed", "--train", "mine:train"]) == 0
    assert count_events(run, "report") < before + 12  # not from the beginning
    through, killed = (load_trials(tmp_path / "results" / name) for name in ("through", "killed"))
    assert [trial.config for trial in killed] == [trial.config for trial in through]
    for ours, theirs in zip(killed, through, strict=True):
        assert [untimed(epoch) for epoch in ours.epochs] == [untimed(epoch) for epoch in theirs.epochs]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("one_ray", "enter_folder")
@pytest.mark.parametrize("name", [*LOOPS, *TASKS])
def test_each_example_goes_the_whole_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Search, kill, resume, confirm, and train the winner."""
    file, _, made = name.partition(":")
    code = ["--task", f"examples.{name}"] if made else ["--train", f"examples.{file}:train"]
    objective = re.search(r"--objective .*", (EXAMPLES / f"{file}.py").read_text())
    command = [str(EXAMPLES / f"{file}.yaml"), *code, *(objective[0].split() if objective else [])]
    command += ["--num-samples", "3", "--max-epochs", "3", "--top-k", "1", "--confirm-seeds", "3", "--name", "whole"]
    run = tmp_path / "results" / "whole"
    search = Search(tmp_path, command)
    search.wait_until(lambda: count_events(run, "report") >= 2)
    search.destroy()
    assert main(["search", "--resume", "whole", *code]) == 0
    trials = load_trials(run)
    assert len(trials) == 3
    assert {trial.status for trial in trials} <= {TrialStatus.COMPLETED, TrialStatus.STOPPED, TrialStatus.DIVERGED}
    rows = load_best_rows(run)
    assert rows[0].confirmation
    assert rows[0].confirmation.verdict
    assert len(rows[0].confirmation.confirm_seeds) == 3
    capsys.readouterr()
    assert main(["train", "whole", *code]) == 0
    assert re.search(r"^test_\w+ [\d.]+( %)?, measured after", capsys.readouterr().out, re.MULTILINE)


# ---- images ----

TRAIN_IMAGES, TEST_IMAGES = 2_400, 500
SEARCH_IMAGES = ("search", "quick", "--num-samples", "2", "--top-k", "1", "--max-epochs", "4", "--name", "own")
DATA = """
import numpy as np
def data():
    with np.load("own.npz") as parts:
        return [parts[name] for name in ("train_images", "train_labels", "test_images", "test_labels")]
"""


def make_parts() -> dict[str, NDArray[np.uint8]]:
    """Ten classes of 28 x 28 pixels under noise: class c is bright in row c."""
    parts: dict[str, NDArray[np.uint8]] = {}
    for name, count, seed in (("train", TRAIN_IMAGES, 1), ("test", TEST_IMAGES, 2)):
        split = make_split(count, classes=10, seed=seed, side=28)
        parts |= {f"{name}_images": split.images[:, 0], f"{name}_labels": split.labels.astype(np.uint8)}
    return parts


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = b"".join(number.to_bytes(4, "big") for number in (0x800 + array.ndim, *array.shape))
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_files(folder: Path) -> None:
    folder.mkdir()
    parts = make_parts()
    for name, stem in (("train", "train"), ("test", "t10k")):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", parts[f"{name}_images"])
        write_idx(folder / f"{stem}-labels-idx1-ubyte", parts[f"{name}_labels"])  # either way will do


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What a command prints."""
    capsys.readouterr()
    code = main(list(arguments))
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return printed.out.splitlines()


def without_wrap_up(lines: list[str]) -> list[str]:
    """All but the time that the search took after its last trial, which no file tells."""
    return [re.sub(r"; then .* to wrap up$|(?<=^confirmed) in \d+ s", "", line) for line in lines]


def check_images(folder: Path, dataset: str) -> None:
    names = ["best.parquet", "confirm.parquet", "epochs.parquet", "report.html", "space.yaml", "trials.parquet"]
    assert [name for name in names if not (folder / name).exists()] == []
    trials = load_trials(folder)
    assert [trial.config.dataset for trial in trials] == [dataset] * 2
    best = [trial.last.val_accuracy for trial in trials if trial.last and trial.config == load_best(folder)]
    assert max(accuracy for accuracy in best if accuracy is not None) > 0.6  # chance is 0.1
    confirmation = load_best_rows(folder)[0].confirmation
    assert confirmation is not None
    assert len(confirmation.confirm_seeds) == 3
    assert {confirmed.status for confirmed in load_confirmed(folder)} == {TrialStatus.COMPLETED}
    provenance = load_provenance(folder)
    assert (provenance.train_images, provenance.validation_images) == (2_200, 200)


def check_training(folder: Path, lines: list[str]) -> None:
    [accuracy] = [float(line.split()[2].rstrip("%")) for line in lines if line.startswith("test accuracy")]
    assert accuracy > 60
    [output] = folder.glob("train-*")
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["train_images"], metrics["test_images"]) == (TRAIN_IMAGES, TEST_IMAGES)
    assert metrics["test_accuracy"] == pytest.approx(accuracy / 100, abs=5e-5)
    assert f"Test accuracy {accuracy:.2f} %" in (output / "card.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
def test_four_files_in_a_folder_go_all_the_way(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_files(tmp_path / "my images")
    searched = call(capsys, *SEARCH_IMAGES, "--dataset", "fashion_mnist", "--data-dir", "my images")
    folder = Path("results", "own")
    check_images(folder, "fashion_mnist")

    # A run that is shown again ends, line by line, as the search itself did.
    shown = call(capsys, "show", "own")
    end = next(place for place, line in enumerate(searched) if line.startswith("2 trials"))
    assert len(searched) - end >= 8
    assert shown[4:] == without_wrap_up(searched[end:])
    assert shown[:2] == [
        "simple_net on fashion_mnist: 2,200 training and 200 validation images",
        "space      quick: lr, batch_size, init_scale",
    ]

    _, program, *arguments = shlex.split(shown[-1])
    assert (program, arguments[-2:]) == ("tune-amp", ["--data-dir", "my images"])
    check_training(folder, call(capsys, *arguments))


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
def test_a_function_goes_all_the_way_and_other_data_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parts = make_parts()
    np.savez(tmp_path / "own.npz", **parts)  # type: ignore[arg-type]  # numpy means keywords of any name
    (tmp_path / "own_images.py").write_text(DATA)
    call(capsys, *SEARCH_IMAGES, "--dataset", "own_images:data")
    folder = Path("results", "own")
    check_images(folder, "own_images:data")
    reuse = shlex.split(call(capsys, "show", "own")[-1])[2:]
    assert reuse[-2:] == ["--dataset", "own_images:data"]
    check_training(folder, call(capsys, *reuse))

    np.savez(tmp_path / "own.npz", **parts | {"test_images": parts["test_images"] // 2})  # type: ignore[arg-type]
    assert main([*reuse, "--seed", "1"]) == 2
    assert "must hold the data that the search used" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray", "enter_folder")
def test_a_search_on_digits_replays_bit_for_bit_and_never_overwrites(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--dataset digits --num-samples 3 --max-epochs 3 --name small --quiet --confirm-seeds 0 --imbalance 1.5"
    [best] = call(capsys, "search", "quick", *options.split())
    assert best == "results/small/best.parquet"
    assert (load_best(best).precision, load_best(best).imbalance) == ("fp16", 1.5)
    thinned = load_provenance(best).train_images
    assert 1_024 < thinned < 1_300  # of 1,413
    study = load_study(study_name="small", storage=open_storage(RunFolder(Path("results/small")).study))
    assert [trial.number for trial in study.trials if trial.state is TrialState.RUNNING] == []

    replayed = call(capsys, "train", best, "--replay")
    equal = [line for line in replayed if "equal to the record, bit for bit" in line]
    assert len(equal) == load_trials("results/small")[0].config.max_epochs

    trained = "\n".join(call(capsys, "train", best, "--output", "out"))
    assert "imbalance 1.5" in trained
    assert re.search(r"^recall by class, the worst first: \d: [\d.]+%, ", trained, re.MULTILINE)
    metrics = json.loads(Path("out", "metrics.json").read_text())
    assert len(metrics["test_recalls"]) == 10
    assert thinned < metrics["train_images"] < thinned + 128  # the validation images have a long tail here, too
    assert main(["train", best, "--output", "out"]) == 2
    refusal = "error: --output: out already exists and is no empty folder; choose another\n"
    assert capsys.readouterr().err == refusal


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
    ({"resume": "x", "space": "quick"}, r"^space: must be left out beside resume"),
    ({"space": {"own": {"a": {"choices": object()}}}}, r"^space: must hold numbers, texts, lists and mappings"),
    ({"lr": 3}, r"^lr: is no argument of tune_amp.tune: a setting of trials is searched or fixed by the space"),
    ({"epochs": 3}, r"^epochs: is no argument of tune_amp.tune; did you mean max_epochs\?$"),
    ({"anything": 3}, r"^anything: is no argument of tune_amp.tune$"),
    ({"train": 5}, r"^5: must be a function or a class with a name$"),
    ({"train": "mine:train", "dataset": "digits"}, r"^--dataset: must be left out beside --train"),
    ({"num_samples": 0}, r"^--num-samples: must be at least 1, got 0$"),
    ({"num_samples": [3, 8]}, r"num-samples.*3,8"),
    ({"objective": ["val_loss", "f1"]}, r"^--objective: must be one of val_accuracy"),
    ({"tracker": ("tensorboard", "aim")}, r"^--tracker: must be one of tensorboard.*aim"),
    ({"objective": "f1"}, r"^--objective: must be one of val_accuracy"),
    ({"imbalance": 0.5}, r"^--imbalance: must be at least 1.*, got 0.5$"),
    ({"tracker": "aim"}, r"^--tracker: must be one of tensorboard"),
    ({"resume": "nothing"}, r"^--resume: must be the folder of a run"),
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
