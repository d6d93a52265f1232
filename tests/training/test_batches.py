"""Batches: splits on a device, their scaling, the order of images, their difficulty and class weights."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight  # type: ignore[import-untyped]

from tune_amp.training.batches import (
    InputScaling,
    batch_indices,
    class_weights,
    difficulty_order,
    fit_input_scaling,
    place_split,
    scale_images,
)
from tune_amp.training.data import Dataset, Split
from tune_amp.trial.config import InputError

CPU = torch.device("cpu")


def make_split(count: int = 2600, classes: int = 2, seed: int = 0) -> Split:
    """More images than are widened at a time."""
    generator = np.random.default_rng(seed)
    images = generator.integers(3, 200, (count, 2, 3, 4), np.uint8)
    return Split(images=images, labels=generator.integers(0, classes, count))


def test_split_is_placed_on_the_cpu_without_a_copy_even_if_read_only() -> None:
    split = make_split(10)
    for array in (split.images, split.labels):
        array.flags.writeable = False
    placed = place_split(split, CPU)
    assert placed.images.dtype == torch.uint8
    assert placed.labels.dtype == torch.int64
    assert placed.images.data_ptr() == split.images.ctypes.data
    assert placed.labels.data_ptr() == split.labels.ctypes.data


def test_placing_silences_no_other_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(_: Any) -> torch.Tensor:
        warnings.warn("another", UserWarning, stacklevel=1)
        return torch.zeros(1)

    monkeypatch.setattr(torch, "from_numpy", warn)
    with pytest.warns(UserWarning, match="another"):
        place_split(make_split(10), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_split_and_batches_are_placed_on_the_gpu() -> None:
    device, split = torch.device("cuda"), make_split(10)
    placed = place_split(split, device)
    assert placed.images.device.type == placed.labels.device.type == "cuda"
    np.testing.assert_array_equal(placed.images.cpu().numpy(), split.images)
    on_gpu = batch_indices(100, 8, torch.Generator().manual_seed(1), device)
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), batch_indices(100, 8, torch.Generator().manual_seed(1), CPU))


def test_minmax_maps_the_training_pixels_to_0_and_1() -> None:
    split = make_split()
    split.images[-1, 0, 0, 0] = 215  # in the last chunk
    scaled = scale_images(torch.from_numpy(split.images), fit_input_scaling(split, "minmax"))
    assert scaled.dtype == torch.float32
    assert scaled.shape == split.images.shape
    assert (scaled.min().item(), scaled.max().item()) == (0, 1)
    expected = (split.images.astype(np.float64) - 3) / (215 - 3)
    np.testing.assert_allclose(scaled.numpy(), expected, rtol=1e-6)


def test_standard_scaling_gives_the_training_pixels_mean_0_and_deviation_1() -> None:
    split = make_split()
    scaling = fit_input_scaling(split, "standard")
    assert scaling.shift == pytest.approx(split.images.mean(dtype=np.float64), rel=1e-12)
    assert scaling.factor == pytest.approx(1 / split.images.std(dtype=np.float64), rel=1e-12)
    scaled = scale_images(torch.from_numpy(split.images), scaling)
    assert scaled.mean().item() == pytest.approx(0, abs=1e-5)
    assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["minmax", "standard"])
def test_scaling_of_a_data_set_knows_nothing_of_validation_and_test(digits: Dataset, method: str) -> None:
    elsewhere = Split(images=digits.test.images // 2, labels=digits.test.labels)
    changed = dataclasses.replace(digits, validation=elsewhere, test=elsewhere)
    scaling = fit_input_scaling(digits.train, method)
    assert fit_input_scaling(changed.train, method) == scaling
    pixels = digits.train.images
    expected = pixels.mean(dtype=np.float64) if method == "standard" else pixels.min()
    assert scaling.shift == pytest.approx(expected)


def test_scaling_leaves_the_resident_images_as_they_are() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    scaling = InputScaling(shift=1, factor=2)
    assert scale_images(images, scaling).tolist() == [[[-2, 0, 2], [4, 6, 8]]]
    assert images.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    for other in (images[0], images.float(), images.long()):  # rows of numbers, floats, tokens
        assert scale_images(other, scaling) is other


@pytest.mark.parametrize("method", ["minmax", "standard"])
def test_constant_images_cannot_be_scaled(method: str) -> None:
    split = Split(images=np.full((4, 1, 2, 2), 9, np.uint8), labels=np.zeros(4, np.int64))
    with pytest.raises(InputError, match="all are 9"):
        fit_input_scaling(split, method)


@given(count=st.integers(1, 200), batch_size=st.integers(1, 200), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=50, database=None)
def test_batches_hold_each_index_at_most_once_and_are_full(count: int, batch_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if batch_size > count:
        with pytest.raises(InputError, match=rf"batch_size: .* {count} images .* got {batch_size}"):
            batch_indices(count, batch_size, generator, CPU)
        return
    batches = batch_indices(count, batch_size, generator, CPU)
    assert batches.shape == (count // batch_size, batch_size)
    assert batches.dtype == torch.int64
    assert len(set(batches.ravel().tolist())) == batches.numel()
    assert batches.min() >= 0
    assert batches.max() < count


def test_batches_repeat_with_the_seed_and_differ_between_epochs() -> None:
    first, again, other = (torch.Generator().manual_seed(seed) for seed in (5, 5, 6))
    torch.manual_seed(0)
    epochs = [batch_indices(1000, 32, first, CPU) for _ in range(3)]
    torch.manual_seed(1)  # the global generator plays no part
    assert all(torch.equal(epoch, batch_indices(1000, 32, again, CPU)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], batch_indices(1000, 32, other, CPU))
    # What is dropped changes too: over epochs every image is seen.
    assert len(set(torch.cat(epochs).ravel().tolist())) == 1000


# Difficulty and class weights


def test_difficulty_is_the_distance_to_the_mean_image_of_the_class() -> None:
    split = make_split(classes=2)
    means = [split.images[split.labels == c].astype(np.float64).mean(axis=0) for c in range(2)]
    distances = [np.sqrt(((image - means[c]) ** 2).sum()) for image, c in zip(split.images, split.labels, strict=True)]
    order = difficulty_order(split, 3)  # a class without an image is no fault
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(split)))
    assert np.diff(np.array(distances)[order]).min() >= -1e-9


def test_images_of_one_difficulty_keep_their_order() -> None:
    split = Split(images=np.full((50, 1, 2, 2), 7, np.uint8), labels=np.arange(50) % 2)
    split.images[10] = 9
    split.images[11] = 9
    easy = [i for i in range(50) if i not in {10, 11}]
    assert difficulty_order(split, 2).tolist() == [*easy, 10, 11]


def test_balanced_class_weights_are_scikit_learns() -> None:
    labels = np.repeat(np.arange(3), (2, 5, 13))
    weights = class_weights(labels, 3, "balanced")
    assert weights is not None
    assert weights.dtype == torch.float32
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    assert class_weights(labels, 3, "none") is None


def test_class_without_an_image_cannot_be_weighted() -> None:
    with pytest.raises(InputError, match="class 3 has none"):
        class_weights(np.array([0, 1, 2, 4]), 5, "balanced")
