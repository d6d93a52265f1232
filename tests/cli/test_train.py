"""``scripts/train.py`` on digits, in this process: its flags do what they say, and it leaves what it says it leaves."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from records import PROVENANCE, make_trial
from safetensors.torch import load_file

from tune_amp.cli.train import train_command
from tune_amp.results.records import rank_trials, write_best, write_trials
from tune_amp.reuse.final import FinalTraining, replay_trial
from tune_amp.training.data import Dataset
from tune_amp.trial.config import InputError, TrialConfig


@pytest.fixture
def best(tmp_path: Path, digits: Dataset) -> Path:
    """The best file of a search on digits, whose second configuration differs from the first."""
    return write_searched(tmp_path, digits)


def write_searched(tmp_path: Path, digits: Dataset, **settings: Any) -> Path:
    configs = [TrialConfig(dataset="digits", max_epochs=3, lr=lr, batch_size=256, **settings) for lr in (3e-3, 1e-3)]
    trials = [make_trial(f"trial{place}", config=config) for place, config in enumerate(configs, start=1)]
    provenance = dataclasses.replace(PROVENANCE, dataset="digits", data_hash=digits.content_hash)
    write_trials(tmp_path, trials, provenance)
    write_best(tmp_path, rank_trials(trials), provenance)
    return tmp_path / "best.parquet"


def test_training_prints_average_losses_and_the_accuracy_of_one_test(
    best: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (best.parent / "train-rank1-seed0-epochs3").mkdir()  # left by one that was killed
    assert train_command([str(best)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    assert lines[0].startswith(f"rank 1 of {best} on ")
    assert [re.sub(r"\d\.\d{4}", "X", line) for line in lines[1:4]] == [
        f"epoch {epoch}/3  average loss X" for epoch in (1, 2, 3)
    ]
    output = best.parent / "train-rank1-seed0-epochs3"
    metrics = json.loads((output / "metrics.json").read_text())
    assert f"average loss {metrics['epochs'][2]['train_loss']:.4f}" in lines[3]
    assert lines[4] == f"test accuracy {metrics['test_accuracy']:.2%} on 256 images, in fp32, read once"
    assert lines[5].startswith("recall by class, the worst first: ")
    assert lines[6] == f"saved   {output}: model.safetensors, metrics.json, card.md"
    assert sorted(path.name for path in output.iterdir()) == ["card.md", "metrics.json", "model.safetensors"]
    assert (metrics["train_images"], metrics["num_parameters"]) == (1_541, 203_530)
    card = (output / "card.md").read_text()
    assert f"Test accuracy {100 * metrics['test_accuracy']:.2f} %" in card
    assert "rank 1 of 2" in card
    assert "torch" in card


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_training_that_a_signal_ends_leaves_nothing(
    name: str,
    tmp_path: Path,
    digits: Dataset,
    write_module: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = f"import signal\ndef net(input_shape, num_classes):\n    signal.raise_signal(signal.{name})\n"
    model = f"{write_module(text)}:net"
    trial = make_trial(config=TrialConfig(dataset="digits", model=model))
    write_trials(tmp_path, [trial], PROVENANCE)
    write_best(tmp_path, rank_trials([trial]), dataclasses.replace(PROVENANCE, data_hash=digits.content_hash))
    flags = ["--model", model, "--output", str(tmp_path / "out")]
    assert train_command([str(tmp_path / "best.parquet"), *flags]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_rank_seed_budget_and_folder_are_what_the_flags_say(
    best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rank", "2", "--seed", "5", "--max-epochs", "1", "--output", str(tmp_path / "out")]
    assert train_command([str(best), *flags]) == 0
    assert "epoch 1/1  average loss" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    config = metrics["config"]
    assert (metrics["rank"], config["lr"], config["seed"], config["max_epochs"]) == (2, 1e-3, 5, 1)
    card = (tmp_path / "out" / "card.md").read_text()
    assert "Changed for this training: max_epochs 1 instead of 3, seed 5 instead of 0." in card
    again = ["--rank", "2", "--seed", "6", "--max-epochs", "1", "--output", str(tmp_path / "other")]
    assert train_command([str(best), *again]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert not first["1.weight"].equal(second["1.weight"])  # another seed, other weights


def test_replay_without_the_epochs_beside_compares_the_last_and_says_what_it_cannot(
    tmp_path: Path, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrialConfig(dataset="digits", max_epochs=2, precision="fp16", batch_size=256)
    epochs = tuple(replay_trial(config, digits, torch.device("cpu")))
    trial = make_trial(config=config, epochs=epochs, device="cpu", num_threads=torch.get_num_threads())
    provenance = dataclasses.replace(PROVENANCE, dataset="digits", data_hash=digits.content_hash)
    write_best(tmp_path, rank_trials([trial]), provenance)
    assert train_command([str(tmp_path), "--replay"]) == 0
    note, first, last = capsys.readouterr().out.splitlines()
    assert note == (
        f"note: {tmp_path / 'epochs.parquet'} is missing: only the last epoch is compared, "
        "without loss_scale_steps, loss_scale_values, val_recalls"
    )
    assert re.fullmatch(r"epoch 1/2  train_loss .*  val_accuracy [\d.]+ %  .*", first)
    assert re.fullmatch(r"epoch 2/2  .*val_accuracy [\d.]+ %  .*  equal to the record, bit for bit", last)
    write_trials(tmp_path, [trial], provenance)
    assert train_command([str(tmp_path), "--replay"]) == 0
    assert capsys.readouterr().out.count("equal to the record, bit for bit") == 2


def test_result_of_the_test_is_printed_even_if_nothing_can_be_saved(
    best: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> list[str]:
        raise InputError("--output: model.safetensors cannot be written (No space left on device)")

    monkeypatch.setattr(FinalTraining, "save", fail)
    assert train_command([str(best)]) == 2
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert "test accuracy" in printed.out
    assert "saved" not in printed.out


OWN_MODEL = """
import sys
from torch import nn
class Net(nn.Linear):
    def __init__(self, shape, classes):
        super().__init__(784, classes)
    def forward(self, images):
        {line}
        return super().forward(images.flatten(1))
"""


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("assert len(images) == 2, 'two'", 1, "{model} failed, nothing saved: AssertionError: two"),
        ("len(images) == 2 or bytearray(2**60)", 1, "out of memory, nothing saved: MemoryError"),
        (
            "len(images) == 2 or sys.exit(0)",
            1,
            "{model} failed, nothing saved: RuntimeError: the code called sys.exit(0)",
        ),
        (
            "raise KeyboardInterrupt",
            2,
            "error: model: {model} must train on images of shape [batch, 1, 28, 28], "
            "got RuntimeError: the code raised KeyboardInterrupt (in fp32)",
        ),
    ],
)
def test_own_model_that_fails_leaves_one_line_and_no_files(
    tmp_path: Path,
    digits: Dataset,
    write_module: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    line: str,
    code: int,
    message: str,
) -> None:
    model = f"{write_module(OWN_MODEL.format(line=line))}:Net"
    best = write_searched(tmp_path, digits, model=model)
    assert train_command([str(best), "--model", model, "--output", "out"]) == code
    assert capsys.readouterr().err == message.format(model=model) + "\n"
    assert not (tmp_path / "out").exists()
