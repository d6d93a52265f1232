"""Searches on clusters of simulated nodes, as a user starts them: the nodes join, leave and die meanwhile."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from optuna import load_study
from optuna.trial import TrialState
from pyarrow import fs
from simulated_cluster import SimulatedCluster

from tune_amp.config import TrialStatus
from tune_amp.results import TrialRecord, load_best_rows, load_trials
from tune_amp.searcher import open_storage

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    """A cluster of one node with one CPU; each test adds its own and takes them away."""
    with SimulatedCluster(num_cpus=1, include_dashboard=True) as started:
        yield started


class Search:
    """A search in a process of its own, and what it has told so far."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def run(self) -> Path:
        """The run folder."""
        return self._folder / "results" / "run"

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """What the model left of each attempt of a trial."""
        path = self._folder / "attempts"
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

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something to become true of a search that goes on."""
        deadline = time.monotonic() + 300  # a search starts in 10 s here, and in 100 s beside 40 other processes
        while not holds():
            assert self._process.poll() is None, self._read_errors()
            assert time.monotonic() < deadline, (self.attempts, self.events)
            time.sleep(0.05)

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        code = self._process.wait(240)
        self._reader.join()
        return code

    def finish(self) -> dict[str, Any]:
        """Wait for the end, which must be a good one; returns the last event."""
        assert self.wait() == 0, self._read_errors()
        assert "Traceback" not in self._read_errors()
        assert self.events[-1]["event"] == "result"
        return self.events[-1]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line))

    def _read_errors(self) -> str:
        return (self._folder / "errors").read_text()


def write_model(folder: Path, epoch_seconds: float = EPOCH_SECONDS) -> None:
    """Make the folder with a user's own model in it."""
    folder.mkdir()
    (folder / "sleepy.py").write_text(MODEL.replace("FOLDER", str(folder)).replace("SECONDS", str(epoch_seconds)))
    (folder / "model_parts.py").write_text(PARTS)


@contextlib.contextmanager
def searching(
    cluster: SimulatedCluster, folder: Path, *arguments: object, epoch_seconds: float = EPOCH_SECONDS
) -> Iterator[Search]:
    """A search by ``scripts/search.py`` on the cluster, of a user's own model, in the folder."""
    write_model(folder, epoch_seconds)
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "quick", "--dataset", "digits"]
    command += ["--model", "sleepy:net", "--max-epochs", str(EPOCHS), "--sampler", "random", "--scheduler", "none"]
    command += ["--confirm-seeds", "0", "--address", cluster.address, "--name", "run", "--json", *map(str, arguments)]
    if "--storage-path" not in command:
        command += ["--storage-path", str(folder / "storage")]
    environment = os.environ | cluster.environment
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield Search(process, folder)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


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


def learned(trials: Sequence[TrialRecord]) -> dict[str, list[tuple[float | None, ...]]]:
    """What the trials reported, without times."""
    return {
        trial.trial_name: [(e.epoch, e.train_loss, e.val_loss, e.val_accuracy) for e in trial.epochs]
        for trial in trials
    }


def most_at_a_time(trials: Sequence[TrialRecord]) -> int:
    changes = []
    for trial in trials:
        assert trial.started is not None
        began = trial.started.timestamp()
        changes += [(began, 1), (began + trial.wall_seconds, -1)]
    running = [sum(change for at, change in changes if at <= moment) for moment, _ in changes]
    return max(running)


def test_a_search_on_three_nodes_loses_one_halfway_and_nothing_else(cluster: SimulatedCluster, tmp_path: Path) -> None:
    staying, dying = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    with searching(cluster, tmp_path / "undisturbed", "--num-samples", 9) as undisturbed:
        undisturbed.finish()
    assert {attempt["node"] for attempt in undisturbed.attempts} == {cluster.head, staying, dying}

    with searching(cluster, tmp_path / "disturbed", "--num-samples", 9) as disturbed:
        disturbed.wait_until(lambda: disturbed.count_ended() >= 3)
        disturbed.wait_until(lambda: 2 < disturbed.age_of_attempt(dying) < 4)  # a third of its epochs is reported
        cluster.kill_node(dying)
        disturbed.finish()
    cluster.remove_node(staying)

    assert len(disturbed.attempts) == 10  # the one that ran there began once more
    trials = check_nothing_is_lost(disturbed.run, 9)
    assert learned(trials) == learned(check_nothing_is_lost(undisturbed.run, 9))
    assert [row.trial.trial_name for row in load_best_rows(disturbed.run)] == [
        row.trial.trial_name for row in load_best_rows(undisturbed.run)
    ]
    assert not list((tmp_path / "disturbed" / "storage").rglob("checkpoint_*"))


def test_code_is_shipped_to_the_nodes_with_what_lies_beside_it(cluster: SimulatedCluster, tmp_path: Path) -> None:
    other = cluster.add_node(num_cpus=1)
    with searching(cluster, tmp_path / "s", "--num-samples", 2) as search:
        search.wait_until(lambda: bool(search.events))
        for name in ("sleepy.py", "model_parts.py"):  # other machines do not have them; the driver did import them
            (tmp_path / "s" / name).unlink()
        search.finish()
    cluster.remove_node(other)
    assert {attempt["node"] for attempt in search.attempts} == {cluster.head, other}
    for attempt in search.attempts:
        for file in (attempt["file"], attempt["tune_amp"]):
            assert "/runtime_resources/py_modules_files/" in file  # Ray's copy, not what is installed here


def test_trials_are_added_as_nodes_join_and_move_as_they_leave(cluster: SimulatedCluster, tmp_path: Path) -> None:
    other = cluster.add_node(num_cpus=1)
    with searching(cluster, tmp_path / "s", "--num-samples", 6, epoch_seconds=1.0) as search:
        search.wait_until(lambda: len(search.attempts) == 2)
        joined = cluster.add_node(num_cpus=2)
        search.wait_until(lambda: search.count_workers(joined) == 2 and search.age_of_attempt(joined) > 2)
        begun = len(search.attempts)
        assert begun - search.count_ended() == 4  # as many run now
        cluster.remove_node(joined)
        search.wait_until(lambda: len(search.attempts) > begun)
        search.finish()
    cluster.remove_node(other)
    check_nothing_is_lost(search.run, 6)
    assert len(search.attempts) == 8  # two ran there and began once more


def test_trials_with_a_share_of_a_gpu_run_on_the_node_that_has_one(cluster: SimulatedCluster, tmp_path: Path) -> None:
    plain, equipped = cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=4, num_gpus=1)
    with searching(cluster, tmp_path / "s", "--num-samples", 4, "--gpus-per-trial", 0.5) as search:
        search.finish()
    cluster.remove_node(plain)
    cluster.remove_node(equipped)
    assert {attempt["node"] for attempt in search.attempts} == {equipped}
    assert most_at_a_time(check_nothing_is_lost(search.run, 4)) == 2


def test_a_worker_that_dies_goes_on_from_the_object_store_which_is_tidied_at_the_end(
    cluster: SimulatedCluster, tmp_path: Path
) -> None:
    moto = pytest.importorskip("moto.server")
    other = cluster.add_node(num_cpus=1)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    query = f"?scheme=http&endpoint_override={address}&region=us-east-1"
    store, _ = fs.FileSystem.from_uri(f"s3://key:very-secret@bucket/{query}&allow_bucket_creation=true")
    store.create_dir("bucket")

    def list_checkpoints() -> list[str]:
        found = store.get_file_info(fs.FileSelector("bucket/runs/run", recursive=True, allow_not_found=True))
        return [entry.path for entry in found if entry.base_name == "trial.pt"]

    try:
        url = f"s3://key:very-secret@bucket/runs{query}"
        with searching(cluster, tmp_path / "s", "--num-samples", 2, "--storage-path", url) as search:
            search.wait_until(lambda: len({Path(path).parents[1] for path in list_checkpoints()}) == 2)
            os.kill(search.attempts[0]["pid"], signal.SIGKILL)
            result = search.finish()
        left = store.get_file_info(fs.FileSelector("bucket/runs/run", recursive=True))
        assert "experiment_state" in " ".join(entry.path for entry in left)  # Ray did write there
        assert list_checkpoints() == []
    finally:
        server.stop()
    cluster.remove_node(other)
    check_nothing_is_lost(search.run, 2)
    assert len(search.attempts) == 3
    begun = Counter((tmp_path / "s" / "epochs").read_text().splitlines())
    _, whole, rest = (begun[str(attempt["at"])] for attempt in search.attempts)
    assert 0 < rest < whole  # the trial went on, and did not begin anew
    assert "very-secret" not in json.dumps(result) + (tmp_path / "s" / "errors").read_text()
    assert b"very-secret" not in b"".join(path.read_bytes() for path in search.run.iterdir())


CONFIRMING = """
import json, sys
import sleepy
from tune_amp.session import ray_session

with ray_session(sys.argv[1], run="confirming", modules=(sleepy,)):
    from tune_amp.config import TrialConfig
    from tune_amp.confirm import ConfirmJob, train_on_slots
    from tune_amp.data import load_dataset
    from tune_amp.resources import TrialResources

    config = TrialConfig(dataset="digits", model="sleepy:net", max_epochs=20)
    job = ConfirmJob(trial_ids=("a",), config=config)
    resources = TrialResources(cpus=2, gpus=0.0, max_concurrent=1, reason="")
    for _, run in train_on_slots([job], load_dataset("digits"), resources):
        print(json.dumps({"status": str(run.status), "error": run.error}))
"""


def test_confirmed_run_begins_once_more_as_often_as_its_node_is_lost(cluster: SimulatedCluster, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_model(folder)
    process = subprocess.Popen(
        [sys.executable, "-c", CONFIRMING, cluster.address],
        cwd=folder,
        env=os.environ | cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    for lost in range(3):  # more often than a worker may die
        node = cluster.add_node(num_cpus=2)  # the first has but one
        deadline = time.monotonic() + 100
        while not (folder / "attempts").exists() or len((folder / "attempts").read_text().splitlines()) <= lost:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cluster.remove_node(node)
    last = cluster.add_node(num_cpus=2)
    told, _ = process.communicate(timeout=120)
    cluster.remove_node(last)
    assert [json.loads(line) for line in told.splitlines() if line.startswith("{")] == [
        {"status": "completed", "error": None}
    ]


def test_place_that_is_another_one_on_each_node_is_refused(cluster: SimulatedCluster, tmp_path: Path) -> None:
    other = cluster.add_node(num_cpus=1)
    place = "file:///proc/self/cwd/checkpoints"  # each process has a folder of its own under this name
    with searching(cluster, tmp_path / "s", "--storage-path", place) as search:
        assert search.wait() == 2
    cluster.remove_node(other)
    assert (tmp_path / "s" / "errors").read_text() == (
        "error: --storage-path: /proc/self/cwd/checkpoints must be the same place on all nodes; 127.0.0.1 has its own\n"
    )
    assert not (tmp_path / "s" / "results").exists()


SHARED_DATA = """
import json, sys
import numpy as np
from pyarrow.fs import LocalFileSystem
from tune_amp.session import ray_session

with ray_session(sys.argv[1], run="data"):
    import ray
    from ray._private.internal_api import node_stats
    from tune_amp.config import TrialConfig
    from tune_amp.data import Dataset, Split
    from tune_amp.resources import TrialResources
    from tune_amp.storage import RunStorage
    from tune_amp.tuning import bind_trainable

    def split(count):
        return Split(images=np.zeros((count, 1, 28, 28), np.uint8), labels=np.arange(count) % 10)

    def read_store():
        stats = [node_stats(n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes() if n["Alive"]]
        return {s.store_stats.object_store_bytes_used for s in stats}, len(stats)

    dataset = Dataset(
        name="digits", num_classes=10, train=split(20_000), validation=split(100), test=split(100), content_hash=""
    )
    resources = TrialResources(cpus=1, gpus=0.0, max_concurrent=4, reason="")
    storage = RunStorage(path=sys.argv[2], name="ray", filesystem=LocalFileSystem())
    trainable = bind_trainable(dataset, resources, storage)
    config = vars(TrialConfig(dataset="digits", max_epochs=1))
    actors = [ray.remote(num_cpus=1)(trainable).remote(config=config) for _ in range(4)]
    where = [actor.get_auto_filled_metrics.remote() for actor in actors]
    pids = {told["pid"] for told in ray.get(where)}
    print(json.dumps({"pids": len(pids), "bytes": [sorted(read_store()[0]), read_store()[1]]}))
"""


def test_data_are_placed_once_a_node_however_many_trials_run_there(cluster: SimulatedCluster, tmp_path: Path) -> None:
    other = cluster.add_node(num_cpus=3)  # and one on the first node
    done = subprocess.run(
        [sys.executable, "-c", SHARED_DATA, cluster.address, str(tmp_path)],
        env=os.environ | cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    cluster.remove_node(other)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["pids"] == 4
    used, nodes = told["bytes"]
    assert nodes == 2
    images = 20_000 * 28 * 28
    assert all(images < bytes_of_node < 1.5 * images for bytes_of_node in used)


def test_a_submitted_job_searches_the_cluster_that_it_runs_on(cluster: SimulatedCluster, tmp_path: Path) -> None:
    other = cluster.add_node(num_cpus=1)
    write_model(tmp_path / "code")
    results = tmp_path / "results"
    ray_command = [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        "--address",
        f"http://{cluster.dashboard}",
    ]
    submit = [*ray_command, "--working-dir", str(tmp_path / "code"), "--"]
    search = f"{sys.executable} {ROOT}/scripts/search.py quick --dataset digits --model sleepy:net --address auto"
    search += f" --num-samples 4 --max-epochs {EPOCHS} --scheduler none --confirm-seeds 0 --name run --quiet"
    search += f" --results-dir {results} --storage-path {tmp_path}/checkpoints"
    environment = {**os.environ, **cluster.environment}
    refused = {name: text for name, text in environment.items() if not name.startswith("RAY_AUTH")}
    for tried in (refused, environment):
        done = subprocess.run(
            [*submit, *search.split()], env=tried, capture_output=True, text=True, timeout=240, check=False
        )
        assert results.exists() == (tried is environment), done.stdout + done.stderr
    cluster.remove_node(other)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(results / "run" / "best.parquet") in done.stdout  # the search's own output
    check_nothing_is_lost(results / "run", 4)
    attempts = [json.loads(line) for line in (tmp_path / "code" / "attempts").read_text().splitlines()]
    assert {attempt["node"] for attempt in attempts} == {cluster.head, other}
