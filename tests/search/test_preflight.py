"""What cannot be trained is refused before a search starts, in one line; what can is left as it was."""

import contextlib
import io
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tune_amp.search.options import SearchOptions
from tune_amp.search.preflight import check_fit, check_training
from tune_amp.space.space import SearchSpace, load_space
from tune_amp.training.data import Dataset, Split, load_dataset
from tune_amp.training.task import load_task_dataset
from tune_amp.trial.config import MODELS, OPTIMIZERS, PRECISIONS, InputError
from tune_amp.trial.consent import consent_to


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], SearchSpace]:
    def write_and_load(text: str) -> SearchSpace:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return load_space(str(path))

    return write_and_load


def make_dataset(train_images: int, name: str = "digits", shape: tuple[int, int, int] = (1, 28, 28)) -> Dataset:
    images = np.zeros((train_images, *shape), np.uint8)
    images[-1] = 200
    split = Split(images=images, labels=np.arange(train_images) % 5)
    return Dataset(name=name, num_classes=5, train=split, validation=split, test=split, content_hash="")


LR = "  lr: {low: 1.0e-4, high: 0.1}\n"


@pytest.mark.parametrize(
    "entry", ["{low: 64, high: 2048}", "{low: 64, high: 2048, power_of_two: true}", "{choices: [2048, 64]}"]
)
def test_batch_larger_than_the_data_set_is_refused_with_file_field_and_counts(
    load: Callable[[str], SearchSpace], entry: str
) -> None:
    space = load(f"parameters:\n  batch_size: {entry}\n")
    with pytest.raises(InputError) as caught:
        check_fit(space, make_dataset(1413), SearchOptions())
    assert str(caught.value) == (
        f"{space.source}: batch_size: must be at most the 1,413 training images of digits, got 2048"
    )
    check_fit(space, make_dataset(2048), SearchOptions())


def test_fixed_batch_larger_than_the_data_set_is_refused(load: Callable[[str], SearchSpace]) -> None:
    space = load(f"parameters:\n{LR}fixed: {{batch_size: 101}}\n")
    with pytest.raises(InputError, match=r"batch_size: must be at most the 100 training images of digits, got 101$"):
        check_fit(space, make_dataset(100), SearchOptions())


def test_data_set_smaller_than_the_default_batch_is_refused_where_none_is_given(
    load: Callable[[str], SearchSpace],
) -> None:
    space = load(f"parameters:\n{LR}")
    with pytest.raises(InputError) as caught:
        check_fit(space, make_dataset(63, "my:data"), SearchOptions())
    assert str(caught.value) == "--dataset: my:data has fewer training images than the default batch_size"
    check_fit(space, make_dataset(64), SearchOptions())
    check_fit(load(f"parameters:\n{LR}fixed: {{batch_size: 16}}\n"), make_dataset(63), SearchOptions())


def test_model_that_cannot_be_imported_is_refused(load: Callable[[str], SearchSpace]) -> None:
    consent_to("no_such_module:net")
    with pytest.raises(InputError) as caught:
        check_fit(load(f"parameters:\n{LR}"), make_dataset(99), SearchOptions(model="no_such_module:net"))
    reason = "ModuleNotFoundError: No module named 'no_such_module'"
    assert str(caught.value) == f"no_such_module:net: importing no_such_module failed ({reason})"


# The model, trained for one step

WriteModule = Callable[[str], str]

LINEAR = """
import sys
import torch
class Net(torch.nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layer = torch.nn.Linear(16, classes)
    def forward(self, images):
        logits = self.layer(images.flatten(1))
        {line}
        return logits
"""


def write_net(write_module: WriteModule, line: str) -> str:
    """A user's model of 16 pixels that does ``line`` in its forward pass, when it has logits."""
    return write_module(LINEAR.format(line=line)) + ":Net"


def check(model: str, precisions: Sequence[str] = ("fp32",), optimizers: Sequence[str] = ("adam",)) -> dict[str, str]:
    data = make_dataset(20, shape=(1, 4, 4))
    return check_training(model, data, precisions=precisions, optimizers=optimizers, device=torch.device("cpu"))


def refusal(model: str, **tried: Sequence[str]) -> str:
    with pytest.raises(InputError) as caught:
        check(model, **tried)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("model", MODELS)
def test_built_in_model_can_be_trained_in_every_way(model: str) -> None:
    assert check(model, PRECISIONS, OPTIMIZERS) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def net(input_shape): pass", "TypeError"),
        ("def net(*_):\n    raise RuntimeError('two\\nlines')", "RuntimeError: two lines (in fp32)"),
        ("from torch import nn\ndef net(*_):\n    return nn.Linear(784, 10)", "RuntimeError: "),
        ("import sys\ndef net(*_):\n    sys.exit(3)", "RuntimeError: the code called sys.exit(3) (in fp32)"),
    ],
)
def test_model_that_cannot_be_built_or_run_is_refused(text: str, expected: str, write_module: WriteModule) -> None:
    name = f"{write_module(text)}:net"
    assert refusal(name).startswith(f"model: {name} must train on images of shape [batch, 1, 4, 4], got {expected}")


def test_image_too_small_for_a_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"^model: conv_net must train on images of shape \[batch, 1, 3, 3\], got "):
        check_training(
            "conv_net",
            make_dataset(20, shape=(1, 3, 3)),
            precisions=("fp32",),
            optimizers=("adam",),
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize(
    ("output", "got"),
    [
        ("logits[:, 1:]", "torch.float32 [2, 4]"),
        ("logits[..., None]", "torch.float32 [2, 5, 1]"),
        ("logits[:1]", "torch.float32 [1, 5]"),
        ("logits.argmax(dim=1)", "torch.int64 [2]"),
        ("(logits, logits)", "tuple"),
        ("None", "NoneType"),
    ],
)
def test_other_output_in_either_mode_is_refused(mode: str, output: str, got: str, write_module: WriteModule) -> None:
    name = write_net(write_module, f"if self.training == {mode == 'training'}: return {output}")
    rule = "must return float logits of shape [2, 5] for 2 images"
    assert refusal(name) == f"model: {name} {rule}, got {got} in {mode} mode"


def test_scripted_model_is_accepted(write_module: WriteModule) -> None:
    made = "nn.Sequential(nn.Flatten(), nn.Linear(16, classes))"
    name = write_module(f"import torch\nfrom torch import nn\ndef net(shape, classes): return torch.jit.script({made})")
    assert check(f"{name}:net") == {}


def test_logits_of_half_precision_are_accepted(write_module: WriteModule) -> None:
    assert check(write_net(write_module, "return logits.half()")) == {}


def test_precision_that_alone_fails_is_told_with_its_reason(write_module: WriteModule) -> None:
    name = write_net(write_module, "assert logits.dtype is not torch.float16, 'no kernel'")
    assert check(name, ("fp16", "fp32", "bf16")) == {"fp16": "AssertionError: no kernel"}
    assert refusal(name, precisions=("fp16",)).endswith("got AssertionError: no kernel (in fp16)")


@pytest.mark.parametrize("line", ["logits = logits.detach()", "logits.register_hook(lambda _: 1 / 0)"])
def test_backward_pass_that_fails_is_refused(line: str, write_module: WriteModule) -> None:
    name = write_net(write_module, f"if self.training: {line}")
    assert "images of shape [batch, 1, 4, 4], got " in refusal(name, precisions=("fp32", "bf16", "fp16"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_that_cannot_take_the_gradients_is_refused(optimizer: str, write_module: WriteModule) -> None:
    lines = [
        "import torch",
        "class Net(torch.nn.Module):",
        "    def __init__(self, shape, classes):",
        "        super().__init__()",
        "        self.table = torch.nn.Embedding(256, classes, sparse=True)",
        "    def forward(self, images):",
        "        return self.table(images.flatten(1).mul(255).long()).mean(dim=1)",
    ]
    message = refusal(write_module("\n".join(lines)) + ":Net", optimizers=(optimizer,))
    assert "sparse" in message


def test_search_that_may_use_gpus_is_refused_only_where_fp32_fails_too(
    load: Callable[[str], SearchSpace], write_module: WriteModule
) -> None:
    """Only this machine's CPU is asked: an LSTM runs in fp16 on a GPU, and not here."""
    space = load(f"parameters:\n{LR}fixed: {{precision: fp16, batch_size: 4}}\n")
    data = make_dataset(20, shape=(1, 4, 4))
    only_half = write_net(write_module, "assert logits.dtype is not torch.float16, 'no kernel'")
    with pytest.raises(InputError, match=r"got AssertionError: no kernel \(in fp16\)$"):
        check_fit(space, data, SearchOptions(model=only_half))
    assert check_fit(space, data, SearchOptions(model=only_half), may_use_gpus=True) == {
        "fp16": "AssertionError: no kernel"
    }
    never = write_net(write_module, "assert False")
    with pytest.raises(InputError, match=r"got AssertionError \(in fp32\)"):
        check_fit(space, data, SearchOptions(model=never), may_use_gpus=True)


def test_every_precision_and_optimizer_of_the_space_is_tried(
    load: Callable[[str], SearchSpace], write_module: WriteModule
) -> None:
    space = load("parameters:\n  precision: {choices: [fp16, bf16]}\n  optimizer: {choices: [sgd, adamw]}\n")
    assert (space.precisions, space.list_possible("optimizer")) == (("fp16", "bf16"), ("sgd", "adamw"))
    name = write_net(write_module, "print(logits.dtype, file=sys.stderr) if self.training else None")
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        check_fit(space, make_dataset(64, shape=(1, 4, 4)), SearchOptions(model=name))
    assert {"torch.float16", "torch.bfloat16"} <= set(text.getvalue().split())


def test_further_optimizer_that_fails_is_named(write_module: WriteModule) -> None:
    """One is tried in each precision, the others in a precision that works: here the fourth run's model fails."""
    lines = ["built = []", "def net(*_):", "    built.append(1)", "    return Net(*_) if len(built) != 4 else 1 / 0"]
    name = write_module(LINEAR.format(line="") + "\n".join(lines)) + ":net"
    message = refusal(name, precisions=("fp32", "bf16"), optimizers=("adam", "sgd", "adamw"))
    rule = f"model: {name} must train on images of shape [batch, 1, 4, 4] with adamw"
    assert message == f"{rule}, got ZeroDivisionError: division by zero"


def test_check_is_silent_and_changes_nothing(
    write_module: WriteModule, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    calls = ("torch.rand(1)", "random.random()", "print(1)", "warnings.warn('old')", "torch.set_grad_enabled(True)")
    name = write_net(write_module, f"import random, warnings; {'; '.join(calls)}")
    before = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        assert check(name) == {}
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert capsys.readouterr() == ("", "")
    assert list(recwarn) == []


def test_what_a_module_prints_when_imported_is_seen(
    write_module: WriteModule, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(write_module("print('hello')" + LINEAR.format(line="print('again')")) + ":Net") == {}
    assert capsys.readouterr() == ("hello\n", "")


def test_images_without_any_contrast_are_refused() -> None:
    blank = make_dataset(20)
    blank.train.images[:] = 7
    with pytest.raises(InputError, match=r"pixels of the training images must differ, all are 7$"):
        check_training("simple_net", blank, precisions=("fp32",), optimizers=("adam",), device=torch.device("cpu"))


OWN_TASK = """
import numpy as np
import torch
from torch import nn
from tune_amp.training import Task
class Line(Task):
    metric = ("mae", "min")
    def data(self):
        part = np.linspace(0, 1, 40)[:, None], np.linspace(1, 2, 40)[:, None]
        return part, part, part
    def model(self, hidden):
        return nn.Sequential(nn.Linear(1, hidden), nn.Linear(hidden, 1))
    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])
    def score(self, model, batch):
        return {"mae": (model(batch[0]) - batch[1]).abs().sum()}
    def schedule(self, optimizer, steps):
        warm_up = steps // 20
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warm_up))
class Half(Line):
    def loss(self, model, batch):
        loss = super().loss(model, batch)
        assert model[0](batch[0]).dtype.itemsize == 4 or not model.training, "no half precision"
        return loss
"""


def test_task_is_tried_with_a_value_of_each_own_parameter(
    load: Callable[[str], SearchSpace], write_module: WriteModule
) -> None:
    module = write_module(OWN_TASK)
    name = f"{module}:Line"
    data = load_task_dataset(name)
    tried: dict[str, Any] = {"optimizers": ("adam", "sgd"), "device": torch.device("cpu"), "own": {"hidden": 3}}
    assert check_training(name, data, precisions=PRECISIONS, task=name, **tried) == {}
    half = f"{module}:Half"
    reason = f"TaskError: {half}.loss failed (AssertionError: no half precision)"
    assert check_training(half, data, precisions=("fp32", "fp16"), task=half, **tried) == {"fp16": reason}
    expected = f"task: {half} must train on inputs of shape [batch, 1], got {reason} (in fp16)"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        check_training(half, data, precisions=("fp16",), task=half, **tried)
    space = load(f"parameters:\n{LR}fixed: {{batch_size: 8, accumulate: 6}}\n")
    rule = "batch_size times accumulate must be at most the 40 training images of "
    with pytest.raises(InputError, match=rf"accumulate: {rule}.*, got 8 times 6$"):
        check_fit(space, data, SearchOptions(task=name))


def test_floats_and_data_sets_of_torch_are_tried_too(write_module: WriteModule) -> None:
    lines = [
        "import numpy as np, torch",
        "from torch.utils.data import TensorDataset",
        "x, y = np.random.default_rng(0).normal(size=(30, 16)), np.arange(30) % 5",
        "def floats(): return x, y, x, y",
        "def streamed():",
        "    part = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))",
        "    return part, part",
    ]
    module = write_module("\n".join([*lines, LINEAR.format(line="")]))
    for function in ("floats", "streamed"):
        data = load_dataset(f"{module}:{function}")
        tried: dict[str, Any] = {"precisions": PRECISIONS, "optimizers": ("adam",), "device": torch.device("cpu")}
        assert check_training(f"{module}:Net", data, **tried) == {}
        with pytest.raises(InputError, match=r"^model: conv_net needs images of shape \(channels, "):
            check_training("conv_net", data, **tried)


def test_long_error_of_a_users_model_is_shortened(write_module: WriteModule) -> None:
    message = refusal(write_module("def net(*_):\n    raise RuntimeError('long ' * 1000)") + ":net")
    assert len(message) < 500
    assert message.endswith(" ... (in fp32)")
