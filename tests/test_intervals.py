"""Intervals cover what they should, ties and equivalence are declared when they should be: against simulated truth."""

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from tune_amp.intervals import (
    judge_equivalence,
    least_significant_difference,
    mean_interval,
    paired_interval,
    smallest_effect,
    wilson_interval,
)

SEEDS = 3
SIMULATIONS = 2_000


def test_interval_of_a_mean_is_students() -> None:
    values = [0.97, 0.975, 0.968, 0.972]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.mean, found.std, found.n) == pytest.approx((np.mean(values), np.std(values, ddof=1), 4))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    runs = generator.normal(0.97, 0.002, (SIMULATIONS, SEEDS))
    covered = np.mean([(found := mean_interval(row)).low <= 0.97 <= found.high for row in runs.tolist()])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (9_686, 10_000), (37, 37), (1, 3)])
def test_interval_of_a_share_is_wilsons(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_of_a_share_covers_the_truth_where_accuracies_are() -> None:
    """The textbook's interval covers 0.995 of 256 images in 72 %: its width is 0 where all are classified correctly."""
    hits = np.random.default_rng(2).binomial(256, 0.995, SIMULATIONS)
    intervals = [wilson_interval(share, 256) for share in (hits / 256).tolist()]
    assert 0.93 <= np.mean([low <= 0.995 <= high for low, high in intervals]) <= 0.99


def test_what_a_seed_does_to_both_leaves_their_difference() -> None:
    generator = np.random.default_rng(1)
    seeds = generator.normal(0, 0.01, 5)
    noise = generator.normal(0, 0.0001, (2, 5))
    paired = paired_interval((0.972 + seeds + noise[0]).tolist(), (0.970 + seeds + noise[1]).tolist())
    assert paired.low < 0.002 < paired.high
    assert paired.high - paired.low < 0.001


@pytest.mark.parametrize(("gap", "margin", "equivalent", "differs"), [
    (0.0, 0.002, True, False),
    (0.001, 0.002, True, True),  # a difference that is real and too small to matter
    (0.01, 0.002, False, True),
])  # fmt: skip
def test_equivalent_means_shown_to_be_within_the_margin(
    gap: float, margin: float, equivalent: bool, differs: bool
) -> None:
    noise = np.array([-2, -1, 0, 1, 2]) * 1e-4
    found = judge_equivalence((0.97 + gap + noise).tolist(), [0.97] * 5, margin)
    assert (found.equivalent, found.differs) == (equivalent, differs)
    assert found.difference.mean == pytest.approx(gap)


def test_few_noisy_runs_show_neither_difference_nor_equivalence() -> None:
    found = judge_equivalence([0.97, 0.975, 0.965], [0.968, 0.966, 0.971], 0.002)
    assert not found.equivalent
    assert not found.differs
    assert found.smallest_effect > 0.01


def test_equivalence_is_rarely_declared_of_what_differs_by_the_margin() -> None:
    generator = np.random.default_rng(2)
    differences = generator.normal(0.002, 0.001, (SIMULATIONS, 5))
    declared = np.mean([judge_equivalence(row, [0.0] * 5, 0.002).equivalent for row in differences.tolist()])
    assert declared <= 0.07


def test_smallest_effect_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(3)
    effect = smallest_effect(0.001, 5)
    differences = generator.normal(effect, 0.001, (SIMULATIONS, 5))
    found = np.mean([not (i := mean_interval(row)).low <= 0 <= i.high for row in differences.tolist()])
    assert found == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("configurations", [2, 4, 8])
def test_no_two_of_several_alike_are_told_apart_more_often_than_promised(configurations: int) -> None:
    """Of the best and the worst of several that are alike: a t test of those two would be wrong far more often."""
    generator = np.random.default_rng(4)
    told = naive = 0
    for _ in range(400):
        seeds = generator.normal(0, 0.003, SEEDS)
        scores = 0.97 + seeds + generator.normal(0, 0.001, (configurations, SEEDS))
        means = scores.mean(axis=1)
        told += np.ptp(means) > least_significant_difference(scores.tolist())
        best, worst = scores[means.argmax()], scores[means.argmin()]
        naive += paired_interval(best.tolist(), worst.tolist()).low > 0
    assert told / 400 <= 0.08
    if configurations == 8:
        assert naive / 400 > 0.15


def test_what_is_clearly_worse_is_told_apart() -> None:
    scores = [[0.972, 0.974, 0.973], [0.971, 0.974, 0.973], [0.950, 0.951, 0.951]]
    least = least_significant_difference(scores)
    assert np.mean(scores[0]) - np.mean(scores[1]) < least < np.mean(scores[0]) - np.mean(scores[2])


def test_equal_runs_have_no_spread() -> None:
    assert least_significant_difference([[0.9, 0.91, 0.92]] * 3) == pytest.approx(0, abs=1e-12)
