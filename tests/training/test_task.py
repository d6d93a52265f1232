"""A task of the user's own: regression, tokens, streams, schedules, accumulation; and what it gets wrong."""

import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import make_split, untimed
from torch import nn

from tune_amp.training.data import Dataset, make_long_tail
from tune_amp.training.run import TrainingRun
from tune_amp.training.task import TaskError, load_task, load_task_dataset
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import InputError, TrialConfig

CPU = torch.device("cpu")
WriteModule = Callable[[str], str]

DIABETES = """
import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from tune_amp.training import Task
from tune_amp.trial.config import InputError as Refused
class Diabetes(Task):
    metric = ("mae", "min")
    def data(self):
        inputs, targets = load_diabetes(return_X_y=True, scaled=True)
        inputs, targets = inputs * 20, (targets[:, None] - 150) / 75
        return tuple((inputs[a:b], targets[a:b]) for a, b in ((0, 300), (300, 370), (370, 442)))
    def model(self, hidden=16):
        return nn.Sequential(nn.Linear(10, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    def loss(self, model, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)
    def score(self, model, batch):
        inputs, targets = batch
        return {"mae": (model(inputs) - targets).abs().sum()}
"""


def place(dataset: Dataset, **options: Any) -> TrainingData:
    return TrainingData(dataset.train, dataset.validation, dataset.num_classes, CPU, **options)


def make_config(name: str, **settings: Any) -> TrialConfig:
    common = {"model": name, "dataset": name, "task": name, "lr": 0.01, "batch_size": 20, "max_epochs": 3}
    return TrialConfig(**{**common, **settings})


@pytest.fixture
def diabetes(write_module: WriteModule) -> tuple[str, Dataset]:
    name = write_module(DIABETES) + ":Diabetes"
    return name, load_task_dataset(name)


# Regression


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_regression_learns_and_its_metric_is_a_mean_over_the_split(
    precision: str, diabetes: tuple[str, Dataset]
) -> None:
    name, dataset = diabetes
    assert (dataset.name, dataset.num_classes, dataset.input_shape) == (name, 0, (10,))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (300, 70, 72)
    assert dataset.train.images.dtype == dataset.train.labels.dtype == np.float32
    run = TrainingRun(make_config(name, precision=precision, max_epochs=8), place(dataset))
    epochs = list(run.epochs())
    assert run.hopeless is None
    first, last = epochs[0], epochs[-1]
    assert (last.val_accuracy, last.val_recalls, set(last.metrics)) == (None, (), {"val_mae"})
    with torch.no_grad():
        errors = run.model.eval()(torch.from_numpy(dataset.validation.images)).numpy() - dataset.validation.labels
    assert last.metrics["val_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert last.val_loss == pytest.approx((errors**2).mean(), rel=1e-5)
    assert last.metrics["val_mae"] < 0.8 * np.abs(dataset.validation.labels).mean()
    assert last.train_loss < first.train_loss
    assert (last.underflow_share is None) is (precision != "fp16")
    tested = run.test(dataset.test)
    with torch.no_grad():
        errors = run.model.eval()(torch.from_numpy(dataset.test.images)).numpy() - dataset.test.labels
    assert tested["metrics"] == {"test_mae": pytest.approx(np.abs(errors).mean(), rel=1e-5)}
    assert tested["test_loss"] == pytest.approx((errors**2).mean(), rel=1e-5)
    assert tested["test_accuracy"] is None


def test_own_parameters_are_keyword_arguments_of_the_model(diabetes: tuple[str, Dataset]) -> None:
    name, dataset = diabetes
    run = TrainingRun(make_config(name, own={"hidden": 5}), place(dataset))
    assert run.model.get_parameter("0.weight").shape == (5, 10)
    with pytest.raises(TaskError, match=rf"^{name}.model failed \(TypeError: .*unexpected keyword argument 'depth'\)$"):
        TrainingRun(make_config(name, own={"depth": 5}), place(dataset))


def test_a_trial_without_a_baseline_goes_on_however_bad_it_is(diabetes: tuple[str, Dataset]) -> None:
    name, dataset = diabetes
    frozen = TrainingRun(make_config(name, lr=1e-30), place(dataset))
    assert [metrics.state for metrics in frozen.epochs()] == ["steady"] * 3
    overflowing = TrainingRun(make_config(name, precision="fp16", init_scale=2.0**100, batch_size=100), place(dataset))
    assert [metrics.state for metrics in overflowing.epochs()] == ["collapsed"]
    assert "gradients overflow even at" in str(overflowing.hopeless)


BASELINE = (
    DIABETES
    + """
class Known(Diabetes):
    dead = False
    def baseline(self):
        return 1.0
    def model(self):
        made = super().model()
        if self.dead:
            nn.init.constant_(made[0].weight, 0.0)
            nn.init.constant_(made[0].bias, -1.0)
        return made
class Dead(Known):
    dead = True
class Unknown(Dead):
    def baseline(self):
        return None
class Broken(Diabetes):
    def score(self, model, batch):
        return {"mae": super().score(model, batch)["mae"] * float("nan")}
"""
)


def test_a_dead_network_ends_the_trial_only_if_the_task_has_a_baseline(write_module: WriteModule) -> None:
    module = write_module(BASELINE)
    data = place(load_task_dataset(f"{module}:Known"))
    reasons = {}
    for name in ("Known", "Dead", "Unknown"):
        run = TrainingRun(make_config(f"{module}:{name}", precision="bf16"), data)
        reasons[name] = len(list(run.epochs())), run.hopeless
    dead = "no weight gets a gradient, in fp32 either, and the model is no better than guessing"
    assert reasons == {"Known": (3, None), "Dead": (1, dead), "Unknown": (3, None)}


def test_a_metric_that_is_not_a_number_is_a_divergence(write_module: WriteModule) -> None:
    name = write_module(BASELINE) + ":Broken"
    run = TrainingRun(make_config(name), place(load_task_dataset(name)))
    assert [metrics.state for metrics in run.epochs()] == ["diverged"]
    assert run.hopeless == "val_mae is nan"


# Sequences of tokens

TOKENS = """
import numpy as np
import torch
from torch import nn
from tune_amp.training import Task
from tune_amp.trial.config import InputError as Refused
class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, width), nn.Linear(width, 7)
    def forward(self, tokens):
        return self.head(self.embed(tokens))
class Successor(Task):
    def data(self):
        text = np.arange(3000, dtype=np.int32).reshape(-1, 10) % 7
        return tuple((text[a:b, :-1], text[a:b, 1:]) for a, b in ((0, 200), (200, 240), (240, 300)))
    def model(self, width=16):
        return Net(width)
"""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_defaults_train_a_language_model_on_tokens(precision: str, write_module: WriteModule) -> None:
    name = write_module(TOKENS) + ":Successor"
    dataset = load_task_dataset(name)
    assert dataset.train.images.dtype == np.int32
    assert dataset.train.labels.dtype == np.int64
    run = TrainingRun(make_config(name, precision=precision, max_epochs=6, lr=0.02), place(dataset))
    epochs = list(run.epochs())
    assert epochs[0].val_loss is not None
    assert epochs[-1].val_loss is not None
    assert epochs[-1].val_loss < 0.1
    assert epochs[0].val_loss > 0.2
    assert epochs[-1].val_accuracy == 1
    assert (epochs[-1].metrics, epochs[-1].val_recalls) == ({}, ())
    inputs, targets = torch.from_numpy(dataset.test.images), torch.from_numpy(dataset.test.labels)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(run.model.eval()(inputs).flatten(0, 1), targets.flatten())
    assert run.test(dataset.test)["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


# Schedules and accumulation

SCHEDULED = (
    DIABETES
    + """
class Warm(Diabetes):
    def schedule(self, optimizer, steps):
        self.steps = steps
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
class Cycle(Diabetes):
    def optimizer(self, model, config):
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 10 * config.lr}]
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.8)
    def schedule(self, optimizer, steps):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=steps)
"""
)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("settings", [{}, {"precision": "fp16", "init_scale": 2.0**26}])
def test_a_schedule_advances_at_applied_steps_only(
    settings: dict[str, Any], optimizer: str, write_module: WriteModule
) -> None:
    name = write_module(SCHEDULED) + ":Warm"
    run = TrainingRun(make_config(name, optimizer=optimizer, **settings), place(load_task_dataset(name)))
    metrics = run.train_epoch()
    assert metrics.steps == 15
    assert (0 < metrics.skipped_steps < 15) is bool(settings)
    (group,) = run._optimizer.param_groups
    assert group["lr"] == pytest.approx(0.01 / (1 + metrics.applied_steps))
    assert run._task.steps == 45  # type: ignore[attr-defined]
    assert metrics.loop == "eager: a schedule sets the learning rate on the host"


HOOKED = (
    DIABETES
    + """
    def optimizer(self, model, config):
        optimizer = super().optimizer(model, config)
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        return optimizer
calls = []
"""
)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_hooks_of_the_optimizer_are_called_and_change_no_step(
    precision: str, diabetes: tuple[str, Dataset], write_module: WriteModule
) -> None:
    name, dataset = diabetes
    hooked = write_module(HOOKED) + ":Diabetes"
    runs = [
        TrainingRun(make_config(task, precision=precision, max_epochs=1), place(dataset)) for task in (name, hooked)
    ]
    first, second = (untimed(metrics) for run in runs for metrics in run.epochs())
    assert first == second
    assert importlib.import_module(hooked.partition(":")[0]).calls == ["before", "after"] * first.steps
    captured = TrainingRun(make_config(hooked, max_epochs=1), place(dataset), capture=lambda step: step)
    assert captured.train_epoch().loop == "eager: the optimizer has hooks, which a graph would not call"


def test_accumulated_batches_are_one_large_batch(diabetes: tuple[str, Dataset]) -> None:
    name, dataset = diabetes
    data = place(dataset)
    for optimizer, clip in (("sgd", None), ("adamw", 0.1)):
        common = {"optimizer": optimizer, "grad_clip": clip, "max_epochs": 2}
        parts = TrainingRun(make_config(name, batch_size=10, accumulate=4, **common), data)
        whole = TrainingRun(make_config(name, batch_size=40, **common), data)
        for first, second in zip(parts.epochs(), whole.epochs(), strict=True):
            assert (first.steps, first.applied_steps) == (second.steps, second.applied_steps)
            assert first.train_loss == pytest.approx(second.train_loss, rel=1e-5)
            assert first.metrics["val_mae"] == pytest.approx(second.metrics["val_mae"], rel=1e-4)
        assert first.steps == 2 * (300 // 40)
        for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_more_accumulated_batches_than_the_data_hold_are_refused(diabetes: tuple[str, Dataset]) -> None:
    name, dataset = diabetes
    rule = "accumulate: batch_size times accumulate must not exceed the 300 training images, got 200 times 2"
    with pytest.raises(InputError, match=f"^{rule}$"):
        TrainingRun(make_config(name, batch_size=200, accumulate=2), place(dataset))


def resume(run: TrainingRun, config: TrialConfig, data: TrainingData) -> TrainingRun:
    """A second run that goes on from the state of the first one, as a file holds it."""
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    second = TrainingRun(config, data)
    second.load_state_dict(torch.load(file, weights_only=True))
    return second


@pytest.mark.parametrize("task", ["Warm", "Cycle"])
@pytest.mark.parametrize("settings", [{}, {"precision": "fp16", "init_scale": 2.0**22}])
def test_a_run_with_schedule_and_accumulation_resumes_bit_for_bit(
    task: str, settings: dict[str, Any], write_module: WriteModule
) -> None:
    name = write_module(SCHEDULED) + f":{task}"
    data = place(load_task_dataset(name))
    config = make_config(name, accumulate=3, max_epochs=4, **settings)
    whole = [untimed(metrics) for metrics in TrainingRun(config, data).epochs()]
    first = TrainingRun(config, data)
    parts = [first.train_epoch(), first.train_epoch()]
    second = resume(first, config, data)
    parts += second.epochs()
    assert [untimed(metrics) for metrics in parts] == whole
    rates = [group["lr"] for group in second._optimizer.param_groups]
    assert len(set(rates)) == len(rates)  # the groups have rates of their own
    assert rates != [group["lr"] for group in first._optimizer.param_groups]


# Image classification, the default task

SMOOTH = """
from torch import nn
from tune_amp.training.task import ImageClassification
class Smooth(ImageClassification):
    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)
class Plain(ImageClassification):
    pass
class Rows(ImageClassification):
    def data(self):
        import numpy as np
        labels = np.arange(60) % 3
        images = np.random.default_rng(0).integers(0, 120, (60, 6, 6, 1), np.uint8)
        images[np.arange(60), labels] += 100
        return (images[:30], labels[:30]), (images[30:45], labels[30:45]), (images[45:], labels[45:])
    def average(self, sums, count):
        return {**super().average(sums, count), "images": count}
"""


def test_a_task_may_change_one_method_of_image_classification(write_module: WriteModule) -> None:
    module = write_module(SMOOTH)
    data = TrainingData(make_split(), make_split(21, seed=1), 3, CPU)
    common: dict[str, Any] = {
        "lr": 0.01,
        "batch_size": 8,
        "max_epochs": 2,
        "curriculum": "linear",
        "class_weighting": "balanced",
    }
    epochs = {
        task: [untimed(metrics) for metrics in TrainingRun(TrialConfig(task=task, **common), data).epochs()]
        for task in (None, f"{module}:Plain", f"{module}:Smooth")
    }
    built_in, plain, smooth = epochs.values()
    assert plain == built_in
    assert smooth[0].train_loss > built_in[0].train_loss
    assert len(smooth[0].val_recalls) == 3


def test_data_of_a_derived_image_classification_have_classes(write_module: WriteModule) -> None:
    name = write_module(SMOOTH) + ":Rows"
    dataset = load_task_dataset(name)
    assert (dataset.num_classes, dataset.input_shape, len(dataset.validation)) == (3, (1, 6, 6), 15)
    assert dataset.notice is not None
    assert "channels come last" in dataset.notice
    config = TrialConfig(task=name, dataset=name, class_weighting="balanced", imbalance=2.0, batch_size=8, lr=0.01)
    data = TrainingData(make_long_tail(dataset, 2.0).train, dataset.validation, 3, CPU)
    *_, last = TrainingRun(config, data).epochs()
    assert last.val_accuracy is not None
    assert last.val_accuracy > 0.6
    assert last.metrics == {"val_images": 15.0}


# On digits, seed 3, by the code before there were tasks: the last epoch's train_loss, val_loss and val_accuracy.
WEIGHTED = {"class_weighting": "balanced", "imbalance": 10.0, "input_scaling": "standard", "grad_clip": 1.0}
BEFORE: list[tuple[dict[str, Any], tuple[float, float, float]]] = [
    ({"precision": "fp32", "optimizer": "adam", "weight_decay": 0.01}, (0.339299, 0.286935, 0.9453125)),
    ({"precision": "fp32", "optimizer": "sgd", "weight_decay": 0.01}, (2.03498, 1.89448, 0.7890625)),
    ({"precision": "bf16", "optimizer": "adam", "weight_decay": 0.01}, (0.342551, 0.289929, 0.921875)),
    ({"precision": "bf16", "optimizer": "sgd", "weight_decay": 0.01}, (2.03458, 1.89422, 0.7890625)),
    ({"precision": "fp16", "optimizer": "adam", "weight_decay": 0.01}, (0.338732, 0.286149, 0.9453125)),
    ({"precision": "fp16", "optimizer": "sgd", "weight_decay": 0.01}, (2.03497, 1.89448, 0.7890625)),
    ({"precision": "fp32", **WEIGHTED}, (0.449616, 0.340443, 0.890625)),
    ({"precision": "fp16", **WEIGHTED}, (0.588342, 0.439517, 0.8828125)),
    ({"precision": "fp16", "init_scale": 2.0**40, "growth_interval": 5}, (1.12856, 0.473297, 0.8515625)),
    ({"precision": "fp16", "init_scale": 2.0**-20}, (2.29427, 2.29355, 0.1796875)),
]


@pytest.mark.parametrize(("settings", "expected"), BEFORE)
def test_image_classification_trains_as_before_there_were_tasks(
    settings: dict[str, Any], expected: tuple[float, float, float], digits: Dataset
) -> None:
    config = TrialConfig(dataset="digits", seed=3, lr=3e-3, max_epochs=2, **settings)
    train = make_long_tail(digits, config.imbalance).train
    *_, last = TrainingRun(config, TrainingData(train, digits.validation, 10, CPU)).epochs()
    # The last bits depend on the processor.
    assert (last.train_loss, last.val_loss) == pytest.approx(expected[:2], rel=1e-3)
    assert last.val_accuracy == pytest.approx(expected[2], abs=1.5 / 128)


# What a task gets wrong


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def model(self): return 3", ".model: must return a torch.nn.Module, got 3"),
        ("def model(self): return 1 / 0", ".model failed (ZeroDivisionError: division by zero)"),
        ("def model(self): raise SystemExit(3)", ".model failed (RuntimeError: the code called sys.exit(3))"),
        ("def model(self): return super().model().double()", ".model: must have float32 parameters, which autocast"),
        ("def model(self): return nn.Flatten()", ".model: must have a parameter that requires a gradient, got none"),
        ("model = Task.model", ".model: must be defined, or a model be named by --model"),
        ("def model(self): raise Refused('no')", ".model: no"),
        ("def loss(self, model, batch): return 0.5", ".loss: must return a 0-dim float tensor, the mean"),
        ("def loss(self, model, batch): return model(batch[0])", "got torch.float32 [20, 1]"),
        ("def loss(self, model, batch): raise KeyError('x')", ".loss failed (KeyError: 'x')"),
        ("def score(self, model, batch): return 0.5", ".score: must return a dict of sums by name, got 0.5"),
        ("def score(self, model, batch): return {'mae': 0.5}", ".score: must return a dict of tensors, each a sum"),
        ("def score(self, model, batch): return {'mse': batch[0].sum()}", "must give a number mae, got mse, loss"),
        ("def score(self, model, batch): return {'a b': batch[0].sum()}", "names of letters, digits and _"),
        ("def score(self, model, batch): return {'seconds': batch[0].sum()}", "each a new column val_NAME"),
        ("def average(self, sums, count): return 1.0", ".average: must return a dict of values by name, got 1.0"),
        ("def average(self, sums, count): return {'mae': None}",
         ".average: must return numbers or tuples of them (float()"),
        ("def average(self, sums, count): return {'loss': 1.0, 'mae': 1.0, 'accuracy': 97.5}",
         ".average: accuracy must be a share between 0 and 1, got 97.5"),
        ("def average(self, sums, count): return {'loss': 1.0, 'mae': 1.0, 'accuracy': 1.00001}",
         ".average: accuracy must be a share between 0 and 1, got 1.00001"),
        ("def optimizer(self, model, config): return 1", ".optimizer: must return a torch.optim.Optimizer, got 1"),
        ("def schedule(self, optimizer, steps): return 1", ".schedule: must return a torch.optim.lr_scheduler.LRSch"),
        ("def schedule(self, optimizer, steps): return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)",
         ".schedule: must return a torch.optim.lr_scheduler.LRScheduler that needs no metric, or None, got Reduce"),
        ("def baseline(self): return 'low'", ".baseline: must return a finite number or None, got 'low'"),
    ],
)  # fmt: skip
def test_a_method_that_fails_is_named_on_one_line(body: str, expected: str, write_module: WriteModule) -> None:
    name = write_module(DIABETES + f"class Own(Diabetes):\n    {body}\n") + ":Own"
    data = place(load_task_dataset(name))
    with pytest.raises((TaskError, InputError)) as caught:
        TrainingRun(make_config(name), data).train_epoch()
    message = str(caught.value)
    assert message.startswith(name)
    assert expected in message
    assert "\n" not in message


def test_memory_that_runs_out_in_a_method_is_no_fault_of_the_task(write_module: WriteModule) -> None:
    text = "class Own(Diabetes):\n    def loss(self, model, batch): raise torch.OutOfMemoryError('CUDA')\n"
    name = write_module(DIABETES + text) + ":Own"
    with pytest.raises(torch.OutOfMemoryError):
        TrainingRun(make_config(name), place(load_task_dataset(name))).train_epoch()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("class Own: pass", ": must be a class derived from tune_amp.training.Task, got Own"),
        ("def Own(): pass", ": must be a class derived from tune_amp.training.Task, got function"),
        ("class Own(Task):\n    def __init__(self, x): pass", ": must be made without arguments (TypeError"),
        ("class Own(Task):\n    metric = 'mae'", '.metric: must be (name, "max" or "min"), a name of letters'),
        ("class Own(Task):\n    metric = ('m a', 'min')", "got ('m a', 'min')"),
        ("class Own(Task):\n    metric = ('mae', 'least')", "got ('mae', 'least')"),
        ("class Own(Task): pass", ".data: must be defined, or a data set be named by --dataset"),
        ("class Own(Task):\n    def data(self): 1 / 0", ".data failed (ZeroDivisionError: division by zero)"),
        ("class Own(Task):\n    def data(self): return 1", ".data: must return (train, validation, test), each a pair"),
        ("class Own(Task):\n    def data(self): return (a, a), (a, a)", "or a torch Dataset, got 2 values"),
        ("class Own(Task):\n    def data(self): return a, a, a", "got 3 values, train of type ndarray"),
        ("class Own(Task):\n    def data(self): return (a, a), (a, a), (a, a[1:])", "test inputs: must be as many as"),
        ("class Own(Task):\n    def data(self): return (a, a), (a, a), (a[0:0], a[0:0])", "one, got ((0, 3), "),
        ("class Own(Task):\n    def data(self): return (a, a), (a[:, 1:], a), (a, a)", "must have the shape "),
        ("class Own(Task):\n    def data(self): return (a, a), (a > 0, a), (a, a)", ".data: validation inputs, bool"),
        ("class Own(Task):\n    def data(self): return (a, a / 0), (a, a), (a, a)", "must be finite in float32, got"),
        ("class Own(Task):\n    def data(self): return (a, a.astype(str)), (a, a), (a, a)", "must be uint8 images, "),
    ],
)  # fmt: skip
def test_a_class_that_is_no_task_or_has_no_data_is_refused(text: str, expected: str, write_module: WriteModule) -> None:
    head = "import warnings\nimport numpy as np\nfrom tune_amp.training import Task\na = np.zeros((4, 3))\n"
    name = write_module(f"{head}warnings.simplefilter('ignore')\n{text}\n") + ":Own"
    with pytest.raises(InputError) as caught, np.errstate(all="ignore"):
        load_task_dataset(name)
    assert str(caught.value).startswith(name)
    assert expected in str(caught.value)


def test_a_task_that_only_a_file_names_is_not_loaded(write_module: WriteModule) -> None:
    write_module("text = 1\n")
    with pytest.raises(InputError, match="code that only a file names is not run"):
        load_task("never_named_module:Own")
