"""How ``--resume`` reads a command line: what may be another than when the run was begun, and what must not."""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_amp.results.records import find_version
from tune_amp.results.run_files import JOURNAL_FILE, SPACE_FILE
from tune_amp.search.history import PastRun
from tune_amp.search.options import NONE, SearchOptions, build_options, name_flag, name_run
from tune_amp.space.space import MAX_BYTES, load_space
from tune_amp.trial.config import PICKLING_SAMPLERS, InputError, checked_type, field_types, is_function_name, shown
from tune_amp.trial.consent import check_consent, consent_to
from tune_amp.trial.text import HIDDEN, hide_credentials

LEADS_OUT = ("address", "storage_path", "tracker")
"""What takes data, code and tokens to other machines, or deletes elsewhere: never on the word of a run alone."""
OF_ONE_CALL = ("resume", "name", "results_dir", "warm_start", "quiet", "json")
"""Arguments that are not remembered."""

_HINTS = {
    **field_types(SearchOptions),
    "imbalance": float,
    "space": str | None,
    "data_dir": str | None,
    "address": str | None,
    "storage_path": str | None,
}


def remember(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a run goes on with, wherever that is, as JSON can hold them."""
    kept = {name: value for name, value in vars(arguments).items() if name not in OF_ONE_CALL}
    kept["address"] = arguments.address and hide_credentials(arguments.address)
    kept["storage_path"] = _name_from_anywhere(arguments.storage_path)
    kept["data_dir"] = None if arguments.data_dir is None else str(arguments.data_dir.absolute())
    return kept


def _name_from_anywhere(storage_path: str | None) -> str | None:
    """The place of checkpoints without secrets, and not as seen from the current folder."""
    if storage_path is None or "://" in storage_path:
        return storage_path and hide_credentials(storage_path)
    return str(Path(storage_path).expanduser().absolute())


def take_over(parser: argparse.ArgumentParser, command: Sequence[str], past: PastRun) -> argparse.Namespace:
    """The arguments of a run that goes on: those that it was begun with, but for what the command line says now.

    Args:
        parser: of the command.
        command: its arguments, ``--resume`` among them.
        past: the run.

    Raises:
        InputError: an argument would change what the run has in common, or names nobody's code where the run needs it.
    """
    absent = object()
    given = parser.parse_args(command, argparse.Namespace(address=absent, storage_path=absent))
    for name in ("name", "warm_start"):
        if getattr(given, name) is not None:
            raise InputError(f"{name_flag(name)}: belongs to a run's beginning, not beside --resume")
    if past.provenance.warm_start is not None and not past.trials:
        raise InputError("--resume: the run was cut off before its warm start was taken over; begin it anew")
    recorded = _read_recorded(past)
    _check_way_out([name for name in LEADS_OUT if getattr(given, name) in (absent, [])], recorded)
    recorded["tracker"] = []  # those given take the place of those before
    arguments = parser.parse_args(command, argparse.Namespace(**recorded))
    if HIDDEN in (arguments.storage_path or ""):
        raise InputError(
            f"--storage-path: must be given with its secrets, which are not kept: {arguments.storage_path}"
        )
    _check_space(given.space, past)
    consent_to(given.model, given.dataset, given.sampler)
    sampler = build_options(recorded).sampler
    check_consent("--resume", model=recorded["model"], dataset=recorded["dataset"], sampler=sampler)
    _check_fixed(arguments, recorded, past)
    _check_trials(arguments, past)
    return arguments


def _read_recorded(past: PastRun) -> dict[str, Any]:
    """What the run was begun with: an argument each, of its type. A journal may come from anybody."""
    recorded = {}
    for name, hint in _HINTS.items():
        if name not in past.arguments:
            raise InputError(f"{JOURNAL_FILE}: arguments.{name}: must be there")
        recorded[name] = checked_type(f"{JOURNAL_FILE}: arguments.{name}", past.arguments[name], hint)
    trackers = past.arguments.get("tracker")
    if not isinstance(trackers, list) or not all(isinstance(name, str) for name in trackers):
        raise InputError(f"{JOURNAL_FILE}: arguments.tracker: must be a list of names, got {shown(trackers)}")
    if recorded["data_dir"] is not None:
        recorded["data_dir"] = Path(recorded["data_dir"])
    return recorded | {"dataset": past.provenance.dataset, "tracker": trackers}


def _check_way_out(left_out: Sequence[str], recorded: Mapping[str, Any]) -> None:
    """Whoever packed a run may have named a cluster, a place or trackers of theirs: ours are named by us again."""
    missing = _name_ways_out({name: recorded[name] for name in left_out})
    if missing:
        raise InputError(f"--resume: must be given once more, each as it was or as {NONE}: {shlex.join(missing)}")


def _name_ways_out(arguments: Mapping[str, Any]) -> list[str]:
    """The flags of ``LEADS_OUT`` that are set, each with its value."""
    parts = []
    for name in LEADS_OUT:
        if arguments.get(name):
            value = arguments[name]
            parts += [name_flag(name), ",".join(value) if name == "tracker" else value]
    return parts


def _check_fixed(arguments: argparse.Namespace, recorded: Mapping[str, Any], past: PastRun) -> None:
    now, then = build_options(vars(arguments)), build_options(recorded)
    fixed = [field.name for field in dataclasses.fields(SearchOptions) if "fixed" in field.metadata]
    changes = {name: (getattr(then, name), getattr(now, name)) for name in fixed}
    changes |= {name: (recorded[name], getattr(arguments, name)) for name in ("dataset", "imbalance")}
    for name, (before, wanted) in changes.items():
        if wanted != before:
            raise InputError(f"{name_flag(name)}: must stay {before} in a run that goes on, got {wanted}")
    if now.num_samples < len(past.trials):
        raise InputError(f"--num-samples: must be at least the {len(past.trials)} of the run, got {now.num_samples}")


def _check_space(given: str | None, past: PastRun) -> None:
    if given is not None and load_space(given).text != past.provenance.space_text:
        source = past.provenance.space_source
        raise InputError(f"SPACE: must stay {source} as it was in a run that goes on, got {given}, which differs")


def _check_trials(arguments: argparse.Namespace, past: PastRun) -> None:
    """Refuse a journal whose trials have other settings than the run in what all trials have in common."""
    shared = {name: getattr(arguments, name) for name in ("model", "dataset", "imbalance", "max_epochs", "seed")}
    for trial in past.trials:
        for name, expected in shared.items():
            value = getattr(trial.config, name)
            if value != expected:
                place = f"{JOURNAL_FILE}: trial {shown(trial.trial_id)}"
                raise InputError(f"{place}: {name}: must be {expected}, as in the whole run, got {shown(value)}")


def describe_changes(past: PastRun, folder: Path) -> list[str]:
    """What is another than when the run was begun, and what that means, in lines.

    Raises:
        InputError: the run's own copy of the space was edited.
    """
    about = past.provenance
    copy, source = folder / SPACE_FILE, Path(about.space_source)
    if os.path.lexists(copy) and _read_text(copy) != about.space_text:
        raise InputError(
            f"{copy}: must stay as it was when the run was begun; to search another space, begin a new run"
        )
    lines = []
    now = _read_text(source)
    if now is not None and now != about.space_text:
        lines.append(f"{source} has been changed since; the run goes on with the space as it was")
    found = {name: find_version(name) for name in about.versions}
    changed = [f"{name} {then} then, {found[name]} now" for name, then in about.versions.items() if found[name] != then]
    if changed:
        lines.append(f"{', '.join(changed)}: trials from here on may differ from what they would have been")
    return lines


def _read_text(path: Path) -> str | None:
    """What a space's file says; None where there is none, or it cannot be one."""
    try:
        is_space = path.is_file() and path.stat().st_size <= MAX_BYTES
        return path.read_text(encoding="utf-8", errors="replace") if is_space else None
    except (OSError, ValueError):
        return None


def describe_standing(past: PastRun, num_samples: int, time_budget: float | None = None) -> str:
    """Where a run that goes on stands, in a line."""
    over = len(past.trials) - len(past.unfinished)
    kept = sum(trial.last_result is not None for trial in past.unfinished)
    cut = f", {len(past.unfinished)} were cut off ({kept} of them after a report)" if past.unfinished else ""
    used_up = time_budget is not None and time_budget <= past.seconds
    budget = f", all of --time-budget {time_budget:g}" if used_up else ""
    return f"{over} of {num_samples} trials are over{cut}; {past.seconds:.0f} s so far{budget}"


def name_resume_command(search: Sequence[str], folder: Path, *, default_dir: Path, arguments: Mapping[str, Any]) -> str:
    """The line that goes on with a run.

    Args:
        search: the command that searches, such as ``("tune-amp", "search")``.
        folder: of the run.
        default_dir: where it is looked for without being told.
        arguments: from ``remember``. The user's own code is named again, as consent to run it, and so is what leads out
            of the run folder.
    """
    parts = [*search, "--resume", name_run(folder, default_dir)]
    for name in ("model", "dataset", "sampler"):
        if is_function_name(arguments[name]) or arguments[name] in PICKLING_SAMPLERS:
            parts += [name_flag(name), arguments[name]]
    return shlex.join([*parts, *_name_ways_out(arguments)])
