import types
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.tune import TuneError
from ray.tune.experiment import Trial

from tune_amp.cluster.memory_holders import MEMORY_RETRIES, MEMORY_WAIT_SECONDS
from tune_amp.cluster.ray_patches import patched_worker_deaths
from tune_amp.cluster.resources import TrialResources
from tune_amp.cluster.trainable import NODE_RETRIES, WORKER_RETRIES
from tune_amp.search.source import KeptWorkers
from tune_amp.search.tuner import UncountedDeaths, name_trial, prepare_next_attempt
from tune_amp.trial.config import TrialConfig


class FakeTrial:
    def __init__(self, tag: str, **config: Any) -> None:
        self.experiment_tag = tag
        self.config = vars(TrialConfig(**config))
        self.trial_id = self.status = self.error_file = ""

    def __str__(self) -> str:
        return f"trial {self.experiment_tag}"


@pytest.mark.parametrize(
    ("trial", "name"),
    [
        (
            FakeTrial("7", precision="fp16", lr=0.0031, batch_size=256, init_scale=4096.0),
            "07-fp16-lr0.0031-b256-scale2^12",
        ),
        (FakeTrial("123", lr=0.1, batch_size=64), "123-fp32-lr0.1-b64"),
        (FakeTrial("1", lr=1.234e-5, precision="bf16"), "01-bf16-lr1.2e-05-b64"),
    ],
)
def test_trial_is_named_by_number_and_settings(trial: FakeTrial, name: str) -> None:
    assert name_trial(trial) == name


@pytest.mark.parametrize(
    ("status", "share"),
    [(Trial.ERROR, 0.5), (Trial.RUNNING, 0.25)],  # the second has ended: its retries are used up
)
@pytest.mark.parametrize("cause", ["FULL", "FULL_BY_CUDA"])
def test_trial_that_needs_a_larger_share_gets_it(cause: str, status: str, share: float, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(f"Failure # 1 (occurred at now)\n{globals()[cause]}\n")
    asked = [0.25]
    trial = types.SimpleNamespace(
        trial_id="a",
        status=status,
        error_file=str(tmp_path / "error.txt"),
        update_resources=lambda request: asked.append(request.bundles[0]["GPU"]),
    )
    workers = KeptWorkers()
    workers.actors.append("holds a share")
    assert prepare_next_attempt(SHARED_GPU, set(), workers, trial) == 0.0
    assert asked[-1] == share
    assert workers.actors == []


SHARED_GPU = TrialResources(cpus=1, gpus=0.25, max_concurrent=4, reason="")


def test_trial_whose_nodes_memory_others_hold_waits_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "error.txt").write_text(f"Failure # 1 (occurred at now)\n{CROWDED}\n")
    trial = FakeTrial("1")
    trial.trial_id, trial.status, trial.error_file = "a", Trial.ERROR, str(tmp_path / "error.txt")
    announced: set[str] = set()
    waits = [prepare_next_attempt(SHARED_GPU, announced, KeptWorkers(), trial) for _ in range(2)]
    assert waits == [MEMORY_WAIT_SECONDS] * 2
    told = (
        "the node's memory is held by other programs: 19.50 of 20.00 GiB; the largest is process 77 (solve, 19.00 GiB)"
    )
    assert capsys.readouterr().err == f"waiting  trial 1: {told}\n"
    trial.status = Trial.RUNNING  # its retries are used up
    assert prepare_next_attempt(SHARED_GPU, announced, KeptWorkers(), trial) == 0.0


# What a death costs


def refuse(text: str) -> None:
    pytest.fail(f"no fault was made: {text}")


DIED = (
    "The actor died unexpectedly before finishing this task.\n The actor is dead because its worker process has died."
)
LOST = "The actor died because\n the actor's node was terminated unexpectedly: health check failed"
CROWDED = """1 worker(s) were killed due to the node running low on memory. Memory on the node was 20.00GB used
OOM kill reason: Memory usage 21474836480B exceeded threshold of 20401094656B (95.0% of 21474836480B limit)
Selected to kill: (Task: job ID=01000000, pid=5, actual memory used=0.50GB, worker ID=9fac)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
77\t19.00\tsolve
5\t0.50\tray::AmpTrainable
"""
FULL = "Traceback\n  somewhere\ntune_amp.trainable.LargerShareNeeded: \x1b[31mno room\x1b[0m"
FULL_BY_CUDA = """ray::AmpTrainable.train() (pid=7)
  File "training.py", line 1, in step
torch.AcceleratorError: CUDA error: out of memory
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.

The above exception was the direct cause of the following exception:

ray::AmpTrainable.train() (pid=7)
  File "trainable.py", line 1, in _request_larger_share
    raise LargerShareNeeded(f"out of memory") from error
LargerShareNeeded: out of memory with 0.25 GPU: AcceleratorError: CUDA error: out of memory"""


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Trial:
    """One that runs, of Tune's own class, and keeps no files."""
    monkeypatch.setattr(Trial, "local_path", None)
    return Trial("trainable", stub=True, max_failures=WORKER_RETRIES)


def die_in_turn(trial: Trial, *causes: str) -> bool:
    """Whether the trial is tried again after all of these."""
    with patched_worker_deaths(refuse, UncountedDeaths()):
        for cause in causes:
            trial.handle_error(TuneError(cause) if cause in (FULL, FULL_BY_CUDA) else RayActorError(error_msg=cause))
    return bool(trial.should_recover())


def test_trial_is_tried_again_after_two_deaths_of_its_workers(trial: Trial) -> None:
    assert die_in_turn(trial, DIED, DIED)
    assert not die_in_turn(trial, DIED)


@pytest.mark.parametrize("blameless", [LOST, FULL, FULL_BY_CUDA])
def test_lost_node_and_larger_share_cost_a_trial_none_of_its_retries(trial: Trial, blameless: str) -> None:
    assert die_in_turn(trial, blameless, DIED, blameless, DIED, blameless)
    assert not die_in_turn(trial, DIED)


def test_trial_that_the_time_limit_ended_is_not_tried_again_if_its_node_goes_too(trial: Trial) -> None:
    trial.max_failures = 0
    assert not die_in_turn(trial, LOST)


def test_node_that_is_lost_again_and_again_without_an_epoch_costs_retries(trial: Trial) -> None:
    assert die_in_turn(trial, *[LOST] * (NODE_RETRIES + WORKER_RETRIES))
    assert not die_in_turn(trial, *[LOST] * (NODE_RETRIES + 1))


def test_memory_held_by_others_costs_no_retries_until_it_stays_held(trial: Trial) -> None:
    assert die_in_turn(trial, *[CROWDED] * (MEMORY_RETRIES + WORKER_RETRIES))
    assert not die_in_turn(trial, *[CROWDED] * (MEMORY_RETRIES + 1))


def test_nodes_may_be_lost_as_often_as_epochs_come_in_between(trial: Trial) -> None:
    with patched_worker_deaths(refuse, UncountedDeaths()):
        for epoch in range(1, 50):
            trial.run_metadata.last_result = {"epoch": epoch}
            trial.handle_error(RayActorError(error_msg=LOST))
            trial.run_metadata.last_result = {"epoch": max(0, epoch - 3)}  # from its last checkpoint
            trial.handle_error(RayActorError(error_msg=LOST))
    assert trial.run_metadata.num_failures == 0
