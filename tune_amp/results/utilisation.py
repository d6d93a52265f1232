"""Computes the use of a search's slots from the columns of its trials.

A slot is one of the places in which trials run at the same time.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from tune_amp.results.records import SlotTime, TrialRecord
from tune_amp.trial.config import HOPELESS_STATUSES, TrialStatus


class SlotUse(StrEnum):
    """The use of slot time."""

    USEFUL = "useful training"
    """Training steps of trials that completed."""
    STOPPED = "stopped"
    """Training steps of trials that the scheduler, or the end of the search, ended early."""
    LOST = "hopeless or failed"
    """All the time of trials that diverged, ran out of memory or failed."""
    EVALUATION = "validation and probes"
    """Validation and probes of trials that completed or ended early."""
    REST = "rest"
    """Start-up, data, checkpoints, waiting, and work that died with its worker."""


def utilisation(trials: Iterable[TrialRecord], slot_time: SlotTime) -> dict[SlotUse, float]:
    """Return the slot-seconds of each use, which add up to those of ``slot_time``."""
    seconds = dict.fromkeys(SlotUse, 0.0)
    for trial in trials:
        if trial.status in (*HOPELESS_STATUSES, TrialStatus.FAILED):
            seconds[SlotUse.LOST] += trial.wall_seconds
        elif trial.last is not None:
            use = SlotUse.USEFUL if trial.status is TrialStatus.COMPLETED else SlotUse.STOPPED
            seconds[use] += trial.last.train_seconds
            seconds[SlotUse.EVALUATION] += trial.last.val_seconds + trial.last.probe_seconds
    seconds[SlotUse.REST] = max(0.0, slot_time.slots * slot_time.wall_seconds - sum(seconds.values()))
    return seconds


def find_shares(seconds: Mapping[SlotUse, float]) -> dict[SlotUse, float]:
    """Return the share of each use in the whole, without those that round to 0.0%."""
    total = sum(seconds.values())
    return {use: value / total for use, value in seconds.items() if value > 0.0005 * total}


def describe_utilisation(trials: Iterable[TrialRecord], slot_time: SlotTime) -> str:
    """Return a line such as ``2 slots x 61.2 s: useful training 78.1%, stopped 9.0%, rest 12.9%``."""
    shares = find_shares(utilisation(trials, slot_time))
    uses = ", ".join(f"{use} {share:.1%}" for use, share in shares.items()) or "none"
    slots = "1 slot" if slot_time.slots == 1 else f"{slot_time.slots} slots"
    return f"{slots} x {slot_time.wall_seconds:.1f} s: {uses}"
