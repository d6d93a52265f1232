import dataclasses
import logging
import math
import pickle
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers._tpe.sampler import _split_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from tune_amp.config import OBJECTIVES, TrialConfig, TrialStatus
from tune_amp.searcher import STUDY_FILE, AmpSearch, find_status
from tune_amp.space import SearchSpace, load_space
from tune_amp.stopping import WORST_VALUES

SHARED = {"model": "conv_net", "dataset": "digits", "max_epochs": 3, "seed": 11}
LR_SPACE = "parameters:\n  lr: {low: 1.0e-4, high: 1.0, log: true}\n"
NAN = math.nan

MakeSearch = Callable[..., AmpSearch]


@pytest.fixture
def make_search(tmp_path: Path) -> MakeSearch:
    def make(
        space: str | SearchSpace = "mnist_amp", objective: str = "val_accuracy", seed: int = 0, name: str = "run"
    ) -> AmpSearch:
        folder = tmp_path / name
        folder.mkdir()
        loaded = load_space(space) if isinstance(space, str) else space
        return AmpSearch(loaded, SHARED, objective=objective, seed=seed, folder=folder, study_name=name)

    return make


@pytest.fixture
def lr_space(tmp_path: Path) -> SearchSpace:
    path = tmp_path / "lr.yaml"
    path.write_text(LR_SPACE)
    return load_space(str(path))


def report(epoch: int, accuracy: float, status: str = "running", **changes: Any) -> dict[str, Any]:
    done = status != "running"
    return {
        "epoch": epoch,
        "val_accuracy": accuracy,
        "val_loss": 1 - accuracy,
        "status": status,
        "done": done,
        "training_iteration": epoch,
    } | changes


def stop(epoch: int, accuracy: float) -> dict[str, Any]:
    """The last result of a trial that the scheduler stopped: still running, but done."""
    return report(epoch, accuracy, done=True)


def failure(status: str) -> dict[str, Any]:
    return {"val_accuracy": NAN, "val_loss": NAN, "status": status, "done": True, "error": "why"}


def finish(
    search: AmpSearch, trial_id: str, *epochs: float, end: Mapping[str, Any] | None, error: bool = False
) -> None:
    search.suggest(trial_id)
    for epoch, accuracy in enumerate(epochs, start=1):
        search.on_trial_result(trial_id, report(epoch, accuracy))
    search.on_trial_complete(trial_id, None if end is None else dict(end), error=error)


def stored(search: AmpSearch, trial_id: str) -> FrozenTrial:
    [trial] = [t for t in search.study.trials if t.user_attrs.get("trial_id") == trial_id]
    return trial


# Every outcome, told for what it is


def test_completed_trial_is_told_complete_with_the_value_of_its_full_budget(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "a", 0.5, 0.7, end=report(3, 0.6, "completed"))
    trial = stored(search, "a")
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.6)
    assert trial.intermediate_values == {1: 0.5, 2: 0.7, 3: 0.6}
    assert trial.constraints == {}
    assert trial.user_attrs["status"] == "completed"


def test_stopped_trial_is_told_pruned_where_stock_tells_complete(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "a", 0.5, end=stop(2, 0.4))
    trial = stored(search, "a")
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.4)
    assert trial.intermediate_values == {1: 0.5, 2: 0.4}
    assert trial.constraints == {}
    stock = make_stock()
    stock.suggest("a")
    stock.on_trial_result("a", report(1, 0.5))
    stock.on_trial_complete("a", stop(2, 0.4))
    [told] = stock._ot_study.trials
    assert told.state is TrialState.COMPLETE  # Ray's fault: a value at a low budget among those at the full one


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("end", [report(2, NAN, "diverged"), failure("out_of_memory")])
def test_diverged_and_out_of_memory_trials_are_told_infeasible_with_the_worst_value(
    make_search: MakeSearch, objective: str, end: dict[str, Any]
) -> None:
    search = make_search(objective=objective)
    finish(search, "a", 0.75, end=end)
    trial = stored(search, "a")
    assert (trial.state, trial.value) == (TrialState.COMPLETE, WORST_VALUES[objective])
    assert trial.intermediate_values == {1: {"val_accuracy": 0.75, "val_loss": 0.25}[objective]}
    assert trial.constraints == {end["status"]: 1.0}
    assert trial.user_attrs["status"] == end["status"]


def test_trial_that_diverged_with_a_finite_accuracy_is_not_told_that_accuracy(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "good", end=report(3, 0.5, "completed"))
    finish(search, "diverged", end=report(1, 0.99, "diverged", val_loss=NAN))
    assert stored(search, "diverged").value == 0.0
    assert search.study.best_trial.user_attrs["trial_id"] == "good"


@pytest.mark.parametrize(
    ("end", "error", "status"),
    [
        (failure("failed"), False, "failed"),
        (None, True, "failed"),
        (report(1, 0.5), True, "failed"),
        (None, False, "interrupted"),
        (report(2, 0.5), False, "interrupted"),
    ],
)
def test_failed_and_interrupted_trials_are_told_failed(
    make_search: MakeSearch, end: dict[str, Any] | None, error: bool, status: str
) -> None:
    search = make_search()
    finish(search, "a", 0.5, end=end, error=error)
    trial = stored(search, "a")
    assert (trial.state, trial.value) == (TrialState.FAIL, None)
    assert trial.constraints == {}
    assert trial.user_attrs["status"] == status


def make_stock(space: SearchSpace | None = None) -> Any:
    loaded = load_space("mnist_amp") if space is None else space
    sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, constant_liar=True)
    return OptunaSearch(loaded.suggest, metric="val_accuracy", mode="max", sampler=sampler)


def test_nan_leaves_a_trial_running_under_stock_and_never_under_ours(
    make_search: MakeSearch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = make_stock()
    stock.suggest("a")
    with caplog.at_level(logging.WARNING):
        stock.on_trial_complete("a", report(1, NAN, "diverged"))
    # Ray's fault: running for ever, in the way of the constant liar. Should this fail, Ray has mended it.
    assert [trial.state for trial in stock._ot_study.trials] == [TrialState.RUNNING]

    search = make_search()
    statuses = [str(status) for status in TrialStatus if status not in ("completed", "stopped", "interrupted")]
    for status in statuses:
        finish(search, f"end-{status}", NAN, end=report(2, NAN, status))
        finish(search, f"failure-{status}", end=failure(status))
    assert TrialState.RUNNING not in {trial.state for trial in search.study.trials}
    assert all(math.isfinite(v) for trial in search.study.trials for v in trial.intermediate_values.values())


# What the sampler makes of it


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("hopeless", [report(3, NAN, "diverged"), failure("out_of_memory")])
def test_hopeless_trials_rank_below_every_other_trial_for_tpe(
    make_search: MakeSearch, objective: str, hopeless: dict[str, Any]
) -> None:
    search = make_search(objective=objective)
    finish(search, "hopeless-first", 0.99, 0.99, end=hopeless)  # good until it was not
    finish(search, "completed-worst", end=report(3, 0.0, "completed", val_loss=1e8))
    finish(search, "pruned-worst", end=stop(1, 0.0))
    finish(search, "hopeless-last", end=hopeless)
    finish(search, "completed-good", end=report(3, 0.9, "completed"))
    order: list[str] = []
    for n_below in range(1, 6):
        below, above = _split_trials(search.study, search.study.trials, n_below)
        assert len(below) + len(above) == 5
        [joined] = {trial.user_attrs["trial_id"] for trial in below} - set(order)
        order.append(joined)
    assert order[:3] == ["completed-good", "completed-worst", "pruned-worst"]


def test_tpe_avoids_a_region_where_trials_diverge_and_returns_to_it_where_they_are_told_as_failures(
    make_search: MakeSearch, lr_space: SearchSpace
) -> None:
    def accuracy(lr: float) -> float:
        return NAN if lr > 0.01 else 0.9 - 0.05 * abs(math.log10(lr) + 3)

    def count_diverged(search: Any) -> int:
        """Of 40 trials after the first 20."""
        diverged = 0
        for number in range(60):
            value = accuracy(search.suggest(str(number))["lr"])
            diverged += number >= 20 and math.isnan(value)
            search.on_trial_complete(str(number), report(3, value, "diverged" if math.isnan(value) else "completed"))
        return diverged

    ours = [count_diverged(make_search(lr_space, seed=seed, name=f"ours-{seed}")) for seed in range(2)]
    failing = [count_diverged(Failing(make_search(lr_space, seed=seed, name=f"failing-{seed}"))) for seed in range(2)]
    assert statistics.mean(ours) < 8  # 2 and 2 were seen; at random it would be 20
    assert statistics.mean(failing) > 20  # 36 and 40 were seen: what is ignored stays unknown, and so attractive


class Failing(OptunaSearch):
    """Tells a diverged trial as a failure, as stock does for one that raised."""

    def __init__(self, search: AmpSearch) -> None:
        self._search = search

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return self._search.suggest(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        assert result is not None
        if result["status"] == "diverged":
            self._search.study.tell(self._search._ot_trials[trial_id], state=TrialState.FAIL)
        else:
            self._search.on_trial_complete(trial_id, result)


# Suggestions


@pytest.mark.parametrize("space", ["mnist_amp", "precision", "quick", "stress"])
def test_suggestions_are_exactly_the_fields_of_a_trial_config(make_search: MakeSearch, space: str) -> None:
    """The spaces include a conditional one; any warning of Optuna's would be an error here."""
    search = make_search(space)
    precisions = set()
    for number in range(25):  # beyond the ten that TPE draws at random
        suggested = search.suggest(str(number))
        assert list(suggested) == [field.name for field in dataclasses.fields(TrialConfig)]
        assert vars(TrialConfig(**suggested)) == suggested
        assert suggested.items() >= SHARED.items()
        precisions.add(suggested["precision"])
        search.on_trial_complete(str(number), report(3, 0.5 + number / 100, "completed"))
    assert precisions == ({"fp32", "bf16", "fp16"} if space == "precision" else {"fp16"})


def test_suggestion_is_the_same_however_often_it_is_asked_for(make_search: MakeSearch) -> None:
    search = make_search()
    assert search.suggest("a") == search.suggest("a")
    assert len(search.study.trials) == 1


def suggest_and_tell(search: AmpSearch, numbers: range) -> list[dict[str, Any]]:
    suggestions = []
    for number in numbers:
        suggestions.append(search.suggest(str(number)))
        end = report(3, NAN, "diverged") if number % 4 == 0 else report(3, number / 100, "completed")
        search.on_trial_complete(str(number), end)
    return suggestions


def test_same_seed_gives_the_same_suggestions_and_another_seed_others(make_search: MakeSearch) -> None:
    first, second, other = (
        suggest_and_tell(make_search("precision", seed=seed, name=name), range(25))
        for seed, name in ((3, "first"), (3, "second"), (4, "other"))
    )
    assert first == second
    assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))


# A search outlives its process


def test_searcher_comes_back_from_the_standard_pickle_and_continues_alike(
    make_search: MakeSearch, tmp_path: Path
) -> None:
    straight = suggest_and_tell(make_search(name="straight"), range(25))
    search = make_search(name="saved")
    before = suggest_and_tell(search, range(15))
    search.suggest("open")
    search.on_trial_result("open", report(1, 0.5))
    search.save(str(tmp_path / "searcher.pkl"))
    restored = make_search(name="other")
    restored.restore(str(tmp_path / "searcher.pkl"))
    restored.on_trial_result("open", report(1, 0.5))
    restored.on_trial_complete("open", stop(2, 0.25))
    assert stored(restored, "open").intermediate_values == {1: 0.5, 2: 0.25}
    assert before == straight[:15]
    after = suggest_and_tell(restored, range(100, 110))
    assert len(after) == 10
    assert [trial.state for trial in restored.study.trials].count(TrialState.RUNNING) == 0
    assert pickle.loads(pickle.dumps(search)).study.study_name == "saved"


def test_journal_is_readable_by_another_study_while_the_search_goes_on(make_search: MakeSearch, tmp_path: Path) -> None:
    search = make_search()
    finish(search, "a", 0.5, end=report(2, NAN, "diverged"))
    search.suggest("b")
    path = tmp_path / "run" / STUDY_FILE
    other = optuna.load_study(study_name="run", storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))))
    assert [trial.state for trial in other.trials] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert other.trials[0].constraints == {"diverged": 1.0}
    assert other.direction.name == "MAXIMIZE"


# What Tune may say twice, or never


def test_epochs_that_a_retried_trial_repeats_are_told_once_and_without_a_warning(make_search: MakeSearch) -> None:
    search = make_search()
    search.suggest("a")
    for epoch, accuracy in ((1, 0.1), (2, 0.2), (1, 0.15), (2, 0.25), (3, 0.3), (3, 0.35)):
        search.on_trial_result("a", report(epoch, accuracy))
    search.on_trial_complete("a", stop(3, 0.35))
    assert stored(search, "a").intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}
    assert stored(search, "a").state is TrialState.PRUNED


def test_second_end_of_a_trial_changes_nothing(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "a", end=report(3, 0.5, "completed"))
    search.on_trial_complete("a", failure("failed"), error=True)
    search.on_trial_result("a", report(4, 0.9))
    trial = stored(search, "a")
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.COMPLETE, 0.5, {3: 0.5})
    assert trial.user_attrs["status"] == "completed"


def test_report_of_a_failure_is_no_epoch(make_search: MakeSearch) -> None:
    search = make_search()
    search.suggest("a")
    search.on_trial_result("a", failure("failed"))
    search.on_trial_complete("a", failure("failed"))
    assert stored(search, "a").intermediate_values == {}


def test_close_tells_what_still_runs_as_failed_and_leaves_the_rest(make_search: MakeSearch) -> None:
    search = make_search()
    finish(search, "done", end=report(3, 0.5, "completed"))
    search.suggest("open")
    search.suggest("also-open")
    search.study.enqueue_trial({"lr": 0.001})
    search.close()
    search.close()
    expected = [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]
    assert [trial.state for trial in search.study.trials] == expected


@pytest.mark.parametrize(
    ("result", "error", "status"),
    [
        (None, False, "interrupted"),
        ({}, False, "interrupted"),
        (None, True, "failed"),
        (report(1, 0.5), False, "interrupted"),
        (report(1, 0.5), True, "failed"),
        (stop(1, 0.5), False, "stopped"),
        (stop(1, 0.5), True, "failed"),
        (report(3, 0.5, "completed"), False, "completed"),
        (report(3, 0.5, "completed"), True, "failed"),
        (report(3, NAN, "diverged"), False, "diverged"),
        (failure("out_of_memory"), False, "out_of_memory"),
        (failure("failed"), False, "failed"),
        ({"done": True, "trial_id": "x"}, False, "stopped"),
    ],
)
def test_status_follows_from_the_last_result(result: dict[str, Any] | None, error: bool, status: str) -> None:
    assert find_status(result, error=error) is TrialStatus(status)
