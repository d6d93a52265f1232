"""Measures the importance of each searched parameter for the best trials, and tests it against noise.

Trials are compared at one epoch that nearly all of them reached. Comparing values at different budgets would credit
what the longest trials have in common.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tune_amp.results.parquet import build_columns, build_table, placed, read_file, write_parquet
from tune_amp.results.provenance import Provenance
from tune_amp.results.records import TrialRecord
from tune_amp.results.rows import LARGEST_SHARE, build_from
from tune_amp.results.run_folder import RunFolder, locate
from tune_amp.space.space import SearchSpace
from tune_amp.trial.config import (
    HOPELESS_STATES,
    HOPELESS_STATUSES,
    InputError,
    TrialConfig,
    TrialStatus,
    check,
    described,
)
from tune_amp.trial.objectives import is_maximized

# Optuna's 0.1 leaves 4 of 32 trials to estimate a density from. In 60 simulated TPE searches of 32 trials, a learning
# rate that explains nearly all of the values passed p <= 0.01 in 83 % with a third, 37 % with a quarter, 12 % with 0.1.
TARGET_QUANTILE = 1 / 3
# Optuna requires at least 5 trials in the target: a third of 15.
FEWEST_TRIALS = 15
# Samplers move while they learn, so a setting without effect may drift along with one that has an effect. In the same
# searches, three such settings passed p <= 0.05 in 8 % when permuted among all trials, in 4 % (standard error 2) when
# permuted among neighbours in time. The learning rate would have passed in 90 % instead of 83 %.
BLOCK_TRIALS = 8
# The smallest p-value, 1/200, still passes Holm's first step with 10 parameters; more parameters get more permutations.
# All searched parameters together take about a second of the driver's time at 32 trials.
PERMUTATIONS = 199
LEVEL = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterImportance:
    """One searched parameter: a row of ``importance.parquet``."""

    parameter: str = described("searched field of the trials' configurations")
    importance: float = described("share of the importances of all searched parameters, which sum to 1")
    null_95: float = described(
        "95th percentile of importance where the parameter's values are permuted among trials, at most 100"
    )
    p_value: float = described("share of permutations that reach the importance, the trials as they were included")
    told_from_noise: bool = described("whether p_value passes Holm's correction for all parameters at 5 %")
    raw: float = described("importance before it is made a share: Pearson divergence, as Optuna computes it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceResult:
    """The result of :func:`measure_importance` for one objective."""

    objective: str = described("metric that the trials are compared by")
    epoch: int | None = described("the epoch at which all trials are compared", unit="epochs")
    trials: int = described("trials compared, those that ended hopeless before that epoch included")
    method: str = described("how importance and null are computed")
    rows: tuple[ParameterImportance, ...] = ()
    """Importance of each parameter, most important first."""
    reason: str | None = None
    """Why there are no rows."""


# ---- measure ----


def measure_importance(
    space: SearchSpace,
    trials: Sequence[TrialRecord],
    objective: str,
    *,
    train_images: int,
    permutations: int | None = None,
    seed: int = 0,
) -> ImportanceResult:
    """Measure the importance of each searched parameter for being among the best third of the trials at one epoch.

    PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255; conditional parameters: arXiv:2601.20800) compares the density of
    a parameter in the best third with that in all trials, one parameter at a time, and misses effects that appear only
    in combinations. The null is the same number after the parameter's values were permuted among the trials in which it
    is active. Holm's correction limits the probability that any parameter is falsely distinguished from noise to 5 %,
    if suggestions do not depend on each other. Those of a sampler that learns do, and the probability is then somewhat
    larger.

    Trials that diverged, ran out of memory or were stopped by the scheduler before the epoch count as worse than all
    others. Trials are excluded if their failure was not caused by their settings, or if they were interrupted before
    the epoch.

    Args:
        space: the search space.
        trials: in order of submission.
        objective: see ``trial.objectives``.
        train_images: images in the training split, from which intervals relative to the trial are restored.
        permutations: number of permutations of each parameter's values; None for as many as needed.
        seed: seed of the permutations.
    """
    if permutations is None:
        permutations = max(PERMUTATIONS, math.ceil(len(space.parameters) / LEVEL) - 1)
    epoch = _find_common_epoch(trials)
    losses = [math.nan if epoch is None else _find_loss(trial, objective, epoch) for trial in trials]
    counted = [index for index, loss in enumerate(losses) if not math.isnan(loss)]
    # Ranks, because Optuna would omit infinity, the worst value; equal values get equal ranks.
    ranks = np.unique([losses[index] for index in counted], return_inverse=True)[1]
    result = ImportanceResult(
        objective=objective, epoch=epoch, trials=len(counted), method=_describe_method(permutations)
    )
    reason = _find_obstacle(ranks)
    if reason:
        return dataclasses.replace(result, reason=reason)
    suggestions = [_restore_suggestion(space, trials[index].config, train_images) for index in counted]
    rng = np.random.default_rng(seed)
    measured = {
        parameter.name: _measure_parameter(parameter.optuna_name, suggestions, ranks, permutations, rng)
        for parameter in space.parameters
    }
    return dataclasses.replace(result, rows=_judge(measured))


def _find_common_epoch(trials: Sequence[TrialRecord]) -> int | None:
    """Return the largest epoch that nine tenths of the completed and stopped trials reached; None if there are none."""
    statuses = (TrialStatus.COMPLETED, TrialStatus.STOPPED)
    reached = sorted(trial.last.epoch for trial in trials if trial.last and trial.status in statuses)
    return reached[len(reached) // 10] if reached else None


def _find_loss(trial: TrialRecord, objective: str, epoch: int) -> float:
    """Return the trial's value at ``epoch``, lower is better; infinity: worse than any, NaN: the trial is excluded."""
    if trial.status is TrialStatus.FAILED and not trial.config_fault:
        return math.nan
    report = next((report for report in trial.epochs if report.epoch == epoch), None)
    if report is None:
        # A scheduler stops only trials with bad values.
        is_worst = trial.config_fault or trial.status in (*HOPELESS_STATUSES, TrialStatus.STOPPED)
        return math.inf if is_worst else math.nan
    value = report.find_value(objective)
    if value is None:
        return math.nan
    if not math.isfinite(value) or report.state in HOPELESS_STATES:
        return math.inf
    return -value if is_maximized(objective) else value


def _find_obstacle(ranks: NDArray[np.intp]) -> str | None:
    """Return why importance cannot be measured, or None."""
    if len(ranks) < FEWEST_TRIALS:
        return f"needs at least {FEWEST_TRIALS} trials with a value at one epoch, got {len(ranks)}"
    last_of_best = math.ceil(TARGET_QUANTILE * len(ranks)) - 1
    if np.sort(ranks)[last_of_best] == ranks.max():
        return f"needs a best third that stands out, but most of the {len(ranks)} trials share the worst value"
    return None


def _restore_suggestion(space: SearchSpace, config: TrialConfig, train_images: int) -> optuna.trial.FixedTrial:
    """Restore Optuna's suggestion for a trial of ``config``: parameters and distributions of the active ones only."""
    sizes = {"train_images": train_images, "max_epochs": config.max_epochs}
    # Rounding to whole steps is not undone.
    values = {name: value for _, nearest, _ in space.locate(config, **sizes) for name, value in nearest.items()}
    suggestion = optuna.trial.FixedTrial(values)
    space.suggest(suggestion, **sizes)  # suggests only the active parameters
    return suggestion


def _measure_parameter(
    name: str,
    suggestions: Sequence[optuna.trial.FixedTrial],
    ranks: NDArray[np.intp],
    permutations: int,
    rng: np.random.Generator,
) -> tuple[float, NDArray[np.float64]]:
    """Measure the importance of a parameter, and of each permutation of its values among the trials with it active."""
    active = [index for index, suggestion in enumerate(suggestions) if name in suggestion.params]
    if not active:
        return 0.0, np.zeros(permutations)
    values = [suggestions[index].params[name] for index in active]
    distribution = suggestions[active[0]].distributions[name]
    orders = [np.arange(len(active)), *(_permute_blocks(len(active), rng) for _ in range(permutations))]
    # Each permutation is a separate parameter, and Optuna assesses parameters one by one: one study replaces hundreds.
    names = [str(number) for number in range(len(orders))]
    columns = {
        index: [values[order[place]] for order in orders]  # lists, because numpy would change the types of choices
        for place, index in enumerate(active)
    }
    trials = [
        optuna.create_trial(
            params=dict(zip(names, columns[index], strict=True)) if index in columns else {},
            distributions=dict.fromkeys(names, distribution) if index in columns else {},
            value=float(rank),
        )
        for index, rank in enumerate(ranks)
    ]
    found = _evaluate(trials)
    return found["0"], np.array([found[name] for name in names[1:]])


def _permute_blocks(count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return a random order of ``count`` trials; each stays within its block of ``BLOCK_TRIALS`` or slightly more."""
    blocks = np.array_split(np.arange(count), max(1, count // BLOCK_TRIALS))
    return np.concatenate([rng.permutation(block) for block in blocks])


def _evaluate(trials: Sequence[optuna.trial.FrozenTrial]) -> dict[str, float]:
    """Return Optuna's importance of each parameter for a low value."""
    from optuna.importance import PedAnovaImportanceEvaluator  # imports scikit-learn, which takes seconds

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs the creation of the study at INFO
    study = optuna.create_study()
    study.add_trials(trials)
    with warnings.catch_warnings():
        # About a parameter active in a single trial: its importance is 0, which is reported as noise.
        warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)
        return PedAnovaImportanceEvaluator(target_quantile=TARGET_QUANTILE).evaluate(study)


def _judge(measured: Mapping[str, tuple[float, NDArray[np.float64]]]) -> tuple[ParameterImportance, ...]:
    """Return shares, null percentiles and verdicts, most important first."""
    p_values = {name: (1 + int((null >= raw).sum())) / (1 + len(null)) for name, (raw, null) in measured.items()}
    found = _select_by_holm(p_values)
    total = sum(raw for raw, _ in measured.values()) or 1.0
    rows = [
        ParameterImportance(
            parameter=name,
            importance=raw / total,
            # The percentile is the value of a permutation: an importance above it has a p-value of at most 0.05.
            null_95=min(float(np.quantile(null, 0.95, method="inverted_cdf")) / total, LARGEST_SHARE),
            p_value=p_values[name],
            told_from_noise=name in found,
            raw=raw,
        )
        for name, (raw, null) in measured.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.raw))


def _select_by_holm(p_values: Mapping[str, float]) -> set[str]:
    """Return the names that pass Holm's step-down test (1979) at ``LEVEL``: by p-value, up to the first that fails.

    Holm's and not Benjamini-Hochberg's, because with a handful of parameters a single false finding misleads.
    """
    ordered = sorted(p_values, key=lambda name: p_values[name])
    passes = itertools.takewhile(
        lambda place: p_values[ordered[place]] * (len(ordered) - place) <= LEVEL, range(len(ordered))
    )
    return {ordered[place] for place in passes}


# ---- describe ----


def describe_importance(result: ImportanceResult) -> str:
    """Return a line that says what is compared, or why nothing is."""
    if result.reason:
        return f"importance: not measured: {result.reason}"
    if not any(row.told_from_noise for row in result.rows):
        return (
            f"importance at epoch {result.epoch} ({result.trials} trials): no parameter is distinguishable from noise"
        )
    return f"importance at epoch {result.epoch} ({result.trials} trials), and what permuted values reach in 5 %:"


def _describe_method(permutations: int) -> str:
    return (
        f"PED-ANOVA (Watanabe et al. 2023), best {TARGET_QUANTILE:.0%} of the trials; null: {permutations} permutations"
        f" among {BLOCK_TRIALS} or more neighbours in order of submission; Holm's correction at {LEVEL:.0%}"
    )


# ---- write and read ----

SCHEMA = pa.schema([*build_columns(ImportanceResult), *build_columns(ParameterImportance)])
"""Columns of the result, equal in all rows, before the columns of the row."""


def write_importance(folder: Path, result: ImportanceResult, provenance: Provenance) -> None:
    """Write ``importance.parquet`` into ``folder``: one row a parameter, most important first.

    Raises:
        OSError: the folder is missing, or the disk is full; an existing file is unchanged.
    """
    assert result.rows, "an importance file without a row is not written"
    rows = [vars(result) | vars(row) for row in result.rows]
    table = build_table("importance", SCHEMA, rows, dataclasses.asdict(provenance))
    write_parquet(table, RunFolder(folder).importance)


def load_importance(path: str | Path) -> ImportanceResult:
    """Load what :func:`write_importance` wrote; ``path`` is the file or its run's folder.

    Raises:
        InputError: the file is missing, damaged, not from tune_amp or of another version.
    """
    path = locate(path, "importance")
    rows = read_file(path, "importance", SCHEMA).rows
    with placed(path):
        if not rows:
            raise InputError("must hold at least one row")
        for name, value in (item for row in rows for item in row.items()):
            check(name, value, value is not None, "must be there")
            is_small = not (isinstance(value, float) and abs(value) > LARGEST_SHARE)
            check(name, value, is_small, f"must be at most {LARGEST_SHARE:g}")
        found = tuple(build_from(ParameterImportance, row) for row in rows)
        return build_from(ImportanceResult, rows[0] | {"rows": found})
