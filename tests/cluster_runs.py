"""Searches on a simulated cluster, as a user starts them, for tests that look at them or harm them."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
from fault_runs import Search
from optuna import load_study
from optuna.trial import TrialState
from simulated_cluster import SimulatedCluster

from tune_amp.results.records import TrialRecord, load_trials
from tune_amp.search.study import open_storage
from tune_amp.trial.config import TrialStatus

ROOT = Path(__file__).resolve().parents[1]

EPOCHS = 20
EPOCH_SECONDS = 0.2

# Leaves a line for each attempt of a trial: on which node, in which process, with whose code. An epoch takes a
# while, whatever its settings: where a trial ends before a new node's worker has started, Tune gives the trial that
# waits for that worker to the one that is free, and starts again.
MODEL = """
import json, os, time
import ray, torch
import tune_amp
from model_parts import build_layer


class Net(torch.nn.Module):
    def __init__(self, pixels, classes):
        super().__init__()
        self.layer = build_layer(pixels, classes)
        self.began = time.time()

    def train(self, mode=True):
        if mode:  # once an epoch, and after whatever looks at the model in between
            time.sleep(SECONDS)
            with open("FOLDER/epochs", "a") as file:
                file.write(f"{self.began}\\n")
        return super().train(mode)

    def forward(self, images):
        return self.layer(images.flatten(1))


def net(input_shape, num_classes):
    network = Net(torch.Size(input_shape).numel(), num_classes)
    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        here = {
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "at": network.began,
            "file": __file__,
            "tune_amp": tune_amp.__file__,
        }
        with open("FOLDER/attempts", "a") as file:
            file.write(json.dumps(here) + "\\n")
    return network
"""

PARTS = """
import torch


def build_layer(pixels, classes):
    return torch.nn.Linear(pixels, classes)
"""


class ClusterSearch(Search):
    """A search by ``scripts/search.py`` that tells in JSON lines what it does, of the model above."""

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "results" / "run"

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has told so far."""
        return [json.loads(line) for line in self.stdout.rpartition("\n")[0].splitlines()]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """What the model left of each attempt of a trial."""
        path = self.folder / "attempts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def count_ended(self) -> int:
        """Trials that are over."""
        return sum(event["event"] == "trial" for event in self.events)

    def count_workers(self, node: str) -> int:
        """Processes of a node in which an attempt began."""
        return len({attempt["pid"] for attempt in self.attempts if attempt["node"] == node})

    def age_of_attempt(self, node: str) -> float:
        """Seconds since the last attempt began on a node."""
        return time.time() - max([attempt["at"] for attempt in self.attempts if attempt["node"] == node], default=0.0)

    def finish(self) -> dict[str, Any]:
        """Wait for the end, which must be a good one; returns the last event."""
        assert self.wait() == 0, self.stderr
        assert "Traceback" not in self.stderr
        last = self.events[-1]
        assert last["event"] == "result"
        return last


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something to become true: a search starts in 10 s here, and in 100 s beside 40 other processes."""
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def write_model(folder: Path, epoch_seconds: float = EPOCH_SECONDS) -> None:
    """Make the folder with a user's own model in it."""
    folder.mkdir()
    (folder / "sleepy.py").write_text(MODEL.replace("FOLDER", str(folder)).replace("SECONDS", str(epoch_seconds)))
    (folder / "model_parts.py").write_text(PARTS)


@contextlib.contextmanager
def searching(
    cluster: SimulatedCluster, folder: Path, *arguments: object, epoch_seconds: float = EPOCH_SECONDS
) -> Iterator[ClusterSearch]:
    """A search by ``scripts/search.py`` on the cluster, of a user's own model, in the folder."""
    write_model(folder, epoch_seconds)
    told = ["quick", "--dataset", "digits", "--model", "sleepy:net", "--max-epochs", str(EPOCHS), "--name", "run"]
    told += ["--sampler", "random", "--scheduler", "none", "--confirm-seeds", "0"]
    told += ["--address", cluster.address, "--json", *map(str, arguments)]
    if "--storage-path" not in told:
        told += ["--storage-path", str(folder / "storage")]
    search = ClusterSearch(folder, told, environment=cluster.environment)
    try:
        yield search
    finally:
        search.destroy()


def check_nothing_is_lost(run: Path, num_samples: int) -> list[TrialRecord]:
    """Every trial ended well, each of its epochs is in the files once, and the study holds nothing that runs."""
    trials = load_trials(run)
    assert [trial.status for trial in trials] == [TrialStatus.COMPLETED] * num_samples
    rows = pq.read_table(run / "epochs.parquet", columns=["trial_id", "epoch"]).to_pylist()
    told = Counter((row["trial_id"], row["epoch"]) for row in rows)
    assert told == {(trial.trial_id, epoch): 1 for trial in trials for epoch in range(1, EPOCHS + 1)}
    states = [trial.state for trial in load_study(study_name="run", storage=open_storage(run / "study.journal")).trials]
    assert states == [TrialState.COMPLETE] * num_samples
    return trials
