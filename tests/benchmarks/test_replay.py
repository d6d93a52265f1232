import dataclasses
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from curve_tables import SHARED, TRAIN_IMAGES, learn, make_config, make_curve, make_curves, make_stress_table
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from records import NAN

from benchmarks.quality.curves import Curves, sample_configs
from benchmarks.quality.replay import (
    CurveTable,
    Problem,
    Program,
    ReplayedTrial,
    _process_result,
    build_amp_scheduler,
    build_amp_search,
    build_amp_search_without_defaults,
    build_asha,
    build_fifo,
    build_optuna_search,
    build_optuna_search_with_defaults,
    build_random_search,
    build_record,
    is_loss_infinite,
    is_never_over,
    is_state_hopeless,
    locate_setting,
    replay_optuna,
    replay_program,
    report_epoch,
    run_optuna,
    run_trials,
)
from tune_amp.space.parameter import Parameter
from tune_amp.space.space import load_space
from tune_amp.trial.config import InputError, TrialConfig, TrialStatus

OURS = Program(build_searcher=build_amp_search, build_scheduler=build_amp_scheduler, is_over=is_state_hopeless)
STOCK = Program(build_searcher=build_optuna_search, build_scheduler=build_asha, is_over=is_never_over)
RANDOM = Program(build_searcher=build_random_search, build_scheduler=build_fifo, is_over=is_never_over)

Replay = Callable[[Problem], list[ReplayedTrial]]


def replay_with(program: Program) -> Replay:
    return lambda problem: replay_program(program, problem)


EVERY = pytest.mark.parametrize(
    "replay",
    [replay_with(OURS), replay_with(STOCK), replay_with(RANDOM), replay_optuna],
    ids=["ours", "stock", "random", "optuna"],
)


@pytest.fixture(scope="module")
def table() -> CurveTable:
    return CurveTable(make_stress_table())


def make_problem(table: CurveTable, objective: str = "val_accuracy", seed: int = 0, budget: int = 60) -> Problem:
    return Problem(table=table, objective=objective, seed=seed, budget=budget)


def make_table(*curves: tuple[Any, ...]) -> CurveTable:
    """One curve for each learning rate 1e-4, 1e-3, ...: what a suggestion is answered with is up to its lr alone."""
    configs = [make_config(lr=10.0 ** (number - 4)) for number in range(len(curves))]
    lr_only = {"batch_size": 0.0, "init_scale": 0.0, "growth_interval": 0.0, "backoff_factor": 0.0}
    return CurveTable(make_curves(configs, curves, "stress"), weights={"lr": 1.0, **lr_only})


@dataclasses.dataclass
class Listed:
    """A searcher that suggests learning rates from a list, and tells nobody what it hears."""

    rates: list[float]

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return vars(make_config(lr=self.rates[int(trial_id, 16) % len(self.rates)]))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None: ...

    def on_trial_complete(self, trial_id: str, result: dict[str, Any]) -> None: ...


# The lookup


@pytest.mark.parametrize("space", ["stress", "mnist_amp"])
def test_every_recorded_configuration_finds_its_own_curve(space: str) -> None:
    configs = sample_configs(load_space(space), 24, seed=1, train_images=TRAIN_IMAGES, shared=SHARED)
    table = CurveTable(make_curves(configs, [learn(config) for config in configs], space))
    assert [table.find_nearest(config) for config in configs] == list(range(24))


def test_ends_of_every_range_lie_at_0_and_1_on_its_own_scale() -> None:
    lr = Parameter(name="lr", low=1e-4, high=1.0, log=True)
    decay = Parameter(name="weight_decay", low=1.0, high=3.0)
    scale = Parameter(name="init_scale", low=2.0**-20, high=2.0**40, power_of_two=True)
    interval = Parameter(name="growth_interval", low=0.005, high=0.5, log=True, fraction_of_trial=True)
    assert [locate_setting(lr, value, 1000) for value in (1e-4, 1e-2, 1.0)] == pytest.approx([0, 0.5, 1])
    assert locate_setting(decay, 1.5, 1000) == 0.25
    assert locate_setting(scale, 2.0**10, 1000) == pytest.approx(0.5)
    assert locate_setting(interval, 500, 1000) == pytest.approx(1)
    assert locate_setting(interval, 500, 10_000) == pytest.approx(0.5)  # 0.05, between 0.005 and 0.5


def test_a_differing_choice_is_as_far_as_the_ends_of_a_range_whichever_choice_it_is() -> None:
    configs = [make_config(backoff_factor=factor) for factor in (0.5, 0.99)]
    configs.append(make_config(lr=1.0, backoff_factor=0.9))
    curves = make_curves(configs, [make_curve(0.9)] * 3, "stress")
    asked = make_config(lr=1e-4 * 10**0.4, backoff_factor=0.9)  # lr: 0.1 from the low end
    just_less = CurveTable(curves, weights={"lr": 1.0, "backoff_factor": 0.85})
    just_more = CurveTable(curves, weights={"lr": 1.0, "backoff_factor": 0.95})
    assert just_less.find_nearest(asked) == 0  # 0.15 in lr and 0.85, against 0.9 in lr
    assert just_more.find_nearest(asked) == 2


def test_weights_decide_which_curve_is_nearer() -> None:
    configs = [make_config(lr=1e-3, batch_size=1024), make_config(lr=1e-2, batch_size=64)]
    curves = make_curves(configs, [make_curve(0.9)] * 2, "stress")
    asked = make_config(lr=1e-3, batch_size=64)
    assert CurveTable(curves, weights={"lr": 1.0, "batch_size": 0.1}).find_nearest(asked) == 0
    assert CurveTable(curves, weights={"lr": 1.0, "batch_size": 1.0}).find_nearest(asked) == 1


def test_lookup_error_leaves_each_curve_out() -> None:
    table = make_table(make_curve(0.1), make_curve(0.5), make_curve(0.6))
    assert table.measure_lookup() == pytest.approx([0.4, 0.4, 0.1])  # the middle one's neighbours tie: the first


def test_space_with_conditions_is_refused() -> None:
    with pytest.raises(InputError, match="must have no parameter with when"):
        CurveTable(make_curves([TrialConfig(precision="fp32")], [make_curve(0.9)], "precision"))


# The loop


@EVERY
@pytest.mark.parametrize("budget", [1, 50, 61])
def test_replay_spends_exactly_the_budget(table: CurveTable, replay: Replay, budget: int) -> None:
    trials = replay(make_problem(table, budget=budget))
    assert sorted(itertools.chain(*(trial.spent_at for trial in trials))) == list(range(1, budget + 1))


@EVERY
def test_no_more_trials_run_at_a_time_than_there_are_slots(table: CurveTable, replay: Replay) -> None:
    trials = replay(make_problem(table))
    for spent in range(1, 61):
        assert sum(bool(t.spent_at) and t.spent_at[0] <= spent <= t.spent_at[-1] for t in trials) <= 4
    assert sum(trial.status is None for trial in trials) <= 4


@EVERY
def test_a_seed_gives_the_same_search_again_and_another_seed_another(table: CurveTable, replay: Replay) -> None:
    first, again, other = (replay(make_problem(table, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert [trial.config for trial in first] != [trial.config for trial in other]


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_with_one_seed_all_programs_start_with_the_same_ten_random_trials(table: CurveTable, objective: str) -> None:
    problem = make_problem(table, objective, budget=96)
    programs = [STOCK, RANDOM, dataclasses.replace(OURS, build_searcher=build_amp_search_without_defaults)]
    runs = [replay_optuna(problem), *(replay_program(program, problem) for program in programs)]
    starts = [[trial.config for trial in run[:10]] for run in runs]
    assert starts[0] == starts[1] == starts[2] == starts[3]
    # The defaults go before them in ours, and in stock where it is told to.
    defaults = make_config(growth_interval=2000)
    for first in (OURS, dataclasses.replace(STOCK, build_searcher=build_optuna_search_with_defaults)):
        assert [trial.config for trial in replay_program(first, problem)[:10]] == [defaults, *starts[0][1:10]]


def test_suggestions_are_answered_by_the_nearest_curve(table: CurveTable) -> None:
    trials = replay_program(OURS, make_problem(table))
    assert [trial.curve for trial in trials] == [table.find_nearest(trial.config) for trial in trials]


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_nan_trial_keeps_its_slot_to_the_end_under_stock_and_ends_at_once_under_ours(objective: str) -> None:
    table = make_table(make_curve(*[0.9] * 8), make_curve(*[NAN] * 8))
    problem = Problem(table=table, objective=objective, seed=0, budget=16, slots=2)
    searcher = Listed([1e-4, 1e-3])
    stock = run_trials(searcher, build_asha(problem), problem, is_never_over)
    ours = run_trials(searcher, build_amp_scheduler(problem), problem, is_state_hopeless)
    assert (ours[1].status, len(ours[1].spent_at)) == (TrialStatus.DIVERGED, 1)
    if objective == "val_loss":
        assert (stock[1].status, len(stock[1].spent_at)) == (TrialStatus.COMPLETED, 8)
    else:  # a model of NaN has an accuracy like any other, that of class 0: ASHA stops it as a bad one
        assert (stock[1].status, len(stock[1].spent_at)) == (TrialStatus.STOPPED, 1)


def test_trials_in_the_slots_report_in_turn_and_a_freed_slot_is_filled_at_once() -> None:
    table = make_table(make_curve(*[0.9] * 8), make_curve(*[NAN] * 8))
    problem = Problem(table=table, objective="val_loss", seed=0, budget=9, slots=3)
    trials = run_trials(Listed([1e-4, 1e-3, 1e-4]), FIFOScheduler(), problem, is_state_hopeless)
    # The second ends at its first report, and the fourth takes its slot: between the first and the third.
    assert [trial.spent_at for trial in trials[:4]] == [[1, 4, 7], [2], [3, 6, 9], [5, 8]]


def test_a_trial_stopped_by_the_scheduler_is_not_trained_on() -> None:
    table = make_table(make_curve(*[0.9] * 8), make_curve(*[0.5] * 8))
    problem = Problem(table=table, objective="val_accuracy", seed=0, budget=10, slots=2)
    trials = run_trials(Listed([1e-4, 1e-3]), build_asha(problem), problem, is_never_over)
    assert (trials[1].status, trials[1].spent_at) == (TrialStatus.STOPPED, [2])


# Ray's order of calls


@dataclasses.dataclass
class Recording:
    """A searcher and a scheduler that write down what they are told, and stop a trial at an epoch."""

    stop_at: int
    calls: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def on_trial_result(self, *arguments: Any) -> str:
        *who, result = arguments
        place = "searcher" if isinstance(who[-1], str) else "scheduler"
        self.calls.append((place, "result", result["epoch"], result["done"]))
        return TrialScheduler.STOP if result["epoch"] >= self.stop_at else TrialScheduler.CONTINUE

    def on_trial_complete(self, *arguments: Any, **named: Any) -> None:
        place = "searcher" if "result" in named else "scheduler"
        result = named["result"] if named else arguments[-1]
        self.calls.append((place, "complete", result["epoch"], result["done"]))


def process_as_ray(recording: Recording, result: dict[str, Any]) -> bool:
    """The very code of Ray's controller, on a controller and a trial that hold no more than it reads."""
    decisions: list[str] = []
    trial: Any = types.SimpleNamespace(
        trial_id="a", is_saving=False, status=Trial.RUNNING, stopping_criterion={}, last_result=None
    )
    trial.should_stop = lambda flat: Trial.should_stop(trial, flat)
    trial.update_last_result = lambda given: setattr(trial, "last_result", given)

    def ignore(*_: Any, **__: Any) -> None: ...

    controller: Any = types.SimpleNamespace(
        _total_time=0,
        _iteration=0,
        _trials=[],
        _live_trials=types.SimpleNamespace(discard=ignore),
        _scheduler_alg=recording,
        _search_alg=recording,
        _stopper=lambda *_: False,
        _callbacks=types.SimpleNamespace(on_trial_result=ignore, on_trial_complete=ignore),
        _wrapped=lambda: None,
        _validate_result_metrics=ignore,
        _mark_trial_to_checkpoint=ignore,
        _checkpoint_trial_if_needed=ignore,
        _schedule_graceful_trial_stop=ignore,
        _queue_decision=lambda _, decision: decisions.append(decision),
    )
    TuneController._process_trial_result(controller, trial, result)
    if decisions == [TrialScheduler.STOP]:
        TuneController.stop_trial(controller, trial)
        return False
    return True


@pytest.mark.parametrize("stop_at", [1, 3, 99])
def test_searcher_and_scheduler_are_called_as_rays_controller_calls_them(stop_at: int) -> None:
    ours, ray = Recording(stop_at), Recording(stop_at)
    trial = ReplayedTrial(trial_id="a", config=make_config(), curve=0)
    for metrics in make_curve(*[0.9] * 4):
        report = report_epoch(metrics, max_epochs=4, is_over=is_never_over)
        goes_on = _process_result(ours, ours, trial, dict(report))
        assert goes_on == process_as_ray(ray, dict(report))
        if not goes_on:
            break
    assert ours.calls == ray.calls
    assert len(ours.calls) == {1: 3, 3: 7, 99: 8}[stop_at]


# What is reported


def test_reports_are_those_of_the_trainable() -> None:
    first, second = make_curve(0.9, 0.8)
    running = report_epoch(first, max_epochs=2, is_over=is_state_hopeless)
    assert (running["status"], running["done"], running["training_iteration"]) == ("running", False, 1)
    completed = report_epoch(second, max_epochs=2, is_over=is_state_hopeless)
    assert (completed["status"], completed["done"], completed["val_accuracy"]) == ("completed", True, 0.8)
    [diverged] = make_curve(NAN)
    assert report_epoch(diverged, max_epochs=2, is_over=is_state_hopeless)["status"] == "diverged"
    assert report_epoch(diverged, max_epochs=2, is_over=is_never_over)["status"] == "running"


def test_a_collapsed_trial_is_over_for_our_states_and_goes_on_for_a_loop_that_watches_its_loss() -> None:
    [collapsed] = make_curve(0.1, state="collapsed")
    [diverged] = make_curve(NAN)
    [steady] = make_curve(0.1)
    verdicts = [(is_state_hopeless(m), is_loss_infinite(m), is_never_over(m)) for m in (collapsed, diverged, steady)]
    assert verdicts == [(True, False, False), (True, True, False), (False, False, False)]


def test_record_holds_the_trial_as_it_stood_then() -> None:
    table = make_table(make_curve(*[0.9] * 8), make_curve(*[NAN] * 8))
    trial = ReplayedTrial(trial_id="a", config=make_config(), curve=0, spent_at=[3, 7, 11], status=TrialStatus.STOPPED)
    then, at_the_end = (build_record(trial, table.curves, spent) for spent in (10, 11))
    assert (then.status, len(then.epochs)) == (TrialStatus.INTERRUPTED, 2)
    assert (at_the_end.status, len(at_the_end.epochs)) == (TrialStatus.STOPPED, 3)


# Optuna alone


def test_optuna_alone_fails_a_trial_without_a_value_and_completes_the_others() -> None:
    table = make_table(make_curve(*[0.9] * 8), make_curve(*[NAN] * 8), make_curve(*[0.8] * 8), make_curve(*[NAN] * 8))
    study, trials = run_optuna(Problem(table=table, objective="val_loss", seed=1, budget=100))
    for frozen, trial in zip(study.get_trials(), trials, strict=True):
        ended = frozen.state.is_finished()
        assert ended == (trial.status is not None)
        if trial.status is TrialStatus.COMPLETED:
            assert (frozen.state, frozen.value) == (optuna.trial.TrialState.COMPLETE, trial_loss(trial, table))
        if frozen.state is optuna.trial.TrialState.FAIL:
            assert trial.curve in (1, 3)
    assert {trial.state for trial in study.get_trials()} >= set(optuna.trial.TrialState) - {
        optuna.trial.TrialState.WAITING
    }


def trial_loss(trial: ReplayedTrial, table: CurveTable) -> float | None:
    return table.curves.epochs[trial.curve][-1].val_loss


def test_space_of_a_recording_is_read_from_the_recording(tmp_path: Path) -> None:
    curves = make_stress_table(4)
    text = str(curves.origin["space_text"]).replace("high: 1.0,", "high: 2.0,")
    changed = Curves(configs=curves.configs, epochs=curves.epochs, origin={**curves.origin, "space_text": text})
    space = CurveTable(changed).space
    assert (space.source, space.parameters[0].high) == ("stress", 2.0)
