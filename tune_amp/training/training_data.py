"""The data of a worker: placed once on its device, with the facts about it that successive trials share."""

import dataclasses
import functools
import math
import time

import numpy as np
import torch
from torch import Tensor

from tune_amp.training.batches import DeviceSplit, class_weights, difficulty_order, fit_input_scaling
from tune_amp.training.data import Split
from tune_amp.training.models import InputShape
from tune_amp.training.streams import StreamedBatches, place


class TrainingData:
    """A training split, and optionally a validation split, on one device and reused by successive trials.

    Args:
        train: the images to train on.
        validation: the images to validate on after every epoch, or None to train without validation.
        num_classes: labels are 0 .. num_classes - 1; 0 if targets are no classes.
        device: device that holds both splits, images as uint8: 47 MB for 60,000 of MNIST, a quarter of float32. What is
            too large for it is streamed.
        workers: processes that read streamed items; see ``streams.place``.
    """

    def __init__(
        self,
        train: Split,
        validation: Split | None,
        num_classes: int,
        device: torch.device,
        *,
        workers: int | None = None,
    ) -> None:
        started = time.perf_counter()
        self.num_classes = num_classes
        self.device = device
        self.input_shape: InputShape = train.images.shape[1:]
        is_whole = train.images.dtype.kind in "iu" and not train.is_scaled
        self.input_dtype = torch.int64 if is_whole else torch.float32
        """Dtype of a batch's inputs, as far as a model's layers need it."""
        self.train = place(train, device, workers)
        self.validation = None if validation is None else place(validation, device, workers)
        self._workers = workers
        self._placing_seconds = time.perf_counter() - started
        self._host_train = train
        self.input_scaling = functools.cache(functools.partial(fit_input_scaling, train))
        """Returns the input scaling by a method, fitted to the training split only."""
        self._measured = train if validation is None else validation

    def claim_placing_seconds(self) -> float:
        """Return, once, the seconds spent placing and sorting the data, so that only the waiting trial is charged."""
        seconds, self._placing_seconds = self._placing_seconds, 0.0
        return seconds

    def place_test(self, test: Split) -> DeviceSplit | StreamedBatches:
        """Return a test split where the other splits are."""
        return place(test, self.device, self._workers)

    def class_weights(self, method: str) -> Tensor | None:
        """Return ``batches.class_weights`` of the training split, after any thinning, on the device."""
        weights = class_weights(self._host_train.labels, self.num_classes, method)
        return None if weights is None else weights.to(self.device)

    @functools.cached_property
    def guessing(self) -> "Guessing":
        """Results of guessing by the class frequencies of the split that is measured."""
        labels = self._measured.labels
        shares = np.bincount(labels, minlength=self.num_classes) / len(labels)
        entropy = -float(sum(share * math.log(share) for share in shares if share > 0))
        return Guessing(loss=entropy, accuracy=float(shares.max()), images=len(labels))

    @functools.cached_property
    def easy_to_hard(self) -> Tensor:
        """Indices of the training images by increasing difficulty, int64 [n]."""
        started = time.perf_counter()
        order = torch.from_numpy(difficulty_order(self._host_train, self.num_classes)).to(self.device)
        self._placing_seconds += time.perf_counter() - started
        return order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guessing:
    """The best results possible without looking at an image."""

    loss: float
    """Entropy of the labels, in nats."""
    accuracy: float
    """Share of the most frequent class."""
    images: int
    """Number of images that accuracies are measured on."""

    def is_beaten(self, loss: float, accuracy: float | None) -> bool:
        """Return whether a model is clearly better: by 5 % of the loss, or by 3 standard errors of the accuracy."""
        if loss < 0.95 * self.loss:
            return True
        error = math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)
        return accuracy is not None and accuracy > self.accuracy + 3 * error
