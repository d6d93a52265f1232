"""Scalars as YAML 1.2's core schema reads them (section 10.3.2 of its specification), not as YAML 1.1 does."""

import math
from typing import Any

import pytest

from tune_amp.space.strict_yaml import read_yaml

INTEGERS = {"0": 0, "-0": 0, "3": 3, "-19": -19, "+12": 12, "010": 10, "0o17": 15, "0x3A": 58, "0xff": 255}
FLOATS = {"1e-4": 1e-4, "1E3": 1000.0, "12e03": 12000.0, "-2E+05": -2e5, "+1.5e-1": 0.15, "0.": 0.0, "-0.0": -0.0}
FLOATS |= {".5": 0.5, "-.5e1": -5.0, "1.e5": 1e5, "00.5": 0.5}
FLOATS |= {".inf": math.inf, "-.Inf": -math.inf, "+.INF": math.inf}

CONSTANTS = {
    **dict.fromkeys(["null", "Null", "NULL", "~", ""], None),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
}
TEXTS = [
    *("yes", "Yes", "no", "NO", "on", "off", "y", "n"),
    *("nULL", "tRUE", "nan", "inf", ".iNF", "-.nan", "<<", "="),
    *("1_000", "1:30", "0b11", "0o8", "-0o7", "0xG", "-0x1", "1e", "e5", ".e5", ".", "+", "1.2.3", "2^8", "1,5"),
    *("2025-01-01", "2025-01-01 10:00:00"),
    *("'1e-4'", "'true'", "''"),
]


@pytest.mark.parametrize(("scalar", "value"), [*INTEGERS.items(), *FLOATS.items(), *CONSTANTS.items()])
def test_scalar_is_what_the_core_schema_makes_of_it(scalar: str, value: Any) -> None:
    read = read_yaml(f"- {scalar}\n")[0]
    assert (type(read), repr(read)) == (type(value), repr(value))


@pytest.mark.parametrize("scalar", [".nan", ".NaN", ".NAN"])
def test_not_a_number_is_read(scalar: str) -> None:
    assert math.isnan(read_yaml(f"- {scalar}\n")[0])


@pytest.mark.parametrize("scalar", TEXTS)
def test_any_other_scalar_is_a_text(scalar: str) -> None:
    assert read_yaml(f"- {scalar}\n") == [scalar.strip("'")]


def test_keys_that_yaml_1_1_takes_for_something_else_are_texts() -> None:
    assert read_yaml("on: 1\nno: 2\n1e: 3\n") == {"on": 1, "no": 2, "1e": 3}
