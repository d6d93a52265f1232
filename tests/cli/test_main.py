"""What a user types wrong is answered in one line with exit code 2, and nothing is left behind."""

import argparse
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from records import PROVENANCE, make_trial

from tune_amp import __version__
from tune_amp.cli.main import COMMANDS, main
from tune_amp.cli.search import (
    _count_first_workers,
    _is_resumable,
    _load_checked,
    _print_cut_off,
    _user_modules,
    search_command,
)
from tune_amp.cli.search_arguments import GROUPS, search_parser
from tune_amp.cli.search_request import SearchRequest
from tune_amp.cli.train import describe_recalls, train_command
from tune_amp.results.records import rank_trials, write_best, write_trials
from tune_amp.search.options import SearchOptions
from tune_amp.space.space import load_space
from tune_amp.trial.config import InputError, TrialConfig
from tune_amp.trial.consent import consent_to

ROOT = Path(__file__).resolve().parents[2]
NAME_RULE = "must be of letters, digits, _, . and -, and begin with neither . nor -"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNE_AMP_DATA", str(tmp_path / "no-data-here"))
    monkeypatch.setattr(sys, "path", sys.path.copy())


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of a refused command."""
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-samples 0", "--num-samples: must be at least 1, got 0"),
        ("--num-samples many", "argument --num-samples: invalid int value: 'many' (see scripts/search.py --help)"),
        ("--num-sample=3", "unrecognized arguments: --num-sample=3 (see scripts/search.py --help)"),
        ("--max-epochs 0", "--max-epochs: must be at least 1, got 0"),
        ("--grace-period 5 --max-epochs 4", "--grace-period: must be 1 to --max-epochs (4), got 5"),
        ("--reduction-factor 1", "--reduction-factor: must be greater than 1, got 1.0"),
        ("--reduction-factor nan", "--reduction-factor: must be a finite number, got nan"),
        (
            "--objective accuracy",
            "--objective: must be one of val_accuracy, val_loss, train_seconds, peak_memory_bytes, "
            "or several joined by commas; a metric of your own needs --task or --train, got 'accuracy'",
        ),
        ("--imbalance 0.5", "--imbalance: must be at least 1, got 0.5"),
        ("--imbalance inf", "--imbalance: must be a finite number, got inf"),
        ("--time-budget -1", "--time-budget: must be greater than 0, got -1.0"),
        ("--top-k 0", "--top-k: must be at least 1, got 0"),
        ("--seed -1", "--seed: must be between 0 and 2^63 - 1, got -1"),
        ("--quiet --json", "argument --json: not allowed with argument --quiet (see scripts/search.py --help)"),
        (
            "--gpus-per-trial lots",
            "argument --gpus-per-trial: must be auto or a number, got 'lots' (see scripts/search.py --help)",
        ),
        (
            "no_such.yaml",
            "no_such.yaml: is neither a file nor a bundled search space "
            "(extensions, mnist_amp, precision, quick, stress)",
        ),
        (
            "--dataset cifar",
            "dataset: must be one of auto, mnist, fashion_mnist, kmnist, digits, or module:function, got 'cifar'",
        ),
        ("--dataset mnist --data-dir nowhere", "--data-dir: must be an existing folder, got nowhere"),
        ("--model resnet", "--model: must be one of simple_net, conv_net, vit, or module:function, got 'resnet'"),
        (
            "--dataset digits --model no_such_module:net",
            "no_such_module:net: importing no_such_module failed "
            "(ModuleNotFoundError: No module named 'no_such_module')",
        ),
        ("--dataset digits --name a/b", f"--name: {NAME_RULE}, got 'a/b'"),
        ("--dataset digits --name=", f"--name: {NAME_RULE}, got ''"),
        (
            "--resume -x",
            "argument --resume: expected one argument; one that begins with - is joined by =, as in --resume=-x "
            "(see scripts/search.py --help)",
        ),
        ("--results-dir=", "argument --results-dir: must not be empty (see scripts/search.py --help)"),
        (
            "--storage-path=~nobody-has-this-name",
            "argument --storage-path: ~nobody-has-this-name names an unknown home folder; set HOME, give the full "
            "path, or write ./~nobody-has-this-name for that very name (see scripts/search.py --help)",
        ),
        ("--storage-path=", "argument --storage-path: must not be empty (see scripts/search.py --help)"),
        (
            "--dataset digits --address ray://head:10001",
            "--address: ray://head:10001 is not supported, because a search runs on a node of the cluster; submit it "
            "there: ray job submit --address http://HEAD:8265 -- tune-amp search --address auto",
        ),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert refusal(capsys, search_command(arguments.split())) == message
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_space_names_file_key_rule_and_value(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("x.yaml").write_text("parameters:\n  lr: {low: '1e-4', high: 0.1, log: true}\n")
    expected = "x.yaml: parameters.lr.low: must be a number, got '1e-4'"
    assert refusal(capsys, search_command(["x.yaml"])) == expected


def test_a_batch_larger_than_the_data_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text("parameters:\n  batch_size: {low: 64, high: 1024, power_of_two: true}\n")
    expected = "x.yaml: batch_size: must be at most the 772 training images of digits, got 1024"  # of 1,413
    assert refusal(capsys, search_command(["x.yaml", "--dataset", "digits", "--imbalance", "4"])) == expected


def test_a_tail_that_is_too_long_for_the_data_names_the_flag() -> None:
    arguments = argparse.Namespace(dataset="digits", data_dir=None, imbalance=100.0, task=None, train=None)
    space = load_space("quick")
    request = SearchRequest(arguments=arguments, space=space, folder=Path("run"), command=("search",), begun=0.0)
    with pytest.raises(InputError) as caught:
        _load_checked(request)
    rule = "each class of digits must keep at least 2 training images"
    assert str(caught.value) == f"--imbalance: {rule}, got 1 of class 9 at 100:1"


def test_ray_that_does_not_start_was_not_interrupted_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("its node was not ready")

    monkeypatch.setattr(ray, "init", fail)
    assert search_command(["quick", "--dataset", "digits"]) == 1
    assert capsys.readouterr() == ("", "error: Ray did not start: TimeoutError: its node was not ready\n")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_never_mixed_with_another(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "results" / "demo" / "best.parquet"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    code = search_command(["--dataset", "digits", "--name", "demo"])
    assert refusal(capsys, code) == "--name: results/demo already holds a run; choose another name"
    assert kept.read_bytes() == b"kept"


@pytest.mark.parametrize("results_dir", ["file", "file/below", "/proc/tune_amp"])
def test_a_results_folder_that_cannot_be_written_is_refused(
    results_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    message = refusal(capsys, search_command(["--dataset", "digits", "--name", "x", "--results-dir", results_dir]))
    assert message.startswith(f"--results-dir: {results_dir}/x cannot be made (")


def test_help_and_errors_answer_without_importing_the_heavy_libraries() -> None:
    code = (
        "import sys; from tune_amp.cli.search import search_command\n"
        "try: search_command(['--help'])\nexcept SystemExit: pass\n"
        "search_command(['--num-samples', 'x'])\n"
        "print(sorted({'torch', 'ray', 'optuna', 'pyarrow', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("script", ["search", "train", "compare", "report"])
def test_each_script_prints_its_help(script: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: scripts/{script}.py")
    assert done.stderr == ""


def test_tune_amp_without_a_command_tells_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    usage = capsys.readouterr().err
    assert re.findall(r"^  (\w+) +\w.*$", usage, re.MULTILINE) == [*COMMANDS]
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == usage
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tune-amp ")
    assert main(["search", "--num-samples", "0"]) == 2
    assert main(["train", "nowhere.parquet"]) == 2


@pytest.mark.parametrize(
    ("name", "hint"), [("serach", "; did you mean search?"), ("shows", "; did you mean show?"), ("\x1b[2J", "")]
)
def test_an_unknown_command_is_answered_with_the_nearest(
    name: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = f"(known: {', '.join(COMMANDS)})"
    assert refusal(capsys, main([name])) == f"{name!r} is not a command{hint} {known}"


def test_an_unknown_space_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, search_command(["mnist_apm"])).endswith("; did you mean mnist_amp?")


def test_the_package_runs_as_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "tune_amp", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tune-amp {__version__}\n"


def test_a_terminal_gets_a_line_before_the_heavy_libraries_are_imported() -> None:
    code = (
        "import sys; from tune_amp.cli import search\n"
        "search.is_screen = lambda console: True\n"
        "search.say = lambda console, line, **_: print(line, sorted({'torch', 'ray', 'optuna'} & set(sys.modules)))\n"
        "search.search_command(['--num-samples', '0'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "starting   loading Optuna, Ray and PyTorch ... []\n"


def test_every_flag_of_a_search_is_below_a_heading() -> None:
    groups = {
        group.title: [action.dest for action in group._group_actions] for group in search_parser("x")._action_groups
    }
    assert groups.pop("positional arguments") == ["space"]
    assert groups.pop("options") == ["help"]
    assert {title: sorted(names) for title, names in groups.items()} == {
        title: sorted(names) for title, names in GROUPS.items()
    }


@pytest.mark.parametrize("command", ["train", "compare", "report", "show"])
def test_a_run_is_found_by_its_name_by_every_command(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "results" / "demo").mkdir(parents=True)
    best = write_run(tmp_path / "results" / "demo")
    (best if command != "report" else best.with_name("trials.parquet")).write_bytes(b"damaged")
    assert main([command, "demo"]) == 2
    assert re.match(r"error: results/demo/(best|trials)\.parquet: ", capsys.readouterr().err)


# ---- train ----


def test_recalls_are_told_the_worst_first_and_ten_at_most() -> None:
    line = "recall by class, the worst first: 1: 20.00%, 3: 50.00%, 0: 97.25%"
    assert describe_recalls([0.9725, 0.2, math.nan, 0.5]) == line
    many = describe_recalls([1 - label / 100 for label in range(12)])
    assert many.startswith("recall by class, the worst first: 11: 89.00%, 10: 90.00%, ")
    assert many.endswith(", 2: 98.00%, 2 better ones")


def write_run(folder: Path, **config: object) -> Path:
    trial = make_trial(config=TrialConfig(**{"dataset": "digits", "max_epochs": 2, **config}))  # type: ignore[arg-type]
    write_trials(folder, [trial], PROVENANCE)
    write_best(folder, rank_trials([trial]), PROVENANCE)
    return folder / "best.parquet"


def test_a_missing_file_or_rank_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nowhere.parquet" in refusal(capsys, train_command(["nowhere.parquet"]))
    best = write_run(tmp_path)
    assert refusal(capsys, train_command([str(best), "--rank", "7"])) == f"{best}: rank: must be one of 1..1, got 7"


def test_a_damaged_parquet_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    best = write_run(tmp_path)
    best.write_bytes(best.read_bytes()[:-100])
    assert refusal(capsys, train_command([str(best)])).startswith(f"{best}: ")
    best.write_text("lr,batch_size\n")
    assert refusal(capsys, train_command([str(best)])).startswith(f"{best}: ")


def test_other_data_than_the_search_used_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    best = write_run(tmp_path)  # recorded with another hash than digits have
    message = refusal(capsys, train_command([str(best)]))
    assert message.startswith("--data-dir: must hold the data that the search used (sha256 sha256:0123...), got other")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_code_that_only_a_file_names_never_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    best = write_run(tmp_path, model="evil:net")
    expected = f"{best}: model: names your own code; to run it, add --model evil:net"
    assert refusal(capsys, train_command([str(best)])) == expected
    assert "--model: must be evil:net" in refusal(capsys, train_command([str(best), "--model", "other:net"]))
    best = write_run(tmp_path, dataset="evil:data")
    expected = f"{best}: dataset: names your own code; to run it, add --dataset evil:data"
    assert refusal(capsys, train_command([str(best)])) == expected
    assert not Path("ran").exists()


# What the workers of a cluster are sent


def test_modules_beside_a_users_model_are_sent_along_and_nothing_else(
    enter_folder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_parts").mkdir()
    (tmp_path / "my_parts" / "__init__.py").write_text("")
    (tmp_path / "my_layers.py").write_text("import my_parts")
    (tmp_path / "my_model.py").write_text("import json, numpy, my_layers\ndef net(input_shape, num_classes): ...")
    (tmp_path / "not_imported.py").write_text("")
    consent_to("my_model:net")
    sent = {module.__name__ for module in _user_modules("my_model:net")}
    assert sent == {"my_model", "my_layers", "my_parts"}


def test_installed_model_is_sent_alone() -> None:
    consent_to("torchvision.models:resnet18")
    assert [module.__name__ for module in _user_modules("torchvision.models:resnet18")] == ["torchvision"]


def test_built_in_model_needs_nothing() -> None:
    assert _user_modules("simple_net") == ()


@pytest.mark.parametrize("left", [None, "trials.parquet"])
def test_run_folder_that_was_removed_under_a_search_is_one_line(
    left: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray and the last files of the search may have made a part of it again."""
    folder = tmp_path / "run"
    arguments = search_parser("search").parse_args([])
    request = SearchRequest(
        arguments=arguments, space=load_space("quick"), folder=folder, command=("search",), begun=0.0
    )
    if left is not None:
        folder.mkdir()
        (folder / left).touch()
    assert _print_cut_off("no such file", request) == 1
    expected = (
        f"error: {folder} was removed or moved while the search ran, and cannot be resumed there (no such file)\n"
    )
    assert capsys.readouterr().err == expected
    folder.mkdir(exist_ok=True)
    (folder / "reports.journal").write_text("begun")
    assert _print_cut_off("no such file", request) == 130
    assert capsys.readouterr().err.startswith("cut off  no such file\nresume   ")


@pytest.mark.parametrize(("events", "resumable"), [(["run"], False), (["run", "session", "trial"], True)])
def test_run_with_a_warm_start_is_resumed_from_its_first_trial_on(
    events: list[str], resumable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reports.journal").write_text("begun")
    monkeypatch.setattr("tune_amp.cli.search.read_journal", lambda path: [{"event": event} for event in events])
    request: Any = SimpleNamespace(folder=tmp_path, donor=object())
    assert _is_resumable(request) is resumable
    request.donor = None
    assert _is_resumable(request)


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        (0, {}, 8),
        (0, {"cpus_per_trial": 3}, 2),
        (0, {"num_samples": 5}, 5),
        (0, {"max_concurrent": 3}, 3),
        (2, {}, 2),
        (2, {"gpus_per_trial": 0.25}, 2),  # how many share one is not known yet
        (2, {"gpus_per_trial": 2, "train": "mine:train"}, 1),
        (2, {"gpus_per_trial": 0}, 8),
    ],
)
def test_as_many_workers_start_with_ray_as_trials_surely_will(
    gpus: int, options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_amp.cli.search.count_cpus", lambda: 8)
    assert _count_first_workers(SearchOptions(**options), gpus) == expected
