"""Finds who holds the memory that ran out: the trials, or other programs on a shared node.

Memory that other programs hold is not the fault of a trial's settings: the trial waits, retries, and finally fails.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from tune_amp.training.memory import is_out_of_gpu_memory

MEMORY_HELD_SIGN = "memory is held by other programs"
"""Text in the reason of a death or failure that other programs caused."""
MEMORY_RETRIES = 5
"""Number of free retries of such a trial in a row, without a new epoch between them."""
MEMORY_WAIT_SECONDS = 10.0
"""Seconds to wait before each of these retries."""

# Patterns for the text of ray.exceptions.OutOfMemoryError in Ray 2.60. Its GB are GiB.
_USED = re.compile(r"Memory usage (\d+)B exceeded threshold")
_WORKER = re.compile(r"pid=(\d+), actual memory used=([\d.]+)GB, worker ID=")
_USER = re.compile(r"^(\d+)\t([\d.]+)\t(.+)$", re.MULTILINE)


class MemoryHeldError(OSError):
    """A GPU's memory ran out while other programs held a trial's part of it: not the fault of the trial's settings."""


def find_node_holders(text: str) -> str | None:
    """Return who holds a node's memory, in one line, if Ray's workers hold less than half of what is used; else None.

    The process that runs the search is never named as the largest: its user started it. ``text`` is Ray's error for a
    worker that its memory monitor killed.
    """
    used, workers = _USED.search(text), {pid: float(size) for pid, size in _WORKER.findall(text)}
    if used is None or not workers:
        return None
    total = int(used[1]) / 2**30
    others = total - sum(workers.values())
    if others <= total / 2:
        return None
    users = [user for user in _USER.findall(text) if user[0] not in workers and int(user[0]) != os.getpid()]
    most = f"; the largest is process {users[0][0]} ({_name_program(users[0][2])}, {users[0][1]} GiB)" if users else ""
    return f"the node's {MEMORY_HELD_SIGN}: {others:.2f} of {total:.2f} GiB{most}"


def _name_program(command: str) -> str:
    """Return program and script of a command line, without the arguments, which may be secret."""
    words = command.split()
    if words[1:2] == ["-m"]:
        return " ".join((Path(words[0]).name, *words[1:3]))
    return " ".join(Path(word).name for word in words[:2] if not word.startswith("-"))


def find_gpu_holders(*, free: int, own: int, total: int, share: float) -> str | None:
    """Return who holds a GPU's memory, in one line, if less than half of a trial's ``share`` is available; else None.

    Of the GPU's ``total`` bytes, no process holds those that are ``free``, and the trial's process its ``own``.
    """
    due = share * total
    if free + own >= due / 2:
        return None
    held = f"they leave {(free + own) / 2**30:.2f} of the {due / 2**30:.2f} GiB that the trial was given"
    return f"the GPU's {MEMORY_HELD_SIGN}: {held}; nvidia-smi lists them"


@contextlib.contextmanager
def naming_memory_holders(device: torch.device, share: float) -> Iterator[None]:
    """In the ``with`` block, raise MemoryHeldError if a trial's GPU is out of memory because of other programs."""
    try:
        yield
    except Exception as error:
        if device.type != "cuda" or not is_out_of_gpu_memory(error):
            raise
        free, total = torch.cuda.mem_get_info(device)
        holders = find_gpu_holders(free=free, own=torch.cuda.memory_reserved(device), total=total, share=share)
        if holders is None:
            raise
        raise MemoryHeldError(holders) from error
