"""Statistics and verdicts follow from the rows, and from nothing else."""

import math

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from tune_amp.results.statistics import MeanInterval, judge_equivalence
from tune_amp.reuse.precision_page import describe_equivalence, render_table
from tune_amp.reuse.precision_verdicts import (
    ACCURACY_CLAIM,
    CLAIMED,
    MEMORY_CLAIM,
    SPEED_CLAIM,
    Answer,
    ClaimVerdict,
    ComparedRun,
    MapCell,
    Ratio,
    judge_accuracy,
    judge_claims,
    judge_memory,
    judge_speed,
    map_ratio,
    ratio_interval,
    summarise_arm,
)
from tune_amp.trial.config import TrialStatus

HOLDS, FAILS, UNKNOWN = Answer.HOLDS, Answer.FAILS, Answer.UNKNOWN


def make_arm(
    precision: str,
    rates: tuple[float, ...],
    accuracies: tuple[float, ...],
    memory: tuple[int | None, ...] = (None, None, None),
    status: tuple[TrialStatus, ...] = (TrialStatus.COMPLETED,) * 3,
) -> list[ComparedRun]:
    """A run on each of the seeds 1, 2 and 3."""
    return [
        ComparedRun(
            precision=precision,
            seed=seed,
            place=seed,
            status=status[seed - 1],
            val_accuracy=accuracies[seed - 1],
            samples_per_second=rates[seed - 1],
            epoch_seconds=55_000 / rates[seed - 1],
            peak_memory_bytes=memory[seed - 1],
        )
        for seed in (1, 2, 3)
    ]


FP32 = make_arm("fp32", (1000.0, 1100.0, 900.0), (0.970, 0.972, 0.968), (100, 100, 100))


def find(verdicts: list[ClaimVerdict], precision: str, claim: str) -> ClaimVerdict:
    [verdict] = [verdict for verdict in verdicts if (verdict.precision, verdict.claim) == (precision, claim)]
    return verdict


# ---- rules ----


@pytest.mark.parametrize(("low", "high", "answer"), [
    (1.5, 1.7, HOLDS),
    (1.49, 1.7, UNKNOWN),
    (1.2, 1.5, UNKNOWN),
    (1.2, 1.49, FAILS),
    (0.1, 0.2, FAILS),
    (3.5, 4.0, HOLDS),
])  # fmt: skip
def test_speed_is_judged_by_the_whole_interval(low: float, high: float, answer: Answer) -> None:
    assert judge_speed(Ratio(ratio=math.sqrt(low * high), low=low, high=high, n=3)) is answer


@pytest.mark.parametrize(("low", "high", "answer"), [
    (0.4, 0.55, HOLDS),
    (0.5, 0.56, UNKNOWN),
    (0.55, 0.6, UNKNOWN),
    (0.56, 0.6, FAILS),
    (0.98, 0.98, FAILS),
])  # fmt: skip
def test_memory_is_judged_by_the_whole_interval(low: float, high: float, answer: Answer) -> None:
    assert judge_memory(Ratio(ratio=math.sqrt(low * high), low=low, high=high, n=3)) is answer


@pytest.mark.parametrize(("low", "high", "answer"), [
    (-0.5, 0.99, HOLDS),
    (-0.5, 1.0, UNKNOWN),
    (0.9, 1.1, UNKNOWN),
    (1.0, 1.5, UNKNOWN),
    (1.01, 1.5, FAILS),
])  # fmt: skip
def test_accuracy_is_judged_by_one_sided_bounds(low: float, high: float, answer: Answer) -> None:
    assert judge_accuracy(MeanInterval(mean=(low + high) / 2, std=0.1, low=low, high=high, n=3)) is answer


def test_nothing_can_be_told_without_numbers() -> None:
    assert (judge_speed(None), judge_memory(None), judge_accuracy(None)) == (UNKNOWN, UNKNOWN, UNKNOWN)


# ---- from rows ----


def test_ratio_is_a_paired_geometric_mean_with_the_interval_of_the_log() -> None:
    values, others = [2.0, 2.4, 1.5], [1.0, 1.1, 0.9]
    found = ratio_interval(values, others)
    logs = np.log(np.divide(values, others))
    low, high = stats.t.interval(0.95, 2, np.mean(logs), stats.sem(logs))
    assert (found.ratio, found.low, found.high) == pytest.approx(
        (stats.gmean(np.divide(values, others)), *np.exp((low, high)))
    )
    turned = ratio_interval(others, values)
    assert (turned.ratio, turned.low, turned.high) == pytest.approx((1 / found.ratio, 1 / found.high, 1 / found.low))


def test_a_seed_that_is_slow_for_both_leaves_the_ratio() -> None:
    runs = [
        *make_arm("fp32", (1000.0, 10.0, 500.0), (0.9, 0.9, 0.9)),
        *make_arm("fp16", (2000.0, 20.0, 1000.0), (0.9, 0.9, 0.9)),
    ]
    speed = summarise_arm(runs, "fp16").speed
    assert speed is not None
    assert (speed.ratio, speed.low, speed.high) == pytest.approx((2, 2, 2))


def test_verdicts_follow_from_rows_of_a_gpu() -> None:
    fast = make_arm("bf16", (1700.0, 1900.0, 1520.0), (0.9699, 0.9721, 0.968), (52, 52, 52))
    slow = make_arm("fp16", (900.0, 1000.0, 800.0), (0.95, 0.953, 0.949), (80, 81, 80))
    verdicts = judge_claims([*FP32, *slow, *fast], "NVIDIA H200")
    assert [find(verdicts, "bf16", claim).answer for claim in (SPEED_CLAIM, MEMORY_CLAIM, ACCURACY_CLAIM)] == [
        HOLDS
    ] * 3
    assert [find(verdicts, "fp16", claim).answer for claim in (SPEED_CLAIM, MEMORY_CLAIM, ACCURACY_CLAIM)] == [
        FAILS
    ] * 3
    loss = stats.t.interval(0.9, 2, 1.9333, stats.sem([2.0, 1.9, 1.9]))
    assert find(verdicts, "fp16", ACCURACY_CLAIM).evidence == (
        f"+1.93 points lost to fp32 (one-sided 95 % bounds {loss[0]:+.2f} and {loss[1]:+.2f}, n = 3 seeds, NVIDIA H200)"
    )


def test_every_verdict_quotes_its_device_and_how_many() -> None:
    runs = [*FP32, *make_arm("fp16", (900.0, 1000.0, 800.0), (0.95, 0.953, 0.949))]
    verdicts = judge_claims(runs, "cpu, 1 thread")
    assert [(v.precision, v.claim) for v in verdicts] == [
        (precision, claim) for precision in CLAIMED for claim in (SPEED_CLAIM, MEMORY_CLAIM, ACCURACY_CLAIM)
    ]
    assert all("cpu, 1 thread" in verdict.evidence for verdict in verdicts)
    assert all("n = 3 seeds" in verdict.evidence for verdict in verdicts if verdict.precision == "fp16")
    assert find(verdicts, "fp16", MEMORY_CLAIM).answer is UNKNOWN
    assert "was not measured" in find(verdicts, "bf16", SPEED_CLAIM).evidence


def test_a_precision_that_diverges_where_fp32_does_not_has_lost_accuracy() -> None:
    status = (TrialStatus.COMPLETED, TrialStatus.COMPLETED, TrialStatus.DIVERGED)
    fp16 = make_arm("fp16", (1.0, 1.0, 1.0), (0.970, 0.972, 0.968), status=status)
    verdict = find(judge_claims([*FP32, *fp16], "cpu"), "fp16", ACCURACY_CLAIM)
    assert verdict.answer is FAILS
    assert verdict.evidence == "1 of 3 runs diverged where fp32 completed (cpu)"
    assert summarise_arm([*FP32, *fp16], "fp16").speed.n == 2  # type: ignore[union-attr]


def test_a_precision_is_not_blamed_for_a_seed_on_which_fp32_diverges_too() -> None:
    status = (TrialStatus.COMPLETED, TrialStatus.COMPLETED, TrialStatus.DIVERGED)
    both = [make_arm(p, (1.0, 1.0, 1.0), (0.97, 0.971, 0.1), status=status) for p in ("fp32", "fp16")]
    assert find(judge_claims([*both[0], *both[1]], "cpu"), "fp16", ACCURACY_CLAIM).answer is HOLDS


def test_one_pair_tells_nothing() -> None:
    runs = [FP32[0], *make_arm("fp16", (9000.0, 1.0, 1.0), (0.97, 0.1, 0.1))]
    verdicts = judge_claims(runs, "cpu")
    assert {find(verdicts, "fp16", claim).answer for claim in (SPEED_CLAIM, MEMORY_CLAIM, ACCURACY_CLAIM)} == {UNKNOWN}
    assert "fewer than 2 seeds" in find(verdicts, "fp16", MEMORY_CLAIM).evidence


def test_seeds_are_paired_by_number_not_by_order() -> None:
    fp16 = make_arm("fp16", (2000.0, 2200.0, 1800.0), (0.960, 0.962, 0.958))
    found = summarise_arm([*fp16[::-1], *FP32], "fp16")
    assert found.difference is not None
    assert found.difference.difference.std == pytest.approx(0, abs=1e-9)
    assert found.speed is not None
    assert found.speed.low == pytest.approx(found.speed.high)


@pytest.mark.parametrize(("shift", "noise", "word"), [
    (0.0, 0.01, "yes"),
    (1.0, 0.01, "no"),
    (-1.0, 0.01, "no"),
    (0.0, 1.0, "undecided"),
])  # fmt: skip
def test_equivalence_is_shown_refuted_or_open(shift: float, noise: float, word: str) -> None:
    gap = judge_equivalence([97 + shift + noise, 97 + shift - noise, 97 + shift], [97.0] * 3, 0.2)
    assert describe_equivalence(gap) == word


def test_accuracy_is_compared_in_points() -> None:
    fp16 = make_arm("fp16", (1.0, 1.0, 1.0), (0.969, 0.9711, 0.9669))
    found = summarise_arm([*FP32, *fp16], "fp16").difference
    expected = judge_equivalence([96.9, 97.11, 96.69], [97.0, 97.2, 96.8], 0.2)
    assert found is not None
    assert found.difference.mean == pytest.approx(expected.difference.mean)
    assert found.smallest_effect == pytest.approx(expected.smallest_effect)
    assert found.equivalent is expected.equivalent is True


# ---- the map ----


@pytest.mark.parametrize(("rates", "word"), [
    ((110.0, 220.0, 330.0), "faster"),
    ((90.0, 180.0, 270.0), "slower"),
    ((110.0, 180.0, 330.0), "undecided"),
])  # fmt: skip
def test_map_calls_a_precision_faster_where_all_turns_agree(rates: tuple[float, ...], word: str) -> None:
    baseline = MapCell(model="vit", batch_size=64, precision="fp32", turn_rates=(100.0, 200.0, 300.0))
    found = map_ratio(MapCell(model="vit", batch_size=64, precision="bf16", turn_rates=rates), baseline)
    assert found is not None
    assert found.word == word
    paired = [rate / other for rate, other in zip(rates, baseline.turn_rates, strict=True)]
    assert (found.low, found.ratio, found.high) == tuple(sorted(paired))


def test_map_has_no_ratio_where_a_cell_was_skipped() -> None:
    done = MapCell(model="vit", batch_size=64, precision="bf16", turn_rates=(1.0,))
    skipped = MapCell(model="vit", batch_size=64, precision="fp32", reason="skipped")
    assert map_ratio(done, skipped) is None
    assert map_ratio(skipped, done) is None


def test_columns_of_a_table_line_up() -> None:
    lines = render_table(("a", "long title"), [("first", "1"), ("x", "22")]).splitlines()
    assert lines == [
        "| a     | long title |",
        "| ----- | ---------: |",
        "| first |          1 |",
        "| x     |         22 |",
    ]
