"""Repairs a run before it resumes: a damaged file is set aside, and rebuilt from the journal.

Nothing is deleted: a file that is set aside keeps its content under a new name.
"""

import itertools
import os
import warnings
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from tune_amp.results.journal import cut_torn_line
from tune_amp.results.records import load_confirmed
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import RecordedTrial, RunHistory
from tune_amp.search.schedulers import objective_mode
from tune_amp.search.study import open_storage
from tune_amp.space.space import SearchSpace, parse_space
from tune_amp.trial.config import InputError
from tune_amp.trial.text import describe_error


def mend_run(folder: Path, history: RunHistory) -> list[str]:
    """Repair the study and the confirmed runs of a run, or set them aside; return a line for each file set aside.

    If a killed process left half a line at the end of the study, that half is removed. Call this only if no other
    process can have the files open.
    """
    lines = []
    run = RunFolder(folder)
    for path, find_fault in ((run.study, _find_study_fault), (run.confirm, _find_confirmed_fault)):
        if not os.path.lexists(path):
            continue
        fault = find_fault(path, history) if path.is_file() else "is not a file"
        if fault is not None:
            aside, numbers = path.with_name(f"{path.name}.damaged"), itertools.count(2)
            while os.path.lexists(aside):
                aside = path.with_name(f"{path.name}.damaged-{next(numbers)}")
            path.rename(aside)
            lines.append(f"{path}: {fault}; it is kept as {aside.name}, and rebuilt from reports.journal")
        elif path == run.study:
            cut_torn_line(path)
    return lines


def _find_confirmed_fault(path: Path, history: RunHistory) -> str | None:
    try:
        load_confirmed(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _find_study_fault(path: Path, history: RunHistory) -> str | None:
    """Return why Optuna's study at ``path`` cannot be that of the recorded trials; None if it can."""
    space = parse_space(history.provenance.space_source, history.provenance.space_text)
    try:
        study = optuna.load_study(study_name=history.provenance.run, storage=open_storage(path))
        modes = [direction.name.lower() for direction in study.directions]
        if [mode[:3] for mode in modes] != [objective_mode(name) for name in history.provenance.objectives]:
            return f"is of a search that would {' and '.join(modes)}"
        stored = study.get_trials(deepcopy=False)
        for trial in history.trials:
            if trial.number >= len(stored):
                return f"has no trial {trial.number}"
            if not _is_same(trial, stored[trial.number], space, history.provenance.train_images):
                return f"has another trial {trial.number}"
    except OSError:
        raise
    except Exception as error:  # Optuna does not validate what it reads
        return f"cannot be read ({describe_error(error)})"
    return None


def _is_same(recorded: RecordedTrial, stored: FrozenTrial, space: SearchSpace, train_images: int) -> bool:
    if stored.user_attrs.get("trial_id", recorded.trial_id) != recorded.trial_id or stored.state is TrialState.WAITING:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of a value that the space does not have
        fixed = optuna.trial.FixedTrial(stored.params)
        settings = space.suggest(fixed, train_images=train_images, max_epochs=recorded.config.max_epochs)
    return all(getattr(recorded.config, name) == value for name, value in settings.items())
