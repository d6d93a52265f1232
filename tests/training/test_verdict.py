"""The verdicts on training, against rules, against a real GradScaler, and against runs whose end is known."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tune_amp.training.verdict import (
    COLLAPSED_SCALE,
    EpochEvidence,
    GradientProbe,
    ScaleOutlook,
    is_probe_needed,
    judge_epoch,
    look_ahead,
)
from tune_amp.trial.config import HOPELESS_STATES, TrainingState

NAN, INF = math.nan, math.inf
STEADY, STARVED, CALIBRATING, COLLAPSED, DIVERGED = (
    TrainingState(name) for name in ("steady", "starved", "calibrating", "collapsed", "diverged")
)


def make_outlook(scale: float = 2.0**16, **changes: Any) -> ScaleOutlook:
    return ScaleOutlook(**{"scale": scale, "smallest_so_far": scale, "lowest": 2.0**-24, "highest": 2.0**20} | changes)


def make_evidence(**changes: Any) -> EpochEvidence:
    values: dict[str, Any] = {
        "weights_finite": True,
        "weights_moved": True,
        "validation": {"val_loss": 0.3},
        "nan_buffer": None,
        "has_learned": True,
        "epoch_steps": 50,
        "epoch_skipped": 0,
        "applied_steps": 100,
        "skipped_steps": 0,
        "is_last_epoch": False,
    }
    probed: dict[str, Any] = {"underflow_share": 0.0, "outlook": make_outlook()} | changes
    probe = {field.name: probed.pop(field.name) for field in dataclasses.fields(GradientProbe) if field.name in probed}
    return EpochEvidence(probe=GradientProbe(**probe), **values | probed)


FP32 = {"underflow_share": None, "outlook": None}
UNLEARNED = {"has_learned": False, "validation": {"val_loss": 2.31}}
UNKNOWN = {"has_learned": None}  # a task without a baseline
UNMOVED = {"weights_moved": False, "has_learned": True}  # untrained, and by luck better than guessing
ALL_SKIPPED = {"epoch_skipped": 50, "skipped_steps": 50, "applied_steps": 0, **UNMOVED}


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({}, STEADY, None),
        (FP32, STEADY, None),
        ({"weights_finite": False}, DIVERGED, "weights are not finite"),
        ({"weights_finite": False, **FP32}, DIVERGED, "weights are not finite"),
        ({"validation": {"val_loss": NAN}}, DIVERGED, "val_loss is nan"),
        ({"validation": {"val_loss": INF}, **FP32}, DIVERGED, "val_loss is inf"),
        (
            {"validation": {"val_loss": NAN}, "nan_buffer": "norm.running_var"},
            DIVERGED,
            "val_loss is nan: weights are finite, but buffer norm.running_var is not",
        ),
        ({"validation": {}}, STEADY, None),  # trained without validation
        ({"validation": {"val_loss": 0.1, "val_mae": NAN}}, DIVERGED, "val_mae is nan"),
        # a task without a baseline
        (UNKNOWN | {"is_dead": True}, STEADY, None),
        (UNKNOWN | {"is_dead": True, "weights_moved": False}, STEADY, None),
        (UNKNOWN | {"outlook": make_outlook(0.0)}, COLLAPSED, "loss_scale is 0.0"),
        (UNKNOWN | {"outlook": make_outlook(2.0**-30), "skipped_steps": 1}, COLLAPSED, "loss_scale collapsed to"),
        (ALL_SKIPPED | UNKNOWN | {"overflows_at_lowest": True}, COLLAPSED, "every step is skipped, and gradients"),
        # dead networks
        ({"is_dead": True, **UNLEARNED}, COLLAPSED, "no weight gets a gradient"),
        ({"is_dead": True, **UNLEARNED, **FP32}, COLLAPSED, "no weight gets a gradient"),
        ({"is_dead": True}, STEADY, None),  # it has learned all there is
        # the scale itself
        ({"outlook": make_outlook(0.0), **UNLEARNED}, COLLAPSED, "loss_scale is 0.0"),
        ({"outlook": make_outlook(INF), **UNLEARNED}, COLLAPSED, "loss_scale is inf"),
        ({"outlook": make_outlook(NAN), **UNLEARNED}, COLLAPSED, "loss_scale is nan"),
        ({"outlook": make_outlook(NAN)}, STEADY, None),  # has learned: worth what it is
        (
            {"outlook": make_outlook(2.0**-30), "skipped_steps": 1, **UNLEARNED},
            COLLAPSED,
            "loss_scale collapsed to 9.31e-10",
        ),
        ({"outlook": make_outlook(2.0**-30), "skipped_steps": 1}, STEADY, None),
        ({"outlook": make_outlook(2.0**-30), **UNLEARNED}, STEADY, None),  # low by choice
        (
            {"outlook": make_outlook(2.0**-30, smallest_so_far=2.0**-40), "skipped_steps": 9, **UNLEARNED},
            STEADY,  # growing again
            None,
        ),
        ({"outlook": make_outlook(2.0**-24), "skipped_steps": 9, **UNLEARNED}, STEADY, None),
        (
            {"outlook": make_outlook(2.0**-25), "skipped_steps": 9, **UNLEARNED},
            COLLAPSED,
            "loss_scale collapsed to 2.98e-08",
        ),
        # calibration
        ({"epoch_skipped": 25}, STEADY, None),
        ({"epoch_skipped": 26}, CALIBRATING, None),
        ({**ALL_SKIPPED, "overflows_at_lowest": False}, CALIBRATING, None),
        (ALL_SKIPPED | {"overflows_at_lowest": True}, COLLAPSED, "every step is skipped, and gradients overflow even"),
        ({"epoch_skipped": 50, "overflows_at_lowest": True}, CALIBRATING, None),  # has learned: worth what it is
        (
            {"epoch_skipped": 50, "overflows_at_lowest": True, **UNLEARNED},
            CALIBRATING,
            None,
        ),  # later batches may differ
        (ALL_SKIPPED | {"is_last_epoch": True, "epoch_skipped": 0, "skipped_steps": 0, "epoch_steps": 0}, STEADY, None),
        (ALL_SKIPPED | {"is_last_epoch": True}, COLLAPSED, "no step was applied: all 50 were skipped"),
        ({"epoch_skipped": 50, "is_last_epoch": True}, CALIBRATING, None),  # trained before
        # starvation
        ({"underflow_share": 0.5}, STEADY, None),
        ({"underflow_share": 0.51}, STARVED, None),
        ({"underflow_share": 1.0, "vanishes_at_highest": False, **UNMOVED}, STARVED, None),
        (
            {"underflow_share": 1.0, "vanishes_at_highest": True, **UNLEARNED},
            STARVED,
            None,
        ),  # the next images may differ
        (
            {"underflow_share": 1.0, "vanishes_at_highest": True, **UNMOVED},
            COLLAPSED,
            "gradients vanish in fp16, even at 2^20, the highest loss_scale within the trial",
        ),
        ({"underflow_share": 1.0, "vanishes_at_highest": True}, STARVED, None),  # converged: worth what it is
        # the worst comes first
        ({"is_dead": True, **UNLEARNED, "weights_finite": False}, DIVERGED, "weights are not finite"),
        ({"epoch_skipped": 50, "underflow_share": None}, CALIBRATING, None),
    ],
)
def test_verdict_follows_from_the_evidence(changes: dict[str, Any], state: TrainingState, reason: str | None) -> None:
    judged, hopeless = judge_epoch(make_evidence(**changes))
    assert judged is state
    assert (hopeless or "").startswith(reason or "")
    assert (hopeless is None) == (reason is None) == (state not in HOPELESS_STATES)


# What the scale can still reach, against the scaler itself


@dataclasses.dataclass
class Course:
    """A real ``GradScaler`` driven by gradients that overflow or not, as told."""

    scaler: torch.amp.GradScaler

    def used_scales(self, steps: int, *, overflow: bool) -> list[float]:
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        used = []
        for _ in range(steps):
            used.append(self.scaler.get_scale())
            self.scaler.scale(weight.sum()).backward()
            weight.grad = torch.full_like(weight, INF if overflow else 0.0)
            self.scaler.step(optimizer)
            self.scaler.update()
        return used


@given(
    exponent=st.integers(-20, 40),
    growth_factor=st.sampled_from([1.5, 2.0, 4.0]),
    backoff_factor=st.sampled_from([0.5, 0.9]),
    growth_interval=st.integers(1, 9),
    before=st.integers(0, 12),
    steps_left=st.integers(1, 12),
)
def test_outlook_is_what_a_grad_scaler_reaches(
    exponent: int, growth_factor: float, backoff_factor: float, growth_interval: int, before: int, steps_left: int
) -> None:
    factors: dict[str, Any] = {"growth_factor": growth_factor, "backoff_factor": backoff_factor}
    factors["growth_interval"] = growth_interval
    for overflow in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, **factors)
        course = Course(scaler)
        course.used_scales(max(before, 1), overflow=False)
        state = scaler.state_dict()
        outlook = look_ahead(state, state["scale"], steps_left)
        last_used = course.used_scales(steps_left, overflow=overflow)[-1]
        expected = max(last_used, min(COLLAPSED_SCALE, state["scale"])) if overflow else last_used
        assert (outlook.lowest if overflow else outlook.highest) == pytest.approx(expected, rel=1e-5)


def test_outlook_without_a_step_left_is_the_present_scale() -> None:
    state = {"scale": 8.0, "_growth_tracker": 1, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9}
    outlook = look_ahead(state, 4.0, 0)
    assert outlook == ScaleOutlook(scale=8.0, smallest_so_far=4.0, lowest=8.0, highest=8.0)


def test_outlook_survives_scales_and_intervals_at_the_ends_of_their_ranges() -> None:
    state = {"_growth_tracker": 0, "growth_factor": 1e30, "backoff_factor": 1e-30, "growth_interval": 1}
    outlook = look_ahead(state | {"scale": 2.0**-126}, 2.0**-126, 10**6)
    assert (outlook.lowest, outlook.highest) == (2.0**-126, 2.0**127)
    assert look_ahead(state | {"scale": 2.0**60}, 2.0**60, 10**6).lowest == COLLAPSED_SCALE
    for scale in (0.0, INF, NAN):
        assert look_ahead(state | {"scale": scale}, scale, 5).highest == 0.0


# Runs whose end is known


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """Training in which gradients overflow above one scale and vanish below another, and learn in between."""

    init_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    ceiling: float
    floor: float
    epoch_steps: int
    max_epochs: int

    def epochs(self) -> Iterator[tuple[EpochEvidence, bool]]:
        """The evidence after each epoch, and whether some step of the epoch made the model better."""
        scale = smallest = self.init_scale
        tracker = applied = skipped = 0
        learned_ever = False
        for epoch in range(1, self.max_epochs + 1):
            epoch_skipped, learned = 0, False
            for _ in range(self.epoch_steps):
                if scale > self.ceiling:
                    scale, tracker, epoch_skipped = scale * self.backoff_factor, 0, epoch_skipped + 1
                    smallest = min(smallest, scale)
                    continue
                applied += 1
                learned |= scale >= self.floor
                tracker += 1
                if tracker == self.growth_interval:
                    scale, tracker = scale * self.growth_factor, 0
            skipped += epoch_skipped
            learned_ever |= learned
            left = (self.max_epochs - epoch) * self.epoch_steps
            outlook = look_ahead(vars(self) | {"scale": scale, "_growth_tracker": tracker}, smallest, left)
            share = None if scale > self.ceiling else float(scale < self.floor)
            yield (
                make_evidence(
                    has_learned=learned_ever,
                    weights_moved=learned_ever,
                    epoch_steps=self.epoch_steps,
                    epoch_skipped=epoch_skipped,
                    applied_steps=applied,
                    skipped_steps=skipped,
                    underflow_share=share,
                    outlook=outlook,
                    overflows_at_lowest=outlook.lowest > self.ceiling if epoch_skipped == self.epoch_steps else None,
                    vanishes_at_highest=outlook.highest < self.floor if share == 1 else None,
                    is_last_epoch=epoch == self.max_epochs,
                ),
                learned,
            )


# The window in which fp16 training works is wide: 2^-12 to 2^20 for the small network.
SYNTHETIC = st.builds(
    SyntheticRun,
    init_scale=st.integers(-40, 60).map(lambda e: 2.0**e),
    growth_factor=st.sampled_from([1.1, 2.0, 4.0]),
    backoff_factor=st.sampled_from([0.25, 0.5, 0.9, 0.99]),
    growth_interval=st.sampled_from([1, 3, 10, 50, 200, 2000]),
    ceiling=st.integers(10, 24).map(lambda e: 2.0**e),
    floor=st.integers(-20, -2).map(lambda e: 2.0**e),
    epoch_steps=st.sampled_from([5, 20, 53]),
    max_epochs=st.integers(1, 8),
)


@example(
    run=SyntheticRun(  # its scale becomes useful with the last update, which serves no step any more
        init_scale=2.0**-22,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=1,
        ceiling=2.0**10,
        floor=0.25,
        epoch_steps=20,
        max_epochs=1,
    )
)
@settings(max_examples=400)
@given(run=SYNTHETIC)
def test_no_run_that_would_recover_is_ended_and_what_is_hopeless_ends_with_its_first_epoch(run: SyntheticRun) -> None:
    epochs = list(run.epochs())
    useful = [learned for _, learned in epochs]
    for number, (evidence, _) in enumerate(epochs):
        _, hopeless = judge_epoch(evidence)
        if any(useful):
            assert hopeless is None, f"ended after epoch {number + 1}, useful epochs are {useful}"
        elif not evidence.is_last_epoch:  # after the last one nothing is left to save
            assert hopeless is not None


@pytest.mark.parametrize(
    ("changes", "states"),
    [
        ({}, [STEADY] * 4),
        ({"init_scale": 2.0**40}, [CALIBRATING, *[STEADY] * 3]),
        ({"init_scale": 2.0**40, "backoff_factor": 0.99}, [COLLAPSED] * 4),
        ({"init_scale": 2.0**-20, "growth_interval": 6}, [STARVED, STARVED, STEADY, STEADY]),
        ({"init_scale": 2.0**-20}, [COLLAPSED] * 4),
    ],
)
def test_states_tell_calibration_from_collapse_and_starvation(
    changes: dict[str, Any], states: list[TrainingState]
) -> None:
    usual = SyntheticRun(
        init_scale=2.0**16,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=2000,
        ceiling=2.0**20,
        floor=2.0**-12,
        epoch_steps=20,
        max_epochs=4,
    )
    run = dataclasses.replace(usual, **changes)
    assert [judge_epoch(evidence)[0] for evidence, _ in run.epochs()] == states


# When to probe


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"is_due": True}, True),
        ({"is_due": True, "precision": "bf16"}, False),  # only fp16 underflows
        ({"weights_moved": False}, True),
        ({"weights_moved": False, "precision": "fp32"}, False),
        ({"has_learned": False}, True),
        ({"has_learned": False, "precision": "fp32"}, True),  # a network may be dead in every precision
        ({"skipped": 3}, False),  # a model that has learned keeps its value
        ({"has_learned": None}, False),
        ({"has_learned": None, "skipped": 3}, True),
        ({"has_learned": None, "skipped": 3, "precision": "bf16"}, False),
    ],
)
def test_gradients_are_probed_while_the_end_of_the_trial_depends_on_it(changes: dict[str, Any], expected: bool) -> None:
    plain = {"precision": "fp16", "has_learned": True, "weights_moved": True, "skipped": 0, "is_due": False}
    assert is_probe_needed(**{**plain, **changes}) is expected


def test_no_trial_would_have_ended_by_a_probe_that_was_left_out() -> None:
    left_out = 0
    for has_learned, moved, skipped, scale, is_last_epoch in itertools.product(
        (True, False, None), (True, False), (0, 9, 50), (2.0**16, 2.0**-30, 0.0, INF), (True, False)
    ):
        falls_unskipped = scale != 2.0**16 and not skipped
        if falls_unskipped or is_probe_needed(
            precision="fp16", has_learned=has_learned, weights_moved=moved, skipped=skipped, is_due=False
        ):
            continue
        for is_dead, share, overflows, vanishes in itertools.product((True, False), (0.0, 1.0), *[(True, None)] * 2):
            evidence = make_evidence(
                has_learned=has_learned,
                weights_moved=moved,
                epoch_skipped=skipped,
                skipped_steps=skipped,
                is_last_epoch=is_last_epoch,
                is_dead=is_dead,
                underflow_share=share,
                outlook=make_outlook(scale),
                overflows_at_lowest=overflows,
                vanishes_at_highest=vanishes,
            )
            assert judge_epoch(evidence)[1] is None
            left_out += 1
    assert left_out > 100
