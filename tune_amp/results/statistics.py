"""Statistics of repeated runs: intervals of means, ties and equivalence, with plain numbers in and out.

Runs on the same seeds share initial weights and the order of data, so configurations are compared seed by seed.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95
EQUIVALENCE_CONFIDENCE = 0.90
"""Confidence of the interval that corresponds to two one-sided tests at 5 %."""

FEWEST_PAIRS = 3
"""Fewest paired differences that decide anything. Accuracies are counts of images, so two differences are often equal:
their interval has no width, and with 128 images it missed the true difference in 6 to 17 % of searches, not in 5 %."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanInterval:
    """The mean of ``n`` values, with a confidence interval of the true mean."""

    mean: float
    std: float
    """Sample standard deviation (n - 1)."""
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equivalence:
    """The result of an equivalence test of paired values within a margin."""

    difference: MeanInterval
    """Mean of the paired differences, with its 95 % interval."""
    margin: float
    equivalent: bool
    """Whether the difference is shown to be within the margin: its 90 % interval lies inside it."""
    differs: bool
    """Whether the difference is shown not to be 0: its 95 % interval excludes 0."""
    smallest_effect: float
    """The smallest true difference that these runs would have distinguished from 0 with a probability of 80 %."""


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> MeanInterval:
    """Return the mean of at least two values with Student's t interval (Student 1908, "The probable error of a mean").

    The interval assumes independent values from a normal distribution. For accuracies over seeds, it describes further
    seeds on the same images, not other images.
    """
    assert len(values) >= 2
    mean, std = statistics.fmean(values), statistics.stdev(values)
    half = _t_quantile(0.5 + confidence / 2, len(values) - 1) * std / math.sqrt(len(values))
    return MeanInterval(mean=mean, std=std, low=mean - half, high=mean + half, n=len(values))


def paired_interval(values: Sequence[float], others: Sequence[float], confidence: float = CONFIDENCE) -> MeanInterval:
    """Return the interval of the mean of ``values - others``, pair by pair."""
    return mean_interval([value - other for value, other in zip(values, others, strict=True)], confidence)


def wilson_interval(share: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of the true share, estimated from ``n`` independent draws of which ``share`` were hits.

    Wilson's score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953): unlike the textbook's interval, it does
    not shrink to a point at a share of 1, and its coverage is right near 0 and 1, where accuracies are (Brown, Cai,
    DasGupta 2001, doi:10.1214/ss/1009213286). For an accuracy, it describes other images of the same kind, not other
    seeds.
    """
    assert 0 <= share <= 1
    assert n >= 1
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def judge_equivalence(values: Sequence[float], others: Sequence[float], margin: float) -> Equivalence:
    """Test whether ``values`` and ``others`` are the same within ``margin``, pair by pair.

    Two one-sided t tests at 5 % (Schuirmann 1987, doi:10.1007/BF01068419): the values are equivalent if the 90 %
    interval of the mean difference lies within the margin. Values that are not shown to be equivalent need not differ:
    the runs may be too few, which ``smallest_effect`` shows.
    """
    inner = paired_interval(values, others, EQUIVALENCE_CONFIDENCE)
    difference = paired_interval(values, others)
    return Equivalence(
        difference=difference,
        margin=margin,
        equivalent=-margin < inner.low and inner.high < margin,
        differs=difference.low > 0 or difference.high < 0,
        smallest_effect=smallest_effect(difference.std, difference.n),
    )


def smallest_effect(std: float, n: int, power: float = 0.8, confidence: float = CONFIDENCE) -> float:
    """Return the smallest true mean difference that a t test of ``n`` differences finds with probability ``power``.

    Based on the noncentral t distribution (Cohen 1988, "Statistical power analysis for the behavioral sciences").

    Args:
        std: standard deviation of the differences.
        n: number of differences, at least two.
        power: probability of finding the difference.
        confidence: confidence of the two-sided test.
    """
    from scipy import optimize, stats  # type: ignore[import-untyped]  # takes a second to import

    critical = _t_quantile(0.5 + confidence / 2, n - 1)

    def shortfall(noncentrality: float) -> float:
        return float(power - stats.nct.sf(critical, n - 1, noncentrality))

    noncentrality: float = optimize.brentq(shortfall, 0.0, 10.0 * critical)
    return noncentrality * std / math.sqrt(n)


def list_possible_best(scores: Mapping[str, Mapping[int, float]], confidence: float = CONFIDENCE) -> set[str]:
    """Return the names that may be the true best: no other is shown to be better.

    Subset selection (Gupta 1965, doi:10.1080/00401706.1965.10490251) with paired one-sided t tests on the seeds that a
    pair has in common, and Bonferroni's correction for all other names. Each pair has its own spread, and nothing is
    assumed about the spreads of other pairs. The true best is among the names with ``confidence``. Other names
    that are copies of each other count once, and a single one needs a two-sided interval above 0. That is the level of
    ``gain.judge_gain``, whose verdict can only differ if a name other than its challenger beats the default.

    Args:
        scores: name -> seed -> value; more is better. Pairs with fewer than ``FEWEST_PAIRS`` common
            seeds are not compared.
        confidence: probability that the true best is included.
    """
    common = [seed for seed in next(iter(scores.values()), {}) if all(seed in of for of in scores.values())]

    def is_beaten(name: str, other: str, level: float) -> bool:
        seeds = sorted({*scores[name]} & {*scores[other]})
        if len(seeds) < FEWEST_PAIRS:
            return False
        pair = [scores[other][seed] for seed in seeds], [scores[name][seed] for seed in seeds]
        return paired_interval(*pair, 1 - level).low > 0

    def may_be_best(name: str) -> bool:
        others = [other for other in scores if other != name]
        rivals = {tuple(scores[other][seed] for seed in common) for other in others} if common else others
        # Of a two-sided interval, of which one side is used.
        level = min(1.0, 2 / max(1, len(rivals))) * (1 - confidence)
        return not any(is_beaten(name, other, level) for other in others)

    return {name for name in scores if may_be_best(name)}


@functools.cache
def _t_quantile(probability: float, freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))
