"""Products in fp16 by fp32 units: against PyTorch's own, and that nothing else changes."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tune_amp.training import fp16_products
from tune_amp.training.fp16_products import fast_fp16_products
from tune_amp.training.models import build_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def slow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with fp16 units, the products are tested as on one without."""
    monkeypatch.setattr(fp16_products, "_is_slow", lambda: True)


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


class HalfProducts(TorchDispatchMode):
    """Counts PyTorch's own products of fp16 numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward") or "attention" in name:
            self.count += any(isinstance(one, Tensor) and one.dtype is torch.float16 for one in args)
        return func(*args, **(kwargs or {}))


def differentiate(operation: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    """The product under fp16 autocast, and the gradients of its operands, in float64."""
    given = [operand.clone().requires_grad_() for operand in operands]
    with torch.autocast("cpu", torch.float16, enabled=operands[0].dtype is torch.float32):
        product = operation(*given)
    steps = torch.linspace(-1, 1, product.numel()).view_as(product).half().to(product.dtype)
    gradients = torch.autograd.grad(product, given, steps)
    return [tensor.detach().double() for tensor in (product, *gradients)]


@pytest.mark.parametrize(("operation", "shapes"), [
    (functional.linear, [(8, 20), (12, 20), (12,)]),
    (torch.matmul, [(2, 3, 8, 20), (20, 5)]),
    (torch.bmm, [(3, 8, 20), (3, 20, 5)]),
    (torch.addmm, [(8, 5), (8, 20), (20, 5)]),
    (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(3, 8, 20), (3, 20, 5)]),
    (lambda a, b: a @ b, [(8, 20), (20, 5)]),
    (functional.conv1d, [(4, 6, 20), (5, 6, 3)]),
    (lambda x, w: functional.conv2d(x, w, padding="same"), [(4, 3, 8, 8), (5, 3, 3, 3)]),
    (lambda x, w: functional.conv2d(x, w, padding=1, stride=2), [(4, 3, 8, 8), (5, 3, 3, 3)]),
    (functional.conv_transpose2d, [(4, 3, 8, 8), (3, 5, 3, 3)]),
    (functional.scaled_dot_product_attention, [(2, 2, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)]),
])  # fmt: skip
def test_products_and_gradients_are_rounded_once_and_no_further_off_than_pytorchs(
    operation: Callable[..., Tensor], shapes: list[tuple[int, ...]], draw: Callable[..., Tensor]
) -> None:
    operands = [draw(*shape) for shape in shapes]
    exact = differentiate(operation, *(operand.half().double() for operand in operands))
    own = differentiate(operation, *operands)
    with fast_fp16_products("fp16", CPU), HalfProducts() as used:
        fast = differentiate(operation, *operands)
    assert used.count == 0
    for true, theirs, ours in zip(exact, own, fast, strict=True):
        torch.testing.assert_close(ours, true, rtol=2.0**-10, atol=1e-5)
        assert torch.equal(ours, ours.half().double())
        assert (ours - true).abs().mean() <= 1.01 * (theirs - true).abs().mean()


def test_a_sum_beyond_fp16_is_infinite_and_a_gradient_below_it_is_zero() -> None:
    large, weights = torch.full((1, 4), 200.0), torch.full((1, 4), 100.0, requires_grad=True)
    with fast_fp16_products("fp16", CPU), torch.autocast("cpu", torch.float16):
        assert functional.linear(large, weights).item() == torch.inf
        product = functional.linear(large / 200, weights)
        assert product.item() == 400
    [gradient] = torch.autograd.grad(product, weights, torch.full_like(product, 2.0**-24))
    assert gradient.eq(2.0**-24).all()
    product = product.detach()
    with fast_fp16_products("fp16", CPU), torch.autocast("cpu", torch.float16):
        product = functional.linear(large / 2000, weights)
    [gradient] = torch.autograd.grad(product, weights, torch.full_like(product, 2.0**-24))
    assert gradient.eq(0).all()  # a tenth of the smallest number


def test_operands_are_rounded_first() -> None:
    between = torch.tensor([[1 + 2.0**-12]])  # fp16 has 10 bits behind the point
    with fast_fp16_products("fp16", CPU), torch.autocast("cpu", torch.float16):
        assert (functional.linear(between, torch.tensor([[1024.0]])) == 1024).all()


@pytest.mark.parametrize("model", ["simple_net", "conv_net", "vit"])
def test_no_product_of_a_built_in_model_is_left_to_pytorch(model: str, draw: Callable[..., Tensor]) -> None:
    net = build_model(model, (1, 8, 8), 3)
    images = draw(4, 1, 8, 8)

    def count() -> int:
        with HalfProducts() as used:
            with torch.autocast("cpu", torch.float16):
                loss = functional.cross_entropy(net(images), torch.tensor([0, 1, 2, 0]))
            loss.backward()
        return int(used.count)

    assert count() > 0
    with fast_fp16_products("fp16", CPU):
        assert count() == 0
    assert count() > 0


def test_a_checkpointed_model_computes_again_as_it_did(draw: Callable[..., Tensor]) -> None:
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    inputs = draw(4, 6)

    def differentiate_layers(call: Callable[..., Tensor]) -> list[Tensor]:
        layers.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = call(inputs).float().square().sum()
        loss.backward()
        return [parameter.grad.clone() for parameter in layers.parameters() if parameter.grad is not None]

    with fast_fp16_products("fp16", CPU):
        plain = differentiate_layers(layers)
        again = differentiate_layers(lambda inputs: checkpoint(layers, inputs, use_reentrant=False))
    assert len(plain) == 4
    assert all(map(torch.equal, plain, again))


def test_other_types_and_contexts_compute_as_before(draw: Callable[..., Tensor]) -> None:
    inputs, weights = draw(4, 6), draw(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.linear(inputs, weights)
    with fast_fp16_products("fp16", CPU):
        assert torch.equal(functional.linear(inputs, weights), inputs @ weights.t())  # no autocast
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(functional.linear(inputs, weights), expected)
        with torch.autocast("cpu", torch.float16), torch.autocast("cpu", enabled=False):
            assert functional.linear(inputs, weights).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_what_autocast_leaves_alone_is_left_alone(dtype: torch.dtype) -> None:
    one, other = torch.full((2, 3), 1e5).to(dtype), torch.full((3, 2), 2e5).to(dtype)
    with torch.autocast("cpu", torch.float16):
        expected = one @ other
        with fast_fp16_products("fp16", CPU):
            found = one @ other
    assert found.dtype is expected.dtype is dtype
    assert torch.equal(found, expected)


def test_blocks_nest_and_the_last_to_end_puts_everything_back() -> None:
    one = torch.ones(2, 2)

    def is_fast() -> bool:
        with torch.autocast("cpu", torch.float16), HalfProducts() as used:
            torch.mm(one, one)
        return bool(used.count == 0)

    def fail() -> None:
        with fast_fp16_products("fp16", CPU):
            assert is_fast()
            raise ValueError("inside")

    with fast_fp16_products("fp16", CPU):
        with pytest.raises(ValueError, match="inside"):
            fail()
        assert is_fast()
    assert not is_fast()


def test_filters_of_warnings_that_are_set_inside_stay() -> None:
    with warnings.catch_warnings():
        with fast_fp16_products("fp16", CPU):
            warnings.filterwarnings("ignore", message="set inside")
        assert any(str(rule[1]) != "None" and rule[1].pattern == "set inside" for rule in warnings.filters if rule[1])


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_nothing_changes_for_other_precisions(precision: str, draw: Callable[..., Tensor]) -> None:
    with fast_fp16_products(precision, CPU), torch.autocast("cpu", torch.float16), HalfProducts() as used:
        functional.linear(draw(4, 6), draw(5, 6))
    assert used.count == 1


def test_nothing_changes_on_a_cpu_with_fp16_units(monkeypatch: pytest.MonkeyPatch, draw: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(fp16_products, "_is_slow", lambda: False)
    with fast_fp16_products("fp16", CPU), torch.autocast("cpu", torch.float16), HalfProducts() as used:
        functional.linear(draw(4, 6), draw(5, 6))
    assert used.count == 1
