"""Whole steps as CUDA graphs: on the CPU by a capture that repeats the step, so that all but CUDA itself is tried."""

import dataclasses
import io
import math
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import make_split, untimed
from torch import Tensor, nn

from benchmarks.training.gpu_checks import compare_training, early_config, train_and_watch
from tune_amp.training.cuda_graph import (
    LEAST_STEPS,
    WARM_UP_STEPS,
    Capture,
    CaptureError,
    Step,
    StepLoop,
    capturable,
    capture_cuda_graph,
    explain_change,
    release_failed_pool,
)
from tune_amp.training.memory import release_memory
from tune_amp.training.optimizers import build_optimizer
from tune_amp.training.run import TrainingRun
from tune_amp.training.task import load_task_dataset
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import MODELS, OPTIMIZERS, EpochMetrics, TrialConfig
from tune_amp.trial.curricula import PACING

CPU = torch.device("cpu")
WriteModule = Callable[[str], str]
LONG = 10 * LEAST_STEPS
"""Epochs of a budget in which a capture pays."""


@pytest.fixture
def data() -> TrainingData:
    return TrainingData(make_split(), make_split(21), 3, CPU)


def make_config(**settings: Any) -> TrialConfig:
    return TrialConfig(**{"lr": 0.01, "batch_size": 8, "max_epochs": LONG, **settings})


class Repeating:
    """A capture that keeps the step and takes it again where a graph would be replayed."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, step: Step) -> Step:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


def train(run: TrainingRun, epochs: int) -> list[EpochMetrics]:
    """Metrics without what a clock measured, and without the word for the loop."""
    return [untimed(run.train_epoch(), loop="") for _ in range(epochs)]


def copy_state(run: TrainingRun) -> dict[str, Any]:
    """All that a checkpoint holds but the clocks, through the bytes of a file."""
    stored = io.BytesIO()
    torch.save({name: value for name, value in run.state_dict().items() if name != "seconds"}, stored)
    stored.seek(0)
    state: dict[str, Any] = torch.load(stored, weights_only=True)
    return state


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


# The static step


@pytest.mark.parametrize("grad_clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_captured_step_trains_bit_for_bit_as_the_eager_loop(
    precision: str, optimizer: str, grad_clip: float | None, data: TrainingData
) -> None:
    scaler = {"init_scale": 2.0**22, "growth_interval": 3} if precision == "fp16" else {}
    config = make_config(precision=precision, optimizer=optimizer, grad_clip=grad_clip, **scaler)
    capture = Repeating()
    eager, graphed = TrainingRun(config, data, capture=None), TrainingRun(config, data, capture=capture)
    told = train(eager, 3)
    assert told == train(graphed, 3)
    assert_same(copy_state(eager), copy_state(graphed))
    steps = 3 * (60 // 8)
    assert (capture.captured, capture.replayed) == (1, steps - WARM_UP_STEPS)
    if precision == "fp16":  # else nothing of the scaler's would have been compared
        assert told[-1].skipped_steps > 0
        assert told[-1].growths > 0


TASK = """
import numpy as np
from torch import nn
from tune_amp.training import Task
class Line(Task):
    metric = ("mae", "min")
    calls = 0
    def data(self):
        part = np.linspace(0, 1, 60)[:, None], np.linspace(1, 2, 60)[:, None]
        return part, part, part
    def model(self):
        return nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])
    def score(self, model, batch):
        return {"mae": (model(batch[0]) - batch[1]).abs().sum()}
class Counting(Line):
    def loss(self, model, batch):
        self.calls += 1
        return super().loss(model, batch) / self.calls
"""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_task_of_floats_with_accumulation_is_captured_too(precision: str, write_module: WriteModule) -> None:
    name = write_module(TASK) + ":Line"
    dataset = load_task_dataset(name)
    data = TrainingData(dataset.train, dataset.validation, 0, CPU)
    scaler = {"init_scale": 2.0**22} if precision == "fp16" else {}
    config = make_config(task=name, model=name, precision=precision, batch_size=4, accumulate=2, **scaler)
    capture = Repeating()
    eager, graphed = TrainingRun(config, data, capture=None), TrainingRun(config, data, capture=capture)
    assert train(eager, 3) == train(graphed, 3)
    assert_same(copy_state(eager), copy_state(graphed))
    assert (capture.captured, capture.replayed) == (1, 3 * (60 // 8) - WARM_UP_STEPS)


def test_a_task_that_counts_on_the_host_is_not_captured(write_module: WriteModule) -> None:
    name = write_module(TASK) + ":Counting"
    dataset = load_task_dataset(name)
    config = make_config(task=name, model=name)
    run = TrainingRun(config, TrainingData(dataset.train, None, 0, CPU), capture=Repeating())
    assert run.train_epoch().loop == "eager: the model changes on the host"


@pytest.mark.parametrize("curriculum", PACING)
def test_epochs_of_different_length_are_the_same_too(curriculum: str, data: TrainingData) -> None:
    config = make_config(curriculum=curriculum, precision="fp16")
    eager, graphed = TrainingRun(config, data, capture=None), TrainingRun(config, data, capture=Repeating())
    for run in (eager, graphed):
        run.epoch = LONG // 2 - 2  # the last two that grow, and then whole ones
    told = train(eager, 4)
    assert told == train(graphed, 4)
    whole, half = 60 // 8, 30 // 8
    steps = 2 * half + 2 * whole if curriculum == "step" else 4 * whole
    assert told[-1].steps == steps
    for run in (eager, graphed):
        run.epoch = 0  # half of the images
    assert train(eager, 1) == train(graphed, 1)
    assert eager._amp.telemetry.steps == steps + half


def test_run_goes_on_from_a_checkpoint_with_a_capture_of_its_own(data: TrainingData) -> None:
    config = make_config(precision="fp16", init_scale=2.0**22, optimizer="sgd")
    whole = TrainingRun(config, data, capture=None)
    train(whole, 2)
    stored = whole.state_dict()
    state = {**copy_state(whole), "seconds": stored["seconds"]}
    expected = train(whole, 2)
    capture = Repeating()
    resumed = TrainingRun(config, data, capture=capture)
    train(resumed, 1)  # a step is captured, on tensors that the checkpoint replaces
    resumed.load_state_dict(state)
    assert train(resumed, 2) == expected
    assert capture.captured == 2


def test_epoch_shorter_than_the_warm_up_captures_in_a_later_one(data: TrainingData) -> None:
    config = make_config(batch_size=30)
    capture = Repeating()
    run = TrainingRun(config, data, capture=capture)
    first = run.train_epoch()
    assert first.loop == "eager: no step captured yet"
    assert (run.train_epoch().loop, capture.captured, capture.replayed) == ("graph", 1, 1)


@pytest.mark.parametrize("model", MODELS)
def test_every_built_in_model_may_be_captured(model: str) -> None:
    data = TrainingData(make_split(side=8), None, 3, CPU)
    config = make_config(model=model, precision="fp16", grad_clip=1.0)
    eager, graphed = TrainingRun(config, data, capture=None), TrainingRun(config, data, capture=Repeating())
    assert graphed.train_epoch().loop == "graph"
    eager.train_epoch()
    assert_same(copy_state(eager), copy_state(graphed))


# Where there is no graph


def test_epoch_tells_why_it_was_trained_eagerly(data: TrainingData) -> None:
    def train_epochs(max_epochs: int, **settings: Any) -> str:
        return TrainingRun(make_config(max_epochs=max_epochs), data, **settings).train_epoch().loop

    assert train_epochs(LONG) == "eager: the CPU has no CUDA graphs"
    assert train_epochs(LONG, capture=None) == "eager: graphs are not allowed"
    assert train_epochs(14, capture=Repeating()) == "eager: a capture pays from 100 steps"  # 98 steps
    assert train_epochs(15, capture=Repeating()) == "graph"


@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_failed_capture_leaves_the_run_as_if_it_had_not_been_tried(grad_clip: float | None, data: TrainingData) -> None:
    """The step is begun, even unscaled and clipped, before the capture breaks."""

    def break_within(step: Step) -> Step:
        broken = RuntimeError("operation not permitted when stream is capturing")
        handle = run._optimizer.step

        def fail() -> None:
            raise broken

        run._optimizer.step = fail  # type: ignore[method-assign, assignment]
        weights = [parameter.detach().clone() for parameter in run.model.parameters()]
        position = loop_of(run).position.clone()
        try:
            step()
        except RuntimeError as error:
            raise CaptureError(str(error)) from None
        finally:  # under a real capture nothing of it would have run
            run._optimizer.step = handle  # type: ignore[method-assign]
            loop_of(run).position.copy_(position)
            for parameter, weight in zip(run.model.parameters(), weights, strict=True):
                parameter.data.copy_(weight)
        raise AssertionError

    config = make_config(precision="fp16", grad_clip=grad_clip)
    run = TrainingRun(config, data, capture=break_within)
    eager = TrainingRun(config, data, capture=None)
    told = run.train_epoch()
    assert told.loop == "eager: capture failed: operation not permitted when stream is capturing"
    eager.train_epoch()
    assert train(run, 2) == train(eager, 2)
    assert_same(copy_state(run), copy_state(eager))


def make_early_config(precision: str, **settings: Any) -> TrialConfig:
    """A few dozen steps; in fp16 some are skipped, most are applied, and the scale grows."""
    scaler = {"init_scale": 2.0**18, "growth_interval": 3} if precision == "fp16" else {}
    return make_config(precision=precision, grad_clip=1.0, lr=1e-3, **scaler, **settings)


def list_differences(config: TrialConfig, data: TrainingData, capture: Capture = capture_cuda_graph) -> list[str]:
    """What an epoch of captured steps does not do as the eager one, up to rounding."""
    graphed, eager = TrainingRun(config, data, capture=capture), TrainingRun(config, data, capture=None)
    rows = compare_training("", config.precision, train_and_watch(graphed), train_and_watch(eager))
    return [f"{row.quantity}: {row.note}" for row in rows if row.verdict != "met"]


def capture_nothing(step: Step) -> Step:
    return lambda: None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_comparison_of_the_gpu_test_finds_a_graph_that_does_nothing(precision: str, optimizer: str) -> None:
    data = TrainingData(make_split(480, side=8), None, 3, CPU)
    config = make_early_config(precision=precision, optimizer=optimizer)
    assert list_differences(config, data, Repeating()) == []
    assert "change of the weights" in "".join(list_differences(config, data, capture_nothing))


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=[pytest.mark.long] * (model == "vit")) for model in MODELS]
)
def test_comparison_of_the_gpu_test_finds_a_graph_that_does_not_update_the_scaler(model: str) -> None:
    """All else is as it must be but for where steps were skipped; one skip more is rounding."""

    def leave_out_updates(step: Step) -> Step:
        def replay() -> None:
            state = run._amp.scaler.state_dict()
            step()
            run._amp.scaler.load_state_dict(state)

        return replay

    data = TrainingData(make_split(40 * 64, side=8), None, 3, CPU)
    config = early_config(model, "fp16", "adam")
    eager = train_and_watch(TrainingRun(config, data, capture=None))
    run = TrainingRun(config, data, capture=leave_out_updates)

    def judge(told: EpochMetrics) -> str | None:
        rows = compare_training("", "fp16", dataclasses.replace(eager, told=told), eager)
        return next(row.verdict for row in rows if row.quantity == "path of the scale")

    assert judge(run.train_epoch()) == "failed"
    assert judge(dataclasses.replace(eager.told, skipped_steps=eager.told.skipped_steps + 1)) == "met"


def loop_of(run: TrainingRun) -> StepLoop:
    assert run._loop is not None
    return run._loop


COUNTING_MODEL = """
import math
from torch import nn
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.calls = 0
        self.out = nn.Linear(math.prod(input_shape), num_classes)
    def forward(self, images):
        self.calls += 1
        return self.out(images.flatten(1)) * (1 if self.calls % 2 else 2)
def net(input_shape, num_classes):
    return Net(input_shape, num_classes)
"""


def test_model_that_counts_on_the_host_is_not_captured(write_module: WriteModule, data: TrainingData) -> None:
    capture = Repeating()
    run = TrainingRun(make_config(model=f"{write_module(COUNTING_MODEL)}:net"), data, capture=capture)
    assert run.train_epoch().loop == "eager: the model changes on the host"
    assert capture.captured == 0


COMPILED_MODEL = """
import math
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.out = nn.Linear(math.prod(input_shape), num_classes)
        self.fast = torch.compile(self.compute, backend="eager", dynamic=False)
    def compute(self, images):
        return self.out(images.flatten(1))
    def forward(self, images):
        return self.fast(images)
def net(input_shape, num_classes):
    return Net(input_shape, num_classes)
"""


def test_model_that_holds_a_compiled_function_may_be_captured(write_module: WriteModule, data: TrainingData) -> None:
    capture = Repeating()
    run = TrainingRun(make_config(model=f"{write_module(COMPILED_MODEL)}:net"), data, capture=capture)
    assert run.train_epoch().loop == "graph"
    assert capture.replayed > 0


def test_function_put_in_the_place_of_another_is_seen() -> None:
    model = Plain()
    model.counts["scale"] = lambda value: value  # type: ignore[assignment]
    assert explain_change(lambda: None, model, CPU) is None
    kept = model.counts["scale"]  # else the other one might get its address
    change: dict[str, Any] = {"scale": lambda value: 2 * value}
    assert explain_change(lambda: model.counts.update(change), model, CPU) == "the model changes on the host"
    assert kept is not model.counts["scale"]


class Plain(nn.Module):
    """A model with something of each kind on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 2)
        self.register_buffer("running", torch.zeros(2))
        self.counts = {"calls": 0}
        self.generator = np.random.default_rng(0)
        self.inner = nn.ModuleList([nn.Dropout(0.5)])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.counts.update(calls=1),
        lambda model: model.generator.random(),
        lambda model: setattr(model, "running", torch.ones(2)),
        lambda model: setattr(model.out, "weight", nn.Parameter(torch.ones(2, 2))),
        lambda model: setattr(model.inner[0], "p", 0.25),
        lambda model: random.random(),
        lambda model: np.random.random(),  # noqa: NPY002
        lambda model: torch.rand(1),
    ],
)
def test_change_on_the_host_is_seen(change: Callable[[Any], Any]) -> None:
    model = Plain()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        assert explain_change(lambda: change(model), model, CPU) == "the model changes on the host"
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def test_values_of_tensors_may_change() -> None:
    model = Plain()

    def step() -> None:
        model.get_buffer("running").add_(1)
        model.out.weight.data.mul_(2)
        model.out.weight.grad = None

    assert explain_change(step, model, CPU) is None


def test_model_that_cannot_be_compared_is_not_captured() -> None:
    model = Plain()
    model.counts["lock"] = threading.Lock()  # type: ignore[assignment]
    assert explain_change(lambda: None, model, CPU) == "the model's state on the host cannot be compared"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_may_be_captured_only_within(optimizer: str) -> None:
    built = build_optimizer(make_config(optimizer=optimizer), nn.Linear(2, 2))
    flags = [group.get("capturable") for group in built.param_groups]
    with capturable(built):
        assert all(group.get("capturable", True) for group in built.param_groups)
    assert [group.get("capturable") for group in built.param_groups] == flags


# On a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def cuda_data() -> TrainingData:
    return TrainingData(make_split(480, side=8), make_split(21, side=8), 3, torch.device("cuda"))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["simple_net", "conv_net", "vit"])
def test_graph_trains_as_the_eager_loop_does(
    model: str, precision: str, optimizer: str, cuda_data: TrainingData
) -> None:
    config = make_early_config(model=model, precision=precision, optimizer=optimizer)
    assert list_differences(config, cuda_data) == []


DROPOUT_MODEL = """
import math
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.out = nn.Linear(math.prod(input_shape), num_classes)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("kept", torch.zeros(64))
    def forward(self, images):
        mask = self.drop(torch.ones(64, device=images.device))
        self.kept.copy_(mask)
        return self.out(images.flatten(1) * mask)
def net(input_shape, num_classes):
    return Net(input_shape, num_classes)
"""


@pytest.mark.parametrize(
    ("device_name", "loop"),
    [("cpu", "eager: the CPU has no CUDA graphs"), pytest.param("cuda", "graph", marks=[pytest.mark.gpu, on_gpu])],
)
def test_every_epoch_draws_new_random_numbers(device_name: str, loop: str, write_module: WriteModule) -> None:
    """Without a validation split: a forward pass in evaluation mode would write the mask of no dropout."""
    data = TrainingData(make_split(480, side=8), None, 3, torch.device(device_name))
    run = TrainingRun(make_config(model=f"{write_module(DROPOUT_MODEL)}:net"), data)
    assert run.train_epoch().loop == loop
    first = run.model.get_buffer("kept").clone()
    run.train_epoch()
    assert not torch.equal(first, run.model.get_buffer("kept"))


@pytest.mark.parametrize(("torch_has_ended_it", "released"), [(False, 1), (True, 0)])
def test_pool_of_a_failed_capture_is_released_once(torch_has_ended_it: bool, released: int) -> None:
    def end() -> None:
        if torch_has_ended_it:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    releases: list[None] = []
    release_failed_pool(end, lambda: releases.append(None))
    assert len(releases) == released


WAITING_MODEL = """
import math
from torch import nn
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.out = nn.Linear(math.prod(input_shape), num_classes)
    def forward(self, images):
        return self.out(images.flatten(1)) * (1 if images.mean().item() > 0 else 2)
def net(input_shape, num_classes):
    return Net(input_shape, num_classes)
"""


@pytest.mark.gpu
@on_gpu
def test_model_that_waits_for_the_device_trains_eagerly(write_module: WriteModule, cuda_data: TrainingData) -> None:
    run = TrainingRun(make_config(model=f"{write_module(WAITING_MODEL)}:net"), cuda_data)
    told = run.train_epoch()
    assert told.loop == "eager: the model waits for the device"
    assert math.isfinite(told.train_loss)


@pytest.mark.gpu
@on_gpu
def test_capture_that_fails_leaves_a_gpu_that_trains_on(cuda_data: TrainingData) -> None:
    def capture_with_a_wait(step: Step) -> Step:
        def wait() -> None:
            step()
            torch.cuda.current_stream().synchronize()

        return capture_cuda_graph(wait)

    failing: Capture = capture_with_a_wait
    config = make_config(precision="fp16", grad_clip=1.0)
    run = TrainingRun(config, cuda_data, capture=failing)
    assert run.train_epoch().loop.startswith("eager: capture failed: ")
    assert math.isfinite(run.train_epoch().train_loss)
    assert TrainingRun(config, cuda_data).train_epoch().loop == "graph"
    del run

    def fail_and_release() -> int:
        assert "capture failed" in TrainingRun(config, cuda_data, capture=failing).train_epoch().loop
        release_memory(cuda_data.device)
        return torch.cuda.memory_reserved()

    first = fail_and_release()
    if [int(part) for part in torch.__version__.split(".")[:2]] not in ([2, 13], [2, 14]):  # these keep it
        assert max(fail_and_release() for _ in range(5)) <= first


@pytest.mark.gpu
@on_gpu
def test_graphs_of_many_runs_leave_no_memory_behind(cuda_data: TrainingData) -> None:
    def train_and_release() -> int:
        run = TrainingRun(make_config(precision="fp16"), cuda_data)
        assert run.train_epoch().loop == "graph"
        del run
        release_memory(cuda_data.device)
        return torch.cuda.memory_reserved()

    first = train_and_release()
    assert max(train_and_release() for _ in range(5)) <= first
