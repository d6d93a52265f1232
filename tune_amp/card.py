"""The card of trained weights: what they are, on what they were trained, how good they are, and how to use them.

After "Model cards for model reporting" (Mitchell et al. 2019, arXiv:1810.03993), kept to what is known here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tune_amp.config import TrialConfig, code_span, is_function_name, list_settings
from tune_amp.confirmed import DEFAULT_ID
from tune_amp.intervals import wilson_interval
from tune_amp.ranking import count_ties
from tune_amp.results import BestRow, Provenance

if TYPE_CHECKING:
    from tune_amp.confirmed import Confirmation
    from tune_amp.reuse import FinalResult  # brings torch

_NOISE = "2 standard errors of the validation images, one seed each"
_PAIRED = "one-sided paired t tests over the confirmed configurations, corrected for their number, 95 %"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardSource:
    """Where the settings of trained weights come from."""

    best: Sequence[BestRow]
    """All of ``best.parquet``."""
    rank: int
    """Which of them was trained."""
    provenance: Provenance
    versions: Mapping[str, str]
    """Of the libraries that trained the weights."""

    @property
    def row(self) -> BestRow:
        """The row whose settings were trained."""
        return next(row for row in self.best if row.rank == self.rank)

    @property
    def is_default(self) -> bool:
        """Whether these are the tutorial's settings."""
        return self.row.trial.trial_id == DEFAULT_ID

    @property
    def ranked(self) -> list[BestRow]:
        """The rows that have a rank: the default has none beside several objectives."""
        return [row for row in self.best if row.rank is not None]


def describe_card(result: "FinalResult", source: CardSource) -> str:
    """The card, as Markdown."""
    config = result.config
    found = (
        "the default settings, which none was shown to beat" if source.is_default else "settings that a search found"
    )
    head = (
        f"# {code_span(config.model)} trained on {code_span(config.dataset)}\n\n"
        f"Classifies images of shape {_shape(result)} into {result.num_classes} classes. Trained in {config.precision} "
        f"by tune_amp {source.versions['tune_amp']}, with {found}; the weights are fp32."
    )
    sections = {
        "How good": _describe_accuracy(result, source),
        "What it is": _describe_model(result),
        "What it was trained on": _describe_training(result, source),
        "Where the settings come from": _describe_origin(config, source),
        "How to use it": _describe_use(result),
        "Limits": _describe_limits(result),
    }
    return "\n\n".join([head, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _describe_accuracy(result: "FinalResult", source: CardSource) -> str:
    low, high = wilson_interval(result.test_accuracy, result.test_images)
    lines = [
        f"Test accuracy {_percent(result.test_accuracy)}, 95 % interval {_percent(low)} to {_percent(high)} "
        f"(Wilson's, over images), on {result.test_images:,} images, in fp32.",
        "The test set was read once, after the last epoch. Nothing was chosen by it in this training.",
    ]
    confirmation = source.row.confirmation
    if confirmation is not None:
        lines += _describe_confirmation(result, source, confirmation)
    return _listed(lines)


def _describe_confirmation(result: "FinalResult", source: CardSource, confirmation: "Confirmation") -> list[str]:
    """What the search's confirmation found for these settings: with other weights, on other seeds."""
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
    default = next((row.confirmation for row in source.best if row.trial.trial_id == DEFAULT_ID), None)
    if not source.is_default and default is not None and default.test_accuracy_mean is not None:
        reached = _percent(default.test_accuracy_mean)
        seeds = (
            f"{len(default.confirm_seeds)} of these seeds" if len(default.confirm_seeds) < count else "the same seeds"
        )
        lines.append(f"The tutorial's default settings reached a mean of {reached} on {seeds}.")
    return lines


def _describe_model(result: "FinalResult") -> str:
    return _listed(
        [
            f"Model: {code_span(result.config.model)}, {result.num_parameters:,} parameters, "
            "float32 in `model.safetensors`.",
            f"Input: uint8 images {_shape(result)}, given to the model as "
            f"`(pixel - {result.input_shift!r}) * {result.input_factor!r}` in float32.",
            f"Output: logits [batch, {result.num_classes}].",
        ]
    )


def _describe_training(result: "FinalResult", source: CardSource) -> str:
    config, last = result.config, result.epochs[-1]
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    tail = "" if config.imbalance == 1 else f", thinned to a long tail of {config.imbalance:g}:1 (the test set is not)"
    lines = [
        f"Data: {code_span(config.dataset)}, {result.train_images:,} images: training and validation images "
        f"together{tail}.",
        f"SHA-256 of the data: `{result.data_hash}`.",
        f"Seed {config.seed}, {config.max_epochs} epochs, {last.steps:,} steps, of which {last.skipped_steps:,} were "
        f"skipped; average loss of the last epoch {last.train_loss:.4f}.",
        f"Precision {config.precision}, on {result.device}; {versions}.",
        f"Settings: {', '.join(f'{name} {_value(value)}' for name, value in list_settings(config).items())}.",
    ]
    return _listed(lines)


def _describe_origin(config: TrialConfig, source: CardSource) -> str:
    trial, about = source.row.trial, source.provenance
    changed = [
        f"{name} {_value(getattr(config, name))} instead of {_value(value)}"
        for name, value in vars(trial.config).items()
        if value != getattr(config, name)
    ]
    lines = [
        f"Run {code_span(about.run)}, rank {source.rank} of {len(source.ranked)}.",
        "The tutorial's default configuration, which was no trial of the search."
        if source.is_default
        else f"Trial {code_span(trial.trial_id)}: {code_span(trial.trial_name)}.",
        f"Searched for {about.objective} on {about.validation_images:,} validation images.",
        *_describe_verdict(source),
        _describe_tie(source),
    ]
    if changed:
        lines.append(f"Changed for this training: {', '.join(changed)}.")
    return _listed(lines)


def _describe_verdict(source: CardSource) -> list[str]:
    verdicts = [row.confirmation.verdict for row in source.best if row.confirmation and row.confirmation.verdict]
    return [f"Verdict of the search: {verdict.replace('number ', 'rank ')}." for verdict in verdicts]


def _describe_tie(source: CardSource) -> str:
    confirmation = source.row.confirmation
    if confirmation is None:
        return f"Not confirmed on fresh seeds. {_describe_search_tie(source)}"
    if confirmation.tied_with_best is None:
        return "Whether it may be the best cannot be told: not all runs of its confirmation completed."
    others = [row for row in source.ranked if row.rank != source.rank and row.confirmation]
    unknown = [row.rank for row in others if row.confirmation and row.confirmation.tied_with_best is None]
    left_out = f" Runs did not complete of rank {', '.join(map(str, unknown))}: not compared." if unknown else ""
    if len(unknown) == len(others):
        return f"Compared with no other ranked configuration.{left_out}"
    if not confirmation.tied_with_best:
        return f"Shown to be worse than another in {source.provenance.objectives[0]} ({_PAIRED}).{left_out}"
    tied = [row.rank for row in others if row.confirmation and row.confirmation.tied_with_best]
    return f"{_name_ties(tied)} ({_PAIRED}).{left_out}"


def _describe_search_tie(source: CardSource) -> str:
    if source.provenance.objectives != ("val_accuracy",):
        return "Whether others are as good was not tested."
    count = count_ties([row.trial for row in source.ranked], source.provenance.validation_images)
    if 1 < source.rank <= count:
        return f"Tied with rank 1 ({_NOISE})."
    if source.rank > 1:
        return f"Worse than rank 1 ({_NOISE})."
    return f"{_name_ties([row.rank for row in source.ranked[1:count]])} ({_NOISE})."


def _name_ties(ranks: Sequence[int | None]) -> str:
    if not ranks:
        return "No other ranked configuration is tied with it"
    return f"Tied with rank {', '.join(map(str, ranks))}"


def _describe_use(result: "FinalResult") -> str:
    """A snippet that runs as it is, in the folder of the weights."""
    model = result.config.model
    needed = imported = consent = ""
    if is_function_name(model):
        module = code_span(model.partition(":")[0])
        needed = f"{module} must be importable: in the current folder, or below one that `PYTHONPATH` names.\n\n"
        imported = "from tune_amp.config import consent_to\n"
        consent = f'consent_to("{model}")  # your own code, which this runs\n'
    return f"""{needed}In this folder:

```python
import torch
from safetensors.torch import load_model
{imported}from tune_amp.models import build_model

{consent}model = build_model("{model}", {result.input_shape!r}, {result.num_classes})
load_model(model, "model.safetensors")
model.eval()


def classify(images):
    \"\"\"uint8 images [batch, {", ".join(map(str, result.input_shape))}] -> the class of each.\"\"\"
    with torch.inference_mode():
        return model((images - {result.input_shift!r}) * {result.input_factor!r}).argmax(dim=1)
```"""


def _describe_limits(result: "FinalResult") -> str:
    return _listed(
        [
            f"Tested on the {result.test_images:,} test images of {code_span(result.config.dataset)}, and on nothing "
            "else: not on images from another source, nor on any that belong to none of its classes.",
            f"Tested in fp32 on {result.device}: not in lower precision, not quantized, not exported.",
            "One seed. The interval above is over images: another seed moves the accuracy as well.",
            "Whether its probabilities are calibrated was not measured.",
            "To train several times and keep what tests best is to choose by the test set: its accuracy then flatters.",
        ]
    )


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _shape(result: "FinalResult") -> str:
    return "[" + ", ".join(["batch", *map(str, result.input_shape)]) + "]"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _value(value: object) -> str:
    if isinstance(value, str):
        return code_span(value) if is_function_name(value) else value
    return f"{value:g}" if isinstance(value, float) else str(value)
