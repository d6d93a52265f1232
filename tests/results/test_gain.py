"""Whether searching gained anything is judged as it should be: rule by rule, and against simulated truth."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from tune_amp.results.confirmed import DEFAULT_ID, ConfirmedRun
from tune_amp.results.gain import FIRST_SEEDS, Verdict, choose_challenger, describe_verdict, judge_gain, may_gain
from tune_amp.results.statistics import list_possible_best
from tune_amp.trial.config import TrialConfig, TrialStatus

RANKS = {"a": 1, "b": 2, "c": 3, DEFAULT_ID: 4}


def make_configs(*names: str) -> dict[str, TrialConfig]:
    """Each of another learning rate; the default is the default."""
    found = {name: TrialConfig(lr=number / 1000) for number, name in enumerate(names, start=2)}
    return found | ({DEFAULT_ID: TrialConfig(seed=9)} if DEFAULT_ID in names else {})


def make_runs(scores: Mapping[str, Sequence[float]], objective: str = "val_accuracy") -> list[ConfirmedRun]:
    metrics = {"val_loss": 0.1, "val_accuracy": 0.9}
    return [
        ConfirmedRun(trial_id=name, seed=seed, status=TrialStatus.COMPLETED, **metrics | {objective: value})  # type: ignore[arg-type]
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]


def judge(scores: Mapping[str, Sequence[float]], objective: str = "val_accuracy") -> Verdict:
    return judge_gain(make_configs(*scores), make_runs(scores, objective), objective)


def describe(scores: Mapping[str, Sequence[float]], objective: str = "val_accuracy") -> str:
    return describe_verdict(judge(scores, objective), objective, RANKS)


# ---- rules ----

BASE = [0.900, 0.904, 0.902]
HIGH = [0.950, 0.9536, 0.9516]


def test_a_pair_that_is_equal_on_every_seed_gained_nothing_whatever_stands_beside_it() -> None:
    for others in ({}, {"b": [0.1, 0.5, 0.2], "c": [0.3, 0.1, 0.9]}):
        found = judge({"a": BASE, **others, DEFAULT_ID: BASE})
        assert found.gain is not None
        assert (found.challenger, found.recommended, found.kind) == ("a", DEFAULT_ID, "indistinguishable")
        assert (found.gain.difference, found.gain.low, found.gain.high) == (0.0, 0.0, 0.0)


def test_a_metric_that_is_0_on_every_seed_is_equal_and_not_unknown() -> None:
    """Its margin is a share of the default's value: 0."""
    runs = [dataclasses.replace(run, metrics={"val_f1": 0.0}) for run in make_runs({"a": BASE, DEFAULT_ID: BASE})]
    found = judge_gain(make_configs("a", DEFAULT_ID), runs, "val_f1")
    assert (found.kind, found.recommended) == ("indistinguishable", DEFAULT_ID)


def test_the_interval_is_that_of_the_paired_t_test_corrected_for_the_choice() -> None:
    differences = np.subtract(HIGH, BASE)
    for others, confidence in (({}, 0.95), ({"b": BASE}, 0.95), ({"b": BASE, "c": [0.5, 0.6, 0.1]}, 1 - 0.1 / 3)):
        gain = judge({"a": HIGH, **others, DEFAULT_ID: list(BASE)}).gain
        assert gain is not None
        expected = stats.t.interval(confidence, 2, differences.mean(), stats.sem(differences))
        assert (gain.difference, gain.low, gain.high) == pytest.approx((differences.mean(), *expected))
        assert gain.seeds == 3


def test_copies_of_a_configuration_are_one_choice() -> None:
    alone, copied = judge({"a": HIGH, DEFAULT_ID: BASE}), judge({"a": HIGH, "b": HIGH, "c": HIGH, DEFAULT_ID: BASE})
    assert alone.gain == copied.gain


@pytest.mark.parametrize("rivals", ["a", "aaa", "ab", "aabb", "aabc"])
def test_the_verdict_does_not_contradict_the_ties(rivals: str) -> None:
    """The best rival is better than the defaults if, and only if, they are shown not to be the best."""
    generator = np.random.default_rng(5)
    verdicts = set()
    for _ in range(300):
        best = generator.normal(0.004, 0.001, 3)
        values = {"a": best, "b": best - 0.1, "c": best - 0.2}  # equal letters are copies
        scores = {f"{letter}{place}": values[letter].tolist() for place, letter in enumerate(rivals)}
        scores[DEFAULT_ID] = [0.0] * 3
        is_better = judge(scores).kind == "better"
        possible = list_possible_best({name: dict(enumerate(own)) for name, own in scores.items()})
        assert is_better == (DEFAULT_ID not in possible)
        verdicts.add(is_better)
    assert verdicts == {True, False}


@pytest.mark.parametrize(("challenger", "kind", "recommended", "text"), [
    (HIGH, "better", "a", "rank 1 is better than the defaults: +4.97 points of validation accuracy "
     "(95 % interval +4.92 to +5.03, 3 seeds)"),
    ([0.880, 0.884, 0.882], "worse", DEFAULT_ID, "no gain over the defaults: keep them; rank 1 is worse: -2.00 "
     "points of validation accuracy (95 % interval -2.00 to -2.00, 3 seeds)"),
    ([0.901, 0.903, 0.9025], "indistinguishable", DEFAULT_ID, "no gain over the defaults: keep them; rank 1 is "
     "indistinguishable from them: +0.02 points of validation accuracy (95 % interval -0.24 to +0.28, 3 seeds), shown "
     "to be less than 0.2 points apart"),
    ([0.990, 0.890, 0.930], "unknown", DEFAULT_ID, "no gain over the defaults: keep them; whether rank 1 is better "
     "is unknown, too few seeds: +3.47 points of validation accuracy (95 % interval -9.53 to +16.46, 3 seeds)"),
])  # fmt: skip
def test_verdicts(challenger: Sequence[float], kind: str, recommended: str, text: str) -> None:
    scores = {"a": challenger, DEFAULT_ID: BASE}
    found = judge(scores)
    assert (found.kind, found.recommended) == (kind, recommended)
    assert describe(scores) == text


def test_a_lower_loss_is_better() -> None:
    scores = {"a": [0.10, 0.111, 0.12], "b": [0.3, 0.3, 0.3], DEFAULT_ID: [0.20, 0.21, 0.22]}
    found = judge(scores, "val_loss")
    assert (found.kind, found.recommended, found.challenger) == ("better", "a", "a")
    assert describe(scores, "val_loss").startswith(
        "rank 1 is better than the defaults: -0.0997 nats of validation loss (95 % interval -0.1011 to -0.0982"
    )
    assert judge({"a": scores["b"], DEFAULT_ID: scores["a"]}, "val_loss").kind == "worse"


def fail(runs: Sequence[ConfirmedRun], name: str, seed: int) -> list[ConfirmedRun]:
    return [
        dataclasses.replace(run, status=TrialStatus.DIVERGED, val_accuracy=None)
        if (run.trial_id, run.seed) == (name, seed)
        else run
        for run in runs
    ]


@pytest.mark.parametrize(("failures", "kind", "recommended", "text"), [
    ([(DEFAULT_ID, 1)], "better", "a", "rank 1 is better than the defaults: the defaults did not complete on "
     "1 of 3 seeds"),
    ([("a", 1)], "worse", DEFAULT_ID, "no gain over the defaults: keep them; rank 2 is worse: "),
    ([("a", 1), ("b", 2)], "unknown", DEFAULT_ID, "no gain over the defaults: keep them; nothing more is known: no "
     "other configuration completed on every seed"),
    ([("a", 1), ("b", 2), (DEFAULT_ID, 0)], "unknown", "a", "whether searching gained anything is unknown: the "
     "defaults did not complete on 1 of 3 seeds"),
])  # fmt: skip
def test_what_fails_on_a_seed_does_not_win(
    failures: Sequence[tuple[str, int]], kind: str, recommended: str, text: str
) -> None:
    scores = {"a": HIGH, "b": [0.80, 0.81, 0.805], DEFAULT_ID: BASE}
    runs = make_runs(scores)
    for name, seed in failures:
        runs = fail(runs, name, seed)
    found = judge_gain(make_configs(*scores), runs, "val_accuracy")
    assert (found.kind, found.recommended) == (kind, recommended)
    assert describe_verdict(found, "val_accuracy", RANKS).startswith(text)


def test_a_default_that_crashed_is_not_said_to_be_worse() -> None:
    scores = {"a": HIGH, DEFAULT_ID: BASE}
    runs = [
        dataclasses.replace(run, status=TrialStatus.FAILED, error="OSError: disk")
        if run.trial_id == DEFAULT_ID
        else run
        for run in make_runs(scores)
    ]
    found = judge_gain(make_configs(*scores), runs, "val_accuracy")
    assert (found.kind, found.recommended) == ("unknown", "a")
    assert describe_verdict(found, "val_accuracy", RANKS) == (
        "whether searching gained anything is unknown: the defaults did not complete on 3 of 3 seeds"
    )


def test_a_challenger_that_fails_on_a_later_seed_is_not_replaced_and_not_recommended() -> None:
    scores = {"a": [*HIGH, 0.95, 0.95], "b": BASE, DEFAULT_ID: [*BASE, 0.9, 0.9]}
    found = judge_gain(make_configs(*scores), fail(make_runs(scores), "a", 4), "val_accuracy")
    assert (found.challenger, found.recommended, found.kind) == ("a", DEFAULT_ID, "unknown")
    assert found.reason == "the best other configuration did not complete on 1 of 5 seeds"


def test_later_seeds_measure_and_do_not_choose() -> None:
    scores = {"a": [0.95, 0.95, 0.95, 0.1, 0.1], "b": [0.94] * 5, DEFAULT_ID: [0.9] * 5}
    configs, runs = make_configs(*scores), make_runs(scores)
    assert choose_challenger(configs, runs, "val_accuracy") == "a"
    gain = judge_gain(configs, runs, "val_accuracy").gain
    assert gain is not None
    assert gain.seeds == 5
    assert gain.difference == pytest.approx(-0.29)


def test_a_search_that_found_the_defaults_themselves_gained_nothing() -> None:
    configs = {"a": TrialConfig(seed=5), DEFAULT_ID: TrialConfig()}
    found = judge_gain(configs, make_runs({"a": BASE, DEFAULT_ID: BASE}), "val_accuracy")
    assert (found.kind, found.recommended) == ("indistinguishable", DEFAULT_ID)
    assert describe_verdict(found, "val_accuracy", RANKS) == (
        "no gain over the defaults: keep them; the search found the default configuration itself"
    )


def test_without_the_defaults_nothing_is_said_of_a_gain() -> None:
    found = judge({"a": BASE, "b": HIGH})
    assert (found.kind, found.recommended) == ("unknown", "b")
    assert describe({"a": BASE, "b": HIGH}) == (
        "whether searching gained anything is unknown: the default configuration was not trained"
    )


def test_of_several_objectives_the_others_are_not_decided() -> None:
    found = judge({"a": BASE, DEFAULT_ID: BASE})
    text = describe_verdict(found, "val_accuracy", RANKS, several=True)
    assert text.startswith("no gain in validation accuracy over the defaults; rank 1 is indistinguishable")


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_decide_nothing(seeds: int) -> None:
    """Two differences of accuracies are often equal, which says nothing about a third."""
    scores = {"a": [0.95, 0.95], DEFAULT_ID: [0.9, 0.9]}
    verdict = judge({name: values[:seeds] for name, values in scores.items()})
    assert (verdict.kind, verdict.reason) == ("unknown", "fewer than 3 seeds are too few")
    assert list_possible_best({name: dict(enumerate(values[:seeds])) for name, values in scores.items()}) == {*scores}


@pytest.mark.parametrize(("challenger", "expected"), [
    (HIGH, True),  # ahead
    (BASE, False),  # equal
    ([0.8, 0.9, 0.85], False),  # behind
    ([0.9005, 0.9045, 0.9025], False),  # ahead by less than matters
])  # fmt: skip
def test_more_seeds_are_spent_only_if_they_can_show_a_gain(challenger: Sequence[float], expected: bool) -> None:
    scores = {"a": challenger, DEFAULT_ID: BASE}
    assert may_gain(judge(scores), "val_accuracy") is expected
    assert not may_gain(judge({"a": challenger}), "val_accuracy")


# ---- against simulated truth ----

NAMES = ("a", "b", "c", DEFAULT_ID)
SHARED_SPREAD = 0.003
"""Of what a seed does to all configurations alike."""
SIMULATIONS = 1_000


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Means over simulated confirmations."""

    false_better: float
    coverage: float
    truly_best: float
    truly_best_before: float
    """By the rule that this one replaced: the best mean on three seeds, the default left out."""
    runs: float


def simulate(truth: Sequence[float], spreads: Sequence[float], seeds: int, seed: int = 0) -> Outcome:
    """Confirm configurations of known means, in points, as a search does, many times (of 1,000: +-1.4 in 100)."""
    generator = np.random.default_rng(seed)
    configs = make_configs(*NAMES)
    means = dict(zip(NAMES, np.array(truth) / 100, strict=True))
    rows = []
    for _ in range(SIMULATIONS):
        shared = generator.normal(0, SHARED_SPREAD, seeds)
        noise = generator.normal(0, np.array(spreads)[:, None] / 100, (4, seeds))
        scores = {name: (0.9 + means[name] + shared + of).tolist() for name, of in zip(NAMES, noise, strict=True)}
        runs = make_runs({name: values[:FIRST_SEEDS] for name, values in scores.items()})
        challenger = choose_challenger(configs, runs, "val_accuracy")
        assert challenger is not None
        if may_gain(judge_gain(configs, runs, "val_accuracy"), "val_accuracy"):
            runs = [run for run in runs if run.trial_id not in (challenger, DEFAULT_ID)]
            runs += make_runs({name: scores[name] for name in (challenger, DEFAULT_ID)})
        found = judge_gain(configs, runs, "val_accuracy")
        assert found.gain is not None
        true_gain = means[challenger] - means[DEFAULT_ID]
        best = max(means.values())
        rows.append((
            found.kind == "better" and true_gain <= 0,
            found.gain.low <= true_gain <= found.gain.high,
            means[found.recommended] == best,
            means[challenger] == best,
            len(runs),
        ))  # fmt: skip
    return Outcome(*np.mean(rows, axis=0).tolist())


EQUAL = (0, 0, 0, 0)
SPREADS = {
    "alike": (0.3, 0.3, 0.3, 0.3),
    "unlike": (0.1, 0.3, 1.5, 0.3),
    "default quiet": (0.5, 0.5, 0.5, 0.05),
    "default wild": (0.1, 0.3, 0.3, 1.5),
}


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize("spreads", SPREADS.values(), ids=SPREADS)
def test_of_equals_none_passes_for_better_in_more_than_5_of_100_searches(spreads: Sequence[float], seeds: int) -> None:
    found = simulate(EQUAL, spreads, seeds)
    assert found.false_better <= 0.05
    assert 0.93 <= found.coverage <= 0.98


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("truth", [(1, 0, 0, 0), (0.5, 0.3, 0.2, 0), (-2, -2.1, -3, 0)])
def test_the_interval_of_the_gain_covers_the_truth(truth: Sequence[float], seeds: int) -> None:
    found = simulate(truth, (0.1, 0.3, 1.0, 0.3), seeds)
    assert 0.93 <= found.coverage <= 0.98
    assert found.false_better <= 0.05


def test_what_is_recommended_is_truly_best_as_often_as_before_or_more_often() -> None:
    """Where differences are larger than the noise; one of noise's size is not shown, and the defaults are kept."""
    clear = simulate((1, 0, 0, 0), (0.3, 0.3, 0.3, 0.3), 10)
    assert clear.truly_best >= clear.truly_best_before - 0.005 >= 0.95
    behind = simulate((-0.5, -0.6, -1, 0), (0.1, 0.3, 1.0, 0.3), 10)
    assert (behind.truly_best, behind.truly_best_before) == (1.0, 0.0)


def test_seeds_are_spent_where_they_decide() -> None:
    """Of ten seeds for each of four configurations, 40 trainings."""
    assert simulate((-2, -2.1, -3, 0), (0.3, 0.3, 0.3, 0.3), 10).runs == 12
    assert simulate((1, 0, 0, 0), (0.3, 0.3, 0.3, 0.3), 10).runs == pytest.approx(26, abs=0.1)
    assert simulate(EQUAL, (0.3, 0.3, 0.3, 0.3), 10).runs < 25
