import dataclasses
import math
import pickle
import re
import shutil
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.tune import Checkpoint
from ray.tune.result import SHOULD_CHECKPOINT

from tune_amp.cluster.memory_holders import MEMORY_WAIT_SECONDS, MemoryHeldError
from tune_amp.cluster.trainable import (
    CHECKPOINT_FILE,
    READ_BY_TUNE,
    REPORT,
    AmpTrainable,
    LargerShareNeeded,
    WorkerSetup,
    failure_report,
    is_checkpoint_due,
    read_report,
)
from tune_amp.reuse.final import find_differences
from tune_amp.training.data import Dataset
from tune_amp.training.memory import is_out_of_memory, release_memory
from tune_amp.training.run import TrainingRun
from tune_amp.trial.config import OBJECTIVES, EpochMetrics, InputError, TrialConfig, TrialStatus
from tune_amp.trial.consent import list_consented

MakeTrainable = Callable[..., Any]  # an AmpTrainable; Ray leaves train() and reset() without types


def settings(**changes: Any) -> dict[str, Any]:
    defaults = {"dataset": "digits", "batch_size": 256, "max_epochs": 2}
    return vars(TrialConfig(**{**defaults, **changes})).copy()


@pytest.fixture
def make_trainable(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeTrainable]:
    """AmpTrainable as Ray builds it in a worker, but in this process and without Ray."""
    worker_setup = WorkerSetup(
        train=digits.train, validation=digits.validation, num_classes=10, num_threads=1, search_path=()
    )
    # A trainable without a Tune run around it makes a folder in ~/ray_results.
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path / "ray_results"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads, state = torch.get_num_threads(), torch.get_rng_state()

    class BoundTrainable(AmpTrainable):
        """As tune.with_parameters binds it, which needs a running Ray."""

        def setup(self, config: dict[str, Any], worker_setup: WorkerSetup | None = worker_setup) -> None:
            super().setup(config, worker_setup)

    yield lambda **changes: BoundTrainable(config=settings(**changes))
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    assert not ray.is_initialized()


def train(trainable: Any, most: int = 10) -> list[dict[str, Any]]:
    """Reports up to the end of the trial, as Tune asks for them."""
    reports: list[dict[str, Any]] = []
    while not reports or not reports[-1]["done"]:
        assert len(reports) < most
        reports.append(train_once(trainable))
    return reports


def train_once(trainable: Any) -> dict[str, Any]:
    """A report and its epoch's metrics, with what Tune reads of the result."""
    result: dict[str, Any] = trainable.train()
    assert result.keys() <= READ_BY_TUNE | {REPORT}
    report = dataclasses.asdict(result[REPORT])
    metrics = report.pop("metrics")
    told = (metrics or {}) | report
    assert {name: told[name] for name in result.keys() & told.keys()}.items() <= result.items() or metrics is None
    return told | result


def test_epochs_are_reported_as_running_and_the_last_as_completed(make_trainable: MakeTrainable) -> None:
    reports = train(make_trainable(max_epochs=3))
    assert [report["status"] for report in reports] == ["running", "running", "completed"]
    assert [report["done"] for report in reports] == [False, False, True]
    assert [report["epoch"] for report in reports] == [1, 2, 3]
    assert [report["steps"] for report in reports] == [5, 10, 15]
    assert {report["error"] for report in reports} == {None}
    assert {report["device"] for report in reports} == {"cpu"}
    assert reports[-1]["val_accuracy"] > 0.7
    assert {report["num_threads"] for report in reports} == {1} == {torch.get_num_threads()}


@pytest.mark.parametrize(
    ("unsaved", "saves", "due"),
    [
        (0.99, [], False),  # 20 times the 0.05 s that the first is taken for
        (1.0, [], True),
        (1.99, [0.1], False),
        (2.0, [0.1], True),
        (2.0, [0.1, 5.0, 0.1], True),  # the median: one slow disk does not end checkpoints
        (99.0, [5.0, 5.0, 0.1], False),
    ],
)
def test_checkpoint_is_due_when_work_is_twenty_times_its_cost(unsaved: float, saves: list[float], due: bool) -> None:
    assert is_checkpoint_due(unsaved, saves) is due


def test_trial_asks_for_a_checkpoint_when_enough_work_would_be_lost(
    make_trainable: MakeTrainable, tmp_path: Path
) -> None:
    trainable = make_trainable(max_epochs=9)
    assert not trainable.train()[SHOULD_CHECKPOINT]
    trainable._save_seconds.append(1e-6)
    assert trainable.train()[SHOULD_CHECKPOINT]
    trainable.save(str(tmp_path / "checkpoint"))
    assert trainable._unsaved_seconds == 0
    trainable._save_seconds.extend([1e6] * 5)
    report = train_once(trainable)
    assert not report[SHOULD_CHECKPOINT]
    assert report["checkpoint_seconds"] > 0


def test_last_report_asks_for_no_checkpoint(make_trainable: MakeTrainable) -> None:
    trainable = make_trainable(max_epochs=1)
    trainable._save_seconds.append(1e-6)
    report = trainable.train()
    assert report["done"]
    assert not report[SHOULD_CHECKPOINT]


@pytest.mark.parametrize(
    ("error", "share", "first_share", "asks"),
    [
        (RuntimeError("CUDA out of memory"), 0.25, 0.25, True),
        (torch.OutOfMemoryError("CUDA out of memory"), 0.25, 0.25, True),
        (RuntimeError("CUDA out of memory"), 0.5, 0.25, False),  # it was tried again already
        (RuntimeError("CUDA out of memory"), 1.0, 1.0, False),  # there is no more
        (RuntimeError("CUDA out of memory"), 0.0, 0.0, False),
        (MemoryError(), 0.25, 0.25, False),  # the host's memory, of which a share of a GPU has no more
        (ValueError("no"), 0.25, 0.25, False),
    ],
)
def test_larger_share_is_asked_for_once_and_only_for_want_of_gpu_memory(
    error: Exception, share: float, first_share: float, asks: bool, make_trainable: MakeTrainable
) -> None:
    trainable = make_trainable()
    trainable.share, trainable._first_share = share, first_share
    if asks:
        with pytest.raises(LargerShareNeeded, match=r"out of memory with 0\.25 GPU"):
            trainable._request_larger_share(error)
    else:
        trainable._request_larger_share(error)


def test_data_that_find_no_room_are_the_end_of_each_trial_and_not_of_the_worker(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("tune_amp.cluster.trainable.TrainingData", refuse)
        trainable = make_trainable()
        for _ in range(2):
            [report] = train(trainable)
            assert report["status"] == TrialStatus.OUT_OF_MEMORY
            assert trainable.reset(settings())
        trainable.share = trainable._first_share = 0.5
        with pytest.raises(LargerShareNeeded, match=r"out of memory with 0\.5 GPU"):
            trainable.train()
    trainable.share = trainable._first_share = 1.0
    assert trainable.reset(settings())
    assert [report["status"] for report in train(trainable)][-1] == TrialStatus.COMPLETED


def test_report_holds_epoch_metrics_as_they_were(make_trainable: MakeTrainable) -> None:
    result = make_trainable(precision="fp16", init_scale=2.0**30).train()
    metrics = result[REPORT].metrics
    assert {name: result[name] for name in (*OBJECTIVES, "epoch")}.items() <= vars(metrics).items()
    assert sum(isinstance(value, int | float) for value in result.values()) <= 10  # of each, Tune keeps running means
    assert metrics.skipped_steps > 0
    assert len(metrics.loss_scale_values) > 1


def test_report_without_an_epoch_holds_no_metrics() -> None:
    worker: dict[str, Any] = {"device": "cpu", "num_threads": 1, "setup_seconds": 0.0, "checkpoint_seconds": 0.0}
    report = read_report(failure_report(ValueError("x")) | worker)
    assert (report.metrics, report.status, report.error) == (None, "failed", "ValueError: x")


def test_status_is_told_as_plain_text(make_trainable: MakeTrainable) -> None:
    """An enum would travel as a class that the driver of another version may not have."""
    for report in (*train(make_trainable()), failure_report(ValueError("x"))):
        assert type(report["status"]) is str
        assert type(report.get("state", "")) is str


def test_trial_that_diverges_ends_at_once_with_the_reason(make_trainable: MakeTrainable) -> None:
    [report] = train(make_trainable(lr=1e12, optimizer="sgd", max_epochs=5))
    assert report["status"] == "diverged"
    assert re.fullmatch(r"diverged: (weights are not finite|val_loss is (nan|inf))", report["error"])
    assert report["epoch"] == 1
    assert not report[SHOULD_CHECKPOINT]


def test_model_of_nans_diverges(make_trainable: MakeTrainable, write_module: Callable[[str], str]) -> None:
    module = write_module(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, images): return super().forward(images.flatten(1)) * float('nan')\n"
        "def net(shape, classes): return Net(784, classes)\n"
    )
    [report] = train(make_trainable(model=f"{module}:net"))
    assert (report["status"], report["error"]) == ("diverged", "diverged: weights are not finite")


def test_trial_that_would_never_apply_a_step_ends_with_its_first_epoch(make_trainable: MakeTrainable) -> None:
    [report] = train(make_trainable(precision="fp16", init_scale=2.0**100))
    assert (report["status"], report["state"]) == ("diverged", "collapsed")
    assert report["error"].startswith("collapsed: every step is skipped, and gradients overflow even at 2^")


GREEDY_MODEL = """
import torch

class Net(torch.nn.Linear):
    def forward(self, images):
        if len(images) == 100:
            torch.empty(2**46)  # 256 TiB of float32
        return super().forward(images.flatten(1))

def net(shape, classes):
    return Net(784, classes)
"""


def test_trial_that_runs_out_of_memory_is_reported_and_the_next_trains_as_if_nothing_had_been(
    make_trainable: MakeTrainable, write_module: Callable[[str], str]
) -> None:
    model = f"{write_module(GREEDY_MODEL)}:net"
    expected = train(make_trainable(model=model))
    trainable = make_trainable(model=model, batch_size=100)
    [report] = train(trainable)
    assert report["status"] == "out_of_memory"
    assert "can't allocate memory" in report["error"]
    assert "epoch" not in report
    assert math.isnan(report["val_accuracy"])  # Tune insists on the objective
    assert math.isnan(report["val_loss"])
    assert trainable.reset(settings(model=model))
    assert_same(train(trainable), expected)


def test_memory_of_a_trial_that_the_scheduler_stopped_is_given_back_before_the_next(
    make_trainable: MakeTrainable, write_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = write_module(
        "import torch, weakref\n"
        "made = []\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(784, 10)\n"
        "        self.me = [self]  # only the garbage collector frees it\n"
        "        made.append(weakref.ref(self))\n"
        "    def forward(self, images): return super().forward(images.flatten(1))\n"
        "def net(shape, classes): return Net()\n"
    )
    released: list[torch.device] = []

    def release(device: torch.device) -> None:
        release_memory(device)
        released.append(device)

    monkeypatch.setattr("tune_amp.cluster.trainable.release_memory", release)
    trainable = make_trainable(model=f"{module}:net", max_epochs=5)
    assert released == []  # there was no trial before the first
    trainable.train()
    assert trainable.reset(settings(model=f"{module}:net"))
    assert released == [torch.device("cpu")]
    [stopped] = sys.modules[module].made
    assert stopped() is None
    train(trainable)
    assert len(released) == 2
    assert trainable.reset(settings())
    assert len(released) == 2  # the last step has done it
    trainable.train()
    assert trainable.lend(lambda worker, value: (worker, len(released), value), 7) == (trainable, 3, 7)


def test_state_of_an_ended_trial_is_released(make_trainable: MakeTrainable) -> None:
    trainable = make_trainable(max_epochs=2)
    trainable.train()
    assert trainable._run is not None
    trainable.train()
    assert trainable._run is None


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("raise ValueError('first line\\nsecond line')", "ValueError: first line second line{place}"),
        ("raise RuntimeError('x' * 1000)", "RuntimeError: " + "x" * 282 + " ...{place}"),
        ("import sys; sys.exit(3)", "RuntimeError: the code called sys.exit(3){place}"),
        ("raise KeyboardInterrupt", "RuntimeError: the code raised KeyboardInterrupt{place}"),
        ("return None", "model: {model} must return a torch.nn.Module, got NoneType"),
    ],
)
def test_model_that_cannot_be_built_is_a_failed_trial_with_one_line(
    make_trainable: MakeTrainable, write_module: Callable[[str], str], line: str, error: str
) -> None:
    model = f"{write_module(f'def net(shape, classes): {line}')}:net"
    trainable = make_trainable(model=model)
    [report] = train(trainable)
    assert (report["status"], report["error"]) == (
        "failed",
        error.format(model=model, place=f" ({model.partition(':')[0]}.py:1)"),
    )
    assert trainable.reset(settings())
    assert train(trainable)[-1]["status"] == "completed"


def test_loop_that_raises_is_a_failed_trial_with_one_line(
    make_trainable: MakeTrainable, write_module: Callable[[str], str]
) -> None:
    lines = "def train(trial):\n    for _ in trial.epochs():\n        yield {'val_f1': trial.own['hidden']}\n"
    module = write_module(lines)
    [report] = train(make_trainable(train=f"{module}:train"))
    assert (report["status"], report["error"]) == ("failed", f"KeyError: 'hidden' ({module}.py:3)")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"lr": -1.0}, "lr: must be greater than 0, got -1.0"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"batch_size": 10_000}, "batch_size: must not exceed the 1413 images trained on in an epoch, got 10000"),
        ({"model": "evil:net"}, "evil:net: code that only a file names is not run"),
    ],
)
def test_configuration_that_cannot_train_is_a_failed_trial(
    make_trainable: MakeTrainable, changes: dict[str, Any], error: str
) -> None:
    trainable = make_trainable()
    assert trainable.reset(settings() | changes)
    [report] = train(trainable)
    assert report["status"] == "failed"
    assert error in report["error"]


def fail_at_first(monkeypatch: pytest.MonkeyPatch, times: int, error: Exception) -> list[int]:
    """Make the first so many epochs raise, after the training itself; tells the epochs that were begun."""
    begun: list[int] = []

    class Failing(TrainingRun):
        def train_epoch(self) -> EpochMetrics:
            metrics = super().train_epoch()
            begun.append(metrics.epoch)
            if len(begun) in range(2, 2 + times):
                raise error
            return metrics

    monkeypatch.setattr("tune_amp.training.runs.TrainingRun", Failing)
    return begun


def test_failure_that_passes_costs_the_trial_its_epochs_and_nothing_else(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(make_trainable(max_epochs=3))
    begun = fail_at_first(monkeypatch, 1, OSError("no space left for a moment"))
    reports = train(make_trainable(max_epochs=3))
    assert begun == [1, 2, 1, 2, 3]
    assert [report["epoch"] for report in reports] == [1, 1, 2, 3]
    assert reports[-1]["status"] == "completed"
    assert reports[-1]["val_loss"] == undisturbed[-1]["val_loss"]


def test_trial_that_has_failed_once_begins_anew_without_its_checkpoint(
    make_trainable: MakeTrainable, tmp_path: Path
) -> None:
    """The model may have been changed since the checkpoint was written."""
    trainable = make_trainable(max_epochs=3)
    train_once(trainable)
    trainable.save(str(tmp_path / "checkpoint"))
    trainable.reset(settings(max_epochs=3))
    checkpoints = {trainable.trial_id: [str(tmp_path / "checkpoint")]}
    trainable._worker_setup = dataclasses.replace(trainable._worker_setup, checkpoints=checkpoints)
    assert trainable._resume().epoch == 1
    trainable._first_failure = (1, "ValueError: no")
    assert trainable._resume() is None


def test_trial_that_fails_again_has_failed_and_the_next_may_try_again(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = fail_at_first(monkeypatch, 2, OSError("no space left"))
    trainable = make_trainable(max_epochs=3)
    reports = train(trainable)
    assert begun == [1, 2, 1]
    assert [report["status"] for report in reports] == ["running", "failed"]
    assert reports[-1]["config_fault"] is False
    assert reports[-1]["error"].startswith("OSError: no space left (test_trainable.py:")
    begun.clear()
    assert trainable.reset(settings())
    train(trainable)
    assert begun[:3] == [1, 2, 1]


def test_trial_that_fails_in_two_ways_tells_both(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([OSError("no space left"), ValueError("no such value")])

    def fail(*_: Any) -> None:
        raise next(errors)

    monkeypatch.setattr("tune_amp.training.runs.TrainingRun", fail)
    [report] = train(make_trainable())
    first, second = report["error"].split("; before that, ")
    assert first.startswith("ValueError: no such value (test_trainable.py:")
    assert second.startswith("OSError: no space left (test_trainable.py:")


@pytest.mark.parametrize(
    ("errors", "fault"),
    [
        (
            [RuntimeError("no kernel for Half at 0x7f3a, 64"), RuntimeError("no kernel for Half at 0x91, 7")],
            True,
        ),
        ([RuntimeError("no kernel for Half"), RuntimeError("no kernel for Float")], False),
        ([RuntimeError("no kernel"), ValueError("no kernel")], False),
        ([OSError("no space left"), OSError("no space left")], False),  # the disk's fault
        ([OSError("no space left"), InputError("lr: too large")], True),  # a check of ours knows at once
    ],
)
def test_same_error_in_the_same_epoch_twice_is_the_settings_fault(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch, errors: list[Exception], fault: bool
) -> None:
    class Failing(TrainingRun):
        def train_epoch(self) -> EpochMetrics:
            if self.epoch == 1:
                raise errors.pop(0)
            return super().train_epoch()

    monkeypatch.setattr("tune_amp.training.runs.TrainingRun", Failing)
    reports = train(make_trainable(max_epochs=3))
    assert [report["status"] for report in reports] == ["running", "running", "failed"]
    assert reports[-1]["config_fault"] is fault
    assert errors == []


def test_same_error_in_another_epoch_is_chance(make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_first(monkeypatch, 2, RuntimeError("the driver has hiccups"))
    last = train(make_trainable(max_epochs=3))[-1]
    assert (last["status"], last["config_fault"]) == ("failed", False)


def test_trial_whose_gpu_others_fill_is_tried_again_and_fails_through_no_fault_of_its_settings(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("tune_amp.cluster.trainable.time.sleep", slept.append)
    begun = fail_at_first(monkeypatch, 2, MemoryHeldError("the GPU's memory is held by other programs"))
    last = train(make_trainable(max_epochs=3))[-1]
    assert begun == [1, 2, 1]
    assert (last["status"], last["config_fault"]) == ("failed", False)
    assert slept == [MEMORY_WAIT_SECONDS]


@pytest.mark.parametrize(
    ("error", "fault"),
    [(InputError("batch_size: too large"), True), (torch.OutOfMemoryError("CUDA out of memory"), False)],
)
def test_what_would_fail_again_is_not_tried_again(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch, error: Exception, fault: bool
) -> None:
    begun = fail_at_first(monkeypatch, 1, error)
    reports = train(make_trainable(max_epochs=3))
    assert begun == [1, 2]
    assert reports[-1]["config_fault"] is fault


# A GPU that can no longer be used


def fail_with(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(name, fail)


@pytest.mark.parametrize("text", ["CUDA error: device-side assert triggered", "CUDA error: an illegal memory access"])
def test_broken_cuda_context_is_left_to_ray_which_replaces_the_worker(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    trainable = make_trainable()
    fail_with(monkeypatch, "tune_amp.training.runs.TrainingRun", torch.AcceleratorError(text))
    with pytest.raises(torch.AcceleratorError, match=text):
        trainable.train()


def test_gpu_out_of_memory_outside_the_allocator_ends_the_trial_and_not_the_worker(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainable = make_trainable()
    with monkeypatch.context() as failing:
        fail_with(failing, "tune_amp.training.runs.TrainingRun", torch.AcceleratorError("CUDA error: out of memory"))
        [report] = train(trainable)
    assert report["status"] == "out_of_memory"
    assert trainable.reset(settings())
    assert train(trainable)[-1]["status"] == "completed"


def test_memory_that_cannot_be_given_back_costs_no_report_and_no_reset(
    make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainable = make_trainable(max_epochs=1)
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    fail_with(monkeypatch, "tune_amp.cluster.trainable.release_memory", error)
    assert train(trainable)[-1]["status"] == "completed"
    assert trainable.reset(settings())
    trainable.train()
    assert trainable.reset(settings())


# One actor, many trials


def test_next_trial_in_the_same_actor_uses_the_same_resident_data_and_starts_afresh(
    make_trainable: MakeTrainable,
) -> None:
    trainable = make_trainable(precision="fp16", init_scale=2.0**30)
    place = trainable.data.train.images.data_ptr()
    first = train(trainable)
    assert trainable.reset(settings())
    second = train(trainable)
    assert trainable.data.train.images.data_ptr() == place
    assert first[0]["data_seconds"] > 0
    assert second[0]["data_seconds"] == 0  # charged to the trial that waited for it
    assert_same(second, train(make_trainable()))
    assert second[0]["training_iteration"] == 1


def test_trial_abandoned_half_way_leaves_nothing_to_the_next(make_trainable: MakeTrainable) -> None:
    """As when the scheduler stops one."""
    trainable = make_trainable(max_epochs=5, lr=0.01)
    trainable.train()
    assert trainable.reset(settings())
    assert_same(train(trainable), train(make_trainable()))


def test_worker_finds_functions_where_the_driver_does_and_runs_those_that_the_user_named(
    make_trainable: MakeTrainable, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [entry for entry in sys.path if entry]
    monkeypatch.setattr(sys, "path", [*before])
    trainable = make_trainable()
    folders = (before[0], str(tmp_path / "far"), str(tmp_path / "away"))
    worker_setup = WorkerSetup(
        train=digits.train,
        validation=digits.validation,
        num_classes=10,
        num_threads=1,
        search_path=folders,
        consented=("far:net",),
    )
    trainable.setup(settings(), worker_setup)
    assert "far:net" in list_consented()
    assert sys.path == [*before, *folders[1:]]  # last, so that nothing of the worker's own is shadowed


# Checkpoints


def assert_same(reports: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [report["status"] for report in reports] == [report["status"] for report in expected]
    for report, other in zip(reports, expected, strict=True):
        mine, theirs = report[REPORT].metrics, other[REPORT].metrics
        assert mine is not None
        assert theirs is not None
        assert find_differences(theirs, mine) == []


STATEFUL = {"precision": "fp16", "init_scale": 2.0**24, "growth_interval": 4, "max_epochs": 4, "optimizer": "sgd"}


@pytest.mark.parametrize("changes", [{}, STATEFUL, {"curriculum": "linear", "grad_clip": 1.0, "max_epochs": 4}])
def test_trial_continued_from_its_checkpoint_ends_bit_for_bit_as_without(
    make_trainable: MakeTrainable, tmp_path: Path, changes: dict[str, Any]
) -> None:
    expected = train(make_trainable(**changes))
    interrupted = make_trainable(**changes)
    interrupted.train()
    saved = interrupted.save(str(tmp_path))
    torch.manual_seed(999)  # another process
    continued = make_trainable(**changes)
    continued.restore(saved)
    assert_same(train(continued), expected[1:])


def test_checkpoint_is_safe_to_load_and_a_pickle_in_its_place_is_refused(
    make_trainable: MakeTrainable, tmp_path: Path
) -> None:
    trainable = make_trainable(**STATEFUL)
    trainable.train()
    saved = trainable.save(str(tmp_path))
    path = tmp_path / CHECKPOINT_FILE
    assert zipfile.is_zipfile(path)
    assert torch.load(path, weights_only=True)["epoch"] == 1

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    torch.save(Malicious(), path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make_trainable(**STATEFUL).restore(saved)
    assert not (tmp_path / "owned").exists()


def test_ended_trial_saves_nothing_and_nothing_saved_starts_from_the_beginning(
    make_trainable: MakeTrainable, tmp_path: Path
) -> None:
    trainable = make_trainable()
    expected = train(trainable)
    saved = trainable.save(str(tmp_path))
    assert not (tmp_path / CHECKPOINT_FILE).exists()
    again = make_trainable()
    again.restore(saved)
    assert_same(train(again), expected)


# How an exception is told


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory"), False),
        (OSError("can't allocate memory"), False),
        (InputError("lr: must be greater than 0"), False),
    ],
)
def test_memory_errors_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    assert failure_report(error)["status"] == ("out_of_memory" if expected else "failed")


def test_cpu_allocator_says_what_we_look_for() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert is_out_of_memory(caught.value)


def test_input_error_is_told_without_its_type() -> None:
    assert failure_report(InputError("lr: must be\ngreater"))["error"] == "lr: must be greater"
    assert failure_report(KeyError("lr"))["error"] == "KeyError: 'lr'"


def test_every_metric_of_an_epoch_is_in_a_report(make_trainable: MakeTrainable) -> None:
    report = train_once(make_trainable())
    assert {field.name for field in dataclasses.fields(EpochMetrics)} <= report.keys()
    assert {"status", "error", "done", "device", "num_threads"} <= report.keys()


class FailingStorage:
    """Ray's storage of a worker, as far as a save asks for it."""

    sync_config = types.SimpleNamespace(sync_artifacts_on_checkpoint=False)

    def __init__(self, folder: Path, error: Exception) -> None:
        self._folder, self._error = folder, error
        self.current_checkpoint_index = -1
        self.fails = False

    def _update_checkpoint_index(self, metrics: dict[str, Any]) -> None:
        self.current_checkpoint_index += 1

    def persist_current_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        if self.fails:
            raise self._error
        place = self._folder / f"checkpoint_{self.current_checkpoint_index}"
        shutil.copytree(checkpoint.path, place)
        return Checkpoint(str(place))

    def persist_artifacts(self, force: bool) -> None: ...


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("Check that all nodes have")])
def test_save_that_finds_no_place_counts_as_none(
    make_trainable: MakeTrainable, tmp_path: Path, error: Exception
) -> None:
    trainable = make_trainable(**STATEFUL)
    trainable.train()
    trainable._storage = storage = FailingStorage(tmp_path, error)
    first = trainable.save()
    storage.fails = True
    assert trainable.save().checkpoint is None
    storage.fails = False
    second = trainable.save()
    assert [Path(saved.checkpoint.path).name for saved in (first, second)] == ["checkpoint_0", "checkpoint_1"]


def test_fault_of_the_model_is_none_of_the_disk(make_trainable: MakeTrainable, monkeypatch: pytest.MonkeyPatch) -> None:
    trainable = make_trainable(**STATEFUL)
    trainable.train()

    def fail() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainable._run, "state_dict", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        trainable.save()


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_checkpoint_that_is_gone_or_damaged_costs_the_trial_its_epochs_and_no_more(
    make_trainable: MakeTrainable, tmp_path: Path, damage: str
) -> None:
    expected = train(make_trainable(**STATEFUL))
    trainable = make_trainable(**STATEFUL)
    trainable.train()
    trainable._storage = FailingStorage(tmp_path, OSError())
    saved = trainable.save()
    again = make_trainable(**STATEFUL)
    again.restore(saved)
    assert_same(train(again), expected[1:])
    path = Path(saved.checkpoint.path) / CHECKPOINT_FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.unlink()
    if damage == "gone":
        path.parent.rmdir()
    anew = make_trainable(**STATEFUL)
    anew.restore(saved)
    assert_same(train(anew), expected)
