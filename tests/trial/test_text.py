"""Texts for people."""

import math

import pytest

from tune_amp.trial.text import format_number


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.5, "2.50"),
        (1.0, "1.00"),
        (99.94, "99.9"),
        (99.96, "100"),
        (999.6, "1,000"),
        (12345.6, "12,346"),
        (-1234.4, "-1,234"),
        (5.1847e21, "5.18e+21"),
        (0.0, "0.00"),
        (0.012345, "0.0123"),
        (1e-7, "1.00e-07"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_number_keeps_its_digits_and_a_large_one_has_no_exponent(value: float, expected: str) -> None:
    assert format_number(value, 3) == expected
