"""Keeps in the user's cache folder how trials share a GPU, so that a search like an earlier one need not measure it.

A file is a hint: one that is damaged, belongs to another user or cannot be written is ignored, and never replaced.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tune_amp import __version__
from tune_amp.cluster.gpu_sharing import ShareMeasurement
from tune_amp.cluster.mps import list_servers
from tune_amp.training.data import Split
from tune_amp.trial.config import TrialConfig

MOST_BYTES = 2**16
"""Size of the largest file that is read; a measurement takes about a kilobyte."""
MOST_SAMPLES = 1e12
"""Upper limit on a plausible throughput, in images per second."""
QUERY = "--query-gpu=name,memory.total,driver_version,mig.mode.current"
QUERY_SECONDS = 10.0


def describe_measurement(
    config: TrialConfig, train: Split, num_classes: int, counts: Sequence[int]
) -> dict[str, Any] | None:
    """Return everything that a measurement on this worker's GPU depends on; None if the GPU is not known."""
    gpus = describe_gpus()
    if gpus is None:
        return None
    return {
        "gpus": gpus,
        "cpu": describe_cpu(),
        "tune_amp": __version__,
        "mps": list_servers() is not None,
        "torch": torch.__version__,
        "config": dataclasses.asdict(dataclasses.replace(config, seed=0)),
        "images": [str(train.images.dtype), *train.images.shape],
        "num_classes": num_classes,
        "counts": list(counts),
    }


def describe_gpus() -> list[str] | None:
    """Return name, memory and driver of each GPU of this node; None if they are not known, or if one is sliced by MIG.

    ``nvidia-smi`` makes no CUDA context, which would keep measuring processes out of a GPU that takes one process. Its
    numbers need not be those of CUDA, so that all GPUs of a node are named.
    """
    try:
        done = subprocess.run(  # noqa: S603 - NVIDIA's program, as the user's PATH finds it
            ["nvidia-smi", QUERY, "--format=csv,noheader"],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    gpus = [line.rsplit(", ", 1) for line in done.stdout.strip().splitlines()]
    known = [known for known, *mig in gpus if mig and mig != ["Enabled"]]
    return sorted(known) if known and len(known) == len(gpus) else None


def describe_cpu() -> list[str | int | None]:
    """Return name and number of this node's CPUs, which launch the work of a GPU; no name but on Linux."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return [next((line for line in lines if line.startswith("model name")), None), os.cpu_count()]


def recall_shares(
    key: Mapping[str, Any] | None, measure: Callable[[], tuple[ShareMeasurement, ...]]
) -> tuple[tuple[ShareMeasurement, ...], str]:
    """Return an earlier measurement with the same ``key``; otherwise measure, and keep the result.

    Args:
        key: everything that the measurement depends on, as JSON has it; None to measure and keep nothing.
        measure: measures.

    Returns:
        The measurements, and a text to follow their explanation: empty unless they are of an earlier time.
    """
    folder = None if key is None else _find_folder()
    if key is None or folder is None:
        return measure(), ""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"gpu-shares-{name}.json"
    kept = _read(path, key)
    if kept is not None:
        measurements, date = kept
        return measurements, f"; measured on {date}: delete {path} to measure again"
    measurements, today = measure(), datetime.datetime.now(datetime.UTC).date().isoformat()
    _write(path, {"key": key, "date": today, "measurements": [*map(dataclasses.asdict, measurements)]})
    return measurements, ""


def _find_folder() -> Path | None:
    """Return the cache folder; None if the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tune_amp"
    except RuntimeError:
        return None


def _read(path: Path, key: Mapping[str, Any]) -> tuple[tuple[ShareMeasurement, ...], datetime.date] | None:
    """Return the measurements in a file, and their date; None if it is no file of this user's with this key."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_size > MOST_BYTES:
            return None
        kept = json.loads(path.read_bytes())
        date = datetime.date.fromisoformat(kept["date"])
        rows = kept["measurements"]
        trials = [row["trials"] for row in rows]
        is_ours = kept["key"] == key and trials[:1] == [1] and trials == key["counts"][: len(trials)]
        if not is_ours or not all(map(_is_plausible, rows)):
            return None
        return tuple(ShareMeasurement(**row) for row in rows), date
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def _is_plausible(row: Mapping[str, Any]) -> bool:
    rate, memory = row["samples_per_second"], row["trial_memory_bytes"]
    known = memory is None or (isinstance(memory, int) and 0 < memory < 2**50)
    return isinstance(rate, float) and 0 < rate < MOST_SAMPLES and known


def _write(path: Path, kept: Mapping[str, Any]) -> None:
    """Write a file whole or not at all, readable by its owner alone. One that exists stays as it is."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.") as file:
            json.dump(kept, file)
            file.flush()
            os.link(file.name, path)
