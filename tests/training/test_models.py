"""The built-in models, and a user's own: built deterministically, of weights that AMP can train."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tune_amp.training.models import BUILT_IN, InputShape, VisionTransformer, build_model
from tune_amp.trial.config import MODELS, InputError

MNIST: InputShape = (1, 28, 28)
WriteModule = Callable[[str], str]

# The name of a user's module differs from test to test, so that none is found in memory.
GOOD_MODEL = """
from torch import nn
def net(input_shape, num_classes):
    channels, height, width = input_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))
"""


def refusal(name: str) -> str:
    """The one line with which ``build_model`` refuses ``name`` for 5 classes of 1x4x4 images."""
    with pytest.raises(InputError) as caught:
        build_model(name, (1, 4, 4), 5)
    message = str(caught.value)
    assert "\n" not in message
    return message


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_models_that_a_configuration_may_name_are_those_that_exist() -> None:
    assert tuple(BUILT_IN) == MODELS


@pytest.mark.parametrize("num_classes", [3, 10])
@pytest.mark.parametrize("input_shape", [MNIST, (3, 32, 32), (2, 8, 12)])
@pytest.mark.parametrize("name", MODELS)
def test_built_in_model_maps_images_to_logits(name: str, input_shape: InputShape, num_classes: int) -> None:
    model = build_model(name, input_shape, num_classes)
    logits = model(torch.rand(4, *input_shape))
    assert logits.shape == (4, num_classes)
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_simple_net_is_the_tutorials() -> None:
    assert count_parameters(build_model("simple_net", MNIST, 10)) == 784 * 256 + 256 + 256 * 10 + 10


def test_conv_net_halves_the_image_twice() -> None:
    model = build_model("conv_net", MNIST, 10)
    convolutions = (9 * 1 * 32 + 32) + (9 * 32 * 64 + 64)
    assert count_parameters(model) == convolutions + (64 * 7 * 7 * 128 + 128) + (128 * 10 + 10)


def test_vit_has_no_dropout_unless_asked_for() -> None:
    plain, dropping = VisionTransformer(MNIST, 10), VisionTransformer(MNIST, 10, dropout=0.5)
    images = torch.rand(2, *MNIST)
    assert plain.training
    assert torch.equal(plain(images), plain(images))
    assert not torch.equal(dropping(images), dropping(images))
    assert torch.equal(dropping.eval()(images), dropping(images))


def test_vit_sees_where_a_patch_lies() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(MNIST, 10)
    images = torch.rand(1, *MNIST)
    moved = images.roll(7, dims=3)  # whole patches: without positions, their mean would stay the same
    assert not torch.allclose(model(images), model(moved), atol=1e-5)
    nn.init.zeros_(model.position)
    torch.testing.assert_close(model(images), model(moved), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sides", [(30, 28), (28, 30), (7, 7), (3, 4)])
def test_vit_refuses_sides_that_are_no_multiples_of_four(sides: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"multiples of 4, got {sides[0]}x{sides[1]}"):
        build_model("vit", (1, *sides), 10)


@pytest.mark.parametrize("name", MODELS)
def test_weights_follow_the_global_seed(name: str) -> None:
    states = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        states.append(build_model(name, MNIST, 10).state_dict())
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_users_own_model_in_the_current_folder_is_built_for_the_data(write_module: WriteModule) -> None:
    model = build_model(f"{write_module(GOOD_MODEL)}:net", (3, 4, 5), 7)
    assert model(torch.zeros(2, 3, 4, 5)).shape == (2, 7)


OWN_MODEL = """
from torch import nn
def net(input_shape, num_classes, hidden=4, *, act="ReLU"):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, hidden), getattr(nn, act)(), nn.Linear(hidden, num_classes))
def anything(input_shape, num_classes, **own):
    return net(input_shape, num_classes, own["hidden"])
"""


def test_own_parameters_are_keyword_arguments(write_module: WriteModule) -> None:
    module = write_module(OWN_MODEL)
    model = build_model(f"{module}:net", (1, 4, 4), 3, {"hidden": 7, "act": "Tanh"})
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[2], nn.Tanh)
    assert model[1].weight.shape == (7, 16)
    assert count_parameters(build_model(f"{module}:anything", (1, 4, 4), 3, {"hidden": 5, "other": 1.0})) == 5 * 20 + 3
    vit = build_model("vit", MNIST, 10, {"width": 32, "dropout": 0.1})
    assert isinstance(vit, VisionTransformer)
    assert vit.position.shape == (1, 16, 32)


@pytest.mark.parametrize(
    ("name", "taken"), [("own:net", "['hidden', 'act']"), ("simple_net", "none"), ("conv_net", "none")]
)
def test_own_parameter_that_a_model_does_not_take_is_refused(name: str, taken: str, write_module: WriteModule) -> None:
    name = name.replace("own", write_module(OWN_MODEL))
    expected = f"model: {name} must take own.depth as a keyword argument, it takes {taken}"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        build_model(name, (1, 4, 4), 3, {"depth": 2})


@pytest.mark.parametrize("name", ["conv_net", "vit"])
def test_model_of_images_refuses_other_inputs(name: str) -> None:
    expected = f"model: {name} needs images of shape (channels, height, width), got (4,)"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        build_model(name, (4,), 3)


LAZY_MODEL = """
from torch import nn
def net(input_shape, num_classes):
    return nn.Sequential(
        nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(num_classes)
    )
"""


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_get_their_shapes_and_the_weights_of_the_seed(write_module: WriteModule) -> None:
    name = f"{write_module(LAZY_MODEL)}:net"
    states = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        model = build_model(name, (2, 6, 5), 3)
        states.append(model.state_dict())
    first, again, other = states
    assert model.training
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes == [(6, 2, 3, 3), (6,), (6,), (6,), (3, 72), (3,)]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert (first["1.running_mean"].tolist(), int(first["1.num_batches_tracked"])) == ([0.0] * 6, 0)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["5.weight"], other["5.weight"])


def write_parameter(write_module: WriteModule, parameter: str) -> str:
    """A user's linear model that has also ``parameter``."""
    lines = [
        "import torch",
        "class Net(torch.nn.Linear):",
        "    def __init__(self, shape, classes):",
        "        super().__init__(16, classes)",
        f"        self.more = {parameter}",
    ]
    return write_module("\n".join(lines)) + ":Net"


@pytest.mark.parametrize("dtype", ["complex64", "float16", "bfloat16", "float64", "int64"])
def test_weights_that_are_no_fp32_master_weights_are_refused(dtype: str, write_module: WriteModule) -> None:
    name = write_parameter(write_module, f"torch.nn.Parameter(torch.ones(3, dtype=torch.{dtype}), requires_grad=False)")
    message = refusal(name)
    rule = "must have float32 parameters, which autocast casts as it needs them"
    assert message.startswith(f"model: {name} {rule}, got more of torch.{dtype}")
    assert ("view_as_real" in message) is (dtype == "complex64")


def test_lazy_layer_that_is_never_used_is_refused(write_module: WriteModule) -> None:
    name = write_parameter(write_module, "torch.nn.UninitializedParameter()")
    expected = f"model: {name} must use every lazy layer in its forward pass, got more without a shape"
    with pytest.raises(InputError, match=f"^{expected}$"):
        build_model(name, (1, 1, 16), 5)


@pytest.mark.parametrize(("made", "count"), [("Linear(16, 5).requires_grad_(False)", 2), ("Flatten()", 0)])
def test_model_without_anything_to_train_is_refused(made: str, count: int, write_module: WriteModule) -> None:
    name = write_module(f"from torch import nn\ndef net(*_):\n    return nn.{made}") + ":net"
    assert refusal(name) == f"model: {name} must have a parameter that requires a gradient, got none among {count}"


def test_function_that_returns_something_else_is_refused(write_module: WriteModule) -> None:
    name = write_module("def net(*_):\n    return 3") + ":net"
    assert refusal(name) == f"model: {name} must return a torch.nn.Module, got int"


def test_what_a_module_does_at_import_reaches_no_weights(write_module: WriteModule) -> None:
    """It is imported by the first trial of a worker alone; the later ones must begin as that one does."""
    text = "import torch\ntorch.manual_seed(3)\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\n"
    name = f"{write_module(text + GOOD_MODEL)}:net"
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        weights.append(build_model(name, (1, 4, 4), 3).state_dict()["1.weight"])
    assert torch.equal(*weights)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32
