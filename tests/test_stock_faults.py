"""Faults of Ray Tune, Optuna and GradScaler in a search over mixed precision, and what we do on the same inputs.

Each test shows the fault first, on the stock parts alone. Should such a half fail, Ray, Optuna or torch has mended it:
then our repair may be superfluous.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import past_runs as made
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.samplers import RandomSampler, TPESampler
from optuna.samplers._tpe.sampler import _split_trials
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
from ray.tune.search.optuna import OptunaSearch
from torch.nn.functional import cross_entropy

from benchmarks.quality.replay import SameDraws
from tune_amp.cluster.session import RaySession, ray_session
from tune_amp.results.progress import Observer
from tune_amp.results.records import load_trials
from tune_amp.search.history import RecordedTrial
from tune_amp.search.options import SearchOptions
from tune_amp.search.plan import plan_search
from tune_amp.search.run import run_search
from tune_amp.search.schedulers import build_scheduler
from tune_amp.search.study import AmpSearch
from tune_amp.space.space import SearchSpace, load_space
from tune_amp.training.batches import DeviceSplit, batch_indices, scale_images
from tune_amp.training.data import Dataset
from tune_amp.training.evaluation import evaluate
from tune_amp.training.models import build_model
from tune_amp.training.run import TrainingRun
from tune_amp.training.task import ImageClassification
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import OBJECTIVES, TrialConfig, TrialStatus

NAN, INF = math.nan, math.inf
MAX_EPOCHS = 8
TRAIN_IMAGES = 1413
SHARED = {"model": "simple_net", "dataset": "digits", "max_epochs": MAX_EPOCHS, "seed": 0}
LR = "parameters:\n  lr: {low: 1.0e-4, high: 1.0, log: true}\n"
LR_AND_BATCH = f"{LR}  batch_size: {{low: 64, high: 1024, power_of_two: true}}\n"

MakeSpace = Callable[[str], SearchSpace]
MakeSearch = Callable[..., AmpSearch]


@pytest.fixture
def make_ours(tmp_path: Path) -> MakeSearch:
    def make(
        space: SearchSpace, *, seed: int = 0, sampler: str = "tpe", past: Sequence[RecordedTrial] = ()
    ) -> AmpSearch:
        """Our searcher, which goes on where it has a past."""
        name = "run"
        (tmp_path / name).mkdir(exist_ok=True)
        return AmpSearch(
            space,
            SHARED,
            train_images=TRAIN_IMAGES,
            objectives=("val_accuracy",),
            seed=seed,
            folder=tmp_path / name,
            study_name=name,
            sampler=sampler,
            num_samples=32,
            past=past,
        )

    return make


def make_stock(space: Any, draws: int | None = None, **settings: Any) -> Any:
    """Ray's searcher as its documentation shows it, on a mapping of distributions or on one of our spaces.

    With ``draws`` it draws what ours draws with that seed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line for every study is of no interest here
    if isinstance(space, SearchSpace):
        space = functools.partial(space.suggest, train_images=TRAIN_IMAGES, max_epochs=MAX_EPOCHS)
    if draws is not None:
        return SameDraws(space, metric="val_accuracy", mode="max", draws=draws, **settings)
    return OptunaSearch(space, metric="val_accuracy", mode="max", **settings)


def suggest(search: Any, trial_id: str) -> dict[str, Any]:
    """The settings that either searcher suggests."""
    suggested = search.suggest(trial_id)
    return vars(suggested) if isinstance(suggested, TrialConfig) else suggested


def make_stock_asha(grace_period: int = 1) -> Any:
    settings: dict[str, Any] = {"max_t": MAX_EPOCHS, "grace_period": grace_period, "reduction_factor": 2}
    return ASHAScheduler(time_attr="epoch", metric="val_accuracy", mode="max", **settings)


def make_stock_median() -> Any:
    # A time slice without an end: else Ray pauses trials whenever others wait, which is another matter.
    never: Any = INF
    return MedianStoppingRule(
        time_attr="epoch", metric="val_accuracy", mode="max", grace_period=1, min_time_slice=never
    )


def make_our_scheduler(name: str = "asha") -> Any:
    options = SearchOptions(scheduler=name, max_epochs=MAX_EPOCHS, grace_period=1, reduction_factor=2)
    return build_scheduler(options, lambda trial: None)


class Trial:
    """What the schedulers know of Ray's Trial."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def report(epoch: int, accuracy: float, status: str = "running") -> dict[str, Any]:
    """What one of our trials reports."""
    return {
        "epoch": epoch,
        "training_iteration": epoch,
        "val_accuracy": accuracy,
        "val_loss": 1 - accuracy,
        "status": status,
        "done": status != "running",
    }


def train_together(scheduler: Any, curves: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """Trials side by side, epoch after epoch; how many epochs each one got."""
    trials = {name: Trial(name) for name in curves}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)
    spent = dict.fromkeys(curves, 0)
    alive = list(curves)
    for epoch in range(1, MAX_EPOCHS + 1):
        for name in alive.copy():
            spent[name] = epoch
            if scheduler.on_trial_result(None, trials[name], report(epoch, curves[name][epoch - 1])) == "STOP":
                alive.remove(name)
    return spent


def search_in_turn(
    search: Any, scheduler: Any, learn: Callable[[int, Mapping[str, Any], int], float], count: int
) -> list[int]:
    """Trials one after another, told of as Tune does; how many epochs each one got.

    Args:
        search: suggests.
        scheduler: stops.
        learn: the accuracy of a trial, from its number, its settings and the epoch.
        count: trials.
    """
    spent = []
    for number in range(count):
        trial = Trial(str(number))
        config = suggest(search, trial.trial_id)
        scheduler.on_trial_add(None, trial)
        for epoch in range(1, MAX_EPOCHS + 1):
            status = "completed" if epoch == MAX_EPOCHS else "running"
            result = report(epoch, learn(number, config, epoch), status)
            if result["done"]:
                scheduler.on_trial_complete(None, trial, result)
            else:
                result["done"] = scheduler.on_trial_result(None, trial, result) == "STOP"
            if result["done"]:
                search.on_trial_complete(trial.trial_id, result)
                break
            search.on_trial_result(trial.trial_id, result)
        spent.append(epoch)
    return spent


def study_of(search: Any) -> optuna.Study:
    """Ours, or Ray's."""
    return search.study if isinstance(search, AmpSearch) else search._ot_study


def states(search: Any) -> list[TrialState]:
    return [trial.state for trial in study_of(search).trials]


# Fact 1


@pytest.mark.parametrize(("name", "make_rule"), [("asha", make_stock_asha), ("median", make_stock_median)])
def test_stock_schedulers_stop_a_bad_finite_trial_and_never_one_whose_metric_became_nan(
    name: str, make_rule: Callable[[], Any]
) -> None:
    curves = {
        "good": [0.9] * 8,
        "fair": [0.8] * 8,
        "middling": [0.7] * 8,
        "diverged": [0.85] + [NAN] * 7,
        "bad": [0.1] * 8,
    }
    stock = train_together(make_rule(), curves)
    # Should this fail, Ray has mended it: `nan < cutoff` is False, and NaN never replaces the best value so far.
    assert stock["diverged"] == max(stock.values()) == MAX_EPOCHS
    assert stock["bad"] == 1
    ours = train_together(make_our_scheduler(name), curves)
    assert (ours["good"], ours["diverged"], ours["bad"]) == (MAX_EPOCHS, 2, 1)


def test_stock_asha_measures_the_others_without_the_trial_that_diverged() -> None:
    curves = {"good": [0.9] * 8, "diverged": [NAN] * 8, "middling": [0.5] * 8}
    # Should this fail, Ray has mended it: the cutoff is the only finite value, 0.9.
    assert train_together(make_stock_asha(), curves) == {"good": MAX_EPOCHS, "diverged": MAX_EPOCHS, "middling": 1}
    # Ours: the median of 0 and 0.9. At epoch 2 the one that diverged is gone.
    assert train_together(make_our_scheduler(), curves) == {"good": MAX_EPOCHS, "diverged": 1, "middling": 2}


def test_stock_median_rule_measures_the_others_without_trials_that_diverged() -> None:
    curves = {"good": [0.9] * 8, "fair": [0.8] * 8, "diverged": [NAN] * 8, "bad": [0.1] * 8}
    # Should this fail, Ray has mended it: only two trials to compare with, and it wants three.
    assert train_together(make_stock_median(), curves)["bad"] > 1
    assert train_together(make_our_scheduler("median"), curves)["bad"] == 1


# Fact 2


def test_stock_leaves_a_trial_whose_final_metric_is_nan_running_for_ever(
    make_space: MakeSpace, make_ours: MakeSearch, caplog: pytest.LogCaptureFixture
) -> None:
    space = make_space(LR)
    stock, ours = make_stock(space), make_ours(space)
    for search in (stock, ours):
        search.suggest("a")
        with caplog.at_level(logging.WARNING):  # Ray logs why, and goes on
            search.on_trial_complete("a", report(1, NAN, "diverged"))
    # Should this fail, Ray has mended it: the trial stays in the way of TPE's constant liar.
    assert states(stock) == [TrialState.RUNNING]
    assert states(ours) == [TrialState.COMPLETE]
    assert ours.study.trials[0].constraints == {"hopeless": 1.0}


def test_stock_takes_an_infinite_metric_for_the_best_value(make_space: MakeSpace, make_ours: MakeSearch) -> None:
    space = make_space(LR)
    stock, ours = make_stock(space), make_ours(space)
    for search in (stock, ours):
        for trial_id, accuracy in (("infinite", INF), ("good", 0.9)):
            search.suggest(trial_id)
            search.on_trial_complete(trial_id, report(MAX_EPOCHS, accuracy, "completed"))
    # Should this fail, Ray or Optuna has mended it.
    assert stock._ot_study.best_trial.value == INF
    assert ours.study.best_trial.value == 0.9


# Fact 3


def test_stock_tells_stopped_trials_as_complete_and_one_of_them_becomes_the_best(
    make_space: MakeSpace, make_ours: MakeSearch
) -> None:
    def learn(number: int, config: Mapping[str, Any], epoch: int) -> float:
        """The first trial is better after an epoch, and overfits."""
        return [0.9 - 0.02 * (epoch - 1), 0.85][number]

    space = make_space(LR)
    stock, ours = make_stock(space), make_ours(space)
    assert search_in_turn(stock, make_stock_asha(), learn, 2) == [MAX_EPOCHS, 1]
    # Should this fail, Ray has mended it.
    assert states(stock) == [TrialState.COMPLETE, TrialState.COMPLETE]
    assert (stock._ot_study.best_trial.number, stock._ot_study.best_value) == (1, 0.85)  # of an epoch, unconfirmed
    assert search_in_turn(ours, make_our_scheduler(), learn, 2) == [MAX_EPOCHS, 1]
    assert states(ours) == [TrialState.COMPLETE, TrialState.PRUNED]
    assert ours.study.best_trial.number == 0
    assert ours.study.best_value == pytest.approx(0.76)


def test_stock_mixes_budgets_so_that_importances_tell_which_setting_got_how_many_epochs(
    make_space: MakeSpace, make_ours: MakeSearch
) -> None:
    def learn(number: int, config: Mapping[str, Any], epoch: int) -> float:
        """Where it leads depends on the batch size alone; a small learning rate takes longer to get there."""
        slowness = -math.log10(config["lr"])
        return 0.9 - 0.01 * math.log2(config["batch_size"] / 64) - 0.2 * slowness * 0.25 ** (epoch - 1)

    def measure(study: optuna.Study) -> dict[str, float]:
        # A decomposition of variance; Optuna's default tells apart the best tenth, too few of 40 trials to be steady.
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))

    space = make_space(LR_AND_BATCH)
    stock = make_stock(space, sampler=RandomSampler(seed=3), draws=3)
    ours = make_ours(space, sampler="random", seed=3)
    stock._ot_study.enqueue_trial(space.find_defaults(train_images=TRAIN_IMAGES, max_epochs=MAX_EPOCHS))  # as ours does
    spent = search_in_turn(stock, make_stock_asha(), learn, 40)
    assert search_in_turn(ours, make_our_scheduler(), learn, 40) == spent
    assert [trial.params for trial in stock._ot_study.trials] == [trial.params for trial in ours.study.trials]
    # Should this fail, Ray has mended it. With four seeds 0.70 to 0.90 was seen, and ours 0.02 to 0.20.
    assert measure(stock._ot_study)["lr"] > 0.6
    assert measure(ours.study)["lr"] < 0.3


# Fact 4


def test_stock_forgets_trials_that_raised_and_suggests_their_region_again_and_again(
    make_space: MakeSpace, make_ours: MakeSearch
) -> None:
    out_of_memory = dict.fromkeys(OBJECTIVES, NAN) | {"status": "out_of_memory", "done": True, "error": "why"}

    def count_returns(search: Any, **ending: Any) -> int:
        """Of 40 trials after the first 20, those in the region where trials run out of memory."""
        returns = 0
        for number in range(60):
            lr = suggest(search, str(number))["lr"]
            if lr > 0.01:
                returns += number >= 20
                search.on_trial_complete(str(number), **ending)
            else:
                accuracy = 0.9 - 0.05 * abs(math.log10(lr) + 3)
                search.on_trial_complete(str(number), report(MAX_EPOCHS, accuracy, "completed"))
        return returns

    stock = make_stock({"lr": FloatDistribution(1e-4, 1.0, log=True)}, seed=1)
    ours = make_ours(make_space(LR), seed=1)
    returns = count_returns(stock, error=True), count_returns(ours, result=out_of_memory)
    # Should this fail, Ray or Optuna has mended it. At random it would be 20; with eight seeds 36 to 40 was seen,
    # since what stays unknown is attractive, and of ours 1 to 4.
    assert returns[0] > 30
    assert set(states(stock)) == {TrialState.COMPLETE, TrialState.FAIL}
    assert returns[1] < 8
    assert set(states(ours)) == {TrialState.COMPLETE}


# Fact 5


def test_optuna_ranks_a_hopeless_trial_told_as_pruned_above_a_finite_one_by_its_step(
    make_space: MakeSpace, make_ours: MakeSearch
) -> None:
    stock = optuna.create_study(direction="maximize")
    hopeless, stopped = (stock.ask({"lr": FloatDistribution(1e-4, 1.0, log=True)}) for _ in range(2))
    for trial, value, step in ((hopeless, 0.6, 26), (hopeless, NAN, 27), (stopped, 0.9, 1)):
        trial.report(value, step)
    for trial in (hopeless, stopped):
        stock.tell(trial, state=TrialState.PRUNED)
    ours = make_ours(make_space(LR))
    for trial_id in ("hopeless", "stopped"):
        ours.suggest(trial_id)
    ours.on_trial_result("hopeless", report(26, 0.6))
    ours.on_trial_complete("hopeless", report(27, NAN, "diverged"))
    ours.on_trial_complete("stopped", report(1, 0.9) | {"done": True})
    # Should this fail, Optuna has mended it: TPE orders pruned trials by (-step, value).
    assert find_best_for_tpe(stock) == 0
    assert find_best_for_tpe(ours.study) == 1


def find_best_for_tpe(study: optuna.Study) -> int:
    [best], _ = _split_trials(study, study.trials, 1)
    return best.number


# Fact 6


def test_stock_fixes_a_pruner_that_never_prunes_and_tells_no_trial_as_pruned(
    make_space: MakeSpace, make_ours: MakeSearch
) -> None:
    def learn(number: int, config: Mapping[str, Any], epoch: int) -> float:
        return 0.9 - 0.08 * number

    space = make_space(LR)
    stock, ours = make_stock(space), make_ours(space)
    search_in_turn(stock, make_stock_asha(), learn, 10)
    stock.suggest("last")
    stock.on_trial_result("last", report(1, 0.0))
    # Should these fail, Ray has mended it. Optuna's default, the median rule, would prune.
    assert not stock._ot_trials["last"].should_prune()
    stock._ot_study.pruner = optuna.pruners.MedianPruner()
    assert stock._ot_trials["last"].should_prune()
    assert TrialState.PRUNED not in states(stock)
    # Ours leaves stopping to the scheduler, and tells Optuna of it.
    search_in_turn(ours, make_our_scheduler(), learn, 10)
    assert states(ours) == [TrialState.COMPLETE] + [TrialState.PRUNED] * 9


def test_stock_cannot_start_from_earlier_trials_of_a_conditional_space(make_ours: MakeSearch) -> None:
    space = load_space("precision")
    earlier = make_ours(space)
    for number in range(12):
        earlier.suggest(str(number))
        earlier.on_trial_complete(str(number), report(MAX_EPOCHS, number / 12, "completed"))
    points = [trial.params for trial in earlier.study.trials]
    values = [trial.value for trial in earlier.study.trials]
    # Should this fail, Ray has mended it.
    with pytest.raises(TypeError, match="not yet supported when using `evaluated_rewards`"):
        make_stock(space, points_to_evaluate=points, evaluated_rewards=values)
    past = [
        made.recorded(str(number), earlier.find_number(str(number)), place=number + 1, status="completed")
        for number in range(12)
    ]
    ours = make_ours(space, past=past)
    assert [trial.params for trial in ours.study.trials] == points
    assert [trial.value for trial in ours.study.trials] == values
    ours.suggest("next")
    assert ours.study.trials[-1].number == 12


def test_stock_samples_conditional_parameters_apart_from_the_others_without_a_word(
    make_ours: MakeSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_alone = TPESampler.sample_independent
    alone: set[str] = set()

    def note(sampler: TPESampler, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        if trial.number >= 20:  # the first ten are drawn at random, and any parameter has been seen soon after
            alone.add(name)
        return sample_alone(sampler, study, trial, name, distribution)

    def list_sampled_alone(search: Any) -> set[str]:
        alone.clear()
        for number in range(30):
            search.suggest(str(number))
            search.on_trial_complete(str(number), report(MAX_EPOCHS, number / 30, "completed"))
        assert any("log2(init_scale)" in trial.params for trial in study_of(search).trials[20:])
        return alone.copy()

    monkeypatch.setattr(TPESampler, "sample_independent", note)
    space = load_space("precision")
    # Should this fail, Ray or Optuna has mended it: the multivariate TPE, Optuna's default, needs `group=True`.
    assert list_sampled_alone(make_stock(space, seed=1)) == {"log2(init_scale)", "growth_interval/trial_steps"}
    assert list_sampled_alone(make_ours(space, seed=2)) == set()


# Fact 10


SKIPPED_OF_EPOCH = (11, 2, 0, 0)
SPACE = """
parameters:
  lr: {choices: [1.0e-3, 1.0e-8]}
fixed: {precision: fp16, batch_size: 128, init_scale: 2^35}
"""
SEED_WITH_BAD = 2
"""Of which the first draw from the two choices is the bad one; before it, our search tries PyTorch's default, 1e-3."""


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with ray_session(num_cpus=1, num_gpus=0, run="test_stock_faults") as session:
        yield session


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("session")
def test_result_of_a_trial_that_asha_stopped_knows_only_the_counters_of_its_last_epoch(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        for epoch, skipped in enumerate(SKIPPED_OF_EPOCH, start=1):
            tune.report({"epoch": epoch, "val_accuracy": config["lr"], "skipped_steps": skipped})
        tune.report({"epoch": 4, "val_accuracy": config["lr"], "all_skipped_steps": sum(SKIPPED_OF_EPOCH)})

    space = {"lr": FloatDistribution(1e-6, 1e-2, log=True)}
    tuner = tune.Tuner(
        train,
        tune_config=tune.TuneConfig(
            num_samples=2,
            search_alg=make_stock(space, points_to_evaluate=[{"lr": 1e-2}, {"lr": 1e-6}]),
            scheduler=make_stock_asha(grace_period=2),
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()
    metrics: list[Any] = [results[number].metrics for number in range(2)]
    finished, stopped = sorted(metrics, key=lambda last: last["config"]["lr"], reverse=True)
    assert finished["all_skipped_steps"] == 13
    # Should these fail, Ray has mended it: the stop kills the function, which comes to no summary.
    assert (stopped["epoch"], stopped["skipped_steps"]) == (2, 2)
    assert "all_skipped_steps" not in stopped


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("session")
def test_our_record_of_a_trial_that_asha_stopped_counts_over_all_of_its_epochs(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "run").mkdir()
    options = SearchOptions(
        num_samples=2,
        max_epochs=5,
        grace_period=2,
        max_concurrent=1,
        gpus_per_trial=0.0,
        seed=SEED_WITH_BAD,
        confirm_seeds=0,
    )
    plan = plan_search(load_space(str(tmp_path / "space.yaml")), digits, options, folder=tmp_path / "run")
    run_search(plan, Observer())
    finished, stopped = load_trials(tmp_path / "run")
    assert [finished.status, stopped.status] == [TrialStatus.COMPLETED, TrialStatus.STOPPED]
    assert (finished.config.lr, stopped.config.lr) == (1e-3, 1e-8)
    counts = [epoch.skipped_steps for epoch in stopped.epochs]  # from epochs.parquet; 11 steps each
    assert len(counts) == 2
    assert counts[0] == 11 < counts[1] < 22
    totals = pq.read_table(tmp_path / "run" / "trials.parquet").column("skipped_steps").to_pylist()
    assert totals == [finished.epochs[-1].skipped_steps, counts[1]]


# Facts 17, 24 and 26: settings of the scaler with which training comes to nothing


NAN_GRADIENTS = """
import math
import torch

class Net(torch.nn.Linear):
    def forward(self, images):
        logits = super().forward(images.flatten(1))
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * math.nan)
        return logits

def net(shape, classes):
    return Net(math.prod(shape), classes)
"""


@pytest.fixture(scope="module")
def data(digits: Dataset) -> TrainingData:
    return TrainingData(digits.train, digits.validation, digits.num_classes, torch.device("cpu"))


def make_config(**settings: Any) -> TrialConfig:
    return TrialConfig(
        **{"precision": "fp16", "dataset": "digits", "batch_size": 128, "max_epochs": MAX_EPOCHS, **settings}
    )


def train_as_documented(config: TrialConfig, data: TrainingData) -> tuple[list[float], list[float]]:
    """The loop of PyTorch's page on automatic mixed precision, in which nobody looks at the scale.

    Returns:
        Validation accuracies after every epoch, and the loss scale after every step.
    """
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    scaling = data.input_scaling(config.input_scaling)
    model = build_model(config.model, data.input_shape, data.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    assert config.init_scale is not None
    scaler = torch.amp.GradScaler("cpu", init_scale=config.init_scale)
    assert isinstance(data.train, DeviceSplit)
    assert data.validation is not None
    accuracies, scales = [], []
    for _ in range(config.max_epochs):
        for batch in batch_indices(len(data.train.labels), config.batch_size, order, data.device):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                logits = model(scale_images(data.train.images[batch], scaling))
                loss = cross_entropy(logits, data.train.labels[batch])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        accuracies.append(
            evaluate(ImageClassification(), model, data.validation, scaling, batch_size=config.batch_size).number(
                "accuracy"
            )
        )
    return accuracies, scales


def test_stock_grad_scaler_halves_its_scale_for_ever_where_gradients_are_nan(
    data: TrainingData, write_module: Callable[[str], str]
) -> None:
    config = make_config(model=f"{write_module(NAN_GRADIENTS)}:net")
    _, scales = train_as_documented(config, data)
    # Should this fail, torch has mended it: 88 steps, no floor, and no word.
    assert scales == [2.0 ** (16 - step) for step in range(1, 8 * 11 + 1)]
    run = TrainingRun(config, data)
    [metrics] = run.epochs()
    assert metrics.state == "collapsed"
    assert (run.hopeless or "").startswith("every step is skipped, and gradients overflow even at")


def test_stock_asha_gives_a_starved_trial_its_full_budget_where_another_is_worse(data: TrainingData) -> None:
    """At 2^-30 every gradient is zero in fp16: nothing is ever learnt, and the accuracy is that of initial weights."""
    configs = [make_config(init_scale=2.0**-30, seed=seed) for seed in range(2)]
    curves = {str(config.seed): train_as_documented(config, data)[0] for config in configs}
    assert [len(set(accuracies)) for accuracies in curves.values()] == [1, 1]  # epoch after epoch
    worse, better = sorted(curves, key=lambda seed: curves[seed][0])
    assert curves[worse][0] < curves[better][0] < 0.25
    # Should this fail, Ray has mended it: it compares trials, and knows of no reason but their order to stop one.
    assert train_together(make_stock_asha(), {better: curves[better], worse: curves[worse]}) == {
        better: MAX_EPOCHS,
        worse: 1,
    }
    for config in configs:
        run = TrainingRun(config, data)
        [metrics] = run.epochs()
        assert metrics.state == "collapsed"
        assert (run.hopeless or "").startswith("gradients vanish in fp16")
