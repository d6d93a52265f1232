"""The card of trained weights: their model, training data, accuracy, and use.

It follows "Model cards for model reporting" (Mitchell et al. 2019, arXiv:1810.03993), limited to what is known here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tune_amp.results.ranking import count_ties
from tune_amp.results.records import BestFile, BestRow
from tune_amp.results.statistics import wilson_interval
from tune_amp.reuse.markdown import list_settings, render_markdown
from tune_amp.trial.config import COMMON_METRICS, EpochMetrics, is_function_name
from tune_amp.trial.consent import list_own_code
from tune_amp.trial.text import code_span

if TYPE_CHECKING:
    from tune_amp.reuse.final import FinalResult, OwnResult  # imports torch

_NOISE = "2 standard errors of the validation images, one seed each"
_PAIRED = "one-sided paired t tests over the confirmed configurations, corrected for their number, 95 %"


def describe_card(result: "FinalResult", *, best: BestFile, rank: int, versions: Mapping[str, str]) -> str:
    """Return the card as Markdown, from ``templates/card.md``. Texts from files are inline code in it.

    Args:
        result: what was trained and tested.
        best: where the settings come from.
        rank: rank of the row that was trained.
        versions: versions of the libraries that trained the weights.
    """
    config, row = result.config, best.pick(rank)
    low, high = wilson_interval(result.test_accuracy, result.test_images)
    now, found = vars(config), vars(row.trial.config)
    return render_markdown(
        "card.md",
        result=result,
        best=best,
        rank=rank,
        row=row,
        versions=versions,
        config=config,
        own=dict(config.own),
        scaled=result.input_dtype == "uint8",
        shape=f"[{', '.join(map(str, ['batch', *result.input_shape]))}]",
        accuracy=_percent(result.test_accuracy),
        interval=f"{_percent(low)} to {_percent(high)}",
        last=result.epochs[-1],
        settings=list_settings(config),
        changed={name: (value, now[name]) for name, value in found.items() if value != now[name]},
        confirmation=_describe_confirmation(config.max_epochs, best, row),
        tie=_describe_tie(best, rank),
        own_code=config.model.partition(":")[0] if is_function_name(config.model) else "",
    )


def describe_own_card(
    result: "OwnResult", models: Sequence[str], *, best: BestFile, rank: int, versions: Mapping[str, str]
) -> str:
    """Return the card of the user's own loop or task as Markdown, from ``templates/own_card.md``.

    ``models`` are the names of those whose weights are saved. See ``describe_card``.
    """
    last = result.epochs[-1]
    return render_markdown(
        "own_card.md",
        result=result,
        models=models,
        config=result.config,
        last=last,
        measured={name: value for name, value in list_metrics(last).items() if name not in result.tested},
        settings=list_settings(result.config),
        own_code=list_own_code(vars(result.config))[1::2],
        best=best,
        rank=rank,
        versions=versions,
    )


def list_metrics(metrics: EpochMetrics) -> dict[str, float]:
    """Return what an epoch measured: the common metrics that it has, and the user's own."""
    common = {name: getattr(metrics, name) for name in COMMON_METRICS}
    known = {name: value for name, value in common.items() if value is not None and not math.isnan(value)}
    return known | dict(metrics.metrics)


def _describe_confirmation(epochs: int, best: BestFile, row: BestRow) -> list[str]:
    """Return the result of the search's confirmation of these settings, which had other weights and other seeds."""
    confirmation = row.confirmation
    if confirmation is None:
        return []
    count = len(confirmation.confirm_seeds)
    mean, low, high = (getattr(confirmation, f"test_accuracy_{part}") for part in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        failures = "; ".join(map(code_span, confirmation.confirm_failures)) or "no reason is recorded"
        return [f"Of {count} runs of these settings on fresh seeds not all completed: {failures}."]
    lines = [
        f"The search trained these settings again on {count} fresh seeds, without the validation images: mean test "
        f"accuracy {_percent(mean)}, 95 % interval {_percent(low)} to {_percent(high)} (Student's t, over seeds). "
        "That the test set was read there chose nothing either."
    ]
    budget = row.trial.config.max_epochs
    if budget != epochs:
        lines.append(f"Those runs took {budget} epochs, this one {epochs}: not the same training.")
    default = next((row.confirmation for row in best.rows if row.is_default), None)
    if not row.is_default and default is not None and default.test_accuracy_mean is not None:
        fewer = len(default.confirm_seeds)
        seeds = f"{fewer} of these seeds" if fewer < count else "the same seeds"
        reached = _percent(default.test_accuracy_mean)
        lines.append(f"The tutorial's default settings reached a mean of {reached} on {seeds}.")
    return lines


def _describe_tie(best: BestFile, rank: int) -> str:
    confirmation = best.pick(rank).confirmation
    if confirmation is None:
        return f"Not confirmed on fresh seeds. {_describe_search_tie(best, rank)}"
    if confirmation.tied_with_best is None:
        return "Whether it may be the best is unknown: not all runs of its confirmation completed."
    others = [other for other in best.ranked if other.rank != rank and other.confirmation]
    unknown = [other.rank for other in others if other.may_be_best is None]
    left_out = f" Runs did not complete of rank {', '.join(map(str, unknown))}: not compared." if unknown else ""
    if len(unknown) == len(others):
        return f"Compared with no other ranked configuration.{left_out}"
    if not confirmation.tied_with_best:
        return f"Shown to be worse than another in {best.provenance.objectives[0]} ({_PAIRED}).{left_out}"
    return f"{_name_ties([other.rank for other in others if other.may_be_best])} ({_PAIRED}).{left_out}"


def _describe_search_tie(best: BestFile, rank: int) -> str:
    if best.provenance.objectives != ("val_accuracy",):
        return "Whether others are as good was not tested."
    count = count_ties([row.trial for row in best.ranked], best.provenance.validation_images)
    if rank > 1:
        return f"{'Tied with' if rank <= count else 'Worse than'} rank 1 ({_NOISE})."
    return f"{_name_ties([row.rank for row in best.ranked[1:count]])} ({_NOISE})."


def _name_ties(ranks: Sequence[int | None]) -> str:
    if not ranks:
        return "No other ranked configuration is tied with it"
    return f"Tied with rank {', '.join(map(str, ranks))}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
