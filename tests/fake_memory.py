"""A stand-in for CUDA's allocator, for tests without a GPU."""

import pytest
import torch


class FakeMemory:
    """Stands in for CUDA's allocator: what is allocated, and the peak since the last reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = self.workspaces = 0
        for name, function in {
            "memory_allocated": lambda _device: self.allocated,
            "max_memory_allocated": lambda _device: self.peak,
            "reset_peak_memory_stats": self.reset,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, raising=False)

    def reset(self, _device: torch.device) -> None:
        self.peak = self.allocated

    def clear_workspaces(self) -> None:
        self.allocated -= self.workspaces
        self.workspaces = 0

    def touch(self, amount: int, *, workspaces: int = 0) -> None:
        """Allocate, and free all but a library's workspaces, which it takes once."""
        self.allocated += workspaces - self.workspaces
        self.workspaces = workspaces
        self.peak = max(self.peak, self.allocated + amount)
