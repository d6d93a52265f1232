"""Defines the built-in models, and loads a user's own by ``package.module:function``.

A function of ``(input_shape, num_classes)`` makes a model, which maps inputs ``[batch, *input_shape]`` (images are
float32) to logits ``[batch, num_classes]``. A trial's own parameters are passed as keyword arguments.
"""

import inspect
import itertools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tune_amp.training.own_code import exits_as_errors, import_function
from tune_amp.trial.config import InputError

InputShape = tuple[int, ...]
"""Channels, height and width of images; other inputs have any shape."""
ModelFunction = Callable[..., nn.Module]


def simple_net(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Return the tutorial's ``SimpleNet``: one hidden layer of 256 units, 784-256-10 on MNIST."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 256), nn.ReLU(), nn.Linear(256, num_classes))


def conv_net(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Return two convolutions of 32 and 64 channels, each halving the image, then one hidden layer of 128 units."""
    channels, height, width = _check_images("conv_net", input_shape)
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


class VisionTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), mean-pooled, without dropout by default.

    The image is cut into four by four patches: a 28x28 image gives 16 tokens of 7x7 pixels.

    Raises:
        InputError: the image's sides are not multiples of four.
    """

    def __init__(
        self,
        input_shape: InputShape,
        num_classes: int,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, rows, columns = _check_images("vit", input_shape)
        if rows % 4 or columns % 4:
            raise InputError(f"model: vit needs image sides that are multiples of 4, got {rows}x{columns}")
        patch = (rows // 4, columns // 4)
        self.embed = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        # Nested tensors only help with padded text, and enabling them together with norm_first warns.
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, num_classes]`` of float images ``[batch, channels, rows, columns]``."""
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.encoder(tokens + self.position).mean(dim=1))
        return logits


BUILT_IN: dict[str, ModelFunction] = {"simple_net": simple_net, "conv_net": conv_net, "vit": VisionTransformer}


def build_model(
    name: str,
    input_shape: InputShape,
    num_classes: int,
    own: Mapping[str, Any] = types.MappingProxyType({}),
    *,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return the model ``name``, float32 on the CPU, with weights drawn from torch's global generator.

    Lazy layers get their shapes from one pass in evaluation mode over two blank inputs of ``dtype``.

    Raises:
        InputError: the name is a user's function that cannot be imported, that returns no ``nn.Module``, or that
            returns one which AMP cannot train; or the function does not take the parameters in ``own``.
    """
    function = BUILT_IN[name] if name in BUILT_IN else import_function(name)
    _check_own(name, function, own)
    with exits_as_errors(), torch.enable_grad():
        model = function(input_shape, num_classes, **own)
        if not isinstance(model, nn.Module):
            raise InputError(f"model: {name} must return a torch.nn.Module, got {type(model).__name__}")
        check_model(f"model: {name}", model, lambda: _run_dry(model, input_shape, dtype))
    return model


def _check_images(name: str, input_shape: InputShape) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise InputError(f"model: {name} needs images of shape (channels, height, width), got {input_shape}")
    channels, height, width = input_shape
    return channels, height, width


def _check_own(name: str, function: ModelFunction, own: Mapping[str, Any]) -> None:
    """Refuse own parameters that a model's function does not take."""
    taken = inspect.signature(function).parameters.values() if own else ()
    names = [parameter.name for parameter in [*taken][2:] if parameter.kind is not parameter.VAR_KEYWORD]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)
    for parameter in () if takes_all else own:
        if parameter not in names:
            rule = f"must take own.{parameter} as a keyword argument, it takes {names or 'none'}"
            raise InputError(f"model: {name} {rule}")


def _find_lazy(model: nn.Module) -> str | None:
    """Return the name of a parameter or buffer that has no shape yet, or None."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return next((name for name, tensor in tensors if is_lazy(tensor)), None)


def _run_dry(model: nn.Module, input_shape: InputShape, dtype: torch.dtype) -> None:
    was_training = model.training
    with torch.no_grad():  # in inference mode, the new weights could not be trained
        model.eval()(torch.zeros(2, *input_shape, dtype=dtype))
    model.train(was_training)


def check_model(place: str, model: nn.Module, run_dry: Callable[[], None]) -> None:
    """Reject weights that are not AMP's fp32 master weights, and a model without trainable weights.

    Args:
        place: the model, for messages.
        model: the model to check.
        run_dry: runs the model once, to give lazy layers their shapes; called only if there are some.

    Raises:
        InputError: AMP cannot train the model.
    """
    if _find_lazy(model) is not None:
        run_dry()
    lazy = _find_lazy(model)
    if lazy is not None:
        raise InputError(f"{place} must use every lazy layer in its forward pass, got {lazy} without a shape")
    for name, parameter in model.named_parameters():
        if parameter.dtype is not torch.float32:
            advice = "; a constant belongs into a buffer"
            if parameter.is_complex():
                advice = " (torch.view_as_real stores a complex weight as pairs)"
            rule = "must have float32 parameters, which autocast casts as it needs them"
            raise InputError(f"{place} {rule}, got {name} of {parameter.dtype}{advice}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        count = sum(1 for _ in model.parameters())
        raise InputError(f"{place} must have a parameter that requires a gradient, got none among {count}")
