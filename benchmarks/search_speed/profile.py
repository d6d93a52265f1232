"""Where the wall time of a search goes: part by part in the driver, and slot by slot in the trials.

The command runs as a user runs it, with confirmation and report, once for each repeat and seed. ``profiled`` notes when
the parts of the driver began and ended; the run folder has the times of trials and of runs on fresh seeds.
"""

import dataclasses
import datetime
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.machine import describe_machine, describe_versions, render_versions
from benchmarks.markdown import render_table
from benchmarks.search_speed.command_cost import CommandCost, run_measured
from benchmarks.search_speed.profiled import COMMAND, WHOLE, Span
from benchmarks.search_speed.speed import Pairing, list_our_arguments, short_folder
from benchmarks.search_speed.speed_table import OURS
from benchmarks.spread import render_spread
from tune_amp.results.records import TrialRecord, load_confirmed, load_trials
from tune_amp.results.run_folder import RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """One search: seconds of each part, in the order in which the driver comes to them."""

    wall_seconds: float
    driver: Mapping[str, float]
    """Part of the driver -> seconds; they follow each other and add up to ``wall_seconds``."""
    driver_cpu: Mapping[str, float]
    """Part -> CPU seconds of the driver's process, for those that are measured."""
    slots: Mapping[str, float]
    """Use of slots -> slot-seconds, from the first trial's start to the last one's end."""
    confirm_slots: Mapping[str, float]
    """Use of slots -> slot-seconds of the confirmation."""
    trial_epochs: int
    trials: int

    @property
    def at_work(self) -> float:
        """Share of the slots' time, of the whole command, that trials and runs were trained in."""
        trained = self.slots["training"] + self.confirm_slots.get("training", 0.0)
        return trained / (self._slots * self.wall_seconds)

    @property
    def _slots(self) -> float:
        return sum(self.slots.values()) / self.driver["trials"]


def profile_search(pairing: Pairing, folder: Path) -> Profile:
    """Run a search below ``folder``, and return where its time went.

    Raises:
        RuntimeError: the command failed.
    """
    spans = folder / "spans.json"
    program = [sys.executable, "-m", "benchmarks.search_speed.profiled", str(spans)]
    arguments = list_our_arguments(pairing, folder, confirm_seeds=None)
    cost = run_measured([*program, *arguments], folder / "ours.log")
    return read_profile(folder / "results" / OURS, json.loads(spans.read_text(encoding="utf-8")), cost, pairing.slots)


def read_profile(run: Path, spans: Mapping[str, Span], cost: CommandCost, slots: int) -> Profile:
    """Return the profile of a run from its folder and what was noted of its process."""
    trials = [trial for trial in load_trials(run) if trial.started is not None]
    first = min(_start(trial) for trial in trials)
    last = max(_start(trial) + trial.wall_seconds for trial in trials)
    end = {part: span["ended"] for part, span in spans.items()}
    begin = {part: span["began"] for part, span in spans.items()}
    ray = end["Ray's start"]
    loaded = max(ray, end["data and checks"])
    confirmed = end.get("confirmation", end["conclusion"])
    marks = {
        "interpreter": begin[COMMAND],
        "imports of the command": begin[WHOLE],
        "arguments, space, sampler": begin["search with Ray"],
        "Ray's start, data and checks beside it": ray,
        "waiting for data and checks": loaded,
        "resources, first lines": begin["trials"],
        "first worker's start": first,
        "trials": last,
        "Tune's end": end["trials"],
        "ranking, importance": end["conclusion"],
        "confirmation": confirmed,
        "remaining files": begin["report"],
        "report": end["report"],
        "last lines": end["last lines"],
        "Ray's end": end[COMMAND],
        "interpreter's end": cost.started + cost.wall_seconds,
    }
    times = [cost.started, *marks.values()]
    runs = load_confirmed(run) if RunFolder(run).confirm.exists() else ()
    trained = sum(one.train_seconds for one in runs)
    confirming = slots * (confirmed - end["conclusion"])
    return Profile(
        wall_seconds=cost.wall_seconds,
        driver=dict(zip(marks, (after - before for before, after in itertools.pairwise(times)), strict=True)),
        driver_cpu={part: spans[name]["cpu"] for part, name in MEASURED_CPU.items() if name in spans},
        slots=split_slots(trials, slots=slots, first=first, last=last),
        confirm_slots={"training": trained, "rest": confirming - trained} if runs else {},
        trial_epochs=sum(len(trial.epochs) for trial in trials),
        trials=len(trials),
    )


MEASURED_CPU = {
    "trials": "trials",
    "ranking, importance": "conclusion",
    "confirmation": "confirmation",
    "report": "report",
}


def split_slots(trials: Sequence[TrialRecord], *, slots: int, first: float, last: float) -> dict[str, float]:
    """Return the slot-seconds of each use between ``first`` and ``last``, in seconds since the epoch."""
    lasts = [trial.last for trial in trials if trial.last is not None]
    inside = {
        "training": sum(epoch.train_seconds for epoch in lasts),
        "validation": sum(epoch.val_seconds for epoch in lasts),
        "probe": sum(epoch.probe_seconds for epoch in lasts),
        "model and optimizer": sum(trial.setup_seconds for trial in trials),
        "checkpoints": sum(trial.checkpoint_seconds for trial in trials),
    }
    inside["reports, the driver's answers"] = sum(trial.wall_seconds for trial in trials) - sum(inside.values())
    workers: dict[int | None, list[TrialRecord]] = {}
    for trial in sorted(trials, key=_start):
        workers.setdefault(trial.worker, []).append(trial)
    starts = [_start(own[0]) for own in workers.values()]
    ends = [_start(own[-1]) + own[-1].wall_seconds for own in workers.values()]
    busy = sum(trial.wall_seconds for trial in trials)
    outside = {
        "between two trials": sum(ends) - sum(starts) - busy,
        "later workers not started yet": sum(start - first for start in starts),
        "no trial left at the end": sum(last - end for end in ends),
    }
    return inside | outside | {"slots without a worker": (slots - len(workers)) * (last - first)}


def _start(trial: TrialRecord) -> float:
    assert trial.started is not None
    return trial.started.timestamp()


def measure_profiles(
    pairings: Sequence[Pairing], announce: Callable[[str], object] = lambda line: None
) -> dict[Pairing, Profile]:
    """Run the searches one after the other."""
    found = {}
    for pairing in pairings:
        with tempfile.TemporaryDirectory(dir=short_folder(), ignore_cleanup_errors=True) as folder:
            found[pairing] = profile_search(pairing, Path(folder))
        announce(f"{pairing.precision}, {pairing.trials} trials: {found[pairing].wall_seconds:.1f} s")
    return found


def render_profiles(found: Mapping[Pairing, Profile], load: float) -> str:
    """Markdown: a table of the driver and one of the slots for each setting, medians over its repeats."""
    import torch

    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [
        "Where the wall time of a search goes, from the process's start to its end, with confirmation and report. "
        "Medians of n searches with different seeds, the smallest and largest in brackets. "
        + ", ".join(f"{name} {value}" for name, value in machine.items())
        + f"; {render_versions(describe_versions())}; load average before: {load:.1f}; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.",
    ]
    for setting in dict.fromkeys(pairing.pair[0] for pairing in found):
        own = [profile for pairing, profile in found.items() if pairing.pair[0] == setting]
        precision, trials, epochs, _, slots = setting
        lines += ["", f"{precision}, {trials} trials of at most {epochs} epochs, {slots} slots, n = {len(own)}:", ""]
        lines += [_render_parts(own), "", _render_slots(own), ""]
        epochs_each = [profile.trial_epochs / profile.wall_seconds for profile in own]
        lines += [
            f"Trial-epochs a second: {render_spread(epochs_each, '{:.2f}')}. Slots in training steps, of the whole "
            f"command: {render_spread([100 * profile.at_work for profile in own], '{:.0f} %')}."
        ]
    return "\n".join(lines) + "\n"


def _render_parts(own: Sequence[Profile]) -> str:
    rows = []
    for part in own[0].driver:
        seconds = [profile.driver[part] for profile in own]
        share = statistics.median(profile.driver[part] / profile.wall_seconds for profile in own)
        cpu = [profile.driver_cpu[part] for profile in own if part in profile.driver_cpu]
        rows.append(
            [part, render_spread(seconds, "{:.2f} s"), f"{share:.0%}", render_spread(cpu, "{:.2f} s") if cpu else ""]
        )
    rows.append(["whole", render_spread([profile.wall_seconds for profile in own], "{:.1f} s"), "100%", ""])
    return render_table(("driver", "wall", "share", "CPU of the driver"), rows)


def _render_slots(own: Sequence[Profile]) -> str:
    rows = []
    for name in ("trials", "confirmation"):
        parts = [profile.slots if name == "trials" else profile.confirm_slots for profile in own]
        for use in dict.fromkeys(use for part in parts for use in part):
            seconds = [part.get(use, 0.0) for part in parts]
            share = statistics.median(part[use] / sum(part.values()) for part in parts if use in part)
            rows.append([name, use, render_spread(seconds, "{:.2f} s"), f"{share:.1%}"])
    return render_table(("slots", "use", "slot-seconds", "share"), rows)
