"""Builds records from the rows of Parquet files and the events of a journal, which may come from anybody."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from tune_amp.results.parquet import split_optional
from tune_amp.trial.config import SPREAD, InputError, OwnValue, TrialStatus, checked_type, field_types
from tune_amp.trial.consent import distrust
from tune_amp.trial.text import shown

_T = TypeVar("_T")

MOST_SECONDS = 1e12
"""Largest duration in a file, in seconds: far longer than a search, but still short to print."""
LARGEST_SHARE = 100.0
"""Largest share in a file: an accuracy is at most 1, but the interval of a mean over two seeds exceeds that."""


def build_from(source: type[_T], values: Mapping[str, Any]) -> _T:
    """Build a ``source`` from those ``values`` that are its fields; lists become tuples.

    Raises:
        InputError: a field is absent, or null where it cannot be, or breaks a rule of ``source``.
    """
    arguments: dict[str, Any] = {}
    for name, rule in _list_rules(source).items():  # type: ignore[arg-type]  # a class has a hash
        if name not in values and rule.has_default:
            continue
        value = values.get(name)
        if name in SPREAD:
            value = _check_own(value)
        elif value is None and not rule.optional:
            raise InputError(f"{name}: must be there, got null")
        elif rule.is_status:
            if value not in list(TrialStatus):
                raise InputError(f"{name}: must be one of {', '.join(TrialStatus)}, got {shown(value)}")
            value = TrialStatus(value)
        elif isinstance(value, float):
            if rule.is_time and not math.isfinite(value):  # a loss may be NaN, a time cannot
                raise InputError(f"{name}: must be a finite number, got {value}")
            if abs(value) > rule.most:
                raise InputError(f"{name}: must be at most {rule.most:g}, got {value:g}")
        elif isinstance(value, str):
            distrust(value)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return source(**arguments)


class _Rule(NamedTuple):
    optional: bool
    has_default: bool
    is_status: bool
    is_time: bool
    most: float


@functools.cache  # resolving the annotations costs more than building a row
def _list_rules(source: type) -> dict[str, _Rule]:
    """Return what holds for each field of a dataclass."""
    hints = field_types(source)
    rules = {}
    for field in dataclasses.fields(source):
        plain, optional = split_optional(hints.get(field.name))
        is_time = field.metadata.get("unit") in ("s", "1/s")
        is_share = "accuracy" in field.name or field.name == "underflow_share"
        most = MOST_SECONDS if is_time else LARGEST_SHARE if is_share else math.inf
        has_default = field.default is not dataclasses.MISSING or field.name in SPREAD
        rules[field.name] = _Rule(optional, has_default, plain is TrialStatus, is_time, most)
    return rules


def _check_own(values: Any) -> dict[str, Any]:
    """Return a mapping from names to numbers or texts, as a file holds it."""
    if not isinstance(values, Mapping):
        raise InputError(f"own values: must be a mapping, got {shown(values)}")
    for name, value in values.items():
        if isinstance(value, str):
            distrust(value)
        elif not isinstance(value, float):  # a measured value may be NaN
            checked_type(name, value, OwnValue)
    return dict(values)
