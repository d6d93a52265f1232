"""Evaluating a model on a split: a mean over images however they are batched, in batches that fit."""

import math

import numpy as np
import pytest
import torch
from small_runs import make_split
from torch import nn

from tune_amp.training import evaluation
from tune_amp.training.batches import InputScaling, place_split
from tune_amp.training.evaluation import choose_evaluation_batch, evaluate
from tune_amp.training.task import ImageClassification

CPU = torch.device("cpu")


@pytest.mark.parametrize("training_mode", [False, True])
def test_evaluation_puts_the_model_back_into_its_mode(training_mode: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train(training_mode)
    modes: list[bool] = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    split = place_split(make_split(), CPU)
    scaling = InputScaling(shift=0.0, factor=1 / 255)
    first, second = (evaluate(ImageClassification(), model, split, scaling, batch_size=8) for _ in range(2))
    assert first == second
    assert modes == [False, False]
    assert model.training is training_mode


def test_what_a_model_makes_and_keeps_in_evaluation_can_be_trained_with() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))
            self.kept = torch.ones(0, 16)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(self.kept) < len(images):  # as rotary embeddings of sequences longer than before
                self.kept = torch.ones(len(images), 16)
            return images.flatten(1) * self.scale * self.kept[: len(images)]

    model = Positions()
    scaling = InputScaling(shift=0.0, factor=1 / 255)
    evaluate(ImageClassification(), model, place_split(make_split(), CPU), scaling, batch_size=8)
    model(torch.rand(2, 1, 4, 4)).sum().backward()
    assert model.scale.grad is not None


@pytest.mark.parametrize("batch", [1, 7, 59, 60, 61])
def test_evaluation_is_a_mean_over_images_however_they_are_batched(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_PIXELS", 0)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    split = make_split()
    split.labels[40:] = 2  # the last batch is not like the others
    scaling = InputScaling(shift=60.0, factor=0.01)
    logits = model.double()((torch.from_numpy(split.images).double() - 60) * 0.01).detach().numpy()
    log_likelihoods = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_likelihoods[np.arange(60), split.labels].mean()
    sizes: list[int] = []
    model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    found = evaluate(ImageClassification(), model.float(), place_split(split, CPU), scaling, batch_size=batch)
    assert sizes == [len(part) for part in torch.arange(60).split(batch)]
    assert found.number("loss") == pytest.approx(expected, rel=1e-6)
    correct = logits.argmax(axis=1) == split.labels
    assert found.number("accuracy") == correct.mean()
    recalls = found.averages["recalls"]
    assert recalls == tuple(correct[split.labels == label].mean() for label in range(3))
    assert len(set(recalls)) == 3


def test_recall_of_a_class_without_an_image_is_no_number() -> None:
    split = make_split(20, classes=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = evaluate(
        ImageClassification(), model, place_split(split, CPU), InputScaling(shift=0.0, factor=0.01), batch_size=8
    )
    recalls = found.averages["recalls"]
    assert isinstance(recalls, tuple)
    first, second, missing = recalls
    assert first >= 0
    assert second >= 0
    assert math.isnan(missing)


@pytest.mark.parametrize(
    ("batch_size", "shape", "images"),
    [
        (16, (3, 96, 96), 16),  # images of this size fill the memory that training left
        (16, (3, 224, 224), 16),
        (1, (3, 224, 224), 1),
        (64, (1, 28, 28), 256),  # small ones are taken many at a time
        (1024, (1, 28, 28), 1024),
        (4096, (1, 28, 28), 2048),
        (16, (1, 8, 8), 2048),
    ],
)
def test_evaluation_takes_a_training_batch_at_a_time_or_a_fixed_amount_of_pixels(
    batch_size: int, shape: tuple[int, int, int], images: int
) -> None:
    assert choose_evaluation_batch(batch_size, math.prod(shape)) == images
