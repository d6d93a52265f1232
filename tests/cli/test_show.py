"""``tune-amp show`` as a user types it: where it finds a run, what it prints first, and how fast it is there."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from records import PROVENANCE, make_trial
from report_runs import write_full_run

from tune_amp.cli.show import show_command
from tune_amp.results.provenance import Provenance
from tune_amp.results.records import rank_trials, write_best, write_trials
from tune_amp.trial.config import TrialConfig

RUN = Path("results") / "demo"
SHOW = "import sys; from tune_amp.cli.show import show_command; sys.exit(show_command(['demo']))"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_run(provenance: Provenance = PROVENANCE, **config: str) -> None:
    RUN.mkdir(parents=True)
    trial = make_trial(config=TrialConfig(**config))  # type: ignore[arg-type]
    write_trials(RUN, [trial], provenance)
    write_best(RUN, rank_trials([trial]), provenance)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert show_command(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_the_first_lines_tell_what_was_searched_on_what(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(dataclasses.replace(PROVENANCE, space_text="parameters:\n  lr: {low: 1.0e-4, high: 0.1}\n"))
    assert printed(capsys, "demo")[:5] == [
        "simple_net on mnist: 55,000 training and 5,000 validation images",
        "space      search_spaces/mnist_amp.yaml: lr",
        "searched   val_accuracy by tpe and asha, seed 7",
        "run        2026-03-01-mnist, 2026-03-01T12:30:00Z, on cpu",
        "1 trial: 1 completed",
    ]


@pytest.mark.parametrize("run", ["demo", "results/demo", "results/demo/best.parquet", "demo/trials.parquet"])
def test_a_run_is_found_by_its_name_its_folder_and_its_files(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run()
    assert printed(capsys, run)[-1] == "reuse    tune-amp train results/demo/best.parquet"


@pytest.mark.parametrize(("encoding", "interval"), [("ascii", b" +-"), ("latin-1", b" \xb1"), ("utf-8", b" \xc2\xb1")])
def test_run_is_shown_in_whatever_encoding_the_output_has(encoding: str, interval: bytes) -> None:
    RUN.mkdir(parents=True)
    write_full_run(RUN)
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(interval) == 6  # validation and test, of two and of the default


@pytest.mark.parametrize(("redirection", "code"), [("<&- >&- 2>&-", 0), (">&- 2>&-", 2)])
def test_closed_streams_change_no_exit_code(redirection: str, code: int) -> None:
    if code == 0:
        RUN.mkdir(parents=True)
        write_full_run(RUN)
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, SHOW], check=False)
    assert done.returncode == code


def test_runs_elsewhere_are_found_too(capsys: pytest.CaptureFixture[str]) -> None:
    write_run()
    Path("results").rename("elsewhere")
    assert "reuse    tune-amp train elsewhere/demo/best.parquet" in printed(
        capsys, "demo", "--results-dir", "elsewhere"
    )


@pytest.mark.parametrize("flag", [("--data-dir", "my data"), ("--data-dir=my data",)])
def test_the_line_that_trains_names_the_data_and_code_of_the_search(
    flag: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("scripts/search.py", "--dataset", "mine:data", *flag, "--model", "mine:net")
    provenance = dataclasses.replace(PROVENANCE, command=command, dataset="mine:data")
    write_run(provenance, model="mine:net", dataset="mine:data")
    expected = "tune-amp train results/demo/best.parquet --data-dir 'my data' --model mine:net --dataset mine:data"
    assert printed(capsys, "demo")[-1] == f"reuse    {expected}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "RUN: must be the folder of a run, or its name in results, got nowhere"),
        ("results", "results: must hold trials.parquet"),
        ("demo --top-k 0", "--top-k: must be at least 1, got 0"),
        ("demo --top-k x", "argument --top-k: invalid int value: 'x' (see tune-amp show --help)"),
        ("", "the following arguments are required: RUN (see tune-amp show --help)"),
    ],
)
def test_what_is_typed_wrong_is_answered_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run()
    assert show_command(arguments.split()) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {message}\n")


def test_a_damaged_file_of_the_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    write_run()
    file = RUN / "best.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    assert show_command(["demo"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}: ")


def test_a_run_is_shown_without_the_libraries_that_take_seconds_to_import() -> None:
    write_run()
    code = (
        "import sys; from tune_amp.cli.main import main; main(['show', 'demo'])\n"
        "print(sorted({'torch', 'ray', 'sklearn', 'scipy', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "1 trial: 1 completed" in done.stdout
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(("images", "expected"), [
    (0, "mine:train: your own training loop and data"),
    (1413, "mine:train: 1,413 training and 5,000 validation images"),
])  # fmt: skip
def test_a_run_without_a_trial_is_named_by_its_data(
    images: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    RUN.mkdir(parents=True)
    write_trials(RUN, [], dataclasses.replace(PROVENANCE, dataset="mine:train", train_images=images))
    assert printed(capsys, "demo")[0] == expected
