"""Streams data that does not stay on the device: data sets of torch, and arrays that are too large for it.

The order of the items is the same as for resident data: batches of indices, drawn from the run's own generator.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torch.utils.data import Dataset as TorchDataset

from tune_amp.training.batches import Batch, DeviceSplit, InputScaling, place_split, scale_images
from tune_amp.training.data import Split, StreamedSplit
from tune_amp.trial.config import InputError

LARGEST_SHARE = 0.5
"""Largest share of a GPU's free memory that data may occupy; the rest is left to models."""


class StreamedBatches:
    """A split whose batches are read by a DataLoader.

    Args:
        source: data set of items (input, target).
        reason: why it is streamed, for the column ``loop``.
        device: device of the batches.
        input_size: number of values in an input.
        workers: processes that read items; with 0, this process reads them.
    """

    def __init__(
        self,
        source: TorchDataset[Any],
        reason: str,
        device: torch.device,
        *,
        input_size: int,
        workers: int,
    ) -> None:
        self.reason = reason
        self.input_size = input_size
        self._source = source
        self._device = device
        self._workers = workers

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]

    def take(self, indices: Tensor, scaling: InputScaling) -> Batch:
        """Read the batch of the items at ``indices`` in this process."""
        return self._place(default_collate([self._source[int(index)] for index in indices]), scaling)

    def stream(self, batches: Iterable[Tensor], seed: int, scaling: InputScaling) -> Iterator[Batch]:
        """Read the batches of the items at ``batches`` (int64 indices), in this order.

        Items that draw random numbers draw them by ``seed`` in workers; without workers, from the run's generators.
        """
        loader: DataLoader[Any] = DataLoader(
            self._source,
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Workers seed torch's, NumPy's and Python's generators from it.
            generator=torch.Generator().manual_seed(seed % 2**63),
        )
        for batch in loader:
            yield self._place(batch, scaling)

    def in_order(self, at_once: int, scaling: InputScaling) -> Iterator[Batch]:
        """Read all items in their order, ``at_once`` a batch."""
        return self.stream(torch.arange(len(self)).split(at_once), 0, scaling)

    def _place(self, batch: Any, scaling: InputScaling) -> Batch:
        placed = _move(batch, self._device)
        if isinstance(placed, tuple) and isinstance(placed[0], Tensor):
            return _like(placed, (scale_images(placed[0], scaling), *placed[1:]))
        return placed


def place(split: Split, device: torch.device, workers: int | None = None) -> DeviceSplit | StreamedBatches:
    """Return the split on ``device``; or a stream of it, if it is a data set of torch or too large.

    ``workers`` processes read the items of a stream; None: on a GPU as many as a trial has CPU threads, which wait
    meanwhile; on the CPU none, since training needs them.
    """
    if workers is None:
        workers = torch.get_num_threads() if device.type == "cuda" else 0
    size = max(1, split.images[:1].size)
    if isinstance(split, StreamedSplit):
        reason = f"streamed from {type(split.source).__name__}"
        return StreamedBatches(split.source, reason, device, input_size=size, workers=workers)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    too_large = explain_too_large(split.images.nbytes + split.labels.nbytes, free)
    if too_large is None:
        return place_split(split, device)
    on_host = place_split(split, torch.device("cpu"))
    source = TensorDataset(on_host.images, on_host.labels)
    return StreamedBatches(source, f"streamed from memory: {too_large}", device, input_size=size, workers=workers)


def explain_too_large(data_bytes: int, free_bytes: int | None) -> str | None:
    """Return why data does not stay on a device with ``free_bytes`` of memory; None if it does, as on the CPU."""
    if free_bytes is None or data_bytes <= LARGEST_SHARE * free_bytes:
        return None
    return f"{data_bytes / 2**30:.1f} GiB exceed {LARGEST_SHARE:.0%} of the GPU's free {free_bytes / 2**30:.1f} GiB"


def _move(value: Any, device: torch.device) -> Any:
    """Return the tensors within ``value`` on ``device``; floats as float32, in which models are."""
    if isinstance(value, Tensor):
        dtype = torch.float32 if value.dtype is torch.float64 else None
        return value.to(device, dtype, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return _like(value, tuple(_move(part, device) for part in value))
    raise InputError(f"a data set's items must hold tensors, arrays and numbers only, got {type(value).__name__}")


def _like(value: Any, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return ``parts`` as a tuple, a named one if ``value`` is."""
    return type(value)(*parts) if hasattr(value, "_fields") else parts


def count_in_batch(batch: Batch) -> int:
    """Return the number of items in a batch: the length of its first tensor."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)
