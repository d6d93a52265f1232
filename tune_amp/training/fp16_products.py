"""Products in fp16 on a CPU without fp16 units: the same arithmetic, several times as fast as PyTorch's own.

There PyTorch multiplies fp16 numbers one by one, sums in fp32 and rounds the sum to fp16. The fp32 units do the same: a
product in fp32 of operands that were rounded to fp16, rounded to fp16 once more, differs only by the order of the sum.
The gradients of a weight that a model uses several times are added up in fp32, where autocast adds them in fp16.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# What autocast computes in lower precision, without recurrent cells and prelu (aten/src/ATen/autocast_mode.h).
PRODUCTS = (
    "linear",
    *(f"conv{rank}d" for rank in (1, 2, 3)),
    *(f"conv{rank}d.padding" for rank in (1, 2, 3)),
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    *("matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm"),
    "scaled_dot_product_attention",
)


@contextlib.contextmanager
def fast_fp16_products(precision: str, device: torch.device) -> Iterator[None]:
    """In the ``with`` block, autocast of this process computes products in fp16 by fp32 units, where it has no others.

    Results are rounded once; attention counts as one product. So are the gradients: the backward pass of a cast rounds
    to the type that was cast from. Nothing happens for other precisions, on a GPU, and on a CPU with fp16 units.
    """
    if precision != "fp16" or device.type != "cpu" or not _is_slow():
        yield
        return
    # https://docs.pytorch.org/docs/stable/library.html#torch.library.Library.impl
    with torch.library._scoped_library("aten", "IMPL") as library:  # noqa: SLF001 - the public class ends with its object
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name in PRODUCTS:
                library.impl(name, _build_product(name), "AutocastCPU", allow_override=True)
        yield


def _is_slow() -> bool:
    """Return whether PyTorch has only its own loops for products in fp16, not those of oneDNN."""
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_fp16_supported()  # noqa: SLF001


def _build_product(name: str) -> Callable[..., Tensor]:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def multiply(*operands: Any, **options: Any) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")  # a user's own context may ask for another

        def round_operand(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is torch.float64:
                return value
            return value.half().float() if dtype is torch.float16 else value.to(dtype)

        with torch.autocast("cpu", enabled=False):
            product: Tensor = operation(*map(round_operand, operands), **options)
            # Autocast leaves integers, complex numbers and float64 alone.
            return product.half() if dtype is torch.float16 and product.dtype is torch.float32 else product

    return multiply
