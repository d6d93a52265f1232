"""The two scripts as a user runs them: separate processes, a private Ray, files read afterwards."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from optuna import load_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from safetensors.torch import load_file

from tune_amp.results.records import load_best, load_provenance, load_trials
from tune_amp.trial.config import TrialStatus

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run_script(name: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def read_states(folder: Path, study: str) -> list[TrialState]:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return [trial.state for trial in load_study(study_name=study, storage=storage).trials]


def test_a_search_on_real_mnist_leaves_a_winner_that_trains_to_96_percent(mnist_dir: Path, tmp_path: Path) -> None:
    data = ("--data-dir", mnist_dir)
    size = ("--num-samples", 2, "--max-epochs", 1, "--scheduler", "none", "--confirm-seeds", 0)
    done = run_script("search", "--dataset", "mnist", *data, *size, "--name", "demo", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = tmp_path / "results" / "demo"
    trials = load_trials(run)
    assert len(trials) == 2
    assert {trial.status for trial in trials} == {TrialStatus.COMPLETED}
    assert {trial.config.dataset for trial in trials} == {"mnist"}
    provenance = load_provenance(run)
    assert (provenance.train_images, provenance.validation_images) == (55_000, 5_000)
    assert provenance.command[:3] == ("scripts/search.py", "--dataset", "mnist")
    assert re.search(r"^report   results/demo/report\.html$", done.stdout, re.MULTILINE)
    assert "simple_net on mnist: demo" in (run / "report.html").read_text()

    # The command that the search prints is the command that works.
    reuse = shlex.split(re.search(r"^reuse +(.*)$", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert reuse[2] == "results/demo/best.parquet"
    command = [*reuse, "--max-epochs", "2"]
    trained = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert trained.returncode == 0, trained.stderr
    assert len(re.findall(r"^epoch \d/2  average loss \d\.\d{4}", trained.stdout, re.MULTILINE)) == 2
    accuracy = float(re.search(r"^test accuracy ([\d.]+)% on 10,000 images", trained.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert accuracy >= 96
    [output] = run.glob("train-*")
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["train_images"] == 60_000
    assert metrics["test_accuracy"] == pytest.approx(accuracy / 100, abs=5e-5)
    assert [tuple(tensor.shape) for tensor in load_file(output / "model.safetensors").values()] == [
        (256,),
        (256, 784),
        (10,),
        (10, 256),
    ]


SIGNALLED_AT_THE_END = """
import contextlib, signal, sys
from tune_amp.cli.search import search_command
from tune_amp.cluster import ray_patches
reaped_processes = ray_patches.reaped_processes

@contextlib.contextmanager
def interrupted():
    with reaped_processes():
        signal.raise_signal(signal.SIGINT)
        yield

ray_patches.reaped_processes = interrupted
sys.exit(search_command(sys.argv[1:]))
"""


def test_a_signal_while_ray_ends_does_not_break_that(tmp_path: Path) -> None:
    search = ("quick", "--dataset", "digits", "--num-samples", "1", "--max-epochs", "1", "--confirm-seeds", "0")
    command = [sys.executable, "-c", SIGNALLED_AT_THE_END, *search, "--dashboard", "off"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_an_interrupted_search_keeps_what_was_reported_and_exits_130(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "quick", "--dataset", "digits"]
    command += ["--num-samples", "100000", "--max-epochs", "2", "--name", "cut", "--dashboard", "off", "--json"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        told = [json.loads(process.stdout.readline()) for _ in range(4)]
        os.kill(process.pid, number)
        rest, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    events = told + [json.loads(line) for line in rest.splitlines()]
    assert events[-1]["event"] == "result"
    assert events[-1]["interrupted"] is True
    assert events[-1]["reason"] == number.name
    run = tmp_path / "results" / "cut"
    statuses = {trial.trial_id: str(trial.status) for trial in load_trials(run)}
    assert statuses == {event["trial_id"]: event["status"] for event in events[1:-1]}
    assert read_states(run, "cut").count(TrialState.RUNNING) == 0


@pytest.mark.parametrize(
    ("shown", "begins"),
    [
        ((), "simple_net on digits: "),
        (("--json",), '{"event": "start", '),
    ],
)
@pytest.mark.long
def test_a_search_whose_reader_is_gone_goes_on_to_its_end(shown: tuple[str, ...], begins: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "quick", "--dataset", "digits"]
    command += ["--num-samples", "3", "--max-epochs", "1", "--confirm-seeds", "0", "--name", "piped", *shown]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(begins)
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    run = tmp_path / "results" / "piped"
    assert [trial.status for trial in load_trials(run)] == [TrialStatus.COMPLETED] * 3
    assert load_best(run).dataset == "digits"


@pytest.mark.parametrize("shown", [(), ("--json",)])
@pytest.mark.long
def test_a_search_whose_log_finds_no_room_goes_on_to_its_end(shown: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "quick", "--dataset", "digits", *shown]
    command += ["--num-samples", "2", "--max-epochs", "1", "--confirm-seeds", "0", "--name", "mute"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "results" / "mute"
    assert [trial.status for trial in load_trials(run)] == [TrialStatus.COMPLETED] * 2
    assert (run / "report.html").exists()


def test_standard_output_of_json_holds_nothing_else(tmp_path: Path) -> None:
    """Ray tells of dead workers, and a user's code prints, on standard output."""
    (tmp_path / "deadly.py").write_text(
        "import os\nimport torch\nprint('hello from the user')\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, shape, classes):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(torch.Size(shape).numel(), classes)\n"
        "    def forward(self, images):\n"
        "        if 'RAY_JOB_ID' in os.environ and self.training and len(images) > 32:\n"
        "            os._exit(7)\n"
        "        return self.layer(images.flatten(1))\n"
    )
    arguments = (
        "quick",
        "--dataset",
        "digits",
        "--model",
        "deadly:Net",
        "--num-samples",
        1,
        "--name",
        "dead",
        "--json",
    )
    done = run_script("search", *arguments, "--dashboard", "off", folder=tmp_path)
    assert done.returncode == 1
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", "trial", "result"]
    assert events[0]["unfit"] == {}
    assert "hello from the user" in done.stderr
    assert events[1]["status"] == "failed"
    assert "died" in events[1]["error"].lower()
    [trial] = load_trials(tmp_path / "results" / "dead")
    assert (trial.status, trial.epochs) == (TrialStatus.FAILED, ())
    assert f"1 failed: {events[1]['error'][:60]}" in done.stderr
