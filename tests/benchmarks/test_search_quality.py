import dataclasses
import json
import math
import statistics
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from curve_tables import make_config, make_curve, make_curves, make_stress_table
from ray.tune.analysis import ExperimentAnalysis
from records import NAN
from scipy import stats  # type: ignore[import-untyped]

from benchmarks.quality.curves import Curves, write_curves
from benchmarks.quality.replay import CurveTable, Problem, ReplayedTrial, replay_optuna, replay_program, run_optuna
from benchmarks.quality.search_quality import (
    ARMS,
    BUDGETS,
    GUESSING_LOSS,
    OURS,
    SCHEMA,
    SearchQuality,
    _render_regret,
    check_states,
    choose_as_amp,
    choose_as_optuna,
    choose_as_ray,
    compare_pairs,
    count_hopeless_epochs,
    describe_check,
    find_hopeless_epoch,
    list_regrets,
    measure_arm,
    measure_quality,
    render_quality,
    write_quality,
)
from tune_amp.results.parquet import METADATA_KEY
from tune_amp.trial.config import TrialStatus

BAD, GOOD = 0.1, 0.9


def make_table(*curves: Any) -> Curves:
    return make_curves([make_config(lr=10.0 ** (n / 10 - 4)) for n in range(len(curves))], curves, "stress")


def make_trial(curve: int, *spent_at: int, status: TrialStatus | None = None) -> ReplayedTrial:
    return ReplayedTrial(trial_id=str(curve), config=make_config(), curve=curve, spent_at=list(spent_at), status=status)


# Hindsight


@pytest.mark.parametrize(
    ("accuracies", "hopeless_from"),
    [
        ([BAD, BAD, BAD], 1),
        ([GOOD, BAD, BAD], 2),
        ([BAD, GOOD, BAD], 3),
        ([GOOD, GOOD, BAD], 3),
        ([BAD, BAD, GOOD], None),
        ([0.2, 0.2, 0.2], 1),  # exactly twice the accuracy of guessing is not more than that
        ([0.2, 0.2, 0.201], None),
        ([GOOD, NAN, NAN], 2),
    ],
)
def test_a_curve_is_hopeless_after_the_last_epoch_that_had_learned(
    accuracies: list[float], hopeless_from: int | None
) -> None:
    assert find_hopeless_epoch(make_curve(*accuracies)) == hopeless_from


def test_epochs_on_the_hopeless_begin_after_the_first_hopeless_one() -> None:
    curves = make_table(make_curve(*[BAD] * 8), make_curve(GOOD, GOOD, *[BAD] * 6), make_curve(*[GOOD] * 8))
    trials = [make_trial(0, 1, 4, 7), make_trial(1, 2, 5, 8, 10), make_trial(2, 3, 6, 9)]
    # Of the first trial epochs 2 and 3, of the second, hopeless from its third on, the fourth.
    assert count_hopeless_epochs(trials, curves, 10) == 3
    assert count_hopeless_epochs(trials, curves, 9) == 2
    assert count_hopeless_epochs(trials, curves, 3) == 0


def test_states_are_compared_with_hindsight_curve_by_curve() -> None:
    lost = make_curve(BAD, BAD, NAN)  # stopped after epoch 3, hopeless from epoch 1
    missed = make_curve(GOOD, BAD, BAD)
    fine = make_curve(GOOD, GOOD, GOOD)
    wronged = (*make_curve(BAD, state="collapsed"), *make_curve(BAD, GOOD, GOOD)[1:])
    check = check_states(make_table(lost, lost, missed, fine, wronged))
    assert dict(check.counts) == {(1, 3): 2, (2, None): 1, (None, None): 1, (None, 1): 1}
    assert check.recovered == 1
    assert check.largest_gain == pytest.approx(0.8)
    cells = [check.count(hopeless=h, stopped=s) for h in (True, False) for s in (True, False)]
    assert cells == [2, 1, 1, 1]
    assert describe_check("stress", check) == (
        "States on the recorded curves of stress: of 3 that are hopeless in hindsight 2 are stopped (2 after epoch 3), "
        "of 2 others 1; 1 of those stopped learned anything later on, and none gained more than 80.00 points on what "
        "it had."
    )


def test_a_trial_that_had_learned_before_its_stop_and_never_after_has_not_recovered() -> None:
    check = check_states(make_table(make_curve(GOOD, NAN, NAN)))
    assert (check.recovered, check.largest_gain) == (0, 0.0)


def test_a_trial_in_which_nothing_changes_any_more_does_not_learn_whatever_accuracy_it_is_stuck_at() -> None:
    first, *later = make_curve(0.23, 0.23, 0.23, state="collapsed")
    stuck = (first, *(dataclasses.replace(metrics, val_loss=first.val_loss) for metrics in later))
    assert find_hopeless_epoch(stuck) == 2
    check = check_states(make_table(stuck))
    assert (check.recovered, check.largest_gain) == (0, 0.0)
    moving = check_states(make_table(make_curve(0.23, 0.23, 0.23, state="collapsed")))
    assert (moving.recovered, moving.largest_gain) == (1, 0.0)


# Regret


def test_regret_is_in_points_below_the_best_final_accuracy() -> None:
    curves = make_table(make_curve(0.99, 0.90), make_curve(0.5, 0.95), make_curve(0.5, 0.1))
    assert list_regrets(curves, "val_accuracy") == pytest.approx([5.0, 0.0, 85.0])


def test_regret_in_nats_takes_no_loss_for_worse_than_guessing() -> None:
    curves = make_table(*(make_curve(0.9, 0.9) for _ in range(4)))
    losses = (0.5, 0.25, NAN, 5000.0)
    epochs = [
        (first, dataclasses.replace(last, val_loss=loss))
        for (first, last), loss in zip(curves.epochs, losses, strict=True)
    ]
    changed = dataclasses.replace(curves, epochs=tuple(epochs))
    assert list_regrets(changed, "val_loss") == pytest.approx([0.25, 0, *[GUESSING_LOSS - 0.25] * 2])


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_regret_of_an_oracle_is_0_at_every_budget(objective: str) -> None:
    table = CurveTable(make_stress_table())
    regrets = list_regrets(table.curves, objective)
    oracle = dataclasses.replace(ARMS[0], choose=lambda *_: regrets.index(0.0))
    problem = Problem(table=table, objective=objective, seed=0, budget=BUDGETS[-1])
    assert oracle.program is not None
    rows = measure_arm(oracle, replay_program(oracle.program, problem), problem, "stress")
    assert [(row.budget, row.regret) for row in rows] == [(budget, 0.0) for budget in BUDGETS]
    assert [row.mean_regret for row in rows] == [None, 0.0, 0.0, 0.0, 0.0]


# What each program hands out


FINISHED = make_table(make_curve(*[0.8] * 8), make_curve(0.95, *[0.5] * 7), make_curve(0.9, *[0.99] * 7))
COMPLETED = make_trial(0, *range(1, 9), status=TrialStatus.COMPLETED)
STOPPED = make_trial(1, 9, status=TrialStatus.STOPPED)
RUNNING = make_trial(2, 10)


def test_ours_puts_a_completed_trial_before_a_better_one_that_was_stopped_only_where_loss_decides() -> None:
    trials = [COMPLETED, STOPPED, RUNNING]
    assert choose_as_amp(trials, FINISHED, "val_accuracy", 10) == 1
    assert choose_as_amp(trials, FINISHED, "val_loss", 10) == 0
    assert choose_as_amp(trials[1:], FINISHED, "val_loss", 10) == 1
    assert choose_as_ray(trials, FINISHED, "val_accuracy", 10) == 1
    assert choose_as_ray(trials, FINISHED, "val_accuracy", 8) == 0  # before the other two had reported
    assert choose_as_optuna(trials, FINISHED, "val_accuracy", 10) == 0


def test_what_is_chosen_depends_on_nothing_that_came_later() -> None:
    assert choose_as_optuna([COMPLETED], FINISHED, "val_accuracy", 7) is None
    assert choose_as_amp([COMPLETED, STOPPED], FINISHED, "val_accuracy", 7) == 0
    assert choose_as_amp([], FINISHED, "val_accuracy", 7) is None


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_stock_choice_is_that_of_rays_own_analysis(objective: str) -> None:
    table = CurveTable(make_stress_table())
    [stock] = [arm for arm in ARMS if arm.name == "stock Ray Tune + Optuna"]
    assert stock.program is not None
    trials = replay_program(stock.program, Problem(table=table, objective=objective, seed=1, budget=64))
    finished = [
        types.SimpleNamespace(metric_analysis={objective: {"last": trial.last_result[objective]}}, curve=trial.curve)
        for trial in trials
        if trial.last_result
    ]
    analysis: Any = types.SimpleNamespace(
        trials=finished, _validate_metric=lambda name: name, _validate_mode=lambda name: name
    )
    mode = "max" if objective == "val_accuracy" else "min"
    best: Any = ExperimentAnalysis.get_best_trial(analysis, objective, mode)
    assert choose_as_ray(trials, table.curves, objective, 64) == best.curve


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_choice_of_optuna_alone_is_its_studys_best_trial(objective: str) -> None:
    table = CurveTable(make_stress_table())
    study, trials = run_optuna(Problem(table=table, objective=objective, seed=1, budget=64))
    assert choose_as_optuna(trials, table.curves, objective, 64) == trials[study.best_trial.number].curve


def test_hopeless_suggestions_are_counted_after_the_ten_random_ones() -> None:
    curves = make_table(make_curve(*[BAD] * 8), make_curve(*[GOOD] * 8), make_curve(GOOD, *[BAD] * 7))
    trials = [make_trial(0, spent) for spent in range(1, 13)]
    trials += [make_trial(1, 13), make_trial(2, 14), make_trial(0, 17)]
    table = CurveTable(curves)
    problem = Problem(table=table, objective="val_accuracy", seed=0, budget=BUDGETS[-1])
    rows = measure_arm(ARMS[0], trials, problem, "stress")
    # Hopeless only later is not counted; the last trial came after 16 epochs.
    assert (rows[0].trials, rows[0].later_suggestions, rows[0].hopeless_suggestions) == (14, 4, 2)
    assert (rows[1].trials, rows[1].later_suggestions, rows[1].hopeless_suggestions) == (15, 5, 3)


def test_arms_differ_in_what_their_names_say_and_ours_comes_first() -> None:
    arms = {arm.name: arm for arm in ARMS}
    assert len(arms) == len(ARMS)
    ours, stock = ARMS[0], ARMS[1]
    assert ours.name == OURS
    for arm in ARMS:
        if arm.is_ablation:
            base = ours if arm.name.startswith("tune_amp") else stock
            assert arm.program is not None
            assert base.program is not None
            parts = [(vars(arm.program)[part], vars(base.program)[part]) for part in vars(arm.program)]
            parts.append((arm.choose, base.choose))
            changed = sum(mine is not other for mine, other in parts)
            # Our searcher cannot be told that a trial without a finite value completed.
            assert changed == (2 if arm.name == "stock, our searcher" else 1)


# Statistics


def test_paired_difference_is_that_of_scipys_paired_t_test() -> None:
    ours, other = [1.0, 2.5, 0.5, 4.0, 2.0], [1.5, 2.0, 1.0, 5.5, 3.0]
    difference = compare_pairs(ours, other)
    assert difference is not None
    low, high = stats.ttest_rel(ours, other).confidence_interval(0.95)
    assert difference.mean == pytest.approx(-0.6)
    assert (difference.low, difference.high) == pytest.approx((low, high))
    assert difference.n == 5


def test_pairs_of_which_one_is_missing_are_left_out() -> None:
    with_gaps = compare_pairs([1.0, None, 3.0, 4.0], [2.0, 5.0, None, 3.0])
    assert with_gaps == compare_pairs([1.0, 4.0], [2.0, 3.0])
    assert compare_pairs([1.0, None], [2.0, 3.0]) is None


@pytest.mark.parametrize(
    ("differences", "bold"),
    [((-0.6, -0.5, -0.7), True), ((-0.6, 0.5, -0.1), False), ((0.0, 0.0, 0.0), False), ((0.6, 0.5, 0.7), True)],
)
def test_a_difference_is_in_bold_where_its_interval_excludes_0(differences: Sequence[float], bold: bool) -> None:
    assert _render_regret([2 + difference for difference in differences], [2.0] * 3, "stock").endswith("**") == bold


# The whole


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> SearchQuality:
    path = tmp_path_factory.mktemp("curves") / "curves-stress.parquet"
    curves = make_stress_table(24)
    write_curves(path, curves.configs, curves.epochs, curves.origin)
    return measure_quality({"stress": path}, seeds=2, workers=1)


@pytest.mark.slow
def test_every_arm_has_a_row_for_each_objective_seed_and_budget(quality: SearchQuality, tmp_path: Path) -> None:
    assert len(quality.rows) == len(ARMS) * 2 * 2 * len(BUDGETS)
    write_quality(tmp_path / "q.parquet", quality)
    table = pq.read_table(tmp_path / "q.parquet")
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == [vars(row) for row in quality.rows]
    about = json.loads(table.schema.metadata[METADATA_KEY.encode()])
    assert about["seeds"] == [0, 1]
    assert about["curves"]["stress"]["count"] == 24
    assert str(Path.home()) not in json.dumps(about)


@pytest.mark.slow
def test_table_shows_the_mean_and_the_paired_difference_of_each_arm(quality: SearchQuality) -> None:
    text = render_quality(quality)
    of_random = [row for row in quality.rows if (row.arm, row.objective) == ("random search", "val_accuracy")]
    mean = statistics.fmean(row.regret or 0.0 for row in of_random if row.budget == 192)
    [first, *_] = [line for line in text.splitlines() if line.startswith("| random search")]
    assert first.split("|")[6].split()[0] == f"{mean:.3f}"
    assert "±" in first
    [ours, *_] = [line for line in text.splitlines() if line.startswith(f"| {OURS} |")]
    assert "±" not in ours
    assert "mean of 2 seeds" in text


def test_replay_of_optuna_is_the_arm_without_a_program() -> None:
    [alone] = [arm for arm in ARMS if arm.program is None]
    assert alone.name == "Optuna alone"
    table = CurveTable(make_stress_table(8))
    problem = Problem(table=table, objective="val_accuracy", seed=0, budget=8)
    rows = measure_arm(alone, replay_optuna(problem), problem, "stress")
    assert rows[0].regret is None
    assert not math.isnan(rows[0].hopeless_epochs)
