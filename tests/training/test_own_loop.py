"""A user's own training loop: its metrics, its scaler's telemetry, its checkpoints, and what it is refused for."""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tune_amp.results.records import SCHEMAS
from tune_amp.training.amp import AmpStep
from tune_amp.training.data import load_dataset
from tune_amp.training.models import simple_net
from tune_amp.training.own_loop import OwnRun
from tune_amp.training.own_trial import TelemetryScaler, Trial
from tune_amp.training.run import TrainingRun
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import COMMON_METRICS, RESERVED_NAMES, EpochMetrics, InputError, TrialConfig
from tune_amp.trial.text import shown

CPU = torch.device("cpu")
NAN = math.nan
TOO_HIGH = 2.0**15
"""A loss scale at which the first fp16 gradients of ``regression`` overflow, but not those of its whole first epoch."""


def make_config(**settings: Any) -> TrialConfig:
    return TrialConfig(train="mine:train", **{"max_epochs": 3, "precision": "fp16", "lr": 0.05, **settings})


def regression(trial: Trial) -> Iterator[Mapping[str, Any]]:
    """A line through random points, with dropout and shuffling, so that it draws from two generators."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    order = torch.Generator().manual_seed(trial.seed)
    trial.keep(model=model, optimizer=optimizer, schedule=schedule, order=order)
    x = torch.linspace(-1, 1, 64).reshape(16, 4)
    y = x.sum(dim=1, keepdim=True)
    for _ in trial.epochs():
        for batch in torch.randperm(16, generator=order).split(4):
            take_step(trial, model, optimizer, x[batch], y[batch])
        schedule.step()
        model.eval()
        yield {"train_loss": 1.0, "val_mse": nn.functional.mse_loss(model(x), y)}
        model.train()


def take_step(trial: Trial, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    with trial.autocast():
        loss = nn.functional.mse_loss(model(x), y)
    trial.scaler.scale(loss).backward()
    trial.scaler.step(optimizer)
    trial.scaler.update()


def run(function: Callable[[Trial], Any], **settings: Any) -> list[EpochMetrics]:
    return list(OwnRun(make_config(**settings), function, CPU).epochs())


def without_seconds(metrics: EpochMetrics) -> dict[str, Any]:
    return {name: value for name, value in vars(metrics).items() if "second" not in name}


# ---- metrics and telemetry ----


def test_a_loop_runs_without_a_search() -> None:
    yielded = list(regression(Trial(make_config(), CPU)))
    assert [metrics.keys() for metrics in yielded] == [{"train_loss", "val_mse"}] * 3


def test_what_is_yielded_is_reported_with_the_scaler_s_telemetry() -> None:
    last = run(regression, init_scale=TOO_HIGH, growth_interval=3)[-1]
    assert (last.epoch, last.train_loss, last.val_loss, last.val_accuracy) == (3, 1.0, None, None)
    assert last.metrics.keys() == {"val_mse"}
    assert (last.steps, last.applied_steps + last.skipped_steps) == (12, 12)
    assert last.skipped_steps > 0  # fp16 gradients overflow at that scale
    assert last.max_loss_scale == TOO_HIGH
    assert last.loop == "own"
    assert last.samples_per_second > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_are_counted_without_loss_scaling_too(precision: str) -> None:
    last = run(regression, precision=precision)[-1]
    assert (last.steps, last.applied_steps, last.skipped_steps, last.first_applied_step) == (12, 12, 0, 1)
    assert last.loss_scale is None


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_built_in_training_and_an_own_loop_that_does_the_same_have_equal_losses(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset("digits")
    images = torch.from_numpy(dataset.train.images) * (1 / 255)
    labels = torch.from_numpy(dataset.train.labels)
    settings: dict[str, Any] = {"precision": precision, "max_epochs": 2, "lr": 1e-3}
    own: list[Tensor] = []

    def train(trial: Trial) -> Iterator[Mapping[str, float]]:
        model = simple_net((1, 28, 28), 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=trial.lr, fused=True)
        order = torch.Generator().manual_seed(trial.seed)
        for _ in trial.epochs():
            permuted = torch.randperm(len(labels), generator=order)
            for batch in permuted[: len(labels) // trial.batch_size * trial.batch_size].split(trial.batch_size):
                optimizer.zero_grad()
                with trial.autocast():
                    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                trial.scaler.scale(loss).backward()
                trial.scaler.step(optimizer)
                trial.scaler.update()
                own.append(loss.detach())
            yield {"train_loss": 0.0}

    built_in: list[Tensor] = []
    step = AmpStep.step

    def record(amp: AmpStep, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        built_in.append(loss.detach())
        step(amp, optimizer, loss)

    monkeypatch.setattr(AmpStep, "step", record)
    data = TrainingData(dataset.train, None, dataset.num_classes, CPU)
    theirs = list(TrainingRun(TrialConfig(**settings), data).epochs())[-1]
    ours = run(train, **settings)[-1]
    assert len(own) == 2 * (len(labels) // 64)
    assert torch.equal(torch.stack(own), torch.stack(built_in))
    for name in ("steps", "applied_steps", "skipped_steps", "loss_scale", "loss_scale_values", "loss_scale_steps"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_a_step_of_two_optimizers_counts_once_and_as_skipped_if_one_overflows() -> None:
    trial = Trial(make_config(init_scale=2.0), CPU)
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    for factors in ((1.0, 1.0), (1.0, math.inf), (1.0, 1.0)):
        for factor, weight, optimizer in zip(factors, weights, optimizers, strict=True):
            weight.grad = None
            trial.scaler.scale(weight.sum() * factor).backward()
            trial.scaler.step(optimizer)
        trial.scaler.update()
    telemetry = trial.scaler.read()
    assert (telemetry.steps, telemetry.skipped_steps, telemetry.loss_scale) == (3, 1, 1.0)
    assert telemetry.loss_scale_values == (2.0, 1.0)
    assert telemetry.loss_scale_steps == (1, 3)


def test_telemetry_does_not_depend_on_when_it_is_compacted(monkeypatch: pytest.MonkeyPatch) -> None:
    once = without_seconds(run(regression, init_scale=TOO_HIGH, growth_interval=3)[-1])
    monkeypatch.setattr("tune_amp.training.own_trial._LOGGED_STEPS", 2)
    assert without_seconds(run(regression, init_scale=TOO_HIGH, growth_interval=3)[-1]) == once


def test_a_scale_that_the_loop_sets_is_recorded() -> None:
    scaler = TelemetryScaler(make_config(init_scale=8.0), CPU)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update(new_scale=4.0)
    scaler.update(new_scale=2.0)  # without a step
    assert scaler.read().loss_scale == 2.0
    assert scaler.telemetry.skipped_steps == 0


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is read on the host, for which a GPU has to be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def count_reads(scaler: torch.amp.GradScaler) -> int:
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([weight])
    with CountReads() as reads:
        for _ in range(10):
            optimizer.zero_grad()
            scaler.scale(weight.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    return int(reads.count)


def test_recording_never_waits_for_the_device() -> None:
    plain = count_reads(torch.amp.GradScaler("cpu"))
    assert plain > 0  # GradScaler itself reads whether to skip the step
    assert count_reads(TelemetryScaler(make_config(), CPU)) == plain


# ---- checkpoints ----


def save_and_load(state: Mapping[str, Any]) -> Any:
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


def test_a_resumed_loop_continues_bit_for_bit() -> None:
    config = make_config(init_scale=TOO_HIGH, growth_interval=3)
    through = [without_seconds(metrics) for metrics in OwnRun(config, regression, CPU).epochs()]
    first = OwnRun(config, regression, CPU)
    first.train_epoch()
    state = save_and_load(first.state_dict() or {})
    again = OwnRun(config, regression, CPU)
    again.load_state_dict(state)
    assert [without_seconds(metrics) for metrics in again.epochs()] == through[1:]


def test_a_resumed_loop_whose_every_step_is_skipped_ends_as_one_that_ran_through() -> None:
    def train(trial: Trial) -> Iterator[Mapping[str, float]]:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=trial.lr)
        trial.keep(model=model, optimizer=optimizer)
        for _ in trial.epochs():
            for _ in range(4):
                take_step(trial, model, optimizer, torch.ones(2, 4), torch.ones(2, 1))
            yield {"val_loss": 1.0}

    config = make_config(init_scale=2.0**120)
    through = [metrics.state for metrics in OwnRun(config, train, CPU).epochs()]
    first, again = (OwnRun(config, train, CPU) for _ in range(2))
    first.train_epoch()
    again.load_state_dict(save_and_load(first.state_dict() or {}))
    assert through == ["calibrating", "calibrating", "collapsed"]
    assert [metrics.state for metrics in again.epochs()] == through[1:]
    assert again.hopeless == "no step was applied: all 12 were skipped"


def test_a_loop_that_keeps_nothing_has_no_state_and_says_so() -> None:
    def train(trial: Trial) -> Iterator[Mapping[str, float]]:
        for _ in trial.epochs():
            yield {"val_loss": 1.0}

    forgetful = OwnRun(make_config(), train, CPU)
    assert forgetful.train_epoch().loop == "own: keeps nothing, starts again if interrupted"
    assert forgetful.state_dict() is None


def test_two_runs_of_a_seed_are_equal_and_leave_the_generators_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = run(regression), run(regression), run(regression, seed=1)
    assert [m.metrics for m in first] == [m.metrics for m in second]
    assert first[-1].metrics != other[-1].metrics
    assert torch.equal(torch.get_rng_state(), before)


def resume_after_one_epoch(function: Callable[[Trial], Any], again: Callable[[Trial], Any] | None = None) -> OwnRun:
    first = OwnRun(make_config(), function, CPU)
    first.train_epoch()
    resumed = OwnRun(make_config(), again or function, CPU)
    resumed.load_state_dict(save_and_load(first.state_dict() or {}))
    return resumed


def keeping(*names: str, late: bool = False, own_epochs: bool = False) -> Callable[[Trial], Iterator[Any]]:
    """A loop that keeps models of these names, within the epochs if ``late``."""

    def train(trial: Trial) -> Iterator[Any]:
        models = {name: nn.Linear(1, 1) for name in names}
        if not late:
            trial.keep(**models)
        for _ in range(trial.max_epochs) if own_epochs else trial.epochs():
            if late:
                trial.keep(**models)
            yield {"val_loss": 1.0}

    return train


def test_what_a_resumed_loop_must_do_is_said_in_one_line() -> None:
    with pytest.raises(
        InputError, match=r"^trial.keep: must be called before trial.epochs\(\), got a after its begin$"
    ):
        OwnRun(make_config(), keeping("a", late=True), CPU).train_epoch()
    with pytest.raises(
        InputError, match=r"^mine:train: must iterate over trial.epochs\(\), which a resumed trial needs$"
    ):
        resume_after_one_epoch(keeping("a", own_epochs=True)).train_epoch()
    with pytest.raises(InputError, match=r"^trial.keep: must keep b before trial.epochs\(\), as the checkpoint does$"):
        resume_after_one_epoch(keeping("a", "b"), keeping("a")).train_epoch()
    with pytest.raises(InputError, match=r"^trial.keep: b: is not in the checkpoint, which holds a$"):
        resume_after_one_epoch(keeping("a"), keeping("a", "b")).train_epoch()


def test_a_state_that_could_not_be_loaded_again_is_refused_at_the_first_checkpoint() -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"path": Path("x")}

        def load_state_dict(self, state: Any) -> None:
            raise AssertionError

    def train(trial: Trial) -> Iterator[Any]:
        trial.keep(odd=Odd())
        for _ in trial.epochs():
            yield {"val_loss": 1.0}

    ours = OwnRun(make_config(), train, CPU)
    ours.train_epoch()
    with pytest.raises(InputError, match=r"^trial.keep: odd: its state must be of tensors and plain values"):
        ours.state_dict()


def test_a_lazy_model_is_watched_once_it_has_its_shape() -> None:
    def train(trial: Trial) -> Iterator[Any]:
        model = nn.LazyLinear(2)
        trial.keep(model=model)
        for _ in trial.epochs():
            model(torch.ones(1, 3))
            nn.init.constant_(model.weight, NAN)
            yield {"val_loss": 1.0}

    assert [metrics.state for metrics in OwnRun(make_config(), train, CPU).epochs()] == ["diverged"]


def test_closing_a_run_ends_its_loop() -> None:
    ended = []

    def train(trial: Trial) -> Iterator[Mapping[str, float]]:
        try:
            yield {"val_loss": 1.0}
        finally:
            ended.append(True)

    ours = OwnRun(make_config(), train, CPU)
    ours.train_epoch()
    ours.close()
    assert ended == [True]


# ---- verdicts ----


def test_weights_that_are_not_finite_end_a_trial() -> None:
    def train(trial: Trial) -> Iterator[Mapping[str, float]]:
        model = nn.Linear(2, 1)
        trial.keep(model=model)
        for epoch in trial.epochs():
            if epoch == 1:
                nn.init.constant_(model.weight, NAN)
            yield {"val_loss": 1.0}

    ours = OwnRun(make_config(), train, CPU)
    assert [metrics.state for metrics in ours.epochs()] == ["steady", "diverged"]
    assert ours.hopeless == "weights are not finite"


def test_an_objective_that_is_not_finite_ends_a_trial() -> None:
    def train(trial: Trial) -> Iterator[Mapping[str, float]]:
        for _ in trial.epochs():
            yield {"val_f1": NAN, "another": NAN}

    ours = OwnRun(make_config(), train, CPU, objectives=["val_f1"])
    assert [metrics.state for metrics in ours.epochs()] == ["diverged"]
    assert ours.hopeless == "val_f1 is nan"


def test_a_dead_scale_ends_a_trial() -> None:
    def train(trial: Trial) -> Iterator[Mapping[str, float]]:
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in trial.epochs():
            for _ in range(60):
                optimizer.zero_grad()
                trial.scaler.scale(weight.sum() * math.inf).backward()
                trial.scaler.step(optimizer)
                trial.scaler.update()
            yield {"val_loss": 1.0}

    ours = OwnRun(make_config(), train, CPU)
    assert [metrics.state for metrics in ours.epochs()] == ["collapsed"]
    assert ours.hopeless is not None
    assert ours.hopeless.startswith("loss_scale collapsed to")


def probed(trial: Trial) -> Iterator[Mapping[str, Any]]:
    """``regression`` with its gradients probed."""
    x = torch.linspace(-1, 1, 64).reshape(16, 4)
    keep = trial.keep

    def keep_and_watch(**named: Any) -> None:
        keep(**named)
        model = named["model"]
        trial.watch(model, lambda: nn.functional.mse_loss(model(x), x.sum(dim=1, keepdim=True)))

    trial.keep = keep_and_watch  # type: ignore[method-assign]
    yield from regression(trial)


def test_gradients_that_underflow_are_seen_where_the_loop_gives_a_loss_to_probe() -> None:
    low, high = (run(probed, init_scale=scale, growth_interval=100)[0] for scale in (2.0**-22, 2.0**10))
    assert (low.state, high.state) == ("starved", "steady")
    assert low.underflow_share is not None
    assert high.underflow_share is not None
    assert low.underflow_share > 0.5 > high.underflow_share
    assert low.probe_seconds > 0
    assert run(regression, init_scale=2.0**-22)[0].underflow_share is None


def test_frozen_model_is_refused_only_where_a_loss_is_to_be_probed() -> None:
    trial = Trial(make_config(), CPU)
    model = nn.Linear(2, 1).requires_grad_(requires_grad=False)
    trial.watch(model)
    rule = r"^trial.watch: model: must have a parameter that requires a gradient if loss is given, got none$"
    with pytest.raises(InputError, match=rule):
        trial.watch(model, lambda: torch.zeros(()))
    assert trial.probed is None


def test_loop_may_train_for_fewer_epochs_than_its_configuration_says() -> None:
    trial = Trial(make_config(max_epochs=3), CPU)
    trial.max_epochs = 2
    assert list(trial.epochs()) == [0, 1]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_probing_changes_no_step(precision: str) -> None:
    with_probe, without = (run(function, precision=precision)[-1] for function in (probed, regression))
    assert with_probe.metrics == without.metrics
    assert with_probe.loss_scale_values == without.loss_scale_values


# ---- what is refused ----


def test_metrics_of_the_test_set_are_for_confirmation_alone() -> None:
    def train(trial: Trial) -> Iterator[Mapping[str, float]]:
        for _ in trial.epochs():
            yield {"val_loss": 1.0, "test_f1": 0.5}

    with pytest.raises(InputError, match=r"^mine:train: epoch 1: test_f1: must be yielded only if trial.confirming"):
        OwnRun(make_config(), train, CPU).train_epoch()
    confirming = OwnRun(make_config(), train, CPU, confirming=True)
    assert confirming.train_epoch().metrics == {}
    assert confirming.tested == {"test_f1": 0.5}


def yielding(*values: Any) -> Callable[[Trial], Iterator[Any]]:
    return lambda trial: iter(values)


@pytest.mark.parametrize(("function", "message"), [
    (lambda trial: None, "mine:train: must yield its metrics after every epoch, but returns NoneType"),
    (yielding(), "mine:train: must yield once for each of trial.epochs(), 3 times, got 0"),
    (yielding(0.5), "mine:train: epoch 1: must yield a mapping of names to numbers, got 0.5"),
    (yielding({"val_f1": "high"}), "mine:train: epoch 1: 'val_f1': must be a number, got 'high'"),
    (yielding({"val_f1": torch.ones(2)}), "mine:train: epoch 1: 'val_f1': must be a number, got tensor([1., 1.])"),
    (yielding({"val/f1": 1.0}), "mine:train: epoch 1: 'val/f1': must be a name of letters, digits and _"),
    (yielding({1: 1.0}), "mine:train: epoch 1: 1: must be a name of letters, digits and _"),
    (yielding({"epoch": 1}), "mine:train: epoch 1: epoch: is the name of another column, choose another name"),
    (yielding({"val_loss": 1}), "mine:train: epoch 1: must yield the objective val_f1, got val_loss"),
    (yielding({"val_f1": 1, "val_f1_mean": 1}),
     "mine:train: epoch 1: val_f1_mean: is the name of another column, choose another name"),
    (yielding({"means": 1}), "mine:train: epoch 1: means: is the name of another column, choose another name"),
    (yielding({"val_f1": 10**400}), f"mine:train: epoch 1: 'val_f1': must be a number, got {shown(10**400)}"),
    (yielding({"val_accuracy": 93.1}), "mine:train: epoch 1: val_accuracy: must be a share between 0 and 1, got 93.1"),
    (yielding({}), "mine:train: epoch 1: must yield the objective val_f1, got nothing"),
])  # fmt: skip
def test_a_loop_that_breaks_the_contract_is_refused_in_one_line(function: Callable[[Trial], Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        OwnRun(make_config(), function, CPU, objectives=["val_f1"]).train_epoch()
    assert str(caught.value) == message


def test_the_names_are_those_of_the_first_epoch() -> None:
    ours = OwnRun(make_config(), yielding({"a": 1, "b": 2}, {"a": 1}), CPU)
    ours.train_epoch()
    with pytest.raises(InputError, match=r"^mine:train: epoch 2: must yield the names of epoch 1, a, b, got a$"):
        ours.train_epoch()


def test_what_is_kept_must_have_a_state() -> None:
    with pytest.raises(InputError, match=r"^trial.keep: data: must have state_dict and load_state_dict, or be"):
        Trial(make_config(), CPU).keep(data=[1, 2])


def test_no_own_metric_shares_the_name_of_a_column() -> None:
    columns = {*itertools.chain.from_iterable(schema.names for schema in SCHEMAS.values())}
    tested = {"test_loss", "test_accuracy"}  # of confirm.parquet, which holds what an own loop tests
    assert columns - {*COMMON_METRICS} - tested <= RESERVED_NAMES
