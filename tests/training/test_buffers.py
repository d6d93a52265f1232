"""Values of buffers that a forward pass makes infinite are put back, and all others are left as they became."""

import math

import pytest
import torch
from torch import Tensor, nn

from tune_amp.training.buffers import FiniteBuffers


def test_only_values_that_are_no_longer_finite_are_put_back() -> None:
    norm = nn.BatchNorm2d(2)
    mask = torch.tensor([0.0, -math.inf])
    half, double, flag, empty = torch.ones(2).half(), torch.ones(1, 2).double(), torch.tensor([True]), torch.zeros(0)
    buffers = FiniteBuffers([*norm.buffers(), mask, half, double, flag, empty])
    for first in (3.0, 5.0):  # twice: what is put back is the value from before the last block
        norm.running_mean[0] = first  # type: ignore[index]
        with buffers.kept_finite():
            for buffer in (norm.running_mean, half, double):
                buffer.mul_(2.0)  # type: ignore[union-attr]
            for buffer, value in ((norm.running_mean, math.inf), (norm.running_var, math.nan), (half, -math.inf)):
                buffer[0] = value  # type: ignore[index]
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            flag.logical_not_()
        assert norm.running_mean.tolist() == [first, 0.0]  # type: ignore[union-attr]
    assert norm.running_var.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    assert (half.tolist(), double.tolist()) == ([1.0, 4.0], [[4.0, 4.0]])
    assert mask.tolist() == [0.0, -math.inf]  # meant, and there before
    assert norm.num_batches_tracked == 2
    assert flag.item() is True


def test_statistics_of_a_batch_norm_are_those_of_pytorch_where_nothing_overflows() -> None:
    ours, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    buffers = FiniteBuffers(ours.buffers())
    images = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    for batch in images:
        plain(batch)
        with buffers.kept_finite():
            ours(batch)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))


def test_buffers_that_share_memory_or_are_not_dense_are_left_alone() -> None:
    repeated, sparse, dense = torch.ones(3).expand(2, 3), torch.eye(2).to_sparse(), torch.zeros(2)
    with FiniteBuffers([repeated, sparse, dense]).kept_finite():
        dense.fill_(math.nan)
    assert dense.tolist() == [0, 0]
    assert repeated.tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize("buffers", [[], [torch.arange(3)]])
def test_model_without_buffers_that_can_become_infinite_costs_nothing(buffers: list[Tensor]) -> None:
    finite = FiniteBuffers(buffers)
    with finite.kept_finite():
        pass
    assert finite._groups == []
