"""What a figure was measured on: the machine without its name, and the versions of what ran."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tune_amp.cluster.cpus import count_cpus

if TYPE_CHECKING:
    import torch  # takes seconds to import, and only a GPU is asked through it

PACKAGES = ("tune_amp", "torch", "torchvision", "triton", "ray", "optuna", "pyarrow", "numpy")
CPU_INFO = Path("/proc/cpuinfo")
MATRIX_FLAGS = ("avx512f", "avx512_bf16", "amx_bf16", "amx_fp16")
"""Of a processor's flags, those that decide how fast each precision is."""


def describe_machine(device: "torch.device | None" = None) -> dict[str, str]:
    """Processor, instructions for matrices, cores this process may use, memory and kind of system; no host name.

    Args:
        device: a CUDA device adds the GPU's name, memory, compute capability and the CUDA version torch was built for.
    """
    about = {
        "processor": read_processor(),
        "instructions": ", ".join(read_matrix_flags()) or "none of " + ", ".join(MATRIX_FLAGS),
        "cores": str(count_cpus()),
        "memory": f"{count_memory_bytes() / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }
    return about if device is None or device.type != "cuda" else {**_describe_gpu(device), **about}


def describe_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those ``packages`` that are installed."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine_line(device: "torch.device | None" = None) -> str:
    """Machine and versions in one line, for the head of a table."""
    machine = describe_machine(device)
    gpu = f"{machine['gpu']} ({machine['gpu_memory']}, CUDA {machine['cuda']}), " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['processor']} ({machine['cores']} cores, {machine['instructions']}), {machine['memory']}, "
        f"{machine['system']}; {render_versions(describe_versions())}"
    )


def render_versions(versions: Mapping[str, str]) -> str:
    """``python 3.11.7, torch 2.15.0``."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def read_processor(cpu_info: Path = CPU_INFO) -> str:
    """The processor's name as it tells itself, else its architecture."""
    return _read_field(cpu_info, "model name") or platform.processor() or platform.machine()


def read_matrix_flags(cpu_info: Path = CPU_INFO) -> tuple[str, ...]:
    """Those of ``MATRIX_FLAGS`` that the processor has."""
    flags = set(_read_field(cpu_info, "flags").split())
    return tuple(flag for flag in MATRIX_FLAGS if flag in flags)


def count_memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_field(cpu_info: Path, name: str) -> str:
    """The first processor's value in a file like Linux's ``/proc/cpuinfo``; empty where there is none."""
    try:
        lines = cpu_info.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return ""
    values = (line.partition(":") for line in lines)
    return next((" ".join(value.split()) for key, _, value in values if key.strip() == name), "")


def _describe_gpu(device: "torch.device") -> dict[str, str]:
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
    }
