"""How ``--resume`` reads a command line: which arguments may differ from those the run began with, and which not."""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_amp.results.provenance import find_version
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import RunHistory
from tune_amp.search.options import NONE, SearchOptions, build_options, name_flag, name_run
from tune_amp.space.space import MAX_BYTES, load_space
from tune_amp.trial.config import KEEPS_NOTHING, InputError, check, checked_type, field_types
from tune_amp.trial.consent import OWN_CODE_FLAGS, PICKLING_SAMPLERS, check_consent, consent_to, list_own_code
from tune_amp.trial.text import HIDDEN, hide_credentials, shown

EXTERNAL_TARGETS = ("address", "storage_path", "tracker")
"""Arguments that send data, code and tokens to other machines, or delete elsewhere. A run's record alone never sets
them."""
NOT_REMEMBERED = ("resume", "name", "results_dir", "warm_start", "dashboard", "quiet", "json")
"""Arguments that apply to one call and are not recorded."""

_HINTS = {
    **field_types(SearchOptions),
    "imbalance": float,
    "space": str | None,
    "data_dir": str | None,
    "address": str | None,
    "storage_path": str | None,
}


def remember(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments for resuming the run from any folder, as values that JSON can hold."""
    kept = {name: value for name, value in vars(arguments).items() if name not in NOT_REMEMBERED}
    kept["address"] = arguments.address and hide_credentials(arguments.address)
    if arguments.storage_path is not None:
        is_url = "://" in arguments.storage_path
        place = arguments.storage_path if is_url else str(Path(arguments.storage_path).expanduser().absolute())
        kept["storage_path"] = hide_credentials(place) if is_url else place
    kept["data_dir"] = arguments.data_dir and str(arguments.data_dir.absolute())
    return kept


def restore_arguments(
    parser: argparse.ArgumentParser, command: Sequence[str], history: RunHistory
) -> argparse.Namespace:
    """Return the arguments of a resumed run: those that it began with, overridden by the command line.

    Raises:
        InputError: an argument would change what all trials of the run have in common, or the run needs the user's own
            code and no argument names it.
    """
    absent = object()
    given = parser.parse_args(command, argparse.Namespace(address=absent, storage_path=absent))
    for name in ("name", "warm_start"):
        if getattr(given, name) is not None:
            raise InputError(f"{name_flag(name)}: sets how a run begins, and is not allowed with --resume")
    if history.provenance.warm_start is not None and not history.trials:
        raise InputError("--resume: the run was cut off before its warm start was applied; start it again")
    recorded = _read_recorded(history)
    # The run may have been made by others.
    left_out = {name: recorded[name] for name in EXTERNAL_TARGETS if getattr(given, name) in (absent, [])}
    if missing := _name_external_targets(left_out):
        raise InputError(f"--resume: must be given again, each as it was or as {NONE}: {shlex.join(missing)}")
    recorded["tracker"] = []  # the given trackers replace the recorded ones
    arguments = parser.parse_args(command, argparse.Namespace(**recorded))
    if HIDDEN in (arguments.storage_path or ""):
        rule = "must be given with its secrets, which are not kept"
        raise InputError(f"--storage-path: {rule}: {arguments.storage_path}")
    about = history.provenance
    if given.space is not None and load_space(given.space).text != about.space_text:
        rule = f"must stay {about.space_source} as it was in a resumed run"
        raise InputError(f"SPACE: {rule}, got {given.space}, which differs")
    consent_to(*(getattr(given, flag) for flag in OWN_CODE_FLAGS), given.sampler)
    sampler = build_options(recorded).sampler
    check_consent("--resume", **{flag: recorded[flag] or "" for flag in OWN_CODE_FLAGS}, sampler=sampler)
    _check_fixed(arguments, recorded, len(history.trials))
    _check_trials(arguments, history)
    return arguments


def _read_recorded(history: RunHistory) -> dict[str, Any]:
    """Return the arguments that the run began with, each checked for its type: the journal is not trusted."""
    recorded = {}
    for name, hint in _HINTS.items():
        if name not in history.arguments:
            raise InputError(f"reports.journal: arguments.{name}: must be there")
        recorded[name] = checked_type(f"reports.journal: arguments.{name}", history.arguments[name], hint)
    trackers = history.arguments.get("tracker")
    if not isinstance(trackers, list) or not all(isinstance(name, str) for name in trackers):
        raise InputError(f"reports.journal: arguments.tracker: must be a list of names, got {shown(trackers)}")
    if recorded["data_dir"] is not None:
        recorded["data_dir"] = Path(recorded["data_dir"])
    return recorded | {"dataset": history.provenance.dataset, "tracker": trackers}


def _name_external_targets(arguments: Mapping[str, Any]) -> list[str]:
    """Return the flags of ``EXTERNAL_TARGETS`` that are set, each with its value."""
    parts = []
    for name in EXTERNAL_TARGETS:
        if value := arguments.get(name):
            parts += [name_flag(name), ",".join(value) if name == "tracker" else value]
    return parts


def _check_fixed(arguments: argparse.Namespace, recorded: Mapping[str, Any], trials: int) -> None:
    now, then = build_options(vars(arguments)), build_options(recorded)
    fixed = [field.name for field in dataclasses.fields(SearchOptions) if "fixed" in field.metadata]
    changes = {name: (getattr(then, name), getattr(now, name)) for name in fixed}
    changes |= {name: (recorded[name], getattr(arguments, name)) for name in ("dataset", "imbalance")}
    for name, (before, wanted) in changes.items():
        if wanted != before:
            raise InputError(f"{name_flag(name)}: must stay {before} in a resumed run, got {wanted}")
    check("--num-samples", now.num_samples, now.num_samples >= trials, f"must be at least the {trials} of the run")


def _check_trials(arguments: argparse.Namespace, history: RunHistory) -> None:
    """Refuse a journal whose trials differ from the run in a setting that all trials share."""
    shared = {name: getattr(arguments, name) for name in (*OWN_CODE_FLAGS, "imbalance", "max_epochs", "seed")}
    for trial in history.trials:
        for name, expected in shared.items():
            value = getattr(trial.config, name)
            if value != expected:
                place = f"reports.journal: trial {shown(trial.trial_id)}"
                raise InputError(f"{place}: {name}: must be {expected}, as in the whole run, got {shown(value)}")


def describe_changes(history: RunHistory, folder: Path) -> list[str]:
    """Return a line for each change since the run began, with its consequence.

    Raises:
        InputError: the run's own copy of the space was edited.
    """
    about = history.provenance
    copy, source = RunFolder(folder).space, Path(about.space_source)
    if os.path.lexists(copy) and _read_text(copy) != about.space_text:
        raise InputError(f"{copy}: must stay as it was when the run began; to search another space, start a new run")
    lines = []
    now = _read_text(source)
    if now is not None and now != about.space_text:
        lines.append(f"{source} has changed since; the run resumes with the space as it was")
    found = {name: find_version(name) for name in about.versions}
    changed = [f"{name} {then} then, {found[name]} now" for name, then in about.versions.items() if found[name] != then]
    if changed:
        lines.append(f"{', '.join(changed)}: trials from here on may differ from what they would have been")
    metrics = [trial.report.metrics for trial in history.unfinished if trial.report]
    forgetful = [epoch for epoch in metrics if epoch and epoch.loop == KEEPS_NOTHING]
    if forgetful:
        count = f"{len(forgetful)} {'trial starts' if len(forgetful) == 1 else 'trials start'}"
        lines.append(f"your loop keeps nothing (trial.keep): {count} again from the beginning")
    return lines


def _read_text(path: Path) -> str | None:
    """Return the text of a space's file; None if there is no file, or if it cannot be a space."""
    try:
        is_space = path.is_file() and path.stat().st_size <= MAX_BYTES
        return path.read_text(encoding="utf-8", errors="replace") if is_space else None
    except (OSError, ValueError):
        return None


def describe_progress(history: RunHistory, num_samples: int, time_budget: float | None = None) -> str:
    """Return the progress of a resumed run in one line."""
    over = len(history.trials) - len(history.unfinished)
    kept = sum(trial.report is not None for trial in history.unfinished)
    were = "was" if len(history.unfinished) == 1 else "were"
    cut = f", {len(history.unfinished)} {were} cut off ({kept} of them after a report)" if history.unfinished else ""
    used_up = time_budget is not None and time_budget <= history.seconds
    budget = f", all of --time-budget {time_budget:g}" if used_up else ""
    return f"{over} of {num_samples} trials are over{cut}; {history.seconds:.0f} s so far{budget}"


def name_resume_command(search: Sequence[str], folder: Path, *, default_dir: Path, arguments: Mapping[str, Any]) -> str:
    """Return the command that resumes a run, from ``search``, the words that search, and ``remember``'s arguments.

    It names the user's own code again, as consent to run it, and the arguments of ``EXTERNAL_TARGETS`` that are set.
    """
    parts = [*search, "--resume", name_run(folder, default_dir)]
    parts += list_own_code(arguments)
    if arguments["sampler"] in PICKLING_SAMPLERS:
        parts += ["--sampler", arguments["sampler"]]
    return shlex.join([*parts, *_name_external_targets(arguments)])
