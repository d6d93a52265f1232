"""What repeated runs say about accuracies: intervals of means, ties, equivalence. Plain numbers in, plain numbers out.

Runs on the same seeds share initial weights and the order of data, so configurations are compared seed by seed.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95
EQUIVALENCE_CONFIDENCE = 0.90
"""Of the interval that two one-sided tests at 5 % look at."""


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


def list_possible_best(scores: Mapping[str, Mapping[int, float]], confidence: float = CONFIDENCE) -> set[str]:
    """Return the names of those that may be the truly best: that no other is shown to be better than.

    Subset selection (Gupta 1965, doi:10.1080/00401706.1965.10490251) with paired one-sided t tests on the seeds that
    two have in common, and Bonferroni's correction for all others: each pair has its own spread, and nothing is
    assumed of those of the rest. The truly best is among the names with ``confidence``.

    Args:
        scores: name -> seed -> value; more is better. Two with less than two seeds in common are not compared.
        confidence: with which the truly best is not left out.
    """
    level = 2 * (1 - confidence) / max(1, len(scores) - 1)  # of a two-sided interval, of which one side is looked at

    def is_beaten(name: str, other: str) -> bool:
        seeds = sorted({*scores[name]} & {*scores[other]})
        if len(seeds) < 2:
            return False
        pair = [scores[other][seed] for seed in seeds], [scores[name][seed] for seed in seeds]
        return paired_interval(*pair, 1 - level).low > 0

    return {name for name in scores if not any(is_beaten(name, other) for other in scores if other != name)}


@functools.cache
def _t_quantile(probability: float, freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))
