"""Judges from runs on fresh seeds whether searching gained anything over the tutorial's default configuration.

The procedure has two stages, after the screening procedures of ranking and selection (Nelson, Swann, Goldsman and Song
2001, doi:10.1287/opre.49.6.950.10019; with common random numbers: Nelson and Matejcik 1995,
doi:10.1287/mnsc.41.12.1935). All configurations are trained on the first seeds, and the best one other than the default
becomes the challenger. Challenger and default are trained on further seeds only if the challenger leads. The gain is
their paired difference, seed by seed, so that no other configuration widens its interval. The same runs chose the
challenger, so the interval is widened by Bonferroni's correction (Dunn 1961): a challenger that is no better than the
default is judged better in at most 5 of 100 searches. Stopping when the challenger does not lead can only lower that
number.
"""

import dataclasses
import enum
import statistics
from collections.abc import Mapping, Sequence

from tune_amp.results.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.results.statistics import CONFIDENCE, EQUIVALENCE_CONFIDENCE, FEWEST_PAIRS, paired_interval
from tune_amp.trial.config import HOPELESS_STATUSES, TrialConfig, TrialStatus
from tune_amp.trial.objectives import is_maximized, metric_of

FIRST_SEEDS = 3
"""Seeds on which every configuration is trained."""

MARGINS = {"val_accuracy": 0.002, "val_loss": 0.005}
"""Differences below this count as none: 0.2 points of accuracy, or nats. For a user's own metric, see
``RELATIVE_MARGIN``."""
RELATIVE_MARGIN = 0.002
"""The margin of a user's own metric, as a share of the default configuration's value."""
RESOLUTION = 5
"""An interval that leaves a gain of this many margins possible is too wide to call two configurations
indistinguishable."""

OBJECTIVE_NAMES = {"val_accuracy": "validation accuracy", "val_loss": "validation loss"}


class VerdictKind(enum.StrEnum):
    """The challenger compared with the default configuration, on fresh seeds."""

    BETTER = "better"
    INDISTINGUISHABLE = "indistinguishable"
    WORSE = "worse"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
    """The challenger minus the default configuration, in units of the first objective, on validation."""

    difference: float
    """Mean of the paired differences."""
    low: float
    """Lower end of its 95 % interval, corrected for the choice of the challenger."""
    high: float
    seeds: int
    """Number of seeds on which both were trained."""
    margin: float
    """Difference below which the two count as equal."""
    equivalent: bool
    """Whether the two are shown to differ by less than ``margin``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether to use the configuration that the search found."""

    kind: VerdictKind
    challenger: str | None
    """``trial_id`` of the best configuration other than the default; None if none is complete."""
    recommended: str
    """``trial_id`` of the configuration to use."""
    gain: Gain | None = None
    """The measured gain; None if a run did not complete, or if there are too few runs."""
    reason: str = ""
    """Why there is no gain."""


def judge_gain(configs: Mapping[str, TrialConfig], runs: Sequence[ConfirmedRun], objective: str) -> Verdict:
    """Judge whether the best of ``configs`` is better than the default configuration among them.

    Args:
        configs: trial id -> configuration that was trained again, in the search's order, best first; includes
            ``DEFAULT_ID`` if the default was trained.
        runs: rows of ``confirm.parquet``.
        objective: objective of the verdict, see ``trial.objectives``.
    """
    challenger = choose_challenger(configs, runs, objective)
    default_failed = _count_failures(DEFAULT_ID, runs)
    has_default = DEFAULT_ID in configs and not default_failed
    kind, gain, reason = VerdictKind.UNKNOWN, None, ""
    if DEFAULT_ID not in configs:
        reason = "the default configuration was not trained"
    elif not has_default:
        reason = f"the defaults did not complete on {default_failed}"
        # Settings are to blame for a divergence or for memory; a crash may have any cause.
        kind = VerdictKind.BETTER if challenger and _is_own_fault(DEFAULT_ID, runs) else kind
    elif all(_is_default(config, configs) for config in configs.values()):
        reason = "the search found the default configuration itself"
        kind = VerdictKind.INDISTINGUISHABLE
    elif challenger is None:
        reason = "no other configuration completed on every seed"
    elif failed := _count_failures(challenger, runs):
        reason = f"the best other configuration did not complete on {failed}"
    else:
        gain = _measure_gain(challenger, configs, runs, objective)
        kind, reason = (_judge(gain, objective), "") if gain else (kind, f"fewer than {FEWEST_PAIRS} seeds are too few")
    keeps_default = has_default and kind is not VerdictKind.BETTER
    recommended = DEFAULT_ID if keeps_default else challenger or next(iter(configs))
    return Verdict(kind=kind, challenger=challenger, recommended=recommended, gain=gain, reason=reason)


def choose_challenger(configs: Mapping[str, TrialConfig], runs: Sequence[ConfirmedRun], objective: str) -> str | None:
    """Return the id with the best mean on the first seeds, among those that differ from the default in a setting.

    Runs on later seeds do not count, because the choice would change as they complete.
    """
    scores = _list_rival_scores(configs, runs, objective)
    return max(scores, key=lambda name: find_sign(objective) * statistics.fmean(scores[name]), default=None)


def may_gain(verdict: Verdict, objective: str) -> bool:
    """Return whether further seeds could show a gain: the challenger leads, and the two are not shown to be equal."""
    gain = verdict.gain
    return gain is not None and find_sign(objective) * gain.difference > 0 and not gain.equivalent


def without_seed(config: TrialConfig) -> TrialConfig:
    """Return the configuration with seed 0: it is equal for two trials that differ only in the seed."""
    return dataclasses.replace(config, seed=0)


def score_runs(trial_id: str, runs: Sequence[ConfirmedRun], objective: str) -> dict[int, float] | None:
    """Return the value of ``objective`` on each seed; None if a run did not complete, or if there is no run.

    The mean of the runs that completed would reward a configuration that diverges on every other seed.
    """
    own = [run for run in runs if run.trial_id == trial_id]
    completed = [run for run in own if run.status is TrialStatus.COMPLETED]
    values = {run.seed: value for run in completed if (value := run.find_value(objective)) is not None}
    return values if own and len(values) == len({run.seed for run in own}) else None


def describe_verdict(
    verdict: Verdict, objective: str, ranks: Mapping[str, int | None], *, several: bool = False
) -> str:
    """Return the verdict as one sentence, which is the same wherever a run is shown.

    Args:
        verdict: from ``judge_gain``.
        objective: objective of the verdict.
        ranks: trial id -> rank, by which the sentence names the challenger.
        several: whether the search had more objectives, which were not measured again.
    """
    rank = ranks.get(verdict.challenger or "")
    challenger = f"rank {rank}" if rank else "the best other configuration"
    number = _describe_gain(verdict.gain, objective) if verdict.gain else verdict.reason
    if verdict.kind is VerdictKind.BETTER:
        return f"{challenger} is better than the defaults: {number}"
    if verdict.recommended != DEFAULT_ID:
        return f"whether searching gained anything is unknown: {number}"
    keep = f"no gain in {name_objective(objective)} over the defaults" if several else "no gain over the defaults"
    keep += "" if several else ": keep them"
    finding = {
        VerdictKind.INDISTINGUISHABLE: f"{challenger} is indistinguishable from them",
        VerdictKind.WORSE: f"{challenger} is worse",
        VerdictKind.UNKNOWN: "nothing more is known"
        if verdict.gain is None
        else f"whether {challenger} is better is unknown, too few seeds",
    }[verdict.kind]
    if verdict.gain is None and verdict.kind is VerdictKind.INDISTINGUISHABLE:
        return f"{keep}; {number}"
    return f"{keep}; {finding}: {number}"


def show_difference(difference: float, objective: str) -> str:
    """Format a difference for tables: in points of accuracy, in nats, or in the units of a user's own metric."""
    if objective not in MARGINS or abs(difference) > 1e12:
        return f"{difference:+.4g}"
    return f"{100 * difference:+.2f}" if objective == "val_accuracy" else f"{difference:+.4f}"


def format_difference(difference: float, objective: str) -> str:
    """Return a difference with its unit, such as ``+0.35 points``."""
    units = {"val_accuracy": " points", "val_loss": " nats"}
    return f"{show_difference(difference, objective)}{units.get(objective, '')}"


def name_objective(objective: str) -> str:
    """Return the name of an objective in a sentence."""
    return OBJECTIVE_NAMES.get(objective, metric_of(objective))


def _describe_gain(gain: Gain, objective: str) -> str:
    low, high = show_difference(gain.low, objective), show_difference(gain.high, objective)
    of = "of" if objective in MARGINS else "in"
    difference = f"{format_difference(gain.difference, objective)} {of} {name_objective(objective)}"
    number = f"{difference} (95 % interval {low} to {high}, {gain.seeds} seeds)"
    if not gain.equivalent:
        return number
    margins = {"val_accuracy": f"{100 * gain.margin:g} points", "val_loss": f"{gain.margin:g} nats"}
    margin = margins.get(objective, f"{gain.margin:.2g}")
    return f"{number}, shown to be less than {margin} apart"


def _judge(gain: Gain, objective: str) -> VerdictKind:
    """Compare the interval with 0; ``worst`` and ``best`` are larger for a better configuration."""
    worst, best = sorted((find_sign(objective) * gain.low, find_sign(objective) * gain.high))
    if worst > 0:
        return VerdictKind.BETTER
    if best < 0:
        return VerdictKind.WORSE
    return VerdictKind.INDISTINGUISHABLE if best <= RESOLUTION * gain.margin else VerdictKind.UNKNOWN


def _measure_gain(
    challenger: str, configs: Mapping[str, TrialConfig], runs: Sequence[ConfirmedRun], objective: str
) -> Gain | None:
    """Return the gain on all seeds that both were trained on; None if a run did not complete, or with too few runs."""
    ours, theirs = score_runs(challenger, runs, objective), score_runs(DEFAULT_ID, runs, objective)
    seeds = sorted({*(ours or ())} & {*(theirs or ())})
    if ours is None or theirs is None or len(seeds) < FEWEST_PAIRS:
        return None
    rivals = {tuple(values) for values in _list_rival_scores(configs, runs, objective).values()}  # copies count once
    # One-sided, because only a challenger that seems better is acted on: one or two rivals need no correction.
    confidence = max(CONFIDENCE, 1 - 2 * (1 - CONFIDENCE) / len(rivals))
    pair = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    found, inner = paired_interval(*pair, confidence), paired_interval(*pair, EQUIVALENCE_CONFIDENCE)
    margin = MARGINS.get(objective, RELATIVE_MARGIN * abs(statistics.fmean(pair[1])))
    return Gain(
        difference=found.mean,
        low=found.low,
        high=found.high,
        seeds=len(seeds),
        margin=margin,
        equivalent=max(-inner.low, inner.high) < margin,
    )


def _list_rival_scores(
    configs: Mapping[str, TrialConfig], runs: Sequence[ConfirmedRun], objective: str
) -> dict[str, list[float]]:
    """Return trial id -> values on the first seeds, without configurations that failed on one or are the default."""
    first = sorted({run.seed for run in runs})[:FIRST_SEEDS]
    on_first = [run for run in runs if run.seed in first]
    scores = {name: score_runs(name, on_first, objective) for name in configs}
    return {
        name: [found[seed] for seed in sorted(found)]
        for name, found in scores.items()
        if found is not None and not _is_default(configs[name], configs)
    }


def _count_failures(trial_id: str, runs: Sequence[ConfirmedRun]) -> str:
    """Return ``2 of 3 seeds`` if a configuration did not complete on 2 of them; empty if all completed."""
    own = [run for run in runs if run.trial_id == trial_id]
    failed = sum(run.status is not TrialStatus.COMPLETED for run in own)
    return f"{failed} of {len(own)} seeds" if failed else ""


def _is_own_fault(trial_id: str, runs: Sequence[ConfirmedRun]) -> bool:
    return any(run.trial_id == trial_id and run.status in HOPELESS_STATUSES for run in runs)


def _is_default(config: TrialConfig, configs: Mapping[str, TrialConfig]) -> bool:
    return DEFAULT_ID in configs and without_seed(config) == without_seed(configs[DEFAULT_ID])


def find_sign(objective: str) -> int:
    """Return 1 if more is better, else -1."""
    return 1 if is_maximized(objective) else -1
