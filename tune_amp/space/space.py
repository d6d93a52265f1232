"""Search spaces: a YAML file defines what is searched, and the settings of each trial are suggested from it.

.. code-block:: yaml

    parameters:                        # what is searched: fields of TrialConfig
      lr: {low: 1.0e-4, high: 3.0e-2, log: true}
      batch_size: {low: 64, high: 1024, power_of_two: true}
      precision: {choices: [fp32, bf16, fp16]}
      init_scale: {low: 1, high: 2^24, power_of_two: true, when: {precision: fp16}}
      growth_interval: {low: 0.005, high: 0.5, log: true, fraction_of_trial: true, when: {precision: fp16}}
    fixed:                             # what every trial shares
      backoff_factor: 0.25             # a scaler field: reaches fp16 trials only
    own:                               # the user's own parameters, in the same syntax
      hidden: {choices: [64, 128, 256]}
      dropout: {low: 0.0, high: 0.5, default: 0.1}

``when`` makes a parameter active only in trials whose named fields all have (one of) the given values; other trials
omit it, and TrialConfig's default applies. A number may be written as the string ``2^N``.
Powers of two are suggested by their exponent, under the name ``log2(init_scale)``.

``fraction_of_trial`` is for ``growth_interval`` alone. Its numbers are fractions of the trial's training steps, which
are (training images // ``batch_size``) * ``max_epochs``; the interval is rounded to whole steps, at least one. A fixed
interval of 2,000 steps is a quarter of a trial at batch size 64, but longer than a trial at 1,024, where it never acts.
A fraction above 1 never acts in any trial: the loss scale is static and changes only at overflows.
Fractions are suggested under the name ``growth_interval/trial_steps``, so that no study mixes them with steps.

Own parameters reach a model function as keyword arguments, and a train function as ``trial.own``. They are whole
numbers if both bounds are, else numbers; choices are all numbers or all texts. ``default`` is the value in the
configuration that a search has to beat: the first choice, or the middle of the range, unless it is given.
"""

import dataclasses
import difflib
import functools
import graphlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna

from tune_amp.space.parameter import Parameter, exponent_of
from tune_amp.space.strict_yaml import read_yaml
from tune_amp.trial.config import (
    FIELD_TYPES,
    OWN,
    SCALER_DEFAULTS,
    InputError,
    TrialConfig,
    check,
    checked_field,
    checked_type,
    nest_own,
    read_setting,
    shown,
    value_type,
)

MAX_BYTES = 2**16  # a space has a few hundred bytes; PyYAML needs seconds for a megabyte

FLAGS = {
    "model": "--model",
    "dataset": "--dataset",
    "imbalance": "--imbalance",
    "max_epochs": "--max-epochs",
    "seed": "--seed",
    "task": "--task",
    "train": "--train",
}
SEARCHABLE = tuple(name for name in FIELD_TYPES if name not in FLAGS)
RELATIVE = "growth_interval"  # the only field counted in training steps

_POWER_OF_TWO = re.compile(r"2\^(-?[0-9]{1,3})")
_TOO_LARGE = "is larger than 64 KiB, too large for a search space"
_SHAPE = "must be a mapping with low and high, or with choices"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a search varies and what its trials share; :func:`load_space` builds and checks it."""

    source: str
    """File or bundled name, as shown in messages."""
    text: str
    """The YAML, verbatim."""
    parameters: tuple[Parameter, ...]
    """Searched fields: parents before children, and the batch size before fractions of the trial."""
    fixed: Mapping[str, Any]
    """Settings of every trial; scaler fields among them apply to fp16 trials only."""

    @property
    def own_defaults(self) -> dict[str, Any]:
        """The user's own parameters that are active in the default configuration, by name without ``own.``."""
        precision = "fp16" if "fp16" in self.precisions else self.precisions[0]
        settings = {**vars(TrialConfig(precision=precision)), **self.fixed}
        own = {}
        for parameter in self.parameters:  # parents before children
            if parameter.own_type and parameter.is_active(settings):
                settings[parameter.name] = own[parameter.name.removeprefix(OWN)] = parameter.own_default
        return own

    @property
    def is_conditional(self) -> bool:
        """Whether some trials omit a parameter."""
        return any(parameter.when for parameter in self.parameters)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that trials can have: those searched, the fixed one, or TrialConfig's default."""
        return self._list_choices("precision")

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Optimizers that trials can have: those searched, the fixed one, or TrialConfig's default."""
        return self._list_choices("optimizer")

    def _list_choices(self, name: str) -> tuple[str, ...]:
        default = self.fixed.get(name, getattr(TrialConfig, name))
        for parameter in self.parameters:
            if parameter.name == name:
                return tuple(dict.fromkeys((*parameter.choices, *([default] if parameter.when else []))))
        return (default,)

    def suggest(self, trial: optuna.trial.BaseTrial, *, train_images: int, max_epochs: int) -> dict[str, Any]:
        """Return the arguments of TrialConfig for the fixed and the active searched settings.

        The other fields keep TrialConfig's defaults.
        """
        settings = dict(self.fixed)
        for parameter in self.parameters:
            if parameter.is_active(settings):
                steps = _count_steps(settings, train_images, max_epochs)
                settings[parameter.name] = parameter.suggest(trial, trial_steps=steps)
        if settings.get("precision") != "fp16":
            settings = {name: value for name, value in settings.items() if name not in SCALER_DEFAULTS}
        return nest_own(settings)

    def find_defaults(self, *, train_images: int, max_epochs: int) -> dict[str, Any]:
        """Return the usual default settings, or the nearest that the space has, as a study suggests them.

        They are TrialConfig's own defaults in fp16: those of PyTorch's GradScaler and of its AMP tutorials. A setting
        without a nearest value, which is a string that is not a choice, is omitted.
        """
        places = self.locate(
            TrialConfig(precision="fp16", own=self.own_defaults), train_images=train_images, max_epochs=max_epochs
        )
        return {name: value for _, nearest, _ in places for name, value in nearest.items()}

    def locate(
        self, config: TrialConfig, *, train_images: int, max_epochs: int
    ) -> Iterator[tuple[Parameter, dict[str, Any], Any]]:
        """Yield each parameter that is active near ``config``, with the study's suggestion and the setting it gives.

        If ``config`` has a string that is not a choice, no value is near: the suggestion is empty, the setting None.
        """
        settings = dict(self.fixed)
        for parameter in self.parameters:
            if parameter.is_active(settings):
                steps = _count_steps(settings, train_images, max_epochs)
                nearest = parameter.find_nearest(read_setting(config, parameter.name), trial_steps=steps)
                if nearest:
                    settings[parameter.name] = parameter.suggest(optuna.trial.FixedTrial(nearest), trial_steps=steps)
                yield parameter, nearest, settings.get(parameter.name)

    def sample(self, count: int, *, seed: int, train_images: int, max_epochs: int) -> Iterator[dict[str, Any]]:
        """Yield random suggestions, drawn independently of each other."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs the creation of the study at INFO
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        for _ in range(count):
            yield self.suggest(study.ask(), train_images=train_images, max_epochs=max_epochs)

    def bounds(self, name: str) -> tuple[float | int, float | int] | None:
        """Return the smallest and largest number that the space itself gives to field ``name``.

        None if the field is neither searched nor fixed, is not a number, or depends on the length of the trial.
        """
        values: Iterable[Any] = (self.fixed.get(name),)
        for parameter in self.parameters:
            if parameter.name == name and not parameter.fraction_of_trial:
                values = parameter.choices or (parameter.low, parameter.high)
        numbers = [value for value in values if isinstance(value, int | float)]
        return (min(numbers), max(numbers)) if numbers else None


def _count_steps(settings: Mapping[str, Any], train_images: int, max_epochs: int) -> int:
    """Return the training steps of a trial; the batch size precedes the parameters that depend on the steps."""
    batch_size: int = settings.get("batch_size", TrialConfig.batch_size)
    return train_images // batch_size * max_epochs


def load_space(source: str | Path) -> SearchSpace:
    """Read and check a search space: a file, or the name of a bundled one (``mnist_amp``) if no such file exists.

    Raises:
        InputError: one line with the source, the line or key path, the rule and the value.
    """
    source = str(source)
    name = source if source.isprintable() and source else shown(source)
    try:
        text = _read_text(source)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return parse_space(name, text)


def parse_space(source: str, text: str) -> SearchSpace:
    """Check the text of a search space that was read from ``source`` before: a run's files hold the text.

    Raises:
        InputError: one line with the source, the line or key path, the rule and the value.
    """
    if len(text) > MAX_BYTES:
        raise InputError(f"{source}: {_TOO_LARGE}")
    try:
        return _build_space(source, text, read_yaml(text))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _read_text(source: str) -> str:
    try:
        with _find_file(source).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise InputError(_TOO_LARGE)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"must be UTF-8, got byte 0x{data[error.start]:02x} at position {error.start}") from None


def _find_file(source: str) -> Path:
    path = Path(source)
    if path.exists() and not path.is_dir():
        return path
    bundled = list_bundled()
    if source in bundled:
        return bundled[source]
    if source and path.is_dir():
        raise InputError("is a directory, not a file")
    near = difflib.get_close_matches(source, bundled, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"is neither a file nor a bundled search space ({', '.join(bundled)}){hint}")


def list_bundled() -> dict[str, Path]:
    """Return the file of each bundled search space, by name."""
    here = Path(__file__).parents[1]
    folder = here / "search_spaces"  # an installed wheel
    if not folder.is_dir():
        folder = here.parent / "search_spaces"  # a checkout
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _build_space(source: str, text: str, document: Any) -> SearchSpace:
    if not isinstance(document, dict):
        raise InputError(f"must be a mapping with the keys parameters and fixed, got {shown(document)}")
    _check_keys("", document, ("parameters", "fixed", "own"))
    fixed = _read_fixed(document.get("fixed"))
    searched = document.get("parameters") or {}
    check("parameters", searched, isinstance(searched, dict), "must be a mapping of fields")
    _check_fields("parameters", searched)
    own = document.get("own") or {}
    check("own", own, isinstance(own, dict), "must be a mapping of names")
    if not searched and not own:
        raise InputError("parameters: must name at least one field to search")
    parameters = {name: _read_parameter(name, entry) for name, entry in searched.items()}
    for name in parameters:
        if name in fixed:
            raise InputError(f"fixed.{name}: must not be searched as well (parameters.{name})")
    parameters |= {f"{OWN}{name}": _read_own(name, entry) for name, entry in own.items()}
    conditions = {
        name: _read_when(f"{_place(name)}.when", entry["when"], parameters, fixed) if "when" in entry else {}
        for name, entry in (searched | {f"{OWN}{name}": entry for name, entry in own.items()}).items()
    }
    needs = _collect_needs(conditions, _list_predecessors(parameters, conditions))
    _check_scaler_fields(parameters, fixed, needs)
    ordered = tuple(dataclasses.replace(parameters[name], when=conditions[name]) for name in needs)
    return SearchSpace(source=source, text=text, parameters=ordered, fixed=fixed)


def _read_fixed(entries: Any) -> dict[str, Any]:
    if entries is None:
        return {}
    check("fixed", entries, isinstance(entries, dict), "must be a mapping of fields to values")
    _check_fields("fixed", entries)
    return {name: _read_value(f"fixed.{name}", name, value) for name, value in entries.items()}


def _read_parameter(name: str, entry: Any) -> Parameter:
    """Return the parameter without its conditions, which are read later."""
    path = f"parameters.{name}"
    check(path, entry, isinstance(entry, dict), _SHAPE)
    _check_keys(path, entry, ("low", "high", "log", "power_of_two", "fraction_of_trial", "choices", "when"))
    if name != RELATIVE and "fraction_of_trial" in entry:
        raise InputError(f"{path}.fraction_of_trial: is for {RELATIVE} only, got {shown(entry['fraction_of_trial'])}")
    relative = _read_flag(path, entry, "fraction_of_trial")
    if "choices" in entry:
        for key in ("low", "high", "log", "power_of_two"):
            check(f"{path}.{key}", entry.get(key), key not in entry, "must be left out beside choices")
        choices = _read_choices(f"{path}.choices", name, entry["choices"], relative=relative)
        return Parameter(name=name, choices=choices, fraction_of_trial=relative)
    check(path, entry, "low" in entry and "high" in entry, _SHAPE)
    return _read_range(path, name, entry, relative=relative)


def _place(name: str) -> str:
    """Return the place of a parameter in the document."""
    return name if name.startswith(OWN) else f"parameters.{name}"


def _read_own(name: str, entry: Any) -> Parameter:
    """Return a parameter of the user's own, whose type follows from its values; conditions are read later."""
    path = _join("own", name)
    check(path, name, str(name).isidentifier(), "must be a name of letters, digits and _")
    check(path, entry, isinstance(entry, dict), _SHAPE)
    _check_keys(path, entry, ("low", "high", "log", "power_of_two", "choices", "default", "when"))
    bounds = [entry[key] for key in ("low", "high") if key in entry]
    raw = entry.get("choices", bounds)
    check(f"{path}.choices", raw, isinstance(raw, list), "must be a list of at least one value")
    kinds = {type(_read_power_of_two(value, float)) for value in raw}
    expected = float if kinds == {int, float} else next(iter(kinds)) if len(kinds) == 1 else None
    rule = "must all be numbers, or all be texts"
    check(path, raw, expected in (float, int) or (expected is str and "choices" in entry), rule)
    read = functools.partial(_read_own_value, expected=expected)
    if "choices" in entry:
        for key in ("low", "high", "log", "power_of_two"):
            check(f"{path}.{key}", entry.get(key), key not in entry, "must be left out beside choices")
        choices = _read_choices(f"{path}.choices", name, raw, relative=False, read=read)
        parameter = Parameter(name=f"{OWN}{name}", own_type=expected, own_default=choices[0], choices=choices)
    else:
        check(path, entry, len(bounds) == 2, _SHAPE)
        parameter = _read_range(path, f"{OWN}{name}", entry, relative=False, own_type=expected)
    if "default" not in entry:
        return parameter
    default = read(f"{path}.default", name, entry["default"])
    within = default in parameter.choices if parameter.choices else parameter.low <= default <= parameter.high
    check(f"{path}.default", default, within, "must be a value that the parameter can have")
    return dataclasses.replace(parameter, own_default=default)


def _read_own_value(path: str, name: str, raw: Any, *, expected: Any) -> Any:
    return checked_type(path, _read_power_of_two(raw, expected), expected)


def _read_flag(path: str, entry: Mapping[str, Any], key: str) -> bool:
    flag = entry.get(key, False)
    check(f"{path}.{key}", flag, isinstance(flag, bool), "must be true or false")
    return bool(flag)


def _read_choices(
    path: str, name: str, raw: Any, *, relative: bool, read: Callable[..., Any] | None = None
) -> tuple[Any, ...]:
    check(path, raw, isinstance(raw, list) and bool(raw), "must be a list of at least one value")
    choices: dict[Any, None] = {}
    for index, value in enumerate(raw):
        place = f"{path}[{index}]"
        choice = _read_fraction(place, value) if relative else (read or _read_value)(place, name, value)
        if choice in choices:
            raise InputError(f"{place}: must not repeat a choice, got {shown(choice)} again")
        choices[choice] = None
    return tuple(choices)


def _read_range(
    path: str, name: str, entry: Mapping[str, Any], *, relative: bool, own_type: type | None = None
) -> Parameter:
    number = own_type or value_type(name)
    if number is str:
        raise InputError(f"{path}: must have choices instead of low and high, because {name} is a text")
    read = _read_own_value if own_type else _read_value
    low, high = (
        _read_fraction(f"{path}.{key}", entry[key])
        if relative
        else read(f"{path}.{key}", name, entry[key], expected=number)
        for key in ("low", "high")
    )
    if not low < high:
        raise InputError(f"{path}: low < high must hold, got low={low}, high={high}")
    log, power_of_two = (_read_flag(path, entry, key) for key in ("log", "power_of_two"))
    if relative and power_of_two:
        raise InputError(f"{path}: power_of_two and fraction_of_trial must not both be true")
    if log and power_of_two:
        raise InputError(f"{path}: log and power_of_two must not both be true (powers of two are a log scale)")
    check(f"{path}.low", low, not log or low > 0, "must be greater than 0 where log is true")
    for key, bound in (("low", low), ("high", high)):
        check(f"{path}.{key}", bound, not power_of_two or _is_power_of_two(bound), "must be a power of two")
    parameter = Parameter(name=name, low=low, high=high, log=log, power_of_two=power_of_two, fraction_of_trial=relative)
    if own_type is None:
        return parameter
    middle = math.sqrt(low * high) if log or power_of_two else (low + high) / 2
    [default] = parameter.find_nearest(own_type(middle), trial_steps=1).values()
    value = 2**default if power_of_two else default
    return dataclasses.replace(parameter, own_type=own_type, own_default=own_type(value))


def _read_when(
    path: str, raw: Any, parameters: Mapping[str, Parameter], fixed: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """Return the conditions on searched fields; those on fixed fields are resolved here."""
    check(path, raw, isinstance(raw, dict) and bool(raw), "must be a mapping of fields to the values they must have")
    conditions: dict[str, tuple[Any, ...]] = {}
    for parent, given in raw.items():
        place = _join(path, parent)
        if parent not in parameters and parent not in fixed:
            known = ", ".join((*parameters, *fixed))
            raise InputError(f"{place}: must be a field that is searched or fixed here ({known})")
        check(place, given, given != [], "must be a value or a list of at least one value")
        own_type = parameters[parent].own_type if parent in parameters else None
        read = functools.partial(_read_own_value, expected=own_type) if own_type else _read_value
        values = tuple(read(place, parent, value) for value in (given if isinstance(given, list) else [given]))
        if parent in parameters:
            _check_parent(place, parameters[parent], values)
            _narrow(conditions, parent, values, path)
            continue
        for value in values:
            check(place, value, value == fixed[parent], f"must be {shown(fixed[parent])}, its fixed value")
        if parent in SCALER_DEFAULTS and "precision" in parameters:  # fixed, but for fp16 trials only
            _narrow(conditions, "precision", ("fp16",), path)
    return conditions


def _check_parent(path: str, parent: Parameter, values: tuple[Any, ...]) -> None:
    possible = parent.listed()
    if not possible:
        kind = "a fraction of the trial" if parent.fraction_of_trial else "a plain range"
        raise InputError(f"{path}: must have choices or power_of_two to be a condition, but is {kind}")
    for value in values:
        check(path, value, value in possible, f"must be one of {shown(possible)}, as {parent.name} is")


def _list_predecessors(
    parameters: Mapping[str, Parameter], conditions: Mapping[str, Mapping[str, tuple[Any, ...]]]
) -> dict[str, list[str]]:
    """Return for each parameter those that must be suggested before it."""
    predecessors = {name: list(when) for name, when in conditions.items()}
    for name, parameter in parameters.items():
        if parameter.fraction_of_trial and "batch_size" in parameters:  # closes no cycle: a fraction has no children
            predecessors[name].append("batch_size")
    return predecessors


def _collect_needs(
    conditions: Mapping[str, Mapping[str, tuple[Any, ...]]], predecessors: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Return for each parameter, parents first, the values that each ancestor must have for it to be active.

    Conditions are only combined by "and", so one set of values per ancestor describes them fully: the check is exact.
    """
    try:
        order = list(graphlib.TopologicalSorter(predecessors).static_order())
    except graphlib.CycleError as error:
        circle = error.args[1]
        path = f"{_place(circle[-1])}.when"
        raise InputError(f"{path}: conditions must not form a circle, got {' -> '.join(circle)}") from None
    needs: dict[str, dict[str, tuple[Any, ...]]] = {}
    for name in order:
        needs[name] = {}
        for parent, values in conditions[name].items():
            for ancestor, allowed in ((parent, values), *needs[parent].items()):
                _narrow(needs[name], ancestor, allowed, f"{_place(name)}.when")
    return needs


def _narrow(needs: dict[str, tuple[Any, ...]], name: str, allowed: tuple[Any, ...], path: str) -> None:
    """Add "``name`` has one of the values ``allowed``" to what a parameter needs."""
    before = needs.get(name, allowed)
    needs[name] = tuple(value for value in before if value in allowed)
    if not needs[name]:
        raise InputError(
            f"{path}: can never hold: {name} would have to be {_either(before)} and {_either(allowed)} at once"
        )


def _check_scaler_fields(
    parameters: Mapping[str, Parameter],
    fixed: Mapping[str, Any],
    needs: Mapping[str, Mapping[str, tuple[Any, ...]]],
) -> None:
    """Refuse scaler fields that could be suggested outside fp16, where TrialConfig refuses them, or have no effect."""
    precisions: tuple[Any, ...] = (fixed.get("precision", TrialConfig.precision),)
    if "precision" in parameters:
        precisions = parameters["precision"].choices
        if needs["precision"] and TrialConfig.precision not in precisions:
            precisions += (TrialConfig.precision,)  # the precision of a trial in which it is inactive
    for name in SCALER_DEFAULTS:
        path = f"parameters.{name}" if name in parameters else f"fixed.{name}"
        if name not in parameters and name not in fixed:
            continue
        if "fp16" not in precisions:
            raise InputError(f"{path}: has no effect unless precision is fp16, and here it is {_either(precisions)}")
        possible = needs[name].get("precision", precisions) if name in parameters else ("fp16",)
        if possible != ("fp16",):
            raise InputError(f"{path}: needs `when: {{precision: fp16}}`, because precision can be {_either(possible)}")


def _read_value(path: str, name: str, raw: Any, *, expected: Any = None) -> Any:
    """Return ``raw`` as a value of field ``name`` of TrialConfig, checked by its rule."""
    if expected is None:  # null is a setting of grad_clip, but not of a scaler field
        expected = value_type(name) if name in SCALER_DEFAULTS else FIELD_TYPES[name]
    value = checked_type(path, _read_power_of_two(raw, value_type(name)), expected)
    return checked_field(path, value, TrialConfig, name)


def _read_fraction(path: str, raw: Any) -> float:
    """Return ``raw`` as a fraction of a trial's steps; above 1, the interval never ends within the trial."""
    fraction: float = checked_type(path, _read_power_of_two(raw, float), float)
    check(path, fraction, fraction > 0, "must be greater than 0")
    return fraction


def _read_power_of_two(raw: Any, number: type) -> Any:
    """Return the number that a string like ``2^24`` stands for; anything else unchanged."""
    match = _POWER_OF_TWO.fullmatch(raw) if isinstance(raw, str) and number is not str else None
    if not match:
        return raw
    exponent = int(match[1])
    return 2**exponent if exponent >= 0 else 2.0**exponent


def _is_power_of_two(value: float) -> bool:
    # Compared as a number, because frexp rounds an int above 2^53.
    return value > 0 and value == math.ldexp(1.0, exponent_of(value))


def _check_fields(path: str, names: Iterable[str]) -> None:
    for name in names:
        place = _join(path, name)
        if name in FLAGS:
            raise InputError(f"{place}: is not part of a search space: set it with {FLAGS[name]}")
        if name not in SEARCHABLE:
            near = difflib.get_close_matches(name, SEARCHABLE, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{place}: unknown field{hint} (known: {', '.join(SEARCHABLE)})")


def _check_keys(path: str, mapping: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in mapping:
        if key not in known:
            raise InputError(f"{_join(path, key)}: unknown key (known: {', '.join(known)})")


def _join(path: str, key: str) -> str:
    part = key if key.isidentifier() and key.isprintable() else shown(key)
    return f"{path}.{part}" if path else part


def _either(values: Iterable[Any]) -> str:
    return " or ".join(str(value) for value in values)
