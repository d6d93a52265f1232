"""Reads the document of a search space: its entries become parameters and fixed settings, each checked."""

import dataclasses
import difflib
import graphlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import optuna

from tune_amp.space.parameter import Parameter, exponent_of, list_possible
from tune_amp.trial.config import (
    FIELD_TYPES,
    OWN,
    SCALER_DEFAULTS,
    InputError,
    TrialConfig,
    check,
    checked_field,
    checked_type,
)
from tune_amp.trial.text import shown

SHARED = ("model", "dataset", "imbalance", "max_epochs", "seed", "task", "train")
"""Fields that all trials of a search share: flags set them."""
SEARCHABLE = tuple(name for name in FIELD_TYPES if name not in SHARED)
RELATIVE = "growth_interval"  # the only field counted in training steps
STEP_SIZE = ("batch_size", "accumulate")
"""Fields that the number of a trial's steps depends on."""

_POWER_OF_TWO = re.compile(r"2\^(-?[0-9]{1,3})")
_RANGE_KEYS = ("low", "high", "log", "power_of_two")
_FIELD_KEYS = (*_RANGE_KEYS, "fraction_of_trial", "choices", "when")
_OWN_KEYS = (*_RANGE_KEYS, "choices", "default", "when")
_SHAPE = "must be a mapping with low and high, or with choices"

Needs = dict[str, tuple[Any, ...]]
"""Searched field -> values, of which it must have one."""


def read_document(document: Any) -> tuple[tuple[Parameter, ...], dict[str, Any]]:
    """Return the parameters, parents before children, and the fixed settings.

    Raises:
        InputError: one line with the key path, the rule and the value.
    """
    if not isinstance(document, dict):
        raise InputError(f"must be a mapping with the keys parameters and fixed, got {shown(document)}")
    _check_keys("", document, ("parameters", "fixed", "own"))
    fixed = _read_section(document, "fixed", "fields to values")
    fixed = {name: _read_value(f"fixed.{name}", value, Parameter(name=name)) for name, value in fixed.items()}
    own = {f"{OWN}{name}": entry for name, entry in _read_section(document, "own", "names").items()}
    entries = _read_section(document, "parameters", "fields") | own
    if not entries:
        raise InputError("parameters: must name at least one field to search")
    parameters = {name: _read_parameter(name, entry) for name, entry in entries.items()}
    for name in fixed:
        if name in parameters:
            raise InputError(f"fixed.{name}: must not be searched as well (parameters.{name})")
    conditions = {
        name: _read_when(f"{_place(name)}.when", entry["when"], parameters, fixed) if "when" in entry else {}
        for name, entry in entries.items()
    }
    needs = _collect_needs(parameters, conditions)
    ordered = tuple(dataclasses.replace(parameters[name], when=conditions[name]) for name in needs)
    _check_scaler_fields(needs, fixed, list_possible("precision", ordered, fixed))
    return ordered, fixed


def suggest_name(name: str, known: Collection[str]) -> str:
    """Return the hint at the known name nearest to ``name``, for the end of a message; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read_section(document: Mapping[str, Any], section: str, content: str) -> dict[str, Any]:
    entries = {} if document.get(section) is None else document[section]
    check(section, entries, isinstance(entries, dict), f"must be a mapping of {content}")
    for name in entries if section != "own" else ():
        place = _join(section, name)
        if name in SHARED:
            flag = name.replace("_", "-")
            raise InputError(f"{place}: is not part of a search space: set it with --{flag}")
        if name not in SEARCHABLE:
            raise InputError(f"{place}: unknown field{suggest_name(name, SEARCHABLE)} (known: {', '.join(SEARCHABLE)})")
    return dict(entries)


def _read_parameter(name: str, entry: Any) -> Parameter:
    """Return the parameter without its conditions, which are read later."""
    path, short = _place(name), name.removeprefix(OWN)
    is_own = short != name
    check(path, short, short.isidentifier(), "must be a name of letters, digits and _")
    check(path, entry, isinstance(entry, dict), _SHAPE)
    _check_keys(path, entry, _OWN_KEYS if is_own else _FIELD_KEYS)
    if name != RELATIVE and "fraction_of_trial" in entry:
        raise InputError(f"{path}.fraction_of_trial: is for {RELATIVE} only, got {shown(entry['fraction_of_trial'])}")
    is_relative = _read_flag(path, entry, "fraction_of_trial")
    if "choices" in entry:
        raw = entry["choices"]
        check(f"{path}.choices", raw, isinstance(raw, list) and bool(raw), "must be a list of at least one value")
        for key in _RANGE_KEYS:
            check(f"{path}.{key}", entry.get(key), key not in entry, "must be left out beside choices")
    else:
        check(path, entry, "low" in entry and "high" in entry, _SHAPE)
        raw = [entry["low"], entry["high"]]
    own_type = _find_type(path, raw) if is_own else None
    parameter = Parameter(name=name, own_type=own_type, fraction_of_trial=is_relative)
    if "choices" in entry:
        parameter = dataclasses.replace(parameter, choices=_read_choices(f"{path}.choices", parameter, raw))
    else:
        parameter = _read_range(path, parameter, entry)
    return _add_default(path, parameter, entry) if is_own else parameter


def _find_type(path: str, raw: list[Any]) -> type:
    """Return the type of an own parameter with these choices or bounds."""
    kinds = {type(_read_power_of_two(value, float)) for value in raw}
    if kinds == {int, float}:
        return float
    check(path, raw, len(kinds) == 1 and kinds <= {int, float, str}, "must all be numbers, or all be texts")
    return kinds.pop()


def _read_choices(path: str, parameter: Parameter, raw: list[Any]) -> tuple[Any, ...]:
    choices: dict[Any, None] = {}
    for index, value in enumerate(raw):
        place = f"{path}[{index}]"
        choice = _read_value(place, value, parameter)
        if choice in choices:
            raise InputError(f"{place}: must not repeat a choice, got {shown(choice)} again")
        choices[choice] = None
    return tuple(choices)


def _read_range(path: str, parameter: Parameter, entry: Mapping[str, Any]) -> Parameter:
    if parameter.value_type is str:
        raise InputError(f"{path}: must have choices instead of low and high, because {parameter.name} is a text")
    low, high = (_read_value(f"{path}.{key}", entry[key], parameter, is_bound=True) for key in ("low", "high"))
    if not low < high:
        raise InputError(f"{path}: low < high must hold, got low={low}, high={high}")
    log, power_of_two = (_read_flag(path, entry, key) for key in ("log", "power_of_two"))
    if parameter.fraction_of_trial and power_of_two:
        raise InputError(f"{path}: power_of_two and fraction_of_trial must not both be true")
    if log and power_of_two:
        raise InputError(f"{path}: log and power_of_two must not both be true (powers of two are a log scale)")
    check(f"{path}.low", low, not log or low > 0, "must be greater than 0 where log is true")
    for key, bound in (("low", low), ("high", high)):  # compared as a number: frexp rounds an int above 2^53
        is_power = bound > 0 and bound == math.ldexp(1.0, exponent_of(bound))
        check(f"{path}.{key}", bound, is_power or not power_of_two, "must be a power of two")
    return dataclasses.replace(parameter, low=low, high=high, log=log, power_of_two=power_of_two)


def _add_default(path: str, parameter: Parameter, entry: Mapping[str, Any]) -> Parameter:
    """Return an own parameter with its default: the one given, the first choice, or the middle of the range."""
    low, high = parameter.low, parameter.high
    if "default" in entry:
        default = _read_value(f"{path}.default", entry["default"], parameter)
        listed = parameter.listed()
        within = default in listed if low is None or high is None or listed else low <= default <= high
        check(f"{path}.default", default, within, "must be a value that the parameter can have")
    elif low is None or high is None:
        default = parameter.choices[0]
    else:
        middle = math.sqrt(low * high) if parameter.log or parameter.power_of_two else (low + high) / 2
        nearest = parameter.find_nearest(parameter.value_type(middle), trial_steps=1)
        default = parameter.suggest(optuna.trial.FixedTrial(nearest), trial_steps=1)
    return dataclasses.replace(parameter, own_default=default)


def _read_value(place: str, raw: Any, parameter: Parameter, *, is_bound: bool = False) -> Any:
    """Return ``raw`` as a value of the parameter, checked by the type and the rule of its field."""
    if parameter.fraction_of_trial:  # above 1, the interval never ends within the trial
        fraction = checked_type(place, _read_power_of_two(raw, float), float)
        check(place, fraction, fraction > 0, "must be greater than 0")
        return fraction
    name, number = parameter.name, parameter.value_type
    value = _read_power_of_two(raw, number)
    if parameter.own_type:
        return checked_type(place, value, number)
    if is_bound or name in SCALER_DEFAULTS:  # null is a setting of grad_clip, but not of a scaler field
        checked_type(place, value, number)
    return checked_field(place, value, TrialConfig, name)


def _read_power_of_two(raw: Any, number: type) -> Any:
    """Return the number that a string like ``2^24`` stands for; anything else unchanged."""
    match = _POWER_OF_TWO.fullmatch(raw) if isinstance(raw, str) and number is not str else None
    if not match:
        return raw
    exponent = int(match[1])
    return 2**exponent if exponent >= 0 else 2.0**exponent


def _read_flag(path: str, entry: Mapping[str, Any], key: str) -> bool:
    flag = entry.get(key, False)
    check(f"{path}.{key}", flag, isinstance(flag, bool), "must be true or false")
    return bool(flag)


def _read_when(path: str, raw: Any, parameters: Mapping[str, Parameter], fixed: Mapping[str, Any]) -> Needs:
    """Return the conditions on searched fields; those on fixed fields are resolved here."""
    check(path, raw, isinstance(raw, dict) and bool(raw), "must be a mapping of fields to the values they must have")
    conditions: Needs = {}
    for name, given in raw.items():
        place = _join(path, name)
        if name not in parameters and name not in fixed:
            known = ", ".join((*parameters, *fixed))
            raise InputError(f"{place}: must be a field that is searched or fixed here ({known})")
        check(place, given, given != [], "must be a value or a list of at least one value")
        parent = parameters.get(name, Parameter(name=name))
        values = tuple(_read_value(place, value, parent) for value in (given if isinstance(given, list) else [given]))
        if name in parameters:
            possible, rule = parent.listed(), f"must be one of {shown(parent.listed())}, as {name} is"
            if not possible:
                kind = "a fraction of the trial" if parent.fraction_of_trial else "a plain range"
                raise InputError(f"{place}: must have choices or power_of_two to be a condition, but is {kind}")
            _narrow(conditions, name, values, path)
        else:
            possible, rule = (fixed[name],), f"must be {shown(fixed[name])}, its fixed value"
            if name in SCALER_DEFAULTS and "precision" in parameters:  # fixed, but for fp16 trials only
                _narrow(conditions, "precision", ("fp16",), path)
        for value in values:
            check(place, value, value in possible, rule)
    return conditions


def _collect_needs(parameters: Mapping[str, Parameter], conditions: Mapping[str, Needs]) -> dict[str, Needs]:
    """Return for each parameter, parents first, the values that each ancestor must have for it to be active.

    Conditions are only combined by "and", so one set of values per ancestor describes them fully: the check is exact.
    """
    predecessors = {name: list(when) for name, when in conditions.items()}
    if RELATIVE in parameters and parameters[RELATIVE].fraction_of_trial:  # closes no cycle: a fraction has no children
        predecessors[RELATIVE] += [name for name in STEP_SIZE if name in parameters]
    try:
        order = list(graphlib.TopologicalSorter(predecessors).static_order())
    except graphlib.CycleError as error:
        circle = error.args[1]
        path = f"{_place(circle[-1])}.when"
        raise InputError(f"{path}: conditions must not form a circle, got {' -> '.join(circle)}") from None
    needs: dict[str, Needs] = {}
    for name in order:
        needs[name] = {}
        for parent, values in conditions[name].items():
            for ancestor, allowed in ((parent, values), *needs[parent].items()):
                _narrow(needs[name], ancestor, allowed, f"{_place(name)}.when")
    return needs


def _narrow(needs: Needs, name: str, allowed: tuple[Any, ...], path: str) -> None:
    """Add "``name`` has one of the values ``allowed``" to what a parameter needs."""
    before = needs.get(name, allowed)
    needs[name] = tuple(value for value in before if value in allowed)
    if not needs[name]:
        both = f"{_either(before)} and {_either(allowed)}"
        raise InputError(f"{path}: can never hold: {name} would have to be {both} at once")


def _check_scaler_fields(needs: Mapping[str, Needs], fixed: Mapping[str, Any], precisions: tuple[str, ...]) -> None:
    """Refuse scaler fields that could be suggested outside fp16, where TrialConfig refuses them, or have no effect."""
    for name in SCALER_DEFAULTS:
        if name not in needs and name not in fixed:
            continue
        path = f"parameters.{name}" if name in needs else f"fixed.{name}"
        if "fp16" not in precisions:
            raise InputError(f"{path}: has no effect unless precision is fp16, and here it is {_either(precisions)}")
        possible = needs.get(name, {}).get("precision", precisions)
        if name in needs and possible != ("fp16",):
            raise InputError(f"{path}: needs `when: {{precision: fp16}}`, because precision can be {_either(possible)}")


def _check_keys(path: str, mapping: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in mapping:
        if key not in known:
            raise InputError(f"{_join(path, key)}: unknown key (known: {', '.join(known)})")


def _place(name: str) -> str:
    """Return the place of a parameter in the document."""
    return _join("own", name.removeprefix(OWN)) if name.startswith(OWN) else f"parameters.{name}"


def _join(path: str, key: str) -> str:
    part = key if key.isidentifier() and key.isprintable() else shown(key)
    return f"{path}.{part}" if path else part


def _either(values: Iterable[Any]) -> str:
    return " or ".join(str(value) for value in values)
