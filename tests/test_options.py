import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tune_amp.config import InputError
from tune_amp.options import SearchOptions, run_folder

NAN, INF = math.nan, math.inf
CHOICES = "simple_net, conv_net, vit, or module:function"


def test_defaults_are_valid() -> None:
    options = SearchOptions()
    assert options.grace_period <= options.max_epochs
    assert SearchOptions(**dataclasses.asdict(options)) == options


@pytest.mark.parametrize(
    "options",
    [
        {"grace_period": 4, "max_epochs": 4},
        {"num_samples": 1, "top_k": 1, "max_epochs": 1},
        {"reduction_factor": 1.01},
        {"time_budget": 0.1},
        {"objective": "val_loss", "model": "package.module:function", "seed": 2**63 - 1},
        {"top_k": 50, "num_samples": 2},
    ],
)
def test_values_at_the_edge_of_the_rules_are_accepted(options: dict[str, Any]) -> None:
    SearchOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet"}, f"--model: must be one of {CHOICES}, got 'resnet'"),
        ({"model": "net:"}, f"--model: must be one of {CHOICES}, got 'net:'"),
        ({"max_epochs": 0}, "--max-epochs: must be at least 1, got 0"),
        ({"max_epochs": 1.5}, "--max-epochs: must be a whole number, got 1.5"),
        ({"seed": -1}, "--seed: must be between 0 and 2^63 - 1, got -1"),
        ({"seed": 2**63}, "--seed: must fit in 64 bits, got 9223372036854775808"),
        ({"num_samples": 0}, "--num-samples: must be at least 1, got 0"),
        ({"num_samples": -3}, "--num-samples: must be at least 1, got -3"),
        ({"grace_period": 0, "max_epochs": 4}, "--grace-period: must be 1 to --max-epochs (4), got 0"),
        ({"grace_period": 3, "max_epochs": 2}, "--grace-period: must be 1 to --max-epochs (2), got 3"),
        ({"reduction_factor": 1.0}, "--reduction-factor: must be greater than 1, got 1.0"),
        ({"reduction_factor": NAN}, "--reduction-factor: must be greater than 1, got nan"),
        ({"objective": "test_accuracy"}, "--objective: must be one of val_accuracy, val_loss, got 'test_accuracy'"),
        ({"time_budget": 0.0}, "--time-budget: must be greater than 0, got 0.0"),
        ({"time_budget": -5.0}, "--time-budget: must be greater than 0, got -5.0"),
        ({"time_budget": NAN}, "--time-budget: must be greater than 0, got nan"),
        ({"top_k": 0}, "--top-k: must be at least 1, got 0"),
    ],
)
def test_option_that_breaks_its_rule_is_named_by_its_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        SearchOptions(**options)
    assert str(caught.value) == message


# The run's folder


def refusal(results_dir: Path, run: str) -> str:
    before = sorted(results_dir.parent.rglob("*"))
    with pytest.raises(InputError) as caught, run_folder(results_dir, run):
        pytest.fail("was entered")
    assert sorted(results_dir.parent.rglob("*")) == before
    return str(caught.value)


def test_run_folder_is_made_with_its_parents_and_kept_when_filled(tmp_path: Path) -> None:
    with run_folder(tmp_path / "a" / "b", "run 1") as folder:
        assert folder == tmp_path / "a" / "b" / "run 1"
        assert folder.is_dir()
        (folder / "space.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["space.yaml"]


def test_empty_run_folder_is_removed_when_the_run_ends_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such data"), run_folder(tmp_path / "results", "run"):
        raise InputError("no such data")
    assert list(tmp_path.iterdir()) == []


def test_filled_run_folder_is_kept_when_the_run_ends_by_an_error(tmp_path: Path) -> None:
    def begin_and_interrupt() -> None:
        with run_folder(tmp_path, "run") as folder:
            (folder / "trials.parquet").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin_and_interrupt()
    assert (tmp_path / "run" / "trials.parquet").exists()


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/tmp", "a/", "../a", "a\0b", "a\nb"])
def test_name_that_is_no_plain_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / "results", name) == f"--name: must be a plain folder name, got {name!r}"


@pytest.mark.parametrize("filled", [False, True])
def test_name_of_an_existing_run_is_refused_and_its_folder_left_alone(tmp_path: Path, filled: bool) -> None:
    folder = tmp_path / "results" / "run"
    folder.mkdir(parents=True)
    if filled:
        (folder / "trials.parquet").touch()
    message = refusal(tmp_path / "results", "run")
    assert message == f"--name: {folder} already holds a run; choose another name"
    assert folder.is_dir()


def test_file_in_place_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    assert refusal(tmp_path, "run") == f"--name: {tmp_path / 'run'} already holds a run; choose another name"


def test_file_in_place_of_the_results_folder_or_above_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").touch()
    for results_dir in (tmp_path / "results", tmp_path / "results" / "below"):
        message = refusal(results_dir, "run")
        assert message == f"--results-dir: {results_dir / 'run'} cannot be made (Not a directory)"


def test_link_to_nowhere_in_place_of_the_results_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(tmp_path / "nowhere")
    message = refusal(tmp_path / "results", "run")
    assert message == f"--results-dir: must be a folder, got the file {tmp_path / 'results'}"


def test_name_that_the_file_system_refuses_is_one_line(tmp_path: Path) -> None:
    name = "n" * 300
    assert refusal(tmp_path, name) == f"--results-dir: {tmp_path / name} cannot be made (File name too long)"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_results_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    message = refusal(tmp_path, "run")
    tmp_path.chmod(0o700)
    assert message == f"--results-dir: {tmp_path / 'run'} cannot be made (Permission denied)"
