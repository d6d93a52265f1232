"""Recognises out-of-memory errors by their types and by the texts of PyTorch, CUDA and its libraries."""

import re

import torch

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
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_GPU_MEMORY.search(str(error)) is not None
