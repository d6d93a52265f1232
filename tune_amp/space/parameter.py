"""A searched setting of a search space: its possible values, and how Optuna suggests one of them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import optuna

from tune_amp.trial.config import TrialConfig, value_type

LONGEST_INTERVAL = 2.0**62  # TrialConfig takes 64 bits, and a fraction may be any number above 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One searched setting: a range from ``low`` to ``high`` (both included) or ``choices``."""

    name: str
    """The TrialConfig field, or ``own.NAME`` for a user's own parameter."""
    own_type: type | None = None
    """Type of the values of a user's own parameter; None for a field, which has a type."""
    own_default: Any = None
    """Value of a user's own parameter in the default configuration; None for a field, which has a default."""
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    power_of_two: bool = False
    fraction_of_trial: bool = False
    """Whether the numbers are fractions of the trial's training steps."""
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Searched field -> values: the parameter is active if each of these fields is active and has one of its values.

    Conditions on fixed fields are resolved when the space is read.
    """

    @property
    def value_type(self) -> type:
        """Type of the values: float, int or str."""
        return self.own_type or value_type(self.name)

    @property
    def optuna_name(self) -> str:
        """The name in the study, which shows if the suggested number is an exponent or a fraction."""
        if self.fraction_of_trial:
            return f"{self.name}/trial_steps"
        return f"log2({self.name})" if self.power_of_two else self.name

    def is_active(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the conditions hold, given the settings of every active parent."""
        return all(parent in settings and settings[parent] in values for parent, values in self.when.items())

    def listed(self) -> tuple[Any, ...]:
        """Return every value that can be suggested: the choices or powers of two; empty for ranges and fractions."""
        if self.fraction_of_trial:
            return ()
        if not self.power_of_two:
            return self.choices
        lowest, highest = self._exponents()
        return tuple(self._power(exponent) for exponent in range(lowest, highest + 1))

    def suggest(self, trial: optuna.trial.BaseTrial, *, trial_steps: int) -> Any:
        """Return a value of the setting's type for a trial of ``trial_steps`` training steps."""
        if self.power_of_two:
            return self._power(trial.suggest_int(self.optuna_name, *self._exponents()))
        number = self._suggest_number(trial)
        if not self.fraction_of_trial:
            return number
        return max(1, round(min(number * trial_steps, LONGEST_INTERVAL)))

    def find_nearest(self, value: Any, *, trial_steps: int) -> dict[str, Any]:
        """Return the suggestion, under its name in the study, that gives the value nearest to ``value``.

        It is empty if no value is near: ``value`` is None, or a string that is not a choice.
        """
        if value in self.choices and not self.fraction_of_trial:
            return {self.optuna_name: value}
        if value is None or isinstance(value, str):
            return {}
        number = value / max(trial_steps, 1) if self.fraction_of_trial else value
        if self.choices:
            numbers = [choice for choice in self.choices if isinstance(choice, int | float)]
            return {self.optuna_name: min(numbers, key=lambda choice: abs(choice - number))} if numbers else {}
        assert self.low is not None
        assert self.high is not None
        within = min(max(number, self.low), self.high)
        return {self.optuna_name: round(math.log2(within)) if self.power_of_two else within}

    def _suggest_number(self, trial: optuna.trial.BaseTrial) -> Any:
        """Return a choice or a number, as the study stores it."""
        if self.choices:
            return trial.suggest_categorical(self.optuna_name, self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.value_type is int and not self.fraction_of_trial:
            return trial.suggest_int(self.optuna_name, int(self.low), int(self.high), log=self.log)
        return float(trial.suggest_float(self.optuna_name, self.low, self.high, log=self.log))

    def _exponents(self) -> tuple[int, int]:
        assert self.low is not None
        assert self.high is not None
        return exponent_of(self.low), exponent_of(self.high)

    def _power(self, exponent: int) -> float | int:
        value: float | int = self.value_type(math.ldexp(1.0, exponent))  # exact, however small
        return value


def list_possible(name: str, parameters: Iterable[Parameter], fixed: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``SearchSpace.list_possible``."""
    default = fixed.get(name, getattr(TrialConfig, name))
    for parameter in parameters:
        if parameter.name == name:
            return tuple(dict.fromkeys((*parameter.choices, *([default] if parameter.when else []))))
    return (default,)


def exponent_of(value: float) -> int:
    """Return the largest integer that 2 can be raised to without exceeding ``value``, which is greater than 0."""
    return math.frexp(value)[1] - 1
