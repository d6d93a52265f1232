"""Selects what a search reuses of an earlier run: its winners as suggestions, and its trials if they count here.

A winner is suggested if this search could have suggested it: every searched setting lies in its range or among its
choices, and every other one has the value that all trials have here. The sampler gets a trial's value only if this
search would have measured the same, but for chance. Otherwise there are only suggestions, and one line says so. Nothing
that a file names is run: neither a user's own model nor a user's own data set.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from tune_amp.results.parquet import read_origin
from tune_amp.results.provenance import Provenance, find_version
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import TrialRecord, load_best_file, load_epochs, load_trials_file
from tune_amp.results.run_folder import RunFolder, locate
from tune_amp.space.document import SEARCHABLE
from tune_amp.space.parameter import Parameter
from tune_amp.space.space import MAX_BYTES, SearchSpace, parse_space
from tune_amp.trial.config import (
    COST_OBJECTIVES,
    OWN,
    InputError,
    TrialConfig,
    TrialStatus,
    is_function_name,
    read_setting,
)
from tune_amp.trial.text import shown

DECISIVE_VERSIONS = ("torch", "tune_amp")
"""Packages compared up to their minor version: they decide the result of given settings. Ray and Optuna only decide
which settings are tried."""

LEARNING_SAMPLERS = ("tpe", "gp")
"""Samplers that learn from old trials. CMA-ES and NSGA-II learn from their own generations, and random from nothing."""

COMPARABLE = (TrialStatus.COMPLETED, TrialStatus.STOPPED, TrialStatus.DIVERGED)
"""Ends that the same settings would have here too. Memory runs out on one machine and not on another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Donor:
    """An earlier run from which a search can start."""

    path: Path
    """The file that was read."""
    checksum: str
    """Its SHA-256."""
    winners: tuple[TrialRecord, ...]
    """Best first."""
    trials: tuple[TrialRecord, ...]
    """All of its trials; empty if only the winners are known."""
    provenance: Provenance

    @property
    def description(self) -> str:
        """Run, file and checksum, for the record."""
        return f"run {self.provenance.run}, {self.path.name}, sha256:{self.checksum}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OldTrial:
    """A trial of an earlier run, as this search's study would have suggested it."""

    record: TrialRecord
    suggestion: optuna.trial.FixedTrial


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a search reuses of an earlier run."""

    donor: Donor
    suggestions: tuple[Mapping[str, Any], ...]
    """Best first, as parameters of the study."""
    left_out: tuple[str, ...]
    """A line for each winner that is not suggested: which, and why."""
    old_trials: tuple[OldTrial, ...]
    """Trials that the sampler learns from."""
    obstacle: str | None
    """Why there are none; None if they count."""

    def describe(self) -> list[str]:
        """Return one line on what is done and why, and one for each winner that is left out."""
        count = len(self.suggestions)
        suggestions = f"{count or 'no'} suggestion{'s' if count != 1 else ''} from {self.donor.path}"
        if self.obstacle is None:
            trials = f"{len(self.old_trials)} of its {len(self.donor.trials)} trials added"
        else:
            trials = f"its trials are not added: {self.obstacle}"
        return [f"{suggestions}; {trials}", *self.left_out]

    def describe_as_json(self) -> dict[str, Any]:
        """Return the same for programs."""
        return {
            "path": str(self.donor.path),
            "run": self.donor.provenance.run,
            "suggestions": len(self.suggestions),
            "left_out": list(self.left_out),
            "trials_added": len(self.old_trials),
            "not_added_because": self.obstacle,
        }


# ---- read ----


def load_donor(path: str | Path, *, objectives: Sequence[str], top_k: int) -> Donor:
    """Read an earlier run.

    Args:
        path: ``best.parquet``, whose ranked rows are the winners, read with its run's trials if they lie beside it;
            ``trials.parquet``; or a run's folder, in which the former is preferred.
        objectives: objectives of this search, by which the best of ``trials.parquet`` are the winners.
        top_k: largest number of winners.

    Raises:
        InputError: a file is missing, damaged, not from tune_amp, or of another kind or version.
    """
    path = locate(path, "best", "trials")
    kind, _ = read_origin(path)
    if kind not in ("best", "trials"):
        raise InputError(f"{path}: kind: must be best or trials, got {shown(kind)}")
    if kind == "trials":
        of_trials = load_trials_file(path)
        provenance, trials = of_trials.provenance, load_epochs(path, of_trials.trials)
        winners = choose_best(trials, objectives, top_k)
    else:
        best, trials = load_best_file(path), []
        provenance, beside = best.provenance, RunFolder(path.parent).trials
        rows = [row for row in best.rows if not row.is_default]  # the defaults are tried anyway
        winners = [row.trial for row in sorted(rows, key=lambda row: row.rank or 0)]
        if beside.exists():
            of_trials = load_trials_file(beside)
            if (of_trials.provenance.run, of_trials.provenance.created) == (provenance.run, provenance.created):
                trials = load_epochs(beside, of_trials.trials)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return Donor(
        path=path, checksum=checksum, winners=tuple(winners[:top_k]), trials=tuple(trials), provenance=provenance
    )


# ---- plan ----


def plan_warm_start(
    donor: Donor,
    space: SearchSpace,
    shared: Mapping[str, Any],
    *,
    data_hash: str,
    train_images: int,
    objectives: Sequence[str],
    sampler: str,
) -> WarmStart:
    """Decide what a search reuses of ``donor``.

    Args:
        donor: from ``load_donor``.
        space: what is searched here.
        shared: the ``TrialConfig`` fields that all trials have in common here.
        data_hash: hash of the data set here.
        train_images: images of the training split here.
        objectives: what is optimized here.
        sampler: one of ``SAMPLERS``.
    """
    sizes = {"train_images": train_images, "max_epochs": shared["max_epochs"]}
    suggestions, left_out = _choose_suggestions(donor, space, sizes)
    here = {"data_hash": data_hash, "objective": ",".join(objectives)}
    obstacle = next(_list_obstacles(donor, space, shared, here, sampler), None)
    return WarmStart(
        donor=donor,
        suggestions=tuple(suggestions),
        left_out=tuple(left_out),
        old_trials=() if obstacle else tuple(_choose_old_trials(donor, space, sizes, objectives)),
        obstacle=obstacle,
    )


def _choose_suggestions(
    donor: Donor, space: SearchSpace, sizes: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what the study suggests for each winner, and a line for each winner that it does not suggest."""
    tried = [space.find_defaults(**sizes)]
    left_out = [] if donor.winners else [f"{donor.path} has no winner"]
    for trial in donor.winners:
        place = f"trial {shown(trial.trial_name)}"
        try:
            suggestion = dict(find_suggestion(trial.config, space, donor.provenance.train_images, **sizes).params)
        except InputError as error:
            left_out.append(f"{place} is not suggested: {error}")
            continue
        if suggestion in tried:
            same = "the default configuration, which is" if suggestion == tried[0] else "another winner, which is"
            left_out.append(f"{place} has the settings of {same} tried anyway")
        else:
            tried.append(suggestion)
    return tried[1:], left_out


def find_suggestion(
    config: TrialConfig, space: SearchSpace, old_train_images: int, *, train_images: int, max_epochs: int
) -> optuna.trial.FixedTrial:
    """Return what a study of ``space`` suggests for exactly the settings of ``config``: parameters and distributions.

    An interval that the space counts relative to the trial stays relative: half a trial stays half a trial, even if a
    trial has another number of steps here.

    Args:
        config: settings of an earlier run's trial.
        space: what is searched here.
        old_train_images: images of the training split there.
        train_images: images of the training split here.
        max_epochs: full budget of a trial here.

    Raises:
        InputError: the space has no such settings; the message names one.
    """
    steps = dataclasses.replace(config, max_epochs=max_epochs).count_full_steps(train_images)
    wanted = _rescale(config, space, config.count_full_steps(old_train_images), steps)
    sizes = {"train_images": train_images, "max_epochs": max_epochs}
    suggested: dict[str, Any] = {}
    for parameter, nearest, setting in space.locate(wanted, **sizes):
        value = read_setting(wanted, parameter.name)
        if not nearest or setting != value:
            raise InputError(f"{parameter.name}: must be {_describe_values(parameter, steps)}, got {shown(value)}")
        suggested |= nearest
    suggestion = optuna.trial.FixedTrial(suggested)
    here = TrialConfig(**space.suggest(suggestion, **sizes))
    for name in (*SEARCHABLE, *(f"{OWN}{name}" for name in {**wanted.own, **here.own})):
        ours, theirs = read_setting(here, name), read_setting(wanted, name)
        if ours != theirs:
            raise InputError(f"{name}: must be {shown(ours)}, as it is not searched here, got {shown(theirs)}")
    return suggestion


def _rescale(config: TrialConfig, space: SearchSpace, old_steps: int, steps: int) -> TrialConfig:
    """Return ``config`` with its growth interval in steps of a trial here, if the space counts it relative to them."""
    relative = next((parameter for parameter in space.parameters if parameter.fraction_of_trial), None)
    if relative is None or config.growth_interval is None or old_steps == steps:
        return config
    nearest = optuna.trial.FixedTrial(relative.find_nearest(config.growth_interval, trial_steps=old_steps))
    if relative.suggest(nearest, trial_steps=old_steps) == config.growth_interval:
        interval = relative.suggest(nearest, trial_steps=steps)  # what was suggested there, before it was rounded
    else:
        interval = min(max(round(config.growth_interval * steps / max(old_steps, 1)), 1), 2**62)
    return dataclasses.replace(config, growth_interval=interval)


def _describe_values(parameter: Parameter, steps: int) -> str:
    of_trial = f" of the trial's {steps} steps" if parameter.fraction_of_trial else ""
    if parameter.choices:
        return f"one of {', '.join(map(str, parameter.choices))}{of_trial}"
    kind = "a power of two from " if parameter.power_of_two else ""
    return f"{kind}{parameter.low} to {parameter.high}{of_trial}"


# ---- which trials count ----


def _list_obstacles(
    donor: Donor, space: SearchSpace, shared: Mapping[str, Any], here: Mapping[str, str], sampler: str
) -> Iterator[str]:
    """Yield the reasons why the values of the donor's trials would not be measured here, or are of no use."""
    old = donor.provenance
    if not donor.trials:
        yield "no trials.parquet of its run lies beside it"
    if sampler not in LEARNING_SAMPLERS:
        yield f"{sampler} does not learn from them"
    if not _is_same_space(old, space):
        yield "the spaces differ"
    if old.data_hash != here["data_hash"]:
        yield "the data differ"
    if old.objective != here["objective"]:
        yield f"the objectives differ ({shown(old.objective)} there, {shown(here['objective'])} here)"
    for name in here["objective"].split(","):
        if name in COST_OBJECTIVES:
            yield f"{name} depends on the machine and on what runs beside a trial"
    for name, value in shared.items():
        before = getattr(donor.trials[0].config, name)
        if name != "seed" and before != value:  # the effect of the seed is chance
            yield f"{name} differs ({before} there, {value} here)"
    if is_function_name(shared["model"]):
        yield "the model is your own, and its code may have changed"
    for name in DECISIVE_VERSIONS:
        before, now = old.versions.get(name, "unknown"), find_version(name)
        if _cut_version(before) != _cut_version(now):
            yield f"the versions of {name} differ ({shown(before)} there, {shown(now)} here)"


def _is_same_space(old: Provenance, space: SearchSpace) -> bool:
    """Return whether both spaces search the same. Comments and the order of parameters do not matter to a study."""
    if old.space_text == space.text or len(old.space_text) > MAX_BYTES:
        return old.space_text == space.text
    try:
        other = parse_space(old.space_source, old.space_text)
    except InputError:  # it was valid for the version that wrote the file
        return False
    by_name, others = ({parameter.name: parameter for parameter in each.parameters} for each in (space, other))
    return others == by_name and dict(other.fixed) == dict(space.fixed)


def _cut_version(version: str) -> list[str]:
    """``2.15.0+cpu`` -> ``2``, ``15``."""
    return version.split("+", maxsplit=1)[0].split(".")[:2]


def _choose_old_trials(
    donor: Donor, space: SearchSpace, sizes: Mapping[str, int], objectives: Sequence[str]
) -> list[OldTrial]:
    """Return the trials whose outcome a study can use. What failed on another machine may run here."""
    chosen = []
    for record in donor.trials:
        if not _has_outcome(record, objectives):
            continue
        try:
            suggestion = find_suggestion(record.config, space, donor.provenance.train_images, **sizes)
        except InputError:  # a space of the same text cannot have suggested it: the file was made otherwise
            continue
        chosen.append(OldTrial(record=record, suggestion=suggestion))
    return chosen


def _has_outcome(record: TrialRecord, objectives: Sequence[str]) -> bool:
    if record.status not in COMPARABLE or (record.status is TrialStatus.STOPPED and len(objectives) > 1):
        return False  # with several objectives, Optuna keeps no value of a trial cut short
    return record.status is TrialStatus.DIVERGED or all(
        record.last is not None and record.last.find_value(name) is not None for name in objectives
    )
