"""What repeated runs say about accuracies: intervals of means, ties, equivalence. Plain numbers in, plain numbers out.

Runs on the same seeds share initial weights and the order of data, so configurations are compared seed by seed.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanInterval:
    """The mean of ``n`` values and where the mean of all such values is to be expected."""

    mean: float
    std: float
    """Sample standard deviation (n - 1)."""
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equivalence:
    """What paired differences say about being the same within a margin."""

    difference: MeanInterval
    """Of the paired differences, with its 95 % interval."""
    margin: float
    equivalent: bool
    """Shown to be within the margin: the 90 % interval of the difference lies inside it."""
    differs: bool
    """Shown to be other than 0: the 95 % interval excludes it."""
    smallest_effect: float
    """The smallest true difference that these runs would have told from 0 with a probability of 80 %."""


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> MeanInterval:
    """Mean of at least two values with Student's t interval (Student 1908, "The probable error of a mean").

    It assumes independent values from a normal distribution; of accuracies over seeds it tells what further seeds would
    give on the same images, not what other images would.
    """
    assert len(values) >= 2
    mean, std = statistics.fmean(values), statistics.stdev(values)
    half = _t_quantile(0.5 + confidence / 2, len(values) - 1) * std / math.sqrt(len(values))
    return MeanInterval(mean=mean, std=std, low=mean - half, high=mean + half, n=len(values))


def paired_interval(values: Sequence[float], others: Sequence[float], confidence: float = CONFIDENCE) -> MeanInterval:
    """Interval of the mean of ``values - others``, pair by pair."""
    return mean_interval([value - other for value, other in zip(values, others, strict=True)], confidence)


def wilson_interval(share: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the true share lies that ``n`` independent draws estimate, of which ``share`` were hits.

    Wilson's score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953): unlike the textbook's, it is no point
    where the share is 1, and covers what it should near 0 and 1, where accuracies are (Brown, Cai, DasGupta 2001,
    doi:10.1214/ss/1009213286). Of an accuracy it tells what other images of the same kind would give, not other seeds.
    """
    assert 0 <= share <= 1
    assert n >= 1
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def judge_equivalence(values: Sequence[float], others: Sequence[float], margin: float) -> Equivalence:
    """Whether ``values`` and ``others`` are the same within ``margin``, pair by pair.

    Two one-sided t tests at 5 % (Schuirmann 1987, doi:10.1007/BF01068419): equivalent where the 90 % interval of the
    mean difference lies within the margin. Values that are not shown to be equivalent need not differ: the runs may be
    too few to tell, which ``smallest_effect`` shows.
    """
    inner = paired_interval(values, others, 0.90)
    difference = paired_interval(values, others)
    return Equivalence(
        difference=difference,
        margin=margin,
        equivalent=-margin < inner.low and inner.high < margin,
        differs=difference.low > 0 or difference.high < 0,
        smallest_effect=smallest_effect(difference.std, difference.n),
    )


def smallest_effect(std: float, n: int, power: float = 0.8, confidence: float = CONFIDENCE) -> float:
    """The smallest true mean difference that a t test of ``n`` differences would find with probability ``power``.

    From the noncentral t distribution (Cohen 1988, "Statistical power analysis for the behavioral sciences").

    Args:
        std: standard deviation of the differences.
        n: number of differences, at least two.
        power: probability of finding it.
        confidence: of the two-sided test.
    """
    from scipy import optimize, stats  # type: ignore[import-untyped]  # takes a second to import

    critical = _t_quantile(0.5 + confidence / 2, n - 1)

    def shortfall(noncentrality: float) -> float:
        return float(power - stats.nct.sf(critical, n - 1, noncentrality))

    noncentrality: float = optimize.brentq(shortfall, 0.0, 10.0 * critical)
    return noncentrality * std / math.sqrt(n)


def least_significant_difference(scores: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> float:
    """How far apart the means of two configurations must be to be told apart, whichever two are looked at.

    Tukey's honestly significant difference in a randomised complete block design, the seed as block (Tukey 1953, "The
    problem of multiple comparisons"; Hsu 1996, "Multiple comparisons", sections 5 and 7). It holds for all pairs at
    once, so that it stays true for the pair of the best and any other, though the best was chosen by the same runs.
    Differences between configurations are assumed to spread alike.

    Args:
        scores: a row a configuration, at least two; a column a seed, at least two.
        confidence: with which no two configurations that are alike are told apart.
    """
    rows, columns = len(scores), len(scores[0])
    assert rows >= 2
    assert columns >= 2
    row_means = [statistics.fmean(row) for row in scores]
    column_means = [statistics.fmean(column) for column in zip(*scores, strict=True)]
    grand_mean = statistics.fmean(row_means)
    residuals = (
        (score - row_mean - column_mean + grand_mean) ** 2
        for row, row_mean in zip(scores, row_means, strict=True)
        for score, column_mean in zip(row, column_means, strict=True)
    )
    freedom = (rows - 1) * (columns - 1)
    spread = math.sqrt(math.fsum(residuals) / freedom)
    return _range_quantile(confidence, rows, freedom) * spread / math.sqrt(columns)


@functools.cache
def _range_quantile(probability: float, groups: int, freedom: int) -> float:
    """Of the studentized range: SciPy integrates for a tenth of a second."""
    from scipy import stats

    return float(stats.studentized_range.ppf(probability, groups, freedom))


@functools.cache
def _t_quantile(probability: float, freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))
