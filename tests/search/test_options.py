import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tune_amp.cli.search_arguments import search_parser
from tune_amp.search.options import (
    SearchOptions,
    build_options,
    make_run_name,
    name_flag,
    name_path,
    name_run,
    run_folder,
)
from tune_amp.trial.config import InputError, value_type
from tune_amp.trial.text import hide_credentials

NAN, INF = math.nan, math.inf
CHOICES = "simple_net, conv_net, vit, or module:function"


OBJECTIVE_RULE = (
    "must be one of val_accuracy, val_loss, train_seconds, peak_memory_bytes, or several joined by commas; "
    "a metric of your own needs --task or --train"
)

FIRST_RULE = "must begin with val_accuracy or val_loss"

SHARE_RULE = "must be 0, 0.0001 (Ray's smallest) to 1, or a whole number"

SEEDS_RULE = "must be 0, or 3 to 1,000 (fewer decide nothing)"


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss,train_seconds"])
def test_defaults_are_valid_and_stay_so_once_they_are_filled_in(objective: str) -> None:
    options = SearchOptions(objective=objective)
    assert options.grace_period <= options.max_epochs
    assert SearchOptions(**dataclasses.asdict(options)) == options


@pytest.mark.parametrize(
    "options",
    [
        {"grace_period": 4, "max_epochs": 4},
        {"num_samples": 1, "top_k": 1, "max_epochs": 1},
        {"reduction_factor": 1.01},
        {"gpus_per_trial": 0},
        {"gpus_per_trial": 0.0001},
        {"gpus_per_trial": 0.5, "mps": "on"},
        {"gpus_per_trial": 1, "cpus_per_trial": 1, "max_concurrent": 1},
        {"time_budget": 0.1},
        {"objective": "val_loss", "model": "package.module:function", "seed": 2**63 - 1},
        {"top_k": 50, "num_samples": 2},
        {"confirm_seeds": 0},
        {"confirm_seeds": 3},
        {"confirm_seeds": 1000},
        {"objective": "val_loss,val_accuracy,peak_memory_bytes"},
        {"objective": "val_accuracy,train_seconds", "sampler": "tpe", "scheduler": "none"},
        {"sampler": "cmaes", "scheduler": "hyperband"},
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
        ({"reduction_factor": NAN}, "--reduction-factor: must be a finite number, got nan"),
        ({"objective": "test_accuracy"}, f"--objective: {OBJECTIVE_RULE}, got 'test_accuracy'"),
        ({"objective": "val_loss,time"}, f"--objective: {OBJECTIVE_RULE}, got 'time'"),
        ({"objective": "val_loss,"}, f"--objective: {OBJECTIVE_RULE}, got ''"),
        ({"objective": ""}, f"--objective: {OBJECTIVE_RULE}, got ''"),
        ({"objective": "val_loss, val_loss"}, "--objective: must name none twice, got 'val_loss, val_loss'"),
        ({"objective": "train_seconds"}, f"--objective: {FIRST_RULE}, got 'train_seconds'"),
        ({"objective": "peak_memory_bytes,val_loss"}, f"--objective: {FIRST_RULE}, got 'peak_memory_bytes'"),
        (
            {"objective": "val_accuracy,val_loss,train_seconds,peak_memory_bytes"},
            "--objective: must name 3 at most, got 4",
        ),
        ({"confirm_seeds": 1001}, f"--confirm-seeds: {SEEDS_RULE}, got 1001"),
        ({"confirm_seeds": 10**18}, f"--confirm-seeds: {SEEDS_RULE}, got 1000000000000000000"),
        ({"num_samples": 10**400}, "--num-samples: must fit in 64 bits, got 100000000000000000...0000000000000000000"),
        ({"time_budget": INF}, "--time-budget: must be a finite number, got inf"),
        ({"reduction_factor": INF}, "--reduction-factor: must be a finite number, got inf"),
        ({"gpus_per_trial": NAN}, "--gpus-per-trial: must be a finite number, got nan"),
        ({"gpus_per_trial": INF}, "--gpus-per-trial: must be a finite number, got inf"),
        (
            {"gpus_per_trial": 2},
            "--gpus-per-trial: must be at most 1: only a loop of your own (--train) can use several GPUs, got 2",
        ),
        ({"train": "a:b", "task": "a:B"}, "--train: must not be given with --task, got 'a:b' and 'a:B'"),
        ({"train": "a"}, "--train: must have the form module:name, got 'a'"),
        (
            {"train": "a:b", "objective": "x"},
            "--objective: 'x' does not say whether more is better: add --mode max or --mode min",
        ),
        ({"mode": "up"}, "--mode: must be one of max, min, got 'up'"),
        ({"gpus_per_trial": 1.5}, f"--gpus-per-trial: {SHARE_RULE}, got 1.5"),
        ({"gpus_per_trial": -0.5}, f"--gpus-per-trial: {SHARE_RULE}, got -0.5"),
        ({"gpus_per_trial": 0.00009}, f"--gpus-per-trial: {SHARE_RULE}, got 9e-05"),
        ({"mps": "yes"}, "--mps: must be one of auto, on, off, got 'yes'"),
        (
            {"mps": "on", "gpus_per_trial": 0},
            "--mps: must be auto or off where no trials share a GPU (--gpus-per-trial 0), got on",
        ),
        ({"cpus_per_trial": 0}, "--cpus-per-trial: must be at least 1, got 0"),
        ({"cpus_per_trial": -1}, "--cpus-per-trial: must be at least 1, got -1"),
        ({"max_concurrent": 0}, "--max-concurrent: must be at least 1, got 0"),
        ({"max_concurrent": -2}, "--max-concurrent: must be at least 1, got -2"),
        ({"trial_time_limit": 0}, "--trial-time-limit: must be greater than 0, got 0.0"),
        ({"sampler": "grid"}, "--sampler: must be one of auto, tpe, random, gp, cmaes, nsga2, got 'grid'"),
        ({"sampler": ""}, "--sampler: must be one of auto, tpe, random, gp, cmaes, nsga2, got ''"),
        ({"scheduler": "pbt"}, "--scheduler: must be one of auto, asha, hyperband, median, none, got 'pbt'"),
        (
            {"objective": "val_loss,train_seconds", "scheduler": "asha"},
            "--scheduler: must be none for several objectives (Optuna knows no pruned trials there), got 'asha'",
        ),
        (
            {"objective": "val_loss,train_seconds", "sampler": "cmaes"},
            "--sampler: must not be cmaes for several objectives (it knows one), got 'cmaes'",
        ),
        ({"time_budget": 0.0}, "--time-budget: must be greater than 0, got 0.0"),
        ({"time_budget": -5.0}, "--time-budget: must be greater than 0, got -5.0"),
        ({"time_budget": NAN}, "--time-budget: must be a finite number, got nan"),
        ({"max_failures": 0}, "--max-failures: must be at least 1, got 0"),
        ({"top_k": 0}, "--top-k: must be at least 1, got 0"),
        ({"confirm_seeds": 2}, f"--confirm-seeds: {SEEDS_RULE}, got 2"),
        ({"confirm_seeds": -1}, f"--confirm-seeds: {SEEDS_RULE}, got -1"),
    ],
)
def test_option_that_breaks_its_rule_is_named_by_its_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        SearchOptions(**options)
    assert str(caught.value) == message


# What is searched for, and how


def test_objectives_are_told_apart_at_commas_and_joined_without_blanks() -> None:
    options = SearchOptions(objective=" val_loss ,train_seconds, peak_memory_bytes")
    assert options.objectives == ("val_loss", "train_seconds", "peak_memory_bytes")
    assert options.objective == "val_loss,train_seconds,peak_memory_bytes"
    assert SearchOptions().objectives == ("val_accuracy",)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("val_loss", ("tpe", "asha")), ("val_loss,train_seconds", ("nsga2", "none"))],
)
def test_sampler_and_scheduler_are_chosen_by_the_number_of_objectives(
    objective: str, expected: tuple[str, str]
) -> None:
    options = SearchOptions(objective=objective)
    assert (options.sampler, options.scheduler) == expected


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"sampler": "gp", "scheduler": "median"}, ("gp", "median")),
        ({"sampler": "random"}, ("random", "asha")),
        ({"sampler": "cmaes"}, ("cmaes", "asha")),
        ({"sampler": "gp"}, ("gp", "none")),  # they learn nothing from stopped trials
        ({"sampler": "nsga2"}, ("nsga2", "none")),
        ({"sampler": "gp", "scheduler": "asha"}, ("gp", "asha")),
        ({"scheduler": "none"}, ("tpe", "none")),
    ],
)
def test_sampler_and_scheduler_that_were_named_are_kept(named: dict[str, str], expected: tuple[str, str]) -> None:
    options = SearchOptions(**named)  # type: ignore[arg-type]
    assert (options.sampler, options.scheduler) == expected


# The flags


def test_every_option_has_a_flag_with_its_default_its_type_and_its_text_in_the_help() -> None:
    parser = search_parser("")
    assert build_options(vars(parser.parse_args([]))) == SearchOptions()
    shown = " ".join(parser.format_help().split())
    for field in dataclasses.fields(SearchOptions):
        given = {float: "0.5", int: "7", str: "x"}[value_type(field.name, SearchOptions)]
        assert str(getattr(parser.parse_args([name_flag(field.name), given]), field.name)) == given
        default = field.metadata["unset"] if field.default is None else field.default
        assert f"{field.metadata['help']} ({default})" in shown


def test_share_of_a_gpu_can_be_left_to_the_search_by_name() -> None:
    assert search_parser("").parse_args(["--gpus-per-trial", "auto"]).gpus_per_trial is None


# The run's folder


def refusal(results_dir: Path, run: str) -> str:
    before = sorted(results_dir.parent.rglob("*"))
    with pytest.raises(InputError) as caught, run_folder(results_dir, run):
        pytest.fail("was entered")
    assert sorted(results_dir.parent.rglob("*")) == before
    return str(caught.value)


def test_run_folder_is_made_with_its_parents_and_kept_when_filled(tmp_path: Path) -> None:
    with run_folder(tmp_path / "a" / "b", "run-1") as folder:
        assert folder == tmp_path / "a" / "b" / "run-1"
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


NO_FOLDER_NAMES = ["", ".", "..", ".hidden", "a/b", "/tmp", "a/", "../a", "a\0b", "a\nb"]
TO_BE_QUOTED = ["-x", "--", "*", "a?", "a|b", "~", "~x", "a b", " ", "'a'", 'a"', "$HOME", "a;b", "a&", "a#b", "a\\b"]
TO_BE_QUOTED += ["(a)", "a<b", "`a`", "{a,b}", "[a]", "!a", "a=b", "a\u200bb", "\udcff"]


@pytest.mark.parametrize("name", NO_FOLDER_NAMES + TO_BE_QUOTED)
def test_name_that_cannot_be_typed_back_without_quotes_is_refused(tmp_path: Path, name: str) -> None:
    rule = "must be of letters, digits, _, . and -, and begin with neither . nor -"
    assert refusal(tmp_path / "results", name) == f"--name: {rule}, got {name!r}"


@pytest.mark.parametrize(
    "name", ["a", "_", "7", "lr-0.1_b64", "l\u00e4uf", "a\u0308", "\u8dd1", "\u0939\u093f\u0928\u094d\u0926\u0940"]
)
def test_name_of_letters_and_digits_of_any_script_is_taken(tmp_path: Path, name: str) -> None:
    with run_folder(tmp_path, name) as folder:
        assert folder == tmp_path / name


def test_empty_folder_is_not_taken_from_a_search_that_starts_there(tmp_path: Path) -> None:
    """For seconds there is nothing in it. One that was killed then is taken: see ``tests/results/test_files.py``."""
    with run_folder(tmp_path / "results", "run") as folder:
        assert refusal(tmp_path / "results", "run") == f"--name: {folder} is another search's; choose another name"
        assert folder.is_dir()


def test_run_goes_below_the_home_folder_and_never_into_a_folder_named_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with run_folder(Path("~/runs"), "a") as folder:
        assert folder == tmp_path / "home" / "runs" / "a"
    assert not (tmp_path / "~").exists()


def test_searches_that_get_the_same_name_unasked_are_numbered(tmp_path: Path) -> None:
    with (
        run_folder(tmp_path, "quick-20261130-120000", numbered=True) as first,
        run_folder(tmp_path, "quick-20261130-120000", numbered=True) as second,
    ):
        (first / "reports.journal").touch()
        with run_folder(tmp_path, "quick-20261130-120000", numbered=True) as third:
            assert [folder.name for folder in (first, second, third)] == [
                "quick-20261130-120000",
                "quick-20261130-120000-2",
                "quick-20261130-120000-3",
            ]
    assert list(tmp_path.iterdir()) == [first]


@pytest.mark.parametrize(
    ("space", "stem"),
    [
        ("mnist_amp", "mnist_amp"),
        ("spaces/quick.yaml", "quick"),
        ("~/my space (2).yaml", "my_space__2_"),
        ("-.hidden.yaml", "hidden"),
        ("/tmp/ ", "_"),
        ("...", "search"),
    ],
)
def test_run_without_a_name_has_one_that_the_rule_allows(space: str, stem: str, tmp_path: Path) -> None:
    name = make_run_name(space)
    assert re.fullmatch(rf"{re.escape(stem)}-\d{{8}}-\d{{6}}", name)
    with run_folder(tmp_path, name):
        pass


def test_run_is_named_so_that_a_command_line_finds_it() -> None:
    results = Path("results")
    assert name_run(results / "demo", results) == "demo"
    assert name_run(Path("elsewhere/demo"), results) == "elsewhere/demo"
    for old in ("-x", "~", "two words"):  # from before there was a rule
        assert name_run(results / old, results) == f"results/{old}"
    assert name_path(Path("-x/best.parquet")) == "./-x/best.parquet"
    assert name_path(Path("~/demo")) == "./~/demo"


def test_name_of_an_existing_run_is_refused_and_its_folder_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "run"
    folder.mkdir(parents=True)
    (folder / "trials.parquet").touch()
    message = refusal(tmp_path / "results", "run")
    assert message == f"--name: {folder} already holds a run; choose another name"
    assert (folder / "trials.parquet").exists()


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
    assert message == f"--results-dir: {tmp_path / 'results' / 'run'} cannot be made (No such file or directory)"


def test_name_that_the_file_system_refuses_is_one_line(tmp_path: Path) -> None:
    name = "n" * 300
    assert refusal(tmp_path, name) == f"--results-dir: {tmp_path / name} cannot be made (File name too long)"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_results_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    message = refusal(tmp_path, "run")
    tmp_path.chmod(0o700)
    assert message == f"--results-dir: {tmp_path / 'run'} cannot be made (Permission denied)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:sec/ret@bucket/a@b?scheme=http", "s3://***@b?scheme=http"),
        ("--storage-path=s3://key:secret@bucket/a", "--storage-path=s3://***@bucket/a"),
        (
            "abfs://box@store/a?client_secret=x%2Fy&tenant_id=t&SAS_token=z",
            "abfs://***@store/a?client_secret=***&tenant_id=t&SAS_token=***",
        ),
        (
            "s3://bucket/a?endpoint_override=127.0.0.1:9000&region=eu",
            "s3://bucket/a?endpoint_override=127.0.0.1:9000&region=eu",
        ),
        (
            "abfs://box@account.dfs.core.windows.net/a?sv=2024-11-04&sig=x%2Fy%3D",
            "abfs://***@account.dfs.core.windows.net/a?sv=2024-11-04&sig=***",
        ),
        (
            "s3://bucket/a?credential=x&pwd=x&auth=x&pass=x&user=u",
            "s3://bucket/a?credential=***&pwd=***&auth=***&pass=***&user=u",
        ),
        (
            "https://host/a?Authorization=Basic%20x&passphrase=x#access_token=x",
            "https://host/a?Authorization=***&passphrase=***",
        ),
        ("abfs://box/a?blob_storage_authority=.blob.local", "abfs://box/a?blob_storage_authority=.blob.local"),
        ("host/a;jwt=x", "host/a;jwt=***"),
        (
            "AWS_SECRET_ACCESS_KEY=x%/+ AWS_REGION=eu MYSQL_PWD=y",
            "AWS_SECRET_ACCESS_KEY=*** AWS_REGION=eu MYSQL_PWD=***",
        ),
        ("user:secret@head:10001", "***@head:10001"),
        ("--address=user:secret@head:10001", "--address=***@head:10001"),
        ("broken:net", "broken:net"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_record_of_a_command_holds_no_credentials(text: str, shown: str) -> None:
    assert hide_credentials(text) == shown


def test_no_flag_of_a_search_looks_like_a_secret() -> None:
    flags = [flag for action in search_parser("")._actions for flag in action.option_strings]
    assert len(flags) > 20
    assert [flag for flag in flags if hide_credentials(f"{flag}=x") != f"{flag}=x"] == []
