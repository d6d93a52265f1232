"""Measures and releases GPU memory, and recognises out-of-memory errors by their types and texts."""

import contextlib
import gc
import re
from collections.abc import Iterator

import torch

from tune_amp.training.cuda_graph import clear_workspaces

_OUT_OF_GPU_MEMORY = re.compile(
    r"CUDA out of memory"
    r"|CUDA error: out of memory"  # a torch.AcceleratorError, from outside PyTorch's own allocator
    r"|CUBLAS_STATUS_NOT_INITIALIZED"  # cublasCreate, if no memory is left for its handle
    r"|(CUBLAS|CUDNN|CUFFT|CUSOLVER|CUSPARSE)_(\w+_)?ALLOC(ATION)?_FAILED"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: a GPU's, Python's, or the CPU allocator's, which raises a bare RuntimeError."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, MemoryError) or is_out_of_gpu_memory(error)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Return whether a GPU's memory ran out, or the share of it that the process may use."""
    is_named = isinstance(error, RuntimeError) and _OUT_OF_GPU_MEMORY.search(str(error)) is not None
    return is_named or isinstance(error, torch.OutOfMemoryError)


class MemoryMeter:
    """Peak CUDA memory of a run's training on ``device``, without evaluation and what is allocated there now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes: int | None = None
        """Peak so far, in bytes; None without CUDA, and before the first measurement."""
        if device.type == "cuda":
            clear_workspaces()  # else a worker's first trial would be charged for them, and later trials not
            self._resident_bytes = torch.cuda.memory_allocated(device)

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Record the peak of a ``with`` block."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        yield
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - self._resident_bytes
            self.peak_bytes = max(self.peak_bytes or 0, peak)


def release_memory(device: torch.device) -> None:
    """Release a run's memory on ``device`` to other processes. Call it after the last reference to the run is gone."""
    gc.collect()  # models may hold reference cycles
    if device.type == "cuda":
        clear_workspaces()
        torch.cuda.empty_cache()
