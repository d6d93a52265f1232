"""The memory of training, with the workspaces of matrix products apart.

Products of matrices need a workspace: 32 MiB on an H100 or H200, more than a small network. How much of it is in a
run's peak cannot be known in general, so that ``peak_memory_bytes`` includes it: torch 2.11 keeps a workspace for each
thread and stream, torch 2.15 allocates one for the time of each product (``ATen/cuda/CUDAContextLight.h``), and the
peak may fall between two products. Here it is measured on a network without size, and subtracted: what is left is the
least that the run needs besides.
"""

from collections.abc import Mapping

import torch
from torch import nn

from benchmarks.training.gpu_rows import GpuRow
from tune_amp.training.amp import autocast_of
from tune_amp.training.memory import MemoryMeter


def measure_workspace(precision: str, device: torch.device, meter: MemoryMeter) -> int | None:
    """Return the peak bytes of a linear layer of 64 x 64, forward and backward; None without CUDA.

    Args:
        precision: products of each precision may need another workspace.
        device: device of the layer, whose 48 KiB are included.
        meter: meter of that device.
    """
    with meter.measure():
        layer = nn.Linear(64, 64, device=device)
        with autocast_of(precision, device):
            loss = layer(torch.ones(64, 64, device=device)).sum()
        loss.backward()
    return meter.peak_bytes


def build_memory_rows(subject: str, peaks: Mapping[str, int], workspaces: Mapping[str, int]) -> list[GpuRow]:
    """Return the rows of one model and batch size.

    Args:
        subject: the model and the batch size.
        peaks: peak bytes by precision, fp32 among them.
        workspaces: those of ``measure_workspace`` by precision.
    """
    rows = []
    for precision, peak in peaks.items():
        apart = {name: peaks[name] - workspaces[name] for name in ("fp32", precision)}
        for quantity, value, unit in (
            ("peak, data apart", peak / 2**20, "MiB"),
            ("over fp32", peak / peaks["fp32"], ""),
            ("peak, data and workspace apart, at least", apart[precision] / 2**20, "MiB"),
            ("over fp32, workspaces apart", apart[precision] / apart["fp32"], ""),
        ):
            row = GpuRow(part="memory", subject=f"{subject}, {precision}", quantity=quantity, value=value, unit=unit)
            rows.append(row)
    return rows
