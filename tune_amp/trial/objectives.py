"""Objectives: the metrics that a search optimizes, each with the direction in which it is better.

An objective is the name of a metric. Where the name does not say the direction, or says another, it follows a colon:
``val_f1``, ``val_distance``, ``val_reading:max``.
"""

from collections.abc import Collection

from tune_amp.trial.config import COST_OBJECTIVES, RESERVED_NAMES, InputError, check
from tune_amp.trial.text import shown

MAX, MIN = "max", "min"
MODES = (MAX, MIN)

_BETTER = {
    MAX: {*("accuracy", "acc", "auc", "bleu", "dice", "f1", "iou", "map", "precision", "psnr", "r2", "recall")}
    | {"return", "reward", "score", "ssim"},
    MIN: {*("bytes", "cer", "distance", "error", "fid", "loss", "mae", "mape", "mse", "perplexity", "ppl", "regret")}
    | {"rmse", "seconds", "wer"},
}


def metric_of(objective: str) -> str:
    """Return the name of the metric, without a direction."""
    return objective.partition(":")[0]


def is_maximized(objective: str) -> bool:
    """Return whether more is better, by the direction after the colon or else by a word of the name."""
    name, _, mode = objective.partition(":")
    return (mode or guess_mode(name)) == MAX


def show_value(name: str, value: float) -> str:
    """Format a value of a metric or an objective: an accuracy as a percentage, others with five significant digits."""
    return f"{100 * value:.2f} %" if metric_of(name).endswith("accuracy") else f"{value:.5g}"


def guess_mode(name: str) -> str | None:
    """Return the direction that a word of the name implies, the last one first: ``val_loss`` -> min; None if none."""
    for word in reversed(name.lower().split("_")):
        for mode, words in _BETTER.items():
            if word in words:
                return mode
    return None


def read_objectives(place: str, text: str, mode: str | None, known: Collection[str] = ()) -> str:
    """Return objectives, joined by commas, in their shortest form: with a direction only if the name implies another.

    Args:
        place: of the text, for messages.
        text: names joined by commas, each with or without a direction.
        mode: direction of a single one; of several, of those whose name implies none.
        known: the metrics that trials report; empty if the user's own training decides.

    Raises:
        InputError: a name is none, is repeated, is not measured, or its direction is unknown.
    """
    found: dict[str, str] = {}
    for given in (part.strip() for part in text.split(",")):
        name, colon, own = given.partition(":")
        if known:
            rule = f"must be one of {', '.join(known)}, or several joined by commas"
            check(place, given, name in known, f"{rule}; a metric of your own needs --task or --train")
        check(place, given, name.isidentifier(), "must be names of letters, digits and _, joined by commas")
        check(place, given, not colon or own in MODES, "must end with :max or :min, if with a direction")
        check(place, text, name not in found, "must name none twice")
        check(place, given, not name.startswith("test_"), "must be no metric of the test set, which chooses nothing")
        check(place, given, name not in RESERVED_NAMES - {*COST_OBJECTIVES}, "must be no name of another column")
        implied = guess_mode(name)
        chosen = own or (implied or mode if "," in text else mode or implied)
        if chosen is None:
            way = f"write {name}:max or {name}:min" if "," in text else "add --mode max or --mode min"
            raise InputError(f"{place}: {shown(name)} does not say whether more is better: {way}")
        found[name] = name if chosen == implied else f"{name}:{chosen}"
    return ",".join(found.values())
