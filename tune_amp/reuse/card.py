"""The card of trained weights: their model, training data, accuracy, and use.

It follows "Model cards for model reporting" (Mitchell et al. 2019, arXiv:1810.03993), limited to what is known here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tune_amp.results.ranking import count_ties
from tune_amp.results.records import BestFile, BestRow
from tune_amp.results.statistics import wilson_interval
from tune_amp.reuse.markdown import render_markdown
from tune_amp.trial.config import code_span, is_function_name, list_settings

if TYPE_CHECKING:
    from tune_amp.reuse.final import FinalResult  # imports torch

_NOISE = "2 standard errors of the validation images, one seed each"
_PAIRED = "one-sided paired t tests over the confirmed configurations, corrected for their number, 95 %"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardSource:
    """The origin of the settings of trained weights."""

    best: BestFile
    rank: int
    """Rank of the row that was trained."""
    versions: Mapping[str, str]
    """Versions of the libraries that trained the weights."""

    @property
    def row(self) -> BestRow:
        """The row whose settings were trained."""
        return self.best.pick(self.rank)


def describe_card(result: "FinalResult", source: CardSource) -> str:
    """Return the card as Markdown, from ``templates/card.md``. Texts from files are inline code in it."""
    config, now, found = result.config, vars(result.config), source.row.trial.config
    low, high = wilson_interval(result.test_accuracy, result.test_images)
    return render_markdown(
        "card.md",
        result=result,
        source=source,
        config=config,
        own=dict(config.own),
        shape=f"[{', '.join(map(str, ['batch', *result.input_shape]))}]",
        accuracy=_percent(result.test_accuracy),
        interval=f"{_percent(low)} to {_percent(high)}",
        last=result.epochs[-1],
        settings=list_settings(config),
        changed={name: (value, now[name]) for name, value in vars(found).items() if value != now[name]},
        confirmation=_describe_confirmation(result, source),
        verdicts=_list_verdicts(source),
        tie=_describe_tie(source),
        own_code=config.model.partition(":")[0] if is_function_name(config.model) else "",
    )


def _describe_confirmation(result: "FinalResult", source: CardSource) -> list[str]:
    """Return the result of the search's confirmation of these settings, which had other weights and other seeds."""
    confirmation = source.row.confirmation
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
    budget = source.row.trial.config.max_epochs
    if budget != result.config.max_epochs:
        lines.append(f"Those runs took {budget} epochs, this one {result.config.max_epochs}: not the same training.")
    default = next((row.confirmation for row in source.best.rows if row.is_default), None)
    if not source.row.is_default and default is not None and default.test_accuracy_mean is not None:
        reached = _percent(default.test_accuracy_mean)
        seeds = (
            f"{len(default.confirm_seeds)} of these seeds" if len(default.confirm_seeds) < count else "the same seeds"
        )
        lines.append(f"The tutorial's default settings reached a mean of {reached} on {seeds}.")
    return lines


def _list_verdicts(source: CardSource) -> list[str]:
    return [row.confirmation.verdict for row in source.best.rows if row.confirmation and row.confirmation.verdict]


def _describe_tie(source: CardSource) -> str:
    confirmation = source.row.confirmation
    if confirmation is None:
        return f"Not confirmed on fresh seeds. {_describe_search_tie(source)}"
    if confirmation.tied_with_best is None:
        return "Whether it may be the best is unknown: not all runs of its confirmation completed."
    others = [row for row in source.best.ranked if row.rank != source.rank and row.confirmation]
    unknown = [row.rank for row in others if row.may_be_best is None]
    left_out = f" Runs did not complete of rank {', '.join(map(str, unknown))}: not compared." if unknown else ""
    if len(unknown) == len(others):
        return f"Compared with no other ranked configuration.{left_out}"
    if not confirmation.tied_with_best:
        return f"Shown to be worse than another in {source.best.provenance.objectives[0]} ({_PAIRED}).{left_out}"
    tied = [row.rank for row in others if row.may_be_best]
    return f"{_name_ties(tied)} ({_PAIRED}).{left_out}"


def _describe_search_tie(source: CardSource) -> str:
    if source.best.provenance.objectives != ("val_accuracy",):
        return "Whether others are as good was not tested."
    count = count_ties([row.trial for row in source.best.ranked], source.best.provenance.validation_images)
    if 1 < source.rank <= count:
        return f"Tied with rank 1 ({_NOISE})."
    if source.rank > 1:
        return f"Worse than rank 1 ({_NOISE})."
    return f"{_name_ties([row.rank for row in source.best.ranked[1:count]])} ({_NOISE})."


def _name_ties(ranks: Sequence[int | None]) -> str:
    if not ranks:
        return "No other ranked configuration is tied with it"
    return f"Tied with rank {', '.join(map(str, ranks))}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
