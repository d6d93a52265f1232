"""Nodes of a cluster that are lost: what ran there goes on elsewhere or begins once more, and nothing is lost."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cluster_runs import EPOCHS, ClusterSearch, check_nothing_is_lost, searching, write_model
from fault_runs import check_run, note_fault
from simulated_cluster import SimulatedCluster

from tune_amp.results.ranking import choose_best
from tune_amp.results.records import load_best_rows
from tune_amp.reuse.final import find_differences, replay_trial
from tune_amp.training.data import Dataset
from tune_amp.trial.consent import consent_to

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_search_on_three_nodes_loses_one_halfway_and_nothing_else(
    cluster: SimulatedCluster, tmp_path: Path, digits: Dataset, enter_folder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trial reported what it reports when it is trained here, alone."""
    staying, dying = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    with searching(cluster, tmp_path / "disturbed", "--num-samples", 6) as disturbed:
        disturbed.wait_until(lambda: disturbed.count_ended() >= 2)
        disturbed.wait_until(lambda: 2 < disturbed.age_of_attempt(dying) < 4)  # a third of its epochs is reported
        cluster.kill_node(dying)
        disturbed.finish()
    cluster.remove_node(staying)

    assert len(disturbed.attempts) == 7  # the one that ran there began once more
    assert {attempt["node"] for attempt in disturbed.attempts} == {cluster.head, staying, dying}
    trials = check_nothing_is_lost(disturbed.run, 6)
    write_model(tmp_path / "alone", epoch_seconds=0.0)
    monkeypatch.syspath_prepend(tmp_path / "alone")
    consent_to("sleepy:net")
    for trial in trials:
        alone = replay_trial(trial.config, digits, torch.device("cpu"))
        assert [find_differences(*pair) for pair in zip(trial.epochs, alone, strict=True)] == [[]] * EPOCHS
    best = [trial.trial_name for trial in choose_best(trials, ["val_accuracy"], top_k=3)]
    assert [row.trial.trial_name for row in load_best_rows(disturbed.run)] == best
    assert not list((tmp_path / "disturbed" / "storage").rglob("checkpoint_*"))
    note_fault("one node of three killed halfway", "goes on", check_run(disturbed.run), ranking_equal=True)


@pytest.mark.long
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
    note_fault("a node with two trials joins, and leaves", "goes on", check_run(search.run))


CONFIRMING = """
import json, sys
import model_parts, sleepy
from tune_amp.cluster.session import ray_session

with ray_session(sys.argv[1], run="confirming", modules=(model_parts, sleepy)):
    from tune_amp.trial.config import TrialConfig
    from tune_amp.trial.consent import consent_to
    from tune_amp.results.progress import ConfirmJob
    from ray import tune
    from tune_amp.cluster.trainable import AmpTrainable, build_worker_setup
    from tune_amp.confirm.slots import ConfirmSlots
    from tune_amp.training.data import load_dataset
    from tune_amp.cluster.resources import TrialResources

    consent_to("sleepy:net")
    config = TrialConfig(dataset="digits", model="sleepy:net", max_epochs=20)
    job = ConfirmJob(trial_ids=("a",), config=config)
    resources = TrialResources(cpus=2, gpus=0.0, max_concurrent=1, reason="")
    digits = load_dataset("digits")
    trainable = tune.with_parameters(AmpTrainable, worker_setup=build_worker_setup(digits, resources))
    with ConfirmSlots(trainable, digits.test, resources) as slots:
        for _, run in slots.train([job]):
            print(json.dumps({"status": str(run.status), "error": run.error}))
"""


@pytest.mark.long
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


def has_begun(search: ClusterSearch, node: str, attempts: int) -> bool:
    """Whether so many attempts began, the last a second ago on the node."""
    return len(search.attempts) == attempts and 1 < search.age_of_attempt(node) < 1e6


@pytest.mark.long
def test_trial_goes_on_as_often_as_its_node_is_lost(cluster: SimulatedCluster, tmp_path: Path) -> None:
    """It takes two CPUs, which the first node has not."""
    arguments = ("--num-samples", 1, "--cpus-per-trial", 2)
    nodes = [cluster.add_node(num_cpus=2)]
    with searching(cluster, tmp_path / "s", *arguments) as search:
        for lost in range(3):  # more often than a worker may die
            search.wait_until(functools.partial(has_begun, search, nodes[-1], lost + 1))
            nodes.append(cluster.add_node(num_cpus=2))
            cluster.kill_node(nodes[-2])
        search.finish()
    cluster.remove_node(nodes[-1])
    check_nothing_is_lost(search.run, 1)
    assert len(search.attempts) == 4
    note_fault("the node of a trial killed, three times", "goes on", check_run(search.run), faults=3)


@pytest.mark.long
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_search_on_a_cluster_that_loses_its_head_ends_and_says_how_to_go_on(part: str, tmp_path: Path) -> None:
    with SimulatedCluster(num_cpus=1) as cluster, searching(cluster, tmp_path / "s", "--num-samples", 4) as search:
        search.wait_until(lambda: any(event["event"] == "trial" for event in search.events))
        cluster.kill_part(part)
        killed = time.monotonic()
        code = search.wait()
        seconds = time.monotonic() - killed
    assert code == 130, search.stderr
    assert f"cut off  Ray's {part} has died" in search.stderr
    assert "\nresume   " in search.stderr
    count = check_run(search.run)
    note_fault(f"{part} of a cluster killed", "ends with the command to resume", count, ended=seconds)
