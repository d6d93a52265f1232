"""One training step under mixed precision: what the scaler did is told exactly, and costs no wait for the device."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tune_amp.training.amp import (
    AmpStep,
    ScalerTelemetry,
    describe_hardware,
    flushing_denormals,
    fp32_arithmetic,
    summarise_steps,
)
from tune_amp.training.optimizers import build_optimizer
from tune_amp.trial.config import OPTIMIZERS, PRECISIONS, TrialConfig

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
every_device = pytest.mark.parametrize("device_name", ["cpu", pytest.param("cuda", marks=gpu)])

OUTPUT_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POISONS = {"fine": None, "inf": math.inf, "nan": math.nan}


def make_config(**settings: Any) -> TrialConfig:
    return TrialConfig(**{"precision": "fp16", "lr": 0.01, "batch_size": 8, "init_scale": 2.0**10, **settings})


def make_model(seed: int = 0, device: torch.device = CPU) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).to(device)


def make_batches(count: int, seed: int = 0, device: torch.device = CPU) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 5, generator=generator).to(device), torch.randint(3, (8,), generator=generator).to(device))
        for _ in range(count)
    ]


def make_loss(model: nn.Module, batch: tuple[Tensor, Tensor], poison: str = "fine") -> Tensor:
    """Cross entropy, always finite; ``poison`` multiplies its gradient."""
    logits: Tensor = model(batch[0])
    factor = POISONS[poison]
    if factor is not None:
        logits.register_hook(lambda gradient: gradient * factor)
    return nn.functional.cross_entropy(logits, batch[1])


class Trained:
    """A tiny model trained by ``AmpStep``."""

    def __init__(self, config: TrialConfig, device: torch.device = CPU, max_steps: int = 64) -> None:
        self.model = make_model(config.seed, device)
        self.optimizer = build_optimizer(config, self.model)
        self.amp = AmpStep(config, device, max_steps)

    def step(self, batch: tuple[Tensor, Tensor], poison: str = "fine") -> None:
        with self.amp.autocast():
            loss = make_loss(self.model, batch, poison)
        self.amp.step(self.optimizer, loss)

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def equal_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether both hold the same values; NaN equals NaN."""
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def expand(telemetry: ScalerTelemetry, first: int, last: int) -> list[float]:
    """The scale in force at each of the steps ``first`` to ``last``."""
    starts, values = telemetry.loss_scale_steps, telemetry.loss_scale_values
    assert len(starts) == len(values)
    assert all(a < b for a, b in itertools.pairwise(starts))
    assert all(a != b for a, b in itertools.pairwise(values))
    return [values[sum(start <= step for start in starts) - 1] for step in range(first, last + 1)]


@dataclasses.dataclass
class Reference:
    """The textbook's loop, which waits for the device after every step and keeps lists."""

    config: TrialConfig
    device: torch.device
    losses: list[float] = dataclasses.field(default_factory=list)
    used_scales: list[float] = dataclasses.field(default_factory=list)
    scales_after: list[float] = dataclasses.field(default_factory=list)
    skipped: list[bool] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        assert config.init_scale is not None
        assert config.growth_factor is not None
        assert config.backoff_factor is not None
        assert config.growth_interval is not None
        self.model = make_model(config.seed, self.device)
        self.optimizer = build_optimizer(config, self.model)
        self.scaler = torch.amp.GradScaler(
            self.device.type, config.init_scale, config.growth_factor, config.backoff_factor, config.growth_interval
        )

    def step(self, batch: tuple[Tensor, Tensor], poison: str) -> None:
        self.used_scales.append(self.scaler.get_scale())
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.float16):
            loss = make_loss(self.model, batch, poison)
        self.scaler.scale(loss).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.skipped.append(not all(bool(gradient.isfinite().all()) for gradient in gradients))
        if self.config.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        counted = self.adam_steps()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.config.optimizer != "sgd":
            assert (self.adam_steps() == counted) == self.skipped[-1]
        self.losses.append(loss.item())
        self.scales_after.append(self.scaler.get_scale())

    def adam_steps(self) -> float:
        states = list(self.optimizer.state.values())
        return float(states[0]["step"]) if states and "step" in states[0] else 0.0

    def telemetry(self) -> dict[str, Any]:
        """What ``ScalerTelemetry`` must say, the trajectory left out."""
        every_scale = [self.used_scales[0], *self.scales_after]
        return {
            "steps": len(self.losses),
            "applied_steps": self.skipped.count(False),
            "skipped_steps": self.skipped.count(True),
            "growths": sum(after > used for used, after in zip(self.used_scales, self.scales_after, strict=True)),
            "first_applied_step": self.skipped.index(False) + 1 if False in self.skipped else None,
            "loss_scale": every_scale[-1],
            "min_loss_scale": min(every_scale),
            "max_loss_scale": max(every_scale),
        }


scaler_settings = st.fixed_dictionaries(
    {
        "init_scale": st.one_of(st.integers(-20, 40).map(lambda exponent: 2.0**exponent), st.just(2.0**127)),
        "growth_factor": st.sampled_from([1.001, 1.5, 2.0, 3.0, 2.0**12]),
        "backoff_factor": st.sampled_from([0.001, 0.5, 0.7, 0.99]),
        "growth_interval": st.integers(1, 20),
        "optimizer": st.sampled_from(OPTIMIZERS),
        "grad_clip": st.sampled_from([None, 0.05]),
        "seed": st.integers(0, 3),
    }
)
epochs_of_poisons = st.lists(
    st.lists(st.sampled_from(["fine"] * 5 + ["inf", "nan"]), min_size=1, max_size=10), min_size=1, max_size=4
)


@every_device
@settings(max_examples=60, database=None)
@given(scaler_settings=scaler_settings, epochs=epochs_of_poisons)
@example(scaler_settings={"init_scale": 2.0**127, "growth_interval": 1}, epochs=[["fine"] * 10] * 3)
@example(scaler_settings={"init_scale": 2.0**10, "growth_interval": 1, "growth_factor": 64.0}, epochs=[["fine"] * 9])
@example(scaler_settings={"init_scale": 2.0**-20, "growth_interval": 2}, epochs=[["nan"] * 4, ["inf"], ["fine"] * 5])
def test_telemetry_and_weights_equal_those_of_a_loop_that_looks_after_every_step(
    device_name: str, scaler_settings: dict[str, Any], epochs: list[list[str]]
) -> None:
    config, device = make_config(**scaler_settings), torch.device(device_name)
    trained, reference = Trained(config, device, max_steps=10), Reference(config, device)
    batches = iter(make_batches(sum(map(len, epochs)), config.seed, device))
    for poisons in epochs:
        before = len(reference.losses)
        for poison in poisons:
            batch = next(batches)
            trained.step(batch, poison)
            reference.step(batch, poison)
        loss, telemetry = trained.amp.read_epoch(), trained.amp.telemetry
        counted = [
            loss
            for loss, skipped in zip(reference.losses[before:], reference.skipped[before:], strict=True)
            if math.isfinite(loss) or not skipped
        ]
        # NaN where a scale that went down to nothing made the weights NaN.
        assert loss == pytest.approx(np.mean(counted) if counted else math.nan, rel=0, abs=0, nan_ok=True)
        told = dataclasses.asdict(telemetry)
        assert {name: told[name] for name in reference.telemetry()} == reference.telemetry()
        assert expand(telemetry, before + 1, len(reference.losses)) == reference.used_scales[before:]
        assert telemetry.loss_scale_steps[0] == before + 1
        assert equal_bits(trained.weights(), list(reference.model.parameters()))


def test_an_epoch_without_steps_changes_nothing_and_has_no_loss() -> None:
    trained = Trained(make_config())
    assert math.isnan(trained.amp.read_epoch())
    assert trained.amp.telemetry == ScalerTelemetry(loss_scale=2.0**10, min_loss_scale=2.0**10, max_loss_scale=2.0**10)
    trained.step(make_batches(1)[0])
    trained.amp.read_epoch()
    before = trained.amp.telemetry
    assert math.isnan(trained.amp.read_epoch())
    assert trained.amp.telemetry == dataclasses.replace(before, loss_scale_steps=(), loss_scale_values=())


def test_mean_loss_leaves_out_skipped_steps_whose_own_loss_is_not_finite() -> None:
    config = make_config()
    trained, reference, unscaled = Trained(config), Reference(config, CPU), Trained(TrialConfig(precision="fp32"))
    first, second, third = make_batches(3)
    loud = torch.full_like(first[0], math.inf), first[1]
    for batch, poison in ((first, "fine"), (loud, "fine"), (second, "inf"), (third, "fine")):
        trained.step(batch, poison)
        reference.step(batch, poison)
        unscaled.step(batch)
    assert reference.skipped == [False, True, True, False]
    assert [math.isfinite(loss) for loss in reference.losses] == [True, False, True, True]
    assert trained.amp.read_epoch() == np.mean([loss for loss in reference.losses if math.isfinite(loss)])
    trained.step(loud)
    assert math.isnan(trained.amp.read_epoch())
    assert math.isnan(unscaled.amp.read_epoch())  # it applied the step


# summarise_steps against counting by hand


def count_by_hand(start: float, scales: list[float], overflows: list[bool]) -> ScalerTelemetry:
    scale = low = high = start
    applied = skipped = growths = 0
    first: int | None = None
    steps: list[int] = []
    values: list[float] = []
    for number, (after, overflow) in enumerate(zip(scales, overflows, strict=True), start=1):
        if not values or values[-1] != scale:
            steps.append(number)
            values.append(scale)
        if overflow:
            skipped += 1
        else:
            applied += 1
            first = first or number
        if after > scale:
            growths += 1
        scale = after
        low, high = min(low, scale), max(high, scale)
    return ScalerTelemetry(
        steps=len(scales),
        applied_steps=applied,
        skipped_steps=skipped,
        growths=growths,
        first_applied_step=first,
        loss_scale=scale,
        min_loss_scale=low,
        max_loss_scale=high,
        loss_scale_steps=tuple(steps),
        loss_scale_values=tuple(values),
    )


SCALES = [0.0, 2.0**-149, 2.0**-3, 1.0, 4.0, 2.0**127, math.inf]


@settings(max_examples=200, database=None)
@given(
    start=st.sampled_from(SCALES),
    steps=st.lists(st.tuples(st.sampled_from(SCALES), st.booleans()), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_steps_are_summarised_as_counted_by_hand_however_they_are_cut_into_epochs(
    start: float, steps: list[tuple[float, bool]], cuts: list[int]
) -> None:
    scales, overflows = [scale for scale, _ in steps], [overflow for _, overflow in steps]
    telemetry = ScalerTelemetry(loss_scale=start, min_loss_scale=start, max_loss_scale=start)
    used: list[float] = []
    bounds = [0, *sorted(min(cut, len(steps)) for cut in cuts), len(steps)]
    for begin, end in itertools.pairwise(bounds):
        telemetry = summarise_steps(
            telemetry, np.array(scales[begin:end], np.float32), np.array(overflows[begin:end], np.bool_)
        )
        used += expand(telemetry, begin + 1, end)
    expected = count_by_hand(start, scales, overflows)
    assert used == [start, *scales][: len(steps)]
    if len(bounds) == 2:
        assert telemetry == expected
    else:
        whole, cut = (
            dataclasses.replace(each, loss_scale_steps=(), loss_scale_values=()) for each in (expected, telemetry)
        )
        assert cut == whole


# Skipped steps


@pytest.mark.parametrize("poison", ["inf", "nan"])
@pytest.mark.parametrize("grad_clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipped_step_leaves_weights_and_optimizer_state_unchanged(
    optimizer: str, grad_clip: float | None, poison: str
) -> None:
    trained = Trained(make_config(optimizer=optimizer, grad_clip=grad_clip, weight_decay=0.1))
    first, second, third = make_batches(3)
    trained.step(first)
    weights, state = trained.weights(), copy.deepcopy(trained.optimizer.state_dict())
    trained.step(second, poison)
    assert equal_bits(trained.weights(), weights)
    for index, entry in trained.optimizer.state_dict()["state"].items():
        assert entry.keys() == state["state"][index].keys()
        assert all(torch.equal(entry[key], state["state"][index][key]) for key in entry)
        assert optimizer == "sgd" or float(entry["step"]) == 1
    trained.step(third)
    assert not equal_bits(trained.weights(), weights)
    trained.amp.read_epoch()
    assert (trained.amp.telemetry.applied_steps, trained.amp.telemetry.skipped_steps) == (2, 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_run_whose_first_steps_are_skipped_goes_on_as_if_they_had_not_been(optimizer: str) -> None:
    # Fused SGD leaves its momentum as uninitialised memory where the very first step is skipped (FACTS 20).
    config = make_config(optimizer=optimizer, backoff_factor=0.5)
    late, prompt = Trained(config), Trained(dataclasses.replace(config, init_scale=2.0**8))
    batches = make_batches(4)
    late.step(batches[0], "inf")
    late.step(batches[1], "nan")
    for batch in batches[2:]:
        late.step(batch)
        prompt.step(batch)
    assert equal_bits(late.weights(), prompt.weights())
    assert all(bool(weight.isfinite().all()) for weight in late.weights())
    late.amp.read_epoch()
    assert late.amp.telemetry.first_applied_step == 3


def test_momentum_of_fused_sgd_begins_at_zero_and_gives_the_updates_of_the_unfused_one() -> None:
    config = make_config(optimizer="sgd", precision="fp32", init_scale=None, weight_decay=0.01)
    trained, model = Trained(config), make_model()
    buffers = [state["momentum_buffer"] for state in trained.optimizer.state.values()]
    assert len(buffers) == len(list(trained.model.parameters()))
    assert not any(bool(buffer.any()) for buffer in buffers)
    plain = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=0.01, fused=False, foreach=False)
    for batch in make_batches(3):
        trained.step(batch)
        plain.zero_grad()
        make_loss(model, batch).backward()
        plain.step()
    for ours, theirs in zip(trained.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


# Clipping


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_clipping_sees_the_unscaled_gradients(optimizer: str) -> None:
    clip, scale = 0.05, 2.0**10
    config = make_config(optimizer=optimizer, grad_clip=clip, init_scale=scale, lr=0.1)

    def train_by_hand(order: str) -> tuple[list[Tensor], list[float]]:
        model, norms = make_model(), []
        hand = build_optimizer(config, model)
        for batch in make_batches(3):
            hand.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = make_loss(model, batch)
            (loss * scale).backward()
            for action in order.split():
                if action == "clip":
                    norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
                else:
                    for parameter in model.parameters():
                        assert parameter.grad is not None
                        parameter.grad /= scale
            hand.step()
        return [parameter.detach() for parameter in model.parameters()], norms

    trained = Trained(config)
    for batch in make_batches(3):
        trained.step(batch)
    weights, norms = train_by_hand("unscale clip")
    assert min(norms) > clip  # else nothing was clipped
    assert equal_bits(trained.weights(), weights)
    assert not equal_bits(weights, train_by_hand("clip unscale")[0])
    assert not equal_bits(weights, train_by_hand("unscale")[0])


# Precision


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_state_and_loss_are_float32_and_products_are_in_the_precision(precision: str, optimizer: str) -> None:
    trained = Trained(make_config(precision=precision, optimizer=optimizer, init_scale=None))
    outputs: list[torch.dtype] = []
    for layer in trained.model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.dtype))
    for batch in make_batches(2):
        with trained.amp.autocast():
            loss = make_loss(trained.model, batch)
        assert loss.dtype == torch.float32
        trained.amp.step(trained.optimizer, loss)
    assert outputs == [OUTPUT_DTYPES[precision]] * 4
    gradients = [parameter.grad for parameter in trained.model.parameters()]
    state = [value for entry in trained.optimizer.state.values() for value in entry.values()]
    assert state
    for tensor in [*trained.model.parameters(), *gradients, *state]:
        assert tensor is not None
        assert tensor.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("grad_clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_without_a_scaler_training_is_a_plain_loop(precision: str, optimizer: str, grad_clip: float | None) -> None:
    config = make_config(precision=precision, optimizer=optimizer, grad_clip=grad_clip, init_scale=None)
    trained, model = Trained(config), make_model()
    plain, losses = build_optimizer(config, model), []
    batches = make_batches(4)
    for batch in batches[:3]:
        trained.step(batch)
        plain.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = make_loss(model, batch)
        loss.backward()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        plain.step()
        losses.append(loss.item())
    assert not trained.amp.scaler.is_enabled()
    assert trained.amp.read_epoch() == np.mean(losses)
    assert trained.amp.telemetry == ScalerTelemetry(steps=3, applied_steps=3, first_applied_step=1)
    assert equal_bits(trained.weights(), list(model.parameters()))
    trained.step(batches[3])
    trained.amp.read_epoch()
    assert trained.amp.telemetry == ScalerTelemetry(steps=4, applied_steps=4, first_applied_step=1)


def test_without_a_scaler_nothing_guards_against_bad_gradients() -> None:
    trained = Trained(make_config(precision="bf16", init_scale=None))
    trained.step(make_batches(1)[0], "nan")
    trained.amp.read_epoch()
    assert trained.amp.telemetry.applied_steps == 1
    assert trained.weights()[0].isnan().any()


def test_static_loss_scale_is_an_interval_beyond_the_steps() -> None:
    trained = Trained(make_config(growth_interval=21))
    for batch in make_batches(20):
        trained.step(batch)
    trained.amp.read_epoch()
    telemetry = trained.amp.telemetry
    assert (telemetry.growths, telemetry.loss_scale, telemetry.skipped_steps) == (0, 2.0**10, 0)
    assert (telemetry.loss_scale_steps, telemetry.loss_scale_values) == ((1,), (2.0**10,))
    trained.step(make_batches(1)[0])
    trained.amp.read_epoch()
    assert (trained.amp.telemetry.growths, trained.amp.telemetry.loss_scale) == (1, 2.0**11)


# Checkpoints


def train_epoch(config: TrialConfig, poisons: Sequence[str] = ("fine",) * 5) -> Trained:
    trained = Trained(config)
    for batch, poison in zip(make_batches(len(poisons)), poisons, strict=True):
        trained.step(batch, poison)
    trained.amp.read_epoch()
    return trained


def test_restored_scaler_goes_on_where_it_stopped_with_its_growth_tracker() -> None:
    config = make_config(growth_interval=8)
    saved = train_epoch(config, ["nan", "fine", "fine", "fine", "fine", "fine"])
    again = AmpStep(config, CPU, 64)
    again.load_state_dict(copy.deepcopy(saved.amp.state_dict()))
    assert again.telemetry == saved.amp.telemetry
    restored = Trained(config)
    restored.amp = again
    for trained in (saved, restored):
        for batch in make_batches(3):  # five good steps lie behind: the third of these is the eighth
            trained.step(batch)
        trained.amp.read_epoch()
        telemetry = trained.amp.telemetry
        assert (telemetry.loss_scale, telemetry.growths, telemetry.steps) == (2.0**10, 1, 9)
        assert (telemetry.loss_scale_steps, telemetry.loss_scale_values) == ((7,), (2.0**9,))
        assert (telemetry.skipped_steps, telemetry.first_applied_step) == (1, 2)


def test_state_has_only_plain_values_and_is_a_snapshot() -> None:
    saved = train_epoch(make_config())
    state = saved.amp.state_dict()
    kept = copy.deepcopy(state)
    saved.step(make_batches(1)[0], "inf")
    saved.amp.read_epoch()
    assert state == kept
    saved.step(make_batches(1)[0])
    with pytest.raises(AssertionError):  # steps not yet read would be lost
        saved.amp.state_dict()
    saved.amp.read_epoch()
    saved.amp.position = torch.ones(1, dtype=torch.int64)  # as a captured step counts
    with pytest.raises(AssertionError):
        saved.amp.state_dict()


# What is left in fp32, and what the hardware can do


FP32_SETTINGS = {
    "CUDA matmul": torch.backends.cuda.matmul,
    "CUDA conv": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    "CUDA rnn": torch.backends.cudnn.rnn,
    "CPU matmul": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    "CPU conv": torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    "CPU rnn": torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
}


def fp32_flags() -> dict[str, str]:
    return {name: setting.fp32_precision for name, setting in FP32_SETTINGS.items()}


def older_switches() -> tuple[str, bool, bool]:
    """Torch raises where one contradicts the settings above."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    return torch.get_float32_matmul_precision(), matmul, torch.backends.cudnn.allow_tf32


def strict_but(precision: str) -> dict[str, str]:
    return {name: "tf32" if precision == "tf32" and name.startswith("CUDA") else "ieee" for name in FP32_SETTINGS}


@pytest.fixture
def put_back() -> Iterator[None]:
    """Put the settings back that a test changes, torch's own being consistent."""
    before, (matmul_precision, _, cudnn_tf32) = fp32_flags(), older_switches()
    yield
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    set_flags(before)


def set_flags(flags: dict[str, str]) -> None:
    for name, value in flags.items():
        FP32_SETTINGS[name].fp32_precision = value


MIXED_FLAGS = dict(zip(FP32_SETTINGS, ("tf32", "ieee", "tf32", "bf16", "tf32", "ieee"), strict=True))


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp32_arithmetic_is_strict_but_for_tf32_and_put_back(precision: str) -> None:
    set_flags(MIXED_FLAGS)  # they differ from each other and from what any precision asks for
    with fp32_arithmetic(precision):
        assert fp32_flags() == strict_but(precision)
        with fp32_arithmetic("fp32"):  # as evaluation does inside training
            assert fp32_flags() == strict_but("fp32")
        assert fp32_flags() == strict_but(precision)
    assert fp32_flags() == MIXED_FLAGS
    with pytest.raises(KeyError), fp32_arithmetic(precision):
        raise KeyError
    assert fp32_flags() == MIXED_FLAGS


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("chosen", [None, "highest", "high", "medium"])
@pytest.mark.parametrize("cudnn_tf32", [None, False, True])
def test_older_switches_can_be_read_and_are_put_back(
    cudnn_tf32: bool | None, chosen: str | None, precision: str
) -> None:
    if chosen is not None:
        torch.set_float32_matmul_precision(chosen)
    if cudnn_tf32 is not None:
        torch.backends.cudnn.allow_tf32 = cudnn_tf32
    flags, switches = fp32_flags(), older_switches()
    tf32 = precision == "tf32"
    with fp32_arithmetic(precision):
        assert fp32_flags() == strict_but(precision)
        assert older_switches() == ("high" if tf32 else "highest", tf32, tf32)
        with torch.backends.cudnn.flags(enabled=False):  # as a user's module may; it reads the switch
            pass
    assert (fp32_flags(), older_switches()) == (flags, switches)


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("cudnn_tf32", [False, True])
def test_older_switches_that_contradict_the_settings_are_put_back_as_well(cudnn_tf32: bool) -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    set_flags(MIXED_FLAGS)
    with fp32_arithmetic("bf16"):
        assert older_switches() == ("highest", False, False)
    assert fp32_flags() == MIXED_FLAGS
    set_flags(dict.fromkeys(FP32_SETTINGS, "ieee") | {"CUDA matmul": "tf32", "CPU matmul": "bf16"})
    set_flags(dict.fromkeys(("CUDA conv", "CUDA rnn"), "tf32" if cudnn_tf32 else "ieee"))
    assert older_switches() == ("medium", True, cudnn_tf32)


@pytest.mark.usefixtures("put_back")
def test_product_on_the_cpu_is_strict_whatever_a_users_module_chose() -> None:
    factor = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("highest")
    strict = factor @ factor
    torch.set_float32_matmul_precision("medium")  # bf16, where the CPU has units for it
    with fp32_arithmetic("fp32"):
        assert torch.equal(factor @ factor, strict)


@pytest.mark.parametrize(
    ("precision", "capability", "enough"),
    [
        ("fp32", (3, 5), True),
        ("fp16", (6, 1), False),
        ("fp16", (7, 0), True),
        ("fp16", (7, 5), True),
        ("bf16", (7, 5), False),
        ("bf16", (8, 0), True),
        ("bf16", (12, 0), True),
        ("tf32", (7, 5), False),
        ("tf32", (8, 0), True),
        ("tf32", (9, 0), True),
    ],
)
def test_gpu_without_tensor_cores_for_a_precision_is_named(
    precision: str, capability: tuple[int, int], enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    text = describe_hardware(precision, torch.device("cuda"))
    if enough:
        assert text is None
    else:
        assert text is not None
        needed = "7.0" if precision == "fp16" else "8.0"
        assert text.startswith(f"Some GPU has compute capability {capability[0]}.{capability[1]}, and {precision}")
        assert f"need {needed}: expect no speed-up from {precision}" in text


def test_cpu_says_that_tf32_is_fp32_there() -> None:
    assert "on the CPU it is computed as fp32" in (describe_hardware("tf32", CPU) or "")
    assert describe_hardware("fp32", CPU) is None


@pytest.mark.parametrize(
    ("precision", "flags"), [("fp16", {"amx_fp16"}), ("bf16", {"amx_bf16", "avx512_bf16"})], ids=["fp16", "bf16"]
)
def test_cpu_without_matrix_units_says_to_expect_no_speed_up(
    precision: str, flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"amx_fp16", "amx_bf16", "avx512_bf16"} - flags
    for capabilities in ({}, dict.fromkeys(flags, False), dict.fromkeys(other, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert f"this CPU has no {precision} matrix units" in (describe_hardware(precision, CPU) or "")
    for flag in flags:  # one is enough
        capabilities = dict.fromkeys(flags, False) | {flag: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert describe_hardware(precision, CPU) is None
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert describe_hardware(precision, CPU) is not None


# Denormals


def test_denormals_are_zero_within_and_only_within() -> None:
    tiny = torch.tensor([1e-40])
    with flushing_denormals():
        assert (tiny * 1).item() == 0
        with flushing_denormals():
            pass
        assert (tiny * 1).item() == 0, "an inner block switched it off"
    assert (tiny * 1).item() > 0


def test_smallest_numbers_of_fp16_are_kept_where_denormals_are_flushed() -> None:
    smallest = torch.tensor([2.0**-24], dtype=torch.float16)
    with flushing_denormals():
        assert (smallest * 1).item() == smallest.float().item() == 2.0**-24
        assert torch.tensor([2.0**-24]).half().item() == 2.0**-24


# No waiting for the device


class CountWaits(TorchDispatchMode):
    """Counts what moves a value from device to host: ``item``, and what is built on it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad_clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_reads_nothing_back_and_an_epoch_is_read_in_one_transfer(
    optimizer: str, grad_clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(make_config(optimizer=optimizer, grad_clip=grad_clip))
    transfers = 0
    to_host: Callable[[Tensor], Tensor] = torch.Tensor.cpu

    def count(tensor: Tensor) -> Tensor:
        nonlocal transfers
        transfers += 1
        return to_host(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", count)
    batches = make_batches(4)
    with CountWaits() as counter:
        for batch, poison in zip(batches, ["fine", "inf", "fine", "nan"], strict=True):
            trained.step(batch, poison)
        assert (counter.waits, transfers) == (0, 0)
        trained.amp.read_epoch()
        assert (counter.waits, transfers) == (0, 1)


def test_counter_of_waits_sees_those_of_an_unfused_optimizer() -> None:
    trained = Trained(make_config())
    trained.optimizer = torch.optim.SGD(trained.model.parameters(), 0.1, fused=False)
    with CountWaits() as counter:
        for batch in make_batches(3):
            trained.step(batch)
    assert counter.waits == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("grad_clip", [None, 0.1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_on_a_gpu_never_waits_for_it(optimizer: str, precision: str, grad_clip: float | None) -> None:
    device = torch.device("cuda")
    config = make_config(optimizer=optimizer, precision=precision, grad_clip=grad_clip, init_scale=None)
    trained, batches = Trained(config, device), make_batches(4, device=device)
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches:
            trained.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert math.isfinite(trained.amp.read_epoch())
    assert trained.amp.telemetry.steps == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("position", [None, torch.zeros(1, dtype=torch.int64)])
def test_loss_of_another_dtype_is_logged_in_fp32(position: Tensor | None, dtype: torch.dtype, precision: str) -> None:
    """As that of a user's task that averages what the model returns under autocast."""
    scale = 8.0 if precision == "fp16" else None  # the default's product with a loss in fp16 is infinite
    step = AmpStep(TrialConfig(precision=precision, init_scale=scale), CPU, max_steps=2)
    step.position = position
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0, fused=True)
    for value in (1.5, 2.5):
        step.step(optimizer, (weight * value).to(dtype))
    assert step.read_epoch() == 2.0
    assert (step.telemetry.applied_steps, step.telemetry.skipped_steps) == (2, 0)
