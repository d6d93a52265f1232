"""Derives from Ray's errors how a trial ended, why its worker died, and whether the trial is at fault."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_amp.cluster.memory_holders import MEMORY_HELD_SIGN, MEMORY_RETRIES, find_node_holders
from tune_amp.cluster.trainable import NODE_RETRIES, LargerShareNeeded
from tune_amp.trial.config import RUNNING, TrialStatus
from tune_amp.trial.text import one_line

# The first words of ray.exceptions.OutOfMemoryError, after the number of workers that the memory monitor killed.
OUT_OF_MEMORY_SIGN = "killed due to the node running low on memory"
# Start of the message of a torch.AcceleratorError.
CUDA_SIGN = "CUDA error: "
# Name of the exception with which a trial requests a larger share of a GPU's memory.
LARGER_SHARE_SIGN = LargerShareNeeded.__name__

# Texts of ray.exceptions.ActorDiedError if the node is lost, not only the worker.
# If raylet and worker die together, ActorUnavailableError comes first, long before Ray checks the node's health.
NODE_LOST_SIGNS = (
    "the actor's node was terminated",
    "The actor is temporarily unavailable",
)

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ATTEMPT = re.compile(r"^Failure # \d+ \(occurred at .*\)$", re.MULTILINE)


def describe_limit(seconds: float) -> str:
    """Return the reason recorded for a trial that exceeded the time limit."""
    return f"it took longer than --trial-time-limit ({seconds:g} s) and was ended"


def find_status(result: Mapping[str, Any] | None, *, error: bool, cause: str = "") -> TrialStatus:
    """Return how a trial ended, from its last result.

    Args:
        result: the last result; None, or a result without a status, if the trial reported none.
        error: whether Ray counts the trial as an error: its process died, and no retry was left.
        cause: why the process died, from ``find_cause``.
    """
    if error:
        ran_out = OUT_OF_MEMORY_SIGN in cause or LARGER_SHARE_SIGN in cause
        return TrialStatus.OUT_OF_MEMORY if ran_out else TrialStatus.FAILED
    status = (result or {}).get("status", RUNNING)
    if status != RUNNING:
        return TrialStatus(status)
    # Tune sets ``done`` if the scheduler stopped the trial; Ctrl-C and the time budget leave it unset.
    return TrialStatus.STOPPED if (result or {}).get("done") else TrialStatus.INTERRUPTED


def find_cause(trial: Any) -> str:
    """Return why a trial's worker last died, in one line: the end of the traceback that Tune keeps on this machine."""
    # Tune's own get_error reads the copy in the experiment's storage, which lags one attempt or does not exist yet.
    path = trial.error_file
    if path is None or not Path(path).exists():
        return "its worker died, and Ray left no reason"
    return find_reason(_ATTEMPT.split(Path(path).read_text(errors="replace"))[-1])  # Tune appends


def find_reason(text: str) -> str:
    """Return the line of a Ray error that says what happened.

    Usually the last line. If a node ran out of memory that mostly other programs hold, a line that names them.
    """
    holders = find_node_holders(text)
    if holders is not None:
        return one_line(holders)
    lines = [line.strip() for line in _ANSI.sub("", text).splitlines() if line.strip()]
    # Reports of the memory monitor and of CUDA start with what happened and end with a paragraph of advice. A CUDA
    # error may be the cause of a LargerShareNeeded, whose line comes last: that one takes precedence.
    signs = (LARGER_SHARE_SIGN, OUT_OF_MEMORY_SIGN, CUDA_SIGN)
    reasons = [line for sign in signs for line in reversed(lines) if sign in line]
    return one_line([*reasons, *lines[-1:], "its worker died"][0])


def count_free_retries(cause: str) -> int:
    """Return how many times in a row a trial is retried for free after a worker death that is not the trial's fault."""
    if MEMORY_HELD_SIGN in cause:
        return MEMORY_RETRIES
    return NODE_RETRIES if any(sign in cause for sign in NODE_LOST_SIGNS) else 0
