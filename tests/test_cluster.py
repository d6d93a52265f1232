"""Searches on clusters of simulated nodes, as a user starts them."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cluster_runs import EPOCHS, ROOT, check_nothing_is_lost, searching, wait_until, write_model
from pyarrow import fs  # type: ignore[import-untyped]
from simulated_cluster import SimulatedCluster

from tune_amp.results.journal import read_journal
from tune_amp.results.records import TrialRecord, load_trials
from tune_amp.results.run_folder import RunFolder
from tune_amp.trial.config import TrialStatus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def most_at_a_time(trials: Sequence[TrialRecord]) -> int:
    changes = []
    for trial in trials:
        assert trial.started is not None
        began = trial.started.timestamp()
        changes += [(began, 1), (began + trial.wall_seconds, -1)]
    running = [sum(change for at, change in changes if at <= moment) for moment, _ in changes]
    return max(running)


@pytest.mark.long
def test_trials_with_a_share_of_a_gpu_run_on_the_node_that_has_one(cluster: SimulatedCluster, tmp_path: Path) -> None:
    plain, equipped = cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=4, num_gpus=1)
    with searching(cluster, tmp_path / "s", "--num-samples", 4, "--gpus-per-trial", 0.5) as search:
        search.finish()
    cluster.remove_node(plain)
    cluster.remove_node(equipped)
    assert {attempt["node"] for attempt in search.attempts} == {equipped}
    assert most_at_a_time(check_nothing_is_lost(search.run, 4)) == 2


def test_code_is_shipped_and_a_worker_that_dies_goes_on_from_the_object_store_which_is_tidied_at_the_end(
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

    def list_checkpointed() -> set[Path]:
        """Folders of the trials of which a checkpoint is there."""
        found = store.get_file_info(fs.FileSelector("bucket/runs/run", recursive=True, allow_not_found=True))
        return {Path(entry.path).parents[1] for entry in found if entry.base_name == "trial.pt"}

    try:
        url = f"s3://key:very-secret@bucket/runs{query}"
        with searching(cluster, tmp_path / "s", "--num-samples", 2, "--storage-path", url) as search:
            search.wait_until(lambda: bool(search.events))
            for name in ("sleepy.py", "model_parts.py"):  # other machines do not have them; the driver did import them
                (tmp_path / "s" / name).unlink()
            search.wait_until(lambda: len(list_checkpointed()) == 2)
            os.kill(search.attempts[0]["pid"], signal.SIGKILL)
            search.wait_until(lambda: len(list_checkpointed()) == 1)  # the other trial has ended, and needs none
            result = search.finish()
        left = store.get_file_info(fs.FileSelector("bucket/runs/run", recursive=True))
        assert "experiment_state" in " ".join(entry.path for entry in left)  # Ray did write there
        assert list_checkpointed() == set()
    finally:
        server.stop()
    cluster.remove_node(other)
    check_nothing_is_lost(search.run, 2)
    assert len(search.attempts) == 3
    assert {attempt["node"] for attempt in search.attempts} == {cluster.head, other}
    for attempt in search.attempts:
        for file in (attempt["file"], attempt["tune_amp"]):
            assert "/runtime_resources/py_modules_files/" in file  # Ray's copy, not what is installed here
    begun = Counter((tmp_path / "s" / "epochs").read_text().splitlines())
    _, whole, rest = (begun[str(attempt["at"])] for attempt in search.attempts)
    assert 0 < rest < whole  # the trial went on, and did not begin anew
    assert "very-secret" not in json.dumps(result) + search.stderr
    assert b"very-secret" not in b"".join(path.read_bytes() for path in search.run.iterdir())


def test_place_that_is_another_one_on_each_node_is_refused(cluster: SimulatedCluster, tmp_path: Path) -> None:
    other = cluster.add_node(num_cpus=1)
    place = "file:///proc/self/cwd/checkpoints"  # each process has a folder of its own under this name
    with searching(cluster, tmp_path / "s", "--storage-path", place) as search:
        assert search.wait() == 2
    cluster.remove_node(other)
    assert search.stderr == (
        "error: --storage-path: /proc/self/cwd/checkpoints must be the same place on all nodes; 127.0.0.1 has its own\n"
    )
    assert not (tmp_path / "s" / "results").exists()
    assert list((tmp_path / "s" / "checkpoints").iterdir()) == []


SHARED_DATA = """
import json, sys
import numpy as np
from pyarrow.fs import LocalFileSystem
from tune_amp.cluster.session import ray_session

with ray_session(sys.argv[1], run="data"):
    import ray
    from ray._private.internal_api import node_stats
    from tune_amp.trial.config import TrialConfig
    from tune_amp.training.data import Dataset, Split
    from tune_amp.cluster.resources import TrialResources
    from tune_amp.cluster.checkpoints import RunStorage
    from tune_amp.search.tuner import bind_trainable

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
    trainable = bind_trainable(dataset, resources, storage, (), ())
    config = vars(TrialConfig(dataset="digits", max_epochs=1))
    actors = [ray.remote(num_cpus=1)(trainable).remote(config=config) for _ in range(4)]
    where = [actor.get_auto_filled_metrics.remote() for actor in actors]
    pids = {told["pid"] for told in ray.get(where)}
    print(json.dumps({"pids": len(pids), "bytes": [sorted(read_store()[0]), read_store()[1]]}))
"""


@pytest.mark.long
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


@pytest.fixture(scope="module")
def jobs() -> Iterator[SimulatedCluster]:
    """A cluster of one node that takes jobs, through its dashboard."""
    with SimulatedCluster(num_cpus=1, include_dashboard=True) as started:
        yield started


def name_submission(jobs: SimulatedCluster, code: Path, *options: str) -> list[str]:
    """The command that submits, up to what it submits."""
    ray_command = [str(Path(sys.executable).with_name("ray")), "job", "submit"]
    return [*ray_command, "--address", f"http://{jobs.dashboard}", "--working-dir", str(code), *options, "--"]


@pytest.mark.long
def test_a_job_that_is_stopped_ends_cleanly(jobs: SimulatedCluster, tmp_path: Path) -> None:
    """As the page on clusters has it: Ray alone waits for 3 s, less than an epoch of this model."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    [environment] = re.findall(r"--runtime-env-json '(.*?)'", page)
    write_model(tmp_path / "code", epoch_seconds=6.0)
    results = tmp_path / "results"
    options = ("--no-wait", "--submission-id", "stopped", "--runtime-env-json", environment)
    search = f"{sys.executable} {ROOT}/scripts/search.py quick --dataset digits --model sleepy:net --address auto"
    search += f" --num-samples 1 --max-epochs {EPOCHS} --scheduler none --confirm-seeds 0 --name run"
    search += f" --results-dir {results} --storage-path {tmp_path}/checkpoints"
    command = [*name_submission(jobs, tmp_path / "code", *options), *search.split()]
    subprocess.run(command, env={**os.environ, **jobs.environment}, check=True, capture_output=True, timeout=120)
    events = RunFolder(results / "run").journal
    wait_until(lambda: events.exists() and any(event["event"] == "report" for event in read_journal(events)))
    stop = [command[0], "job", "stop", "--address", f"http://{jobs.dashboard}", "stopped"]
    done = subprocess.run(
        stop, env={**os.environ, **jobs.environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_journal(events)[-1]["event"] == "finish"
    assert [trial.status for trial in load_trials(results / "run")] == [TrialStatus.INTERRUPTED]
    assert (results / "run" / "report.html").exists()


@pytest.mark.long
def test_a_submitted_job_searches_the_cluster_that_it_runs_on(jobs: SimulatedCluster, tmp_path: Path) -> None:
    other = jobs.add_node(num_cpus=1)
    write_model(tmp_path / "code")
    results = tmp_path / "results"
    submit = name_submission(jobs, tmp_path / "code")
    search = f"{sys.executable} {ROOT}/scripts/search.py quick --dataset digits --model sleepy:net --address auto"
    search += f" --num-samples 4 --max-epochs {EPOCHS} --scheduler none --confirm-seeds 0 --name run --quiet"
    search += f" --results-dir {results} --storage-path {tmp_path}/checkpoints"
    environment = {**os.environ, **jobs.environment}
    refused = {name: text for name, text in environment.items() if not name.startswith("RAY_AUTH")}
    for tried in (refused, environment):
        done = subprocess.run(
            [*submit, *search.split()], env=tried, capture_output=True, text=True, timeout=240, check=False
        )
        assert results.exists() == (tried is environment), done.stdout + done.stderr
    jobs.remove_node(other)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(results / "run" / "best.parquet") in done.stdout  # the search's own output
    check_nothing_is_lost(results / "run", 4)
    attempts = [json.loads(line) for line in (tmp_path / "code" / "attempts").read_text().splitlines()]
    assert {attempt["node"] for attempt in attempts} == {jobs.head, other}
