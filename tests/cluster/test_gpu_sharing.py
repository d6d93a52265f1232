"""How many trials share a device: the rule, and real measurements by processes on the CPU."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tune_amp.cluster.gpu_sharing import (
    MeasurementError,
    ShareMeasurement,
    choose_trials,
    count_fitting,
    find_knee,
    find_largest,
    list_counts,
    measure_shares,
)
from tune_amp.cluster.resources import _measure_here
from tune_amp.space.space import SearchSpace
from tune_amp.training.data import Split
from tune_amp.trial.config import TrialConfig

GIB = 2**30
MakeSpace = Callable[[str], SearchSpace]
WriteModule = Callable[[str], str]


def measured(*rates: tuple[int, float], memory: int | None = None) -> list[ShareMeasurement]:
    return [
        ShareMeasurement(trials=trials, samples_per_second=rate, trial_memory_bytes=memory) for trials, rate in rates
    ]


# The largest configuration


def largest(space: SearchSpace) -> TrialConfig:
    return find_largest(space, model="conv_net", dataset="mnist", max_epochs=3, seed=5)


def test_largest_has_the_largest_batch_in_the_hungriest_precision_and_optimizer(make_space: MakeSpace) -> None:
    space = make_space(
        "parameters:\n"
        "  batch_size: {low: 64, high: 4096, power_of_two: true}\n"
        "  precision: {choices: [bf16, fp32, fp16]}\n"
        "  optimizer: {choices: [sgd, adamw]}\n"
        "  init_scale: {low: 1.0, high: 2.0, when: {precision: fp16}}\n"
    )
    found = largest(space)
    assert (found.batch_size, found.precision, found.optimizer) == (4096, "fp32", "adamw")
    assert (found.model, found.dataset, found.max_epochs, found.seed) == ("conv_net", "mnist", 3, 5)


def test_largest_has_what_the_space_fixes_and_defaults_for_the_rest(make_space: MakeSpace) -> None:
    found = largest(
        make_space("parameters:\n  lr: {low: 1.0e-4, high: 1.0e-2}\nfixed: {precision: bf16, batch_size: 32}\n")
    )
    assert (found.batch_size, found.precision, found.optimizer) == (32, "bf16", TrialConfig().optimizer)


def test_largest_trains_the_users_own_task_with_its_parameters(make_space: MakeSpace) -> None:
    space = make_space("parameters: {lr: {low: 0.1, high: 1.0}}\nown: {hidden: {choices: [8, 64]}}\n")
    found = find_largest(space, task="mine:Task", dataset="mine:Task", own=space.own_defaults)
    assert (found.task, set(found.own)) == ("mine:Task", {"hidden"})


def test_conditional_parameter_may_have_its_default_too(make_space: MakeSpace) -> None:
    precision = "parameters:\n  precision: {choices: [fp16, bf16]}\n"
    space = make_space(precision + "  batch_size: {low: 2, high: 8, when: {precision: fp16}}\n")
    assert find_largest(space).batch_size == TrialConfig().batch_size
    space = make_space(precision + "  optimizer: {choices: [sgd], when: {precision: fp16}}\n")
    assert find_largest(space).optimizer == "adam"


# The rule


@pytest.mark.parametrize(
    ("most", "counts"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (12, (1, 2, 4, 8, 12)), (64, (1, 2, 4, 8, 16))],
)
def test_counts_are_powers_of_two_and_the_most(most: int, counts: tuple[int, ...]) -> None:
    assert list_counts(most) == counts


@pytest.mark.parametrize(
    ("rates", "knee"),
    [
        ([(1, 100.0)], 1),
        ([(1, 100.0), (2, 105.0), (4, 110.0)], 1),
        ([(1, 100.0), (2, 200.0), (4, 390.0), (8, 400.0)], 4),
        ([(1, 100.0), (2, 200.0), (4, 180.0)], 2),
        ([(8, 400.0), (4, 390.0), (2, 200.0), (1, 100.0)], 4),
    ],
)
def test_knee_is_the_fewest_trials_with_nine_tenths_of_the_best(rates: list[tuple[int, float]], knee: int) -> None:
    assert find_knee(measured(*rates)) == knee


@pytest.mark.parametrize(("trial", "device", "count"), [(10, 100, 9), (46, 100, 1), (45, 100, 2), (500, 100, 1)])
def test_nine_tenths_of_the_memory_are_filled_and_one_trial_is_always_tried(
    trial: int, device: int, count: int
) -> None:
    assert count_fitting(trial, device) == count


def test_choice_says_what_it_gains_and_what_more_would() -> None:
    found = choose_trials(measured((1, 100.0), (2, 190.0), (4, 310.0), (8, 330.0), memory=GIB + GIB // 4), 139 * GIB)
    assert found.trials == 4
    assert found.reason == (
        "4 trials on a GPU train 3.1 times as fast as one, 8 only 3.3; the largest needs 1.2 of 139 GiB"
    )


def test_choice_of_one_says_how_little_more_would_gain() -> None:
    found = choose_trials(measured((1, 100.0), (2, 104.0), (4, 102.0)), None)
    assert (found.trials, found.reason) == (1, "2 trials on a GPU train only 1 times as fast as one")


# Measurements


def make_split(count: int = 512) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4), np.uint8)
    return Split(images=images, labels=np.arange(count, dtype=np.int64) % 2)


@pytest.mark.slow  # starts processes
def test_processes_train_side_by_side_on_the_cpu() -> None:
    found = measure_shares(TrialConfig(batch_size=32), make_split(), 2, "cpu", counts=(2, 1), seconds=0.3)
    assert [measurement.trials for measurement in found] == [1, 2]
    assert all(measurement.samples_per_second > 100 for measurement in found)
    assert {measurement.trial_memory_bytes for measurement in found} == {None}


FAILING_MODEL = """
import math, os
from pathlib import Path
from torch import nn
def net(input_shape, num_classes):
    {what}
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))
"""


def measure_failing(write_module: WriteModule, what: str) -> tuple[ShareMeasurement, ...]:
    model = f"{write_module(FAILING_MODEL.format(what=what))}:net"
    return measure_shares(TrialConfig(batch_size=32, model=model), make_split(), 2, "cpu", counts=(1, 2), seconds=0.1)


@pytest.mark.slow  # starts processes
def test_configuration_that_cannot_be_trained_says_why(write_module: WriteModule) -> None:
    with pytest.raises(MeasurementError, match="RuntimeError: CUDA out of memory") as caught:
        measure_failing(write_module, "raise RuntimeError('CUDA out of memory')")
    assert caught.value.out_of_memory
    with pytest.raises(MeasurementError, match="ValueError: no") as caught:
        measure_failing(write_module, "raise ValueError('no')")
    assert not caught.value.out_of_memory


@pytest.mark.slow  # starts processes
def test_gpu_that_takes_one_process_gets_one_trial(write_module: WriteModule) -> None:
    busy = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    model = f"{write_module(FAILING_MODEL.format(what=f'raise RuntimeError({busy!r})'))}:net"
    shared = _measure_here(make_split(), TrialConfig(batch_size=32, model=model), 2, (1, 2), (), ())
    assert shared.trials == 1
    assert shared.reason.startswith("a GPU takes one process (compute mode EXCLUSIVE_PROCESS): ")


@pytest.mark.slow  # starts processes
def test_process_that_dies_is_an_error_and_not_a_wait(write_module: WriteModule) -> None:
    with pytest.raises(MeasurementError, match="its process died, exit code 7"):
        measure_failing(write_module, "os._exit(7)")


@pytest.mark.slow  # starts processes
def test_second_process_that_fails_leaves_what_the_first_achieved_and_no_process(
    write_module: WriteModule, tmp_path: Path
) -> None:
    """The first process builds its model before the others; who finds its file is one of the others."""
    mark, pids = tmp_path / "first", tmp_path / "pids"
    pids.mkdir()
    what = f"mark = Path({str(mark)!r}); pid = str(os.getpid()); (Path({str(pids)!r}) / pid).touch()\n"
    what += "    mark.exists() or mark.write_text(pid)\n"
    what += "    if mark.read_text() != pid: raise RuntimeError('out of memory')"
    found = measure_failing(write_module, what)
    assert [measurement.trials for measurement in found] == [1]
    known = [int(path.name) for path in pids.iterdir()]
    assert len(known) == 2
    for pid in known:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
