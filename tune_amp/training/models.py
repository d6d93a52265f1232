"""Defines the built-in models, and loads a user's own by ``package.module:function``.

A function of ``(input_shape, num_classes)`` makes a model, which maps float32 images ``[batch, *input_shape]`` to
logits ``[batch, num_classes]``.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tune_amp.training.own_code import exits_as_errors, import_function
from tune_amp.trial.config import InputError

InputShape = tuple[int, int, int]
ModelFunction = Callable[[InputShape, int], nn.Module]


def simple_net(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Return the tutorial's ``SimpleNet``: one hidden layer of 256 units, 784-256-10 on MNIST."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 256), nn.ReLU(), nn.Linear(256, num_classes))


def conv_net(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Return two convolutions of 32 and 64 channels, each halving the image, then one hidden layer of 128 units."""
    channels, height, width = input_shape
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
        channels, rows, columns = input_shape
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


def build_model(name: str, input_shape: InputShape, num_classes: int) -> nn.Module:
    """Return the model ``name``, float32 on the CPU, with weights drawn from torch's global generator.

    Lazy layers get their shapes from one pass in evaluation mode over two blank images.

    Raises:
        InputError: the name is a user's function that cannot be imported, that returns no ``nn.Module``, or that
            returns one which AMP cannot train.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](input_shape, num_classes)
    function = import_function(name)
    with exits_as_errors(), torch.enable_grad():
        model = function(input_shape, num_classes)
        if not isinstance(model, nn.Module):
            raise InputError(f"model: {name} must return a torch.nn.Module, got {type(model).__name__}")
        if _find_lazy(model) is not None:
            _run_dry(model, input_shape)
    _check_parameters(name, model)
    return model


def _find_lazy(model: nn.Module) -> str | None:
    """Return the name of a parameter or buffer that has no shape yet, or None."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return next((name for name, tensor in tensors if is_lazy(tensor)), None)


def _run_dry(model: nn.Module, input_shape: InputShape) -> None:
    was_training = model.training
    with torch.no_grad():  # in inference mode, the new weights could not be trained
        model.eval()(torch.zeros(2, *input_shape))
    model.train(was_training)


def _check_parameters(name: str, model: nn.Module) -> None:
    """Reject weights that are not AMP's fp32 master weights, and a model without trainable weights."""
    lazy = _find_lazy(model)
    if lazy is not None:
        raise InputError(f"model: {name} must use every lazy layer in its forward pass, got {lazy} without a shape")
    for place, parameter in model.named_parameters():
        if parameter.dtype is not torch.float32:
            advice = "; a constant belongs into a buffer"
            if parameter.is_complex():
                advice = " (torch.view_as_real stores a complex weight as pairs)"
            rule = "must have float32 parameters, which autocast casts as it needs them"
            raise InputError(f"model: {name} {rule}, got {place} of {parameter.dtype}{advice}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        count = sum(1 for _ in model.parameters())
        raise InputError(f"model: {name} must have a parameter that requires a gradient, got none among {count}")
