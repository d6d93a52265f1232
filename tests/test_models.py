"""The built-in models, and a user's own: built deterministically, and refused in one line before a search starts."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tune_amp.config import MODELS, InputError
from tune_amp.models import BUILT_IN, InputShape, VisionTransformer, build_model, check_model

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
    """The one line with which ``check_model`` refuses ``name`` for 5 classes of 1x4x4 images."""
    with pytest.raises(InputError) as caught:
        check_model(name, (1, 4, 4), 5)
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
    check_model(name, input_shape, num_classes)


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
        check_model("vit", (1, *sides), 10)


def test_image_too_small_for_a_model_is_refused_in_one_line() -> None:
    with pytest.raises(
        InputError, match=r"^model: conv_net must accept images of shape \[batch, 1, 3, 3\], got [^\n]+$"
    ):
        check_model("conv_net", (1, 3, 3), 10)


@pytest.mark.parametrize("name", MODELS)
def test_weights_follow_the_global_seed(name: str) -> None:
    states = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        states.append(build_model(name, MNIST, 10).state_dict())
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("fails", [False, True])
def test_checking_a_model_leaves_the_global_generator_alone(fails: bool, write_module: WriteModule) -> None:
    name = "vit"
    if fails:
        name = write_module("import torch\ndef net(*_):\n    torch.rand(5)\n    raise RuntimeError") + ":net"
    before = torch.get_rng_state()
    if fails:
        refusal(name)
    else:
        check_model(name, MNIST, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_users_own_model_in_the_current_folder_is_built_for_the_data(write_module: WriteModule) -> None:
    name = f"{write_module(GOOD_MODEL)}:net"
    check_model(name, (3, 4, 5), 7)
    model = build_model(name, (3, 4, 5), 7)
    assert model(torch.zeros(2, 3, 4, 5)).shape == (2, 7)


@pytest.mark.parametrize("logits", ["torch.zeros(2, 5)", "torch.zeros(2, 5, dtype=torch.float16)"])
def test_any_float_logits_are_accepted(logits: str, write_module: WriteModule) -> None:
    check_model(write_returning(write_module, logits), (1, 4, 4), 5)


def write_returning(write_module: WriteModule, output: str) -> str:
    """A user's model whose output is ``output``."""
    lines = [
        "import torch",
        "class Net(torch.nn.Module):",
        "    def forward(self, images):",
        f"        return {output}",
        "def net(input_shape, num_classes):",
        "    return Net()",
    ]
    return write_module("\n".join(lines)) + ":net"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
        ("other = 1", "must hold a function net, got no such name"),
        ("def net(input_shape): pass", "must accept images of shape [batch, 1, 4, 4], got TypeError"),
        ("def net(*_):\n    raise RuntimeError('two\\nlines')", "[batch, 1, 4, 4], got RuntimeError: two lines"),
        ("def net(*_):\n    return 3", "must return a torch.nn.Module, got int"),
        (
            "from torch import nn\ndef net(*_):\n    return nn.Linear(784, 10)",
            "must accept images of shape [batch, 1, 4, 4], got RuntimeError: ",
        ),
    ],
)
def test_users_model_that_cannot_be_built_or_run_is_refused(
    text: str, expected: str, write_module: WriteModule
) -> None:
    name = f"{write_module(text)}:net"
    message = refusal(name)
    assert name in message
    assert expected in message


@pytest.mark.parametrize(
    ("output", "got"),
    [
        ("torch.zeros(2, 4)", "torch.float32 [2, 4]"),
        ("torch.zeros(2, 5, 1)", "torch.float32 [2, 5, 1]"),
        ("torch.zeros(1, 5)", "torch.float32 [1, 5]"),
        ("torch.zeros(2, 5, dtype=torch.int64)", "torch.int64 [2, 5]"),
        ("(torch.zeros(2, 5), None)", "tuple"),
        ("None", "NoneType"),
    ],
)
def test_users_model_with_another_output_is_refused(output: str, got: str, write_module: WriteModule) -> None:
    name = write_returning(write_module, output)
    assert refusal(name) == f"model: {name} must return float logits of shape [2, 5] for 2 images, got {got}"


def test_model_is_checked_as_it_validates_without_dropout_or_gradients(write_module: WriteModule) -> None:
    assertion = "torch.zeros(2, 5) if not self.training and not torch.is_grad_enabled() else 1 / 0"
    check_model(write_returning(write_module, assertion), (1, 4, 4), 5)


def test_long_error_of_a_users_model_is_shortened(write_module: WriteModule) -> None:
    message = refusal(write_module("def net(*_):\n    raise RuntimeError('long ' * 1000)") + ":net")
    assert len(message) < 500
    assert message.endswith(" ...")
