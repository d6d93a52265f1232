"""Intervals cover what they should, ties and equivalence are declared when they should be: against simulated truth."""

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from tune_amp.results.statistics import (
    judge_equivalence,
    list_possible_best,
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


@pytest.mark.parametrize("spreads", [(1, 1, 1, 1), (0.1, 1, 5, 1), (0.1, 2, 2, 2)])
def test_the_truly_best_is_left_out_no_more_often_than_promised_whatever_the_spreads(
    spreads: tuple[float, ...],
) -> None:
    """All are alike, so that any may stand for the truly best: an uncorrected t test would lose it far more often."""
    generator = np.random.default_rng(4)
    lost = naive = 0
    for _ in range(1_000):
        seeds = generator.normal(0, 0.003, SEEDS)
        noise = generator.normal(0, 0.001, (4, SEEDS)) * np.array(spreads)[:, None]
        scores = {str(name): dict(enumerate((0.97 + seeds + own).tolist())) for name, own in enumerate(noise)}
        lost += "0" not in list_possible_best(scores)
        others = [list(scores[name].values()) for name in ("1", "2", "3")]
        naive += any(paired_interval(other, list(scores["0"].values()), 0.90).low > 0 for other in others)
    assert lost / 1_000 <= 0.055
    assert naive / 1_000 > 0.07


def as_scores(*rows: list[float]) -> dict[str, dict[int, float]]:
    return {name: dict(enumerate(row)) for name, row in zip("abc", rows, strict=False)}


def test_what_is_clearly_worse_is_left_out() -> None:
    scores = as_scores([0.972, 0.974, 0.973], [0.971, 0.9745, 0.973], [0.950, 0.951, 0.9515])
    assert list_possible_best(scores) == {"a", "b"}


def test_a_wild_third_hides_no_difference_of_two() -> None:
    apart = [0.972, 0.974, 0.973], [0.962, 0.9641, 0.9632]
    assert list_possible_best(as_scores(*apart, [0.1, 0.9, 0.5])) == {"a", "c"}


def test_equals_and_those_without_two_common_seeds_are_all_kept() -> None:
    assert list_possible_best(as_scores(*[[0.9, 0.91, 0.92]] * 3)) == {"a", "b", "c"}
    assert list_possible_best({"a": {1: 0.9, 2: 0.8}, "b": {2: 0.1, 3: 0.1}}) == {"a", "b"}
    assert list_possible_best({"a": {1: 0.9}}) == {"a"}


def test_seeds_that_only_one_was_trained_on_are_left_aside() -> None:
    scores = as_scores([0.972, 0.974, 0.973], [0.950, 0.951, 0.9515])
    scores["b"] |= {9: 5.0, 10: 5.0}
    assert list_possible_best(scores) == {"a"}
