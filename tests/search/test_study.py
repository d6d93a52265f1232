import dataclasses
import math
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import past_runs as made
import pytest
from optuna.samplers import CmaEsSampler
from optuna.samplers._tpe.sampler import _split_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tune_amp.cluster.failures import OUT_OF_MEMORY_SIGN, count_free_retries, find_cause, find_status
from tune_amp.cluster.trainable import LargerShareNeeded
from tune_amp.results.journal import cut_torn_line
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import RecordedTrial
from tune_amp.search.schedulers import find_worst_value
from tune_amp.search.study import UNKNOWN_VALUES, AmpSearch
from tune_amp.space.space import SearchSpace, load_space
from tune_amp.trial.config import OBJECTIVES, RANKING_OBJECTIVES, InputError, TrialConfig, TrialStatus
from tune_amp.trial.consent import consent_to

SHARED = {"model": "conv_net", "dataset": "digits", "max_epochs": 3, "seed": 11}
TRAIN_IMAGES = 1437
LR_SPACE = "parameters:\n  lr: {low: 1.0e-4, high: 1.0, log: true}\n"
NAN = math.nan

MakeSearch = Callable[..., AmpSearch]


@pytest.fixture
def make_search(tmp_path: Path) -> MakeSearch:
    def make(
        space: str | SearchSpace = "mnist_amp",
        *objectives: str,
        seed: int = 0,
        name: str = "run",
        sampler: str = "tpe",
        past: Sequence[RecordedTrial] = (),
        on_fault: Callable[[str], None] | None = None,
    ) -> AmpSearch:
        """A search in the folder ``name``, which goes on where it has a past."""
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return AmpSearch(
            load_space(space) if isinstance(space, str) else space,
            SHARED,
            train_images=TRAIN_IMAGES,
            objectives=objectives or ("val_accuracy",),
            seed=seed,
            folder=folder,
            study_name=name,
            sampler=sampler,
            num_samples=32,
            past=past,
            on_fault=on_fault,
        )

    return make


@pytest.fixture
def lr_space(tmp_path: Path) -> SearchSpace:
    path = tmp_path / "lr.yaml"
    path.write_text(LR_SPACE)
    return load_space(str(path))


@pytest.fixture
def two_ranges(tmp_path: Path) -> SearchSpace:
    path = tmp_path / "two_ranges.yaml"
    path.write_text(LR_SPACE + "  batch_size: {low: 64, high: 1024, power_of_two: true}\n")
    return load_space(str(path))


def report(epoch: int, accuracy: float, status: str = "running", **changes: Any) -> dict[str, Any]:
    done = status != "running"
    return {
        "epoch": epoch,
        "val_accuracy": accuracy,
        "val_loss": 1 - accuracy,
        "status": status,
        "done": done,
        "training_iteration": epoch,
        "train_seconds": 2.0 * epoch,
        "peak_memory_bytes": 1000,
    } | changes


def stop(epoch: int, accuracy: float) -> dict[str, Any]:
    """The last result of a trial that the scheduler stopped: still running, but done."""
    return report(epoch, accuracy, done=True)


def failure(status: str, *, config_fault: bool = False) -> dict[str, Any]:
    ending = {"status": status, "done": True, "error": "why", "config_fault": config_fault}
    return dict.fromkeys(OBJECTIVES, NAN) | ending


def finish(
    search: AmpSearch, trial_id: str, *epochs: float, end: Mapping[str, Any] | None, error: bool = False
) -> None:
    search.suggest(trial_id)
    for epoch, accuracy in enumerate(epochs, start=1):
        search.on_trial_result(trial_id, report(epoch, accuracy))
    search.on_trial_complete(trial_id, None if end is None else dict(end), error=error)


def stored(search: AmpSearch, trial_id: str) -> FrozenTrial:
    [trial] = [t for t in search.study.trials if t.user_attrs.get("trial_id") == trial_id]
    return trial


# Every outcome, told for what it is


def test_completed_trial_is_told_complete_with_the_value_of_its_full_budget(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "a", 0.5, 0.7, end=report(3, 0.6, "completed"))
    trial = stored(search, "a")
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.6)
    assert trial.intermediate_values == {1: 0.5, 2: 0.7, 3: 0.6}
    assert trial.constraints == {"hopeless": 0.0}
    assert trial.user_attrs["status"] == "completed"


def test_stopped_trial_is_told_pruned_with_its_values_on_the_way(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "a", 0.5, end=stop(2, 0.4))
    trial = stored(search, "a")
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.4)
    assert trial.intermediate_values == {1: 0.5, 2: 0.4}
    assert trial.constraints == {}


@pytest.mark.parametrize("objective", RANKING_OBJECTIVES)
@pytest.mark.parametrize("end", [report(2, NAN, "diverged"), failure("out_of_memory")])
def test_diverged_and_out_of_memory_trials_are_told_infeasible_with_the_worst_value(
    make_search: MakeSearch, objective: str, end: dict[str, Any]
) -> None:
    search = make_search("mnist_amp", objective)
    finish(search, "a", 0.75, end=end)
    trial = stored(search, "a")
    assert (trial.state, trial.value) == (TrialState.COMPLETE, find_worst_value(objective))
    assert trial.intermediate_values == {1: {"val_accuracy": 0.75, "val_loss": 0.25}[objective]}
    assert trial.constraints == {"hopeless": 1.0}
    assert trial.user_attrs["status"] == end["status"]


def test_trial_that_diverged_with_a_finite_accuracy_is_not_told_that_accuracy(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "good", end=report(3, 0.5, "completed"))
    finish(search, "diverged", end=report(1, 0.99, "diverged", val_loss=NAN))
    assert stored(search, "diverged").value == 0.0
    assert search.study.best_trial.user_attrs["trial_id"] == "good"


@pytest.mark.parametrize(
    ("end", "error", "status"),
    [
        (failure("failed"), False, "failed"),
        (None, True, "failed"),
        (report(1, 0.5), True, "failed"),
        (None, False, "interrupted"),
        (report(2, 0.5), False, "interrupted"),
    ],
)
def test_failed_and_interrupted_trials_are_told_failed(
    make_search: MakeSearch, end: dict[str, Any] | None, error: bool, status: str
) -> None:
    search = make_search()
    finish(search, "a", 0.5, end=end, error=error)
    trial = stored(search, "a")
    assert (trial.state, trial.value) == (TrialState.FAIL, None)
    assert trial.constraints == {}
    assert trial.user_attrs["status"] == status


def test_no_trial_stays_running_and_no_value_on_the_way_is_nan(make_search: MakeSearch) -> None:
    search = make_search()
    statuses = [str(status) for status in TrialStatus if status not in ("completed", "stopped", "interrupted")]
    for status in statuses:
        finish(search, f"end-{status}", NAN, end=report(2, NAN, status))
        finish(search, f"failure-{status}", end=failure(status))
    assert TrialState.RUNNING not in {trial.state for trial in search.study.trials}
    assert all(math.isfinite(v) for trial in search.study.trials for v in trial.intermediate_values.values())


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_settings_that_our_own_checks_refuse_are_told_infeasible(make_search: MakeSearch, sampler: str) -> None:
    search = make_search(sampler=sampler)
    finish(search, "refused", end=failure("failed", config_fault=True))
    finish(search, "other fault", end=failure("failed"))
    refused, other = stored(search, "refused"), stored(search, "other fault")
    assert (refused.state, refused.value, refused.constraints) == (TrialState.COMPLETE, 0.0, {"hopeless": 1.0})
    assert refused.user_attrs["status"] == "failed"
    assert (other.state, other.constraints) == (TrialState.FAIL, {})


def test_precision_that_fails_by_its_own_fault_is_suggested_less_than_by_chance(make_search: MakeSearch) -> None:
    """A third of 75 by chance. Where a failure counted for nothing, it was 44 of these."""
    suggested = []
    for seed in range(3):
        search = make_search("precision", seed=seed, name=f"seed-{seed}")
        suggested += [suggest_where_fp16_fails(search, str(number)) for number in range(40)][15:]
    assert suggested.count("fp16") <= 18


def suggest_where_fp16_fails(search: AmpSearch, trial_id: str) -> str:
    config = search.suggest(trial_id)
    runs = config.precision != "fp16"
    end = report(3, 0.5 + config.lr, "completed") if runs else failure("failed", config_fault=True)
    search.on_trial_complete(trial_id, end)
    return config.precision


def test_trial_stopped_for_its_loss_is_not_told_its_accuracy(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "a", 0.5, end=stop(2, 0.6) | {"val_loss": NAN})
    assert (stored(search, "a").state, stored(search, "a").value) == (TrialState.COMPLETE, 0.0)
    assert stored(search, "a").constraints == {"hopeless": 1.0}


# What ended a worker, as Tune writes it into a trial's error file (both from runs of ray 2.60.0)

KILLED = "Failure # 1 (occurred at 2026-11-24_01-59-43)\nThe actor died unexpectedly before finishing this task.\n\n"
# As torch words it.
DEVICE_ASSERT = """Failure # 1 (occurred at 2026-11-26_05-00-00)
ray::AmpTrainable.train() (pid=7, ip=127.0.0.1)
  File "training.py", line 1, in step
torch.AcceleratorError: CUDA error: device-side assert triggered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
OUT_OF_MEMORY = """Failure # 2 (occurred at 2026-11-24_01-59-47)
1 worker(s) were killed due to the node running low on memory. Memory on the node was 0.98GB used / 23.54GB limit
OOM kill reason: Memory usage 1051643904B exceeded threshold of 25276064B (0.1% of 25276063744B limit)
Ray killed 1 worker(s) based on the killing policy
Refer to the documentation on how to address the out of memory issue. Consider provisioning more memory on this node.

"""

NODE_DIED = """Failure # 2 (occurred at 2026-11-25_21-55-43)
The actor died unexpectedly before finishing this task.
\tip: 127.0.0.1
The actor died because its node has died. Node Id: 85dd7aef7ddc609558a14717b6090698c504c3d645c4755b274233cc
\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats
"""
NODE_UNREACHABLE = """Failure # 2 (occurred at 2026-11-26_01-40-11)
The actor 0a1b2c is unavailable: The actor is temporarily unavailable: RpcError: RPC error: Socket closed rpc_code: 14.
"""
NODE_LEFT = NODE_DIED.replace(
    "unexpectedly: health check failed due to missing too many", "expectedly: received SIGTERM"
)
WORKER_DIED = """Failure # 3 (occurred at 2026-11-25_21-56-04)
The actor died unexpectedly before finishing this task.
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits. Some common causes include: consider enabling resource isolation to prevent node deaths.
"""


@dataclasses.dataclass
class DeadTrial:
    trial_id: str
    error_file: str | None


@pytest.fixture
def die(tmp_path: Path) -> Callable[..., DeadTrial]:
    def write(*attempts: str) -> DeadTrial:
        path = tmp_path / "error.txt"
        path.write_text("".join(attempts))
        return DeadTrial("a", str(path))

    return write


def test_trial_whose_worker_the_memory_monitor_killed_is_told_out_of_memory(
    make_search: MakeSearch, die: Callable[..., DeadTrial]
) -> None:
    search = make_search()
    search.suggest("a")
    search.on_trial_complete("a", error=True, cause=find_cause(die(KILLED, OUT_OF_MEMORY)))
    assert stored(search, "a").constraints == {"hopeless": 1.0}
    assert stored(search, "a").user_attrs["status"] == "out_of_memory"


def test_last_death_of_a_worker_decides(make_search: MakeSearch, die: Callable[..., DeadTrial]) -> None:
    search = make_search()
    search.suggest("a")
    search.on_trial_complete("a", error=True, cause=find_cause(die(OUT_OF_MEMORY, KILLED)))
    assert stored(search, "a").state is TrialState.FAIL
    assert stored(search, "a").user_attrs["status"] == "failed"


def test_node_that_left_or_died_is_told_from_a_worker_that_did(die: Callable[..., DeadTrial]) -> None:
    assert find_cause(die(DEVICE_ASSERT)) == "torch.AcceleratorError: CUDA error: device-side assert triggered"
    assert count_free_retries(find_cause(die(KILLED, NODE_DIED)))
    assert count_free_retries(find_cause(die(NODE_LEFT)))
    assert count_free_retries(find_cause(die(KILLED, NODE_UNREACHABLE)))
    assert not count_free_retries(find_cause(die(NODE_DIED, WORKER_DIED)))
    assert not count_free_retries(find_cause(die(OUT_OF_MEMORY)))
    assert not count_free_retries(find_cause(DeadTrial("a", None)))


def test_trial_whose_nodes_memory_others_hold_is_told_failed(
    make_search: MakeSearch, die: Callable[..., DeadTrial]
) -> None:
    worker = "Selected to kill: (pid=5, actual memory used=0.40GB, worker ID=9fac)\n"  # of the 0.98 GiB
    search = make_search()
    search.suggest("a")
    search.on_trial_complete("a", error=True, cause=find_cause(die(KILLED, OUT_OF_MEMORY + worker)))
    assert (stored(search, "a").state, stored(search, "a").constraints) == (TrialState.FAIL, {})
    assert stored(search, "a").user_attrs["status"] == "failed"


def test_trial_that_asked_for_a_larger_share_and_has_no_attempt_left_ran_out_of_memory() -> None:
    cause = f"ray::AmpTrainable.train() tune_amp.cluster.trainable.{LargerShareNeeded.__name__}: CUDA out of memory"
    assert find_status(None, error=True, cause=cause) is TrialStatus.OUT_OF_MEMORY
    assert find_status(None, error=True, cause="The actor died") is TrialStatus.FAILED


def test_cause_is_one_line_of_the_last_attempt(die: Callable[..., DeadTrial]) -> None:
    assert find_cause(die(OUT_OF_MEMORY, KILLED)) == "The actor died unexpectedly before finishing this task."
    cause = find_cause(die(KILLED, OUT_OF_MEMORY))
    assert cause.startswith("1 worker(s) were killed due to the node running low on memory.")
    assert "\n" not in cause
    assert find_cause(die("\x1b[36mray::step()\x1b[39m\nValueError: \x1b[31mno\x1b[39m\n")) == "ValueError: no"
    assert find_cause(die("Failure # 1 (occurred at 2026-11-24_01-59-43)\n\n")) == "its worker died"
    assert find_cause(DeadTrial("a", None)) == "its worker died, and Ray left no reason"
    assert find_cause(DeadTrial("a", "/nowhere/error.txt")) == "its worker died, and Ray left no reason"


@pytest.mark.slow
@pytest.mark.long
def test_ray_still_words_a_kill_by_its_memory_monitor_as_we_read_it(tmp_path: Path) -> None:
    """In a process of its own: any memory in use is too much for this Ray, whose settings are read on start.

    The worker holds a small part of it.
    """
    script = tmp_path / "kill.py"
    script.write_text(KILL_SCRIPT)
    limits = {"RAY_memory_usage_threshold": "0.0001", "RAY_memory_monitor_refresh_ms": "100"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True, timeout=120, check=False)
    assert "FOUND True failed the node's memory is held by other programs: " in done.stdout, done.stdout + done.stderr


KILL_SCRIPT = """
import sys, time
import ray
from ray import tune
from pathlib import Path
from tune_amp.cluster.failures import OUT_OF_MEMORY_SIGN, find_cause, find_status

class Waiting(tune.Trainable):
    def step(self):
        time.sleep(60)

class Watch(tune.Callback):
    def on_trial_error(self, iteration, trials, trial, **info):
        is_known = OUT_OF_MEMORY_SIGN in Path(trial.error_file).read_text()
        print("FOUND", is_known, find_status(None, error=True, cause=find_cause(trial)), find_cause(trial))

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
tune.Tuner(Waiting, run_config=tune.RunConfig(storage_path=sys.argv[1], callbacks=[Watch()], verbose=0)).fit()
"""


# Several objectives

BOTH = ("val_accuracy", "train_seconds")


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "gp"])
def test_every_ending_is_told_with_several_objectives(make_search: MakeSearch, sampler: str) -> None:
    search = make_search("mnist_amp", *BOTH, sampler=sampler)
    finish(search, "completed", 0.5, 0.7, end=report(3, 0.6, "completed"))
    finish(search, "diverged", 0.5, end=report(2, NAN, "diverged"))
    finish(search, "memory", end=failure("out_of_memory"))
    finish(search, "stopped", 0.5, end=stop(2, 0.4))
    finish(search, "failed", end=failure("failed"))
    finish(search, "died", 0.5, end=None, error=True)
    finish(search, "interrupted", 0.5, end=None)
    assert stored(search, "completed").values == [0.6, 6.0]
    assert stored(search, "completed").constraints == {"hopeless": 0.0}
    for hopeless in ("diverged", "memory"):
        told = stored(search, hopeless)
        assert told.values == ([0.6, 6.0] if sampler == "gp" else [find_worst_value(name) for name in BOTH])
        assert told.constraints == {"hopeless": 1.0}
    for trial_id in ("stopped", "failed", "died", "interrupted"):
        assert stored(search, trial_id).state is TrialState.FAIL
    assert [trial.user_attrs["trial_id"] for trial in search.study.best_trials] == ["completed"]
    assert [direction.name for direction in search.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    search.suggest("next")


@pytest.mark.parametrize("measured", [None, NAN, math.inf])
@pytest.mark.parametrize("objectives", [("val_accuracy", "peak_memory_bytes"), ("peak_memory_bytes",)])
def test_completed_trial_without_a_measurement_does_not_stay_running(
    make_search: MakeSearch, objectives: tuple[str, ...], measured: float | None
) -> None:
    search = make_search("mnist_amp", *objectives)
    finish(search, "a", end=report(3, 0.5, "completed", peak_memory_bytes=measured))
    assert (stored(search, "a").state, stored(search, "a").values) == (TrialState.FAIL, None)
    assert stored(search, "a").user_attrs["status"] == "completed"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_search_of_several_objectives_leaves_the_region_where_trials_diverge(
    make_search: MakeSearch, two_ranges: SearchSpace, sampler: str
) -> None:
    search = make_search(two_ranges, *BOTH, sampler=sampler)
    diverged = []
    for number in range(60):
        lr = search.suggest(str(number)).lr
        diverged.append(lr > 0.01)
        accuracy = 0.9 - 0.05 * abs(math.log10(lr) + 3)
        end = report(3, NAN, "diverged") if diverged[-1] else report(3, accuracy, "completed")
        search.on_trial_complete(str(number), end)
    assert sum(diverged[30:]) < 10  # at random it would be 15


# What the sampler makes of it


@pytest.mark.parametrize("objective", RANKING_OBJECTIVES)
@pytest.mark.parametrize("hopeless", [report(3, NAN, "diverged"), failure("out_of_memory")])
def test_hopeless_trials_rank_below_every_other_trial_for_tpe(
    make_search: MakeSearch, objective: str, hopeless: dict[str, Any]
) -> None:
    search = make_search("mnist_amp", objective)
    finish(search, "hopeless-first", 0.99, 0.99, end=hopeless)  # good until it was not
    finish(search, "completed-worst", end=report(3, 0.0, "completed", val_loss=1e8))
    finish(search, "pruned-worst", end=stop(1, 0.0))
    finish(search, "hopeless-last", end=hopeless)
    finish(search, "completed-good", end=report(3, 0.9, "completed"))
    order: list[str] = []
    for n_below in range(1, 6):
        below, above = _split_trials(search.study, search.study.trials, n_below)
        assert len(below) + len(above) == 5
        [joined] = {trial.user_attrs["trial_id"] for trial in below} - set(order)
        order.append(joined)
    assert order[:3] == ["completed-good", "completed-worst", "pruned-worst"]


def test_gp_is_told_the_worst_completed_value_of_hopeless_trials(make_search: MakeSearch) -> None:
    search = make_search("mnist_amp", "val_loss", sampler="gp")
    finish(search, "first", end=failure("out_of_memory"))
    finish(search, "good", end=report(3, 0.75, "completed"))
    finish(search, "bad", end=report(3, 0.25, "completed"))
    finish(search, "last", 0.0, end=report(3, NAN, "diverged"))
    values = {trial_id: stored(search, trial_id).value for trial_id in ("first", "good", "bad", "last")}
    assert values == {"first": UNKNOWN_VALUES["val_loss"], "good": 0.25, "bad": 0.75, "last": 0.75}
    assert search.study.best_trial.user_attrs["trial_id"] == "good"


def test_gp_is_told_no_perfect_loss_of_a_hopeless_trial_of_the_users_own(make_search: MakeSearch) -> None:
    search = make_search("mnist_amp", "val_loss:min", sampler="gp")
    finish(search, "first", end=failure("out_of_memory"))
    assert stored(search, "first").value == UNKNOWN_VALUES["val_loss"]


def test_gp_still_sees_differences_among_good_trials_where_others_were_hopeless(
    make_search: MakeSearch, lr_space: SearchSpace
) -> None:
    def mean_loss(search: AmpSearch) -> float:
        """Of the good ones among 14 trials after the first 10."""
        losses = []
        for number in range(24):
            lr = search.suggest(str(number)).lr
            loss = 0.1 + 0.3 * abs(math.log10(lr) + 3.3)
            hopeless = lr > 0.01
            end = report(3, NAN, "diverged") if hopeless else report(3, 1 - loss, "completed")
            search.on_trial_complete(str(number), end)
            if number >= 10 and not hopeless:
                losses.append(loss)
        return statistics.mean(losses)

    ours, flattened = (
        [make_search(lr_space, "val_loss", sampler="gp", seed=seed, name=f"{name}-{seed}") for seed in range(3)]
        for name in ("ours", "flattened")
    )
    for search in flattened:
        search._models_values = False  # it is told 1e9
    assert sum(map(mean_loss, ours)) < 0.8 * sum(map(mean_loss, flattened))  # 0.68 was seen


@pytest.mark.parametrize("sampler", ["gp", "cmaes", "nsga2"])
def test_sampler_goes_on_where_every_trial_so_far_was_hopeless(
    make_search: MakeSearch, two_ranges: SearchSpace, sampler: str
) -> None:
    """Any warning of Optuna's would be an error here."""
    search = make_search(two_ranges, sampler=sampler)
    for number in range(14):
        finish(search, str(number), end=failure("out_of_memory"))
    assert len({trial.params["lr"] for trial in search.study.trials}) > 10


# Suggestions


@pytest.mark.parametrize("space", ["mnist_amp", "precision", "quick", "stress"])
def test_suggestions_have_what_all_trials_share_and_what_the_space_has(make_search: MakeSearch, space: str) -> None:
    """The spaces include a conditional one; any warning of Optuna's would be an error here."""
    search = make_search(space)
    precisions = set()
    for number in range(25):  # beyond the ten that TPE draws at random
        suggested = search.suggest(str(number))
        assert vars(suggested).items() >= SHARED.items()
        precisions.add(suggested.precision)
        search.on_trial_complete(str(number), report(3, 0.5 + number / 100, "completed"))
    assert precisions == ({"fp32", "bf16", "fp16"} if space == "precision" else {"fp16"})


def suggest_and_tell(search: AmpSearch, numbers: range) -> list[TrialConfig]:
    suggestions = []
    for number in numbers:
        suggestions.append(search.suggest(str(number)))
        end = report(3, NAN, "diverged") if number % 4 == 0 else report(3, number / 100, "completed")
        search.on_trial_complete(str(number), end)
    return suggestions


def test_same_seed_gives_the_same_suggestions_and_another_seed_others(make_search: MakeSearch) -> None:
    first, second, other = (
        suggest_and_tell(make_search("precision", seed=seed, name=name), range(25))
        for seed, name in ((3, "first"), (3, "second"), (4, "other"))
    )
    assert first == second
    assert first[0] == other[0]  # the defaults
    assert all(mine != theirs for mine, theirs in zip(first[1:], other[1:], strict=True))


# A search outlives its process


def test_journal_is_readable_by_another_study_while_the_search_goes_on(make_search: MakeSearch, tmp_path: Path) -> None:
    search = make_search()
    finish(search, "a", 0.5, end=report(2, NAN, "diverged"))
    search.suggest("b")
    path = RunFolder(tmp_path / "run").study
    other = optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))))
    assert [trial.state for trial in other.trials] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert other.trials[0].constraints == {"hopeless": 1.0}
    assert other.direction.name == "MAXIMIZE"


SEEN_BY_TPE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


def seen_by_tpe(search: AmpSearch) -> list[Any]:
    """All of a trial that TPE reads, of those that it reads."""
    trials = search.study.get_trials(states=SEEN_BY_TPE)
    return [(t.state, t.values, t.params, t.distributions, t.constraints, t.intermediate_values) for t in trials]


def past_trial(search: AmpSearch, trial_id: str, place: int, last: dict[str, Any], status: str | None) -> RecordedTrial:
    """A trial as the journal of the killed search would tell of it."""
    return made.recorded(trial_id, search.find_number(trial_id), place=place, status=status, last=last)


def search_until_killed(search: AmpSearch, count: int) -> list[RecordedTrial]:
    """``count`` trials one after the other, every fourth of which diverged, and the last of which is still running."""
    past = []
    for number in range(count):
        trial_id = str(number)
        search.suggest(trial_id)
        if number == count - 1:
            search.on_trial_result(trial_id, report(1, 0.5))
            past.append(past_trial(search, trial_id, number + 1, report(1, 0.5), None))
            continue
        end = report(3, NAN, "diverged") if number % 4 == 0 else report(3, number / 100, "completed")
        search.on_trial_complete(trial_id, end)
        past.append(past_trial(search, trial_id, number + 1, end, end["status"]))
    return past


def go_on(search: AmpSearch, first: int, count: int) -> list[TrialConfig]:
    """The trial that ran goes on to its end, then come others; what was suggested."""
    search.on_trial_complete(str(first - 1), report(3, 0.75, "completed"))
    return suggest_and_tell(search, range(first, first + count))


SAMPLERS_THAT_GO_ON = ["tpe", "random", "nsga2"]


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS_THAT_GO_ON)
@pytest.mark.parametrize("space", ["stress", "precision"])
def test_search_that_goes_on_suggests_what_it_would_have_suggested(
    make_search: MakeSearch, space: str, sampler: str, interrupted: bool
) -> None:
    straight = make_search(space, name="straight", sampler=sampler)
    search_until_killed(straight, 15)
    expected = go_on(straight, 15, 6)

    killed = make_search(space, sampler=sampler)
    past = search_until_killed(killed, 15)
    if interrupted:  # it had the time to say so
        killed.close()
    resumed = make_search(space, sampler=sampler, past=past)
    assert go_on(resumed, 15, 6) == expected
    assert seen_by_tpe(resumed) == seen_by_tpe(straight) or interrupted  # then the order of trials is another
    states = [trial.state for trial in resumed.study.trials]
    assert states.count(TrialState.RUNNING) == 0
    assert states.count(TrialState.FAIL) == interrupted
    assert stored_states(resumed, "14") == ["FAIL", "COMPLETE"][1 - interrupted :]


class MakesFolder:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_that_a_study_holds_is_loaded_only_where_the_user_named_the_sampler(
    make_search: MakeSearch, two_ranges: SearchSpace, tmp_path: Path
) -> None:
    """What decides is the sampler that would load it, whatever the journal names."""
    killed = make_search(two_ranges, sampler="cmaes")
    killed.suggest("0")
    study, sampler = killed.study, killed.study.sampler
    assert isinstance(sampler, CmaEsSampler)
    attribute = f"{sampler._attr_key_optimizer}:0"
    pickled = pickle.dumps(MakesFolder(tmp_path / "unpickled")).hex()
    study._storage.set_trial_system_attr(study.trials[0]._trial_id, attribute, pickled)
    end = report(3, 0.5, "completed")
    killed.on_trial_complete("0", end)
    past = [past_trial(killed, "0", 1, end, "completed")]
    with pytest.raises(InputError, match=r"study\.journal: sampler: cmaes keeps a pickle .*, add --sampler cmaes"):
        make_search(two_ranges, sampler="cmaes", past=past)
    make_search(two_ranges, sampler="tpe", past=past).suggest("1")
    assert not (tmp_path / "unpickled").exists()
    consent_to("cmaes")
    make_search(two_ranges, sampler="cmaes", past=past).suggest("2")
    assert (tmp_path / "unpickled").exists()


def stored_states(search: AmpSearch, trial_id: str) -> list[str]:
    return [t.state.name for t in search.study.trials if t.user_attrs.get("trial_id") == trial_id]


def test_trial_that_runs_on_keeps_its_values_and_repeats_none(make_search: MakeSearch) -> None:
    for name, interrupted in (("killed", False), ("interrupted", True)):
        killed = make_search(name=name)
        past = search_until_killed(killed, 1)
        if interrupted:
            killed.close()
        resumed = make_search(name=name, past=past)
        for epoch, accuracy in ((1, 0.6), (2, 0.7)):
            resumed.on_trial_result("0", report(epoch, accuracy))
        resumed.on_trial_complete("0", stop(3, 0.8))
        told = resumed.study.trials[-1]
        assert told.intermediate_values == {1: 0.5, 2: 0.7, 3: 0.8}
        assert told.state is TrialState.PRUNED
        assert told.user_attrs["status"] == "stopped"


def test_end_that_the_study_missed_is_told_and_one_that_it_knows_is_not_told_again(make_search: MakeSearch) -> None:
    killed = make_search()
    for trial_id in ("missed", "known"):
        killed.suggest(trial_id)
    killed.on_trial_complete("known", report(3, 0.5, "completed"))
    missed = past_trial(killed, "missed", 1, report(3, 0.25, "completed"), "completed")
    known = past_trial(killed, "known", 2, report(2, 0.4), None)
    resumed = make_search(past=[missed, known])
    assert [trial.value for trial in resumed.study.trials] == [0.25, 0.5]
    resumed.on_trial_complete("known", report(3, 0.125, "completed"))  # trained again from its last checkpoint
    assert [trial.value for trial in resumed.study.trials] == [0.25, 0.5]


def test_trial_told_as_out_of_memory_of_which_the_journal_had_not_heard_goes_on(make_search: MakeSearch) -> None:
    """The process was killed between the two notes of a death for which nobody tries again."""
    killed = make_search()
    for trial_id in ("died", "told"):
        killed.suggest(trial_id)
    killed.on_trial_complete("died", error=True, cause=OUT_OF_MEMORY_SIGN)
    killed.on_trial_complete("told", report(2, 0.4, "out_of_memory"))
    past = [
        past_trial(killed, "died", 1, report(2, 0.4), None),
        past_trial(killed, "told", 2, report(2, 0.4, "out_of_memory"), None),
    ]
    resumed = make_search(past=past)
    resumed.on_trial_complete("died", report(3, 0.75, "completed"))
    told = [(t.user_attrs["trial_id"], t.value, t.constraints) for t in resumed.study.trials]
    assert told == [
        ("died", find_worst_value("val_accuracy"), {"hopeless": 1.0}),
        ("told", find_worst_value("val_accuracy"), {"hopeless": 1.0}),
        ("died", 0.75, {"hopeless": 0.0}),
    ]
    assert past[0].number == 2


def test_process_killed_while_it_told_of_a_death_leaves_one_trial_that_goes_on(
    make_search: MakeSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = make_search()
    killed.suggest("died")  # the defaults, which were enqueued
    monkeypatch.setattr(killed.study, "tell", _die)
    with pytest.raises(KeyboardInterrupt):
        killed.on_trial_complete("died", error=True, cause=OUT_OF_MEMORY_SIGN)
    resumed = make_search(past=[past_trial(killed, "died", 1, report(2, 0.4), None)])
    resumed.on_trial_complete("died", report(3, 0.75, "completed"))
    assert [(t.state, t.constraints.get("hopeless")) for t in resumed.study.trials] == [
        (TrialState.FAIL, 1.0),
        (TrialState.COMPLETE, 0.0),
    ]


def _die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("died", [1, 2])
def test_defaults_and_draws_that_nobody_had_heard_of_come_again(make_search: MakeSearch, died: int) -> None:
    """The process was killed between Optuna's note of a trial and ours."""
    straight = make_search(name="straight")
    expected = [straight.suggest(str(number)) for number in range(3)]
    killed = make_search()
    past = []
    for number in range(died):
        killed.suggest(str(number))
        past.append(past_trial(killed, str(number), number + 1, report(1, 0.5), None))
    killed.suggest("unheard")
    resumed = make_search(past=past)
    assert resumed.study.trials[died].state is TrialState.FAIL
    again = [resumed.suggest(f"again-{number}") for number in range(died, 3)]
    assert again == expected[died:]


def test_defaults_come_again_once_though_their_trial_was_told_as_interrupted(make_search: MakeSearch) -> None:
    """The disk was full when the journal was to hear of them; then the process had the time to say so to the study."""
    expected = make_search(name="straight").suggest("0")
    killed = make_search()
    heard = {"lr": 0.001}
    killed.study.enqueue_trial(heard)
    killed.suggest("unheard")
    killed.suggest("heard")
    past = [past_trial(killed, "heard", 1, report(1, 0.5), None)]
    killed.close()
    for _ in range(2):  # cut off again before anything of it happened
        resumed = make_search(past=past)
        assert [trial.state for trial in resumed.study.trials].count(TrialState.WAITING) == 1
    assert dataclasses.replace(resumed.suggest("again"), lr=expected.lr) == expected
    assert [trial.state for trial in resumed.study.trials].count(TrialState.WAITING) == 0


def test_what_a_killed_process_gave_back_is_not_given_back_again(
    make_search: MakeSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed between the trial that is to come again and the end of the one in whose place it comes."""
    killed = make_search()
    killed.study.enqueue_trial({"lr": 0.001})
    killed.suggest("unheard")
    killed.suggest("heard")
    past = [past_trial(killed, "heard", 1, report(1, 0.5), None)]

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", _die)
        with pytest.raises(KeyboardInterrupt):
            make_search(past=past)
    for _ in range(2):
        resumed = make_search(past=past)
        assert [trial.state for trial in resumed.study.trials].count(TrialState.WAITING) == 1


def test_trial_that_is_submitted_once_more_is_not_enqueued_besides(make_search: MakeSearch) -> None:
    killed = make_search()
    killed.suggest("defaults")
    past = [past_trial(killed, "defaults", 1, report(1, 0.5), None)]
    number = past[0].number
    killed.close()
    make_search(past=past)  # cut off before the journal heard of the new number
    past[0].number = number
    again = make_search(past=past)
    assert [trial.state for trial in again.study.trials].count(TrialState.WAITING) == 0


def test_end_by_lack_of_memory_that_the_study_missed_is_told_as_that(make_search: MakeSearch) -> None:
    killed = make_search()
    killed.suggest("a")
    make_search(past=[past_trial(killed, "a", 1, report(1, 0.5), "out_of_memory")])
    [told] = make_search(past=[past_trial(killed, "a", 1, report(1, 0.5), "out_of_memory")]).study.trials
    assert (told.state, told.constraints) == (TrialState.COMPLETE, {"hopeless": 1.0})


def test_study_that_was_cut_off_before_its_first_trial_begins_anew(make_search: MakeSearch) -> None:
    """Else the defaults would be tried twice, or never."""
    first = make_search().suggest("unheard")
    again = make_search()
    assert len(again.study.trials) == 1
    assert again.suggest("a") == first
    assert [trial.state for trial in again.study.trials] == [TrialState.RUNNING]


def test_study_that_is_lost_is_not_rebuilt_around_a_number_that_no_search_gives(make_search: MakeSearch) -> None:
    [past] = search_until_killed(make_search(), 1)
    past.number = 10**12
    with pytest.raises(InputError) as caught:
        make_search(name="other", past=[past])
    assert str(caught.value) == "reports.journal: number: must be near the 1 trials, got 1000000000000"


def test_killed_writer_leaves_neither_its_lock_nor_half_a_line_in_the_way(
    make_search: MakeSearch, tmp_path: Path
) -> None:
    """Optuna itself would wait half a minute for the lock, and glue its next line to the torn one."""
    past = search_until_killed(make_search(), 3)
    path = RunFolder(tmp_path / "run").study
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"worker')
    path.with_name("study.journal.lock").symlink_to(path)
    cut_torn_line(path)
    assert path.read_bytes() == whole
    started = time.monotonic()
    make_search(past=past).close()
    assert time.monotonic() - started < 20
    assert len(make_search(past=past).study.trials) == 4


def test_full_disk_is_told_and_leaves_the_study_readable(
    make_search: MakeSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[str] = []
    search = make_search(on_fault=faults.append)
    search.suggest("a")
    path = RunFolder(tmp_path / "run").study
    whole = path.read_bytes()

    def write_half(backend: Any, logs: list[dict[str, Any]]) -> None:
        with path.open("ab") as file:
            file.write(b'{"op_code":4,"worker')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", write_half)
        search.on_trial_result("a", report(1, 0.5))
        search.on_trial_complete("a", report(3, 0.5, "completed"))
        with pytest.raises(OSError, match="No space left"):
            search.suggest("b")
        search.close()
    assert set(faults) == {"OSError: [Errno 28] No space left on device"}
    assert path.read_bytes() == whole
    search.close()
    assert stored(search, "a").state is TrialState.FAIL


def test_sampler_that_does_not_apply_is_refused_before_a_study_is_made(
    make_search: MakeSearch, lr_space: SearchSpace, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--sampler"):
        make_search(lr_space, sampler="nsga2")
    assert list((tmp_path / "run").iterdir()) == []


# What Tune may say twice, or never


def test_epochs_that_a_retried_trial_repeats_are_told_once_and_without_a_warning(make_search: MakeSearch) -> None:
    search = make_search()
    search.suggest("a")
    for epoch, accuracy in ((1, 0.1), (2, 0.2), (1, 0.15), (2, 0.25), (3, 0.3), (3, 0.35)):
        search.on_trial_result("a", report(epoch, accuracy))
    search.on_trial_complete("a", stop(3, 0.35))
    assert stored(search, "a").intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}
    assert stored(search, "a").state is TrialState.PRUNED


def test_second_end_of_a_trial_changes_nothing(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "a", end=report(3, 0.5, "completed"))
    search.on_trial_complete("a", failure("failed"), error=True)
    search.on_trial_result("a", report(4, 0.9))
    trial = stored(search, "a")
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.COMPLETE, 0.5, {3: 0.5})
    assert trial.user_attrs["status"] == "completed"


def test_report_of_a_failure_is_no_epoch(make_search: MakeSearch) -> None:
    search = make_search()
    search.suggest("a")
    search.on_trial_result("a", failure("failed"))
    search.on_trial_complete("a", failure("failed"))
    assert stored(search, "a").intermediate_values == {}


def test_close_tells_what_still_runs_as_failed_and_leaves_the_rest(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "done", end=report(3, 0.5, "completed"))
    search.suggest("open")
    search.suggest("also-open")
    search.study.enqueue_trial({"lr": 0.001})
    search.close()
    search.close()
    expected = [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]
    assert [trial.state for trial in search.study.trials] == expected


@pytest.mark.parametrize(
    ("result", "error", "status"),
    [
        (None, False, "interrupted"),
        ({}, False, "interrupted"),
        (None, True, "failed"),
        (report(1, 0.5), False, "interrupted"),
        (report(1, 0.5), True, "failed"),
        (stop(1, 0.5), False, "stopped"),
        (stop(1, 0.5), True, "failed"),
        (report(3, 0.5, "completed"), False, "completed"),
        (report(3, 0.5, "completed"), True, "failed"),
        (report(3, NAN, "diverged"), False, "diverged"),
        (failure("out_of_memory"), False, "out_of_memory"),
        (failure("failed"), False, "failed"),
        ({"done": True, "trial_id": "x"}, False, "stopped"),
    ],
)
def test_status_follows_from_the_last_result(result: dict[str, Any] | None, error: bool, status: str) -> None:
    assert find_status(result, error=error) is TrialStatus(status)
