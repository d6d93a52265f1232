"""Winners of an earlier run are suggested where they fit; its trials count where they would be measured alike."""

import dataclasses
import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import past_runs as made
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from curve_tables import make_stress_table
from optuna.trial import FrozenTrial, TrialState
from records import INF, NAN, PROVENANCE, make_epoch, make_trial

from benchmarks.quality.replay import CurveTable
from benchmarks.quality.warm_start import (
    OTHER,
    make_donor,
    plan_replay,
    replay_search,
    trace_replay,
)
from tune_amp.cli.search import search_command
from tune_amp.results.confirmed import DEFAULT_ID
from tune_amp.results.provenance import Provenance, list_versions
from tune_amp.results.records import (
    BestRow,
    TrialRecord,
    load_best,
    load_provenance,
    load_trials,
    rank_trials,
    write_best,
    write_trials,
)
from tune_amp.results.run_folder import RunFolder
from tune_amp.results.statistics import paired_interval
from tune_amp.search.history import RecordedTrial
from tune_amp.search.study import AmpSearch, open_storage
from tune_amp.search.warm_start import DECISIVE_VERSIONS, Donor, WarmStart, find_suggestion, load_donor, plan_warm_start
from tune_amp.space.space import load_space, parse_space
from tune_amp.training.data import Dataset
from tune_amp.trial.config import InputError, TrialConfig, TrialStatus

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"model": "simple_net", "dataset": "mnist", "max_epochs": 4, "seed": 11}
TRAIN_IMAGES = 10_240
SIZES = {"train_images": TRAIN_IMAGES, "max_epochs": 4}
DATA = "sha256:0123"

PLAIN = """\
parameters:
  lr: {low: 1.0e-4, high: 1.0, log: true}
  batch_size: {low: 64, high: 1024, power_of_two: true}
"""
CONDITIONAL = """\
parameters:
  precision: {choices: [bf16, fp16]}
  lr: {low: 1.0e-4, high: 1.0, log: true}
  init_scale: {low: 2^0, high: 2^24, power_of_two: true, when: {precision: fp16}}
  growth_interval: {low: 0.02, high: 0.5, log: true, fraction_of_trial: true, when: {precision: fp16}}
fixed: {batch_size: 256}
"""

BothPlans = Callable[..., WarmStart]


def make_config(**changes: Any) -> TrialConfig:
    return TrialConfig(**{**SHARED, "seed": 0, **changes})


def make_old(trial_id: str, accuracy: float | None = 0.9, **settings: Any) -> TrialRecord:
    """A trial that completed with ``accuracy``."""
    epochs = tuple(make_epoch(e, val_accuracy=accuracy, val_loss=0.5) for e in (1, 4)) if accuracy is not None else ()
    return make_trial(trial_id, trial_name=trial_id, config=make_config(**settings), epochs=epochs)


def make_provenance(space: str = PLAIN, **changes: Any) -> Provenance:
    known: dict[str, Any] = {"space_text": space, "data_hash": DATA, "train_images": TRAIN_IMAGES}
    known |= {"versions": list_versions(*DECISIVE_VERSIONS)}
    return dataclasses.replace(PROVENANCE, **(known | changes))


def make_donor_of(trials: Sequence[TrialRecord], space: str = PLAIN, *, winners: int = 2, **changes: Any) -> Donor:
    provenance = make_provenance(space, **changes)
    return Donor(
        path=Path("old/best.parquet"),
        checksum="0" * 64,
        winners=tuple(trials[:winners]),
        trials=tuple(trials),
        provenance=provenance,
    )


def plan(
    donor: Donor,
    space: str = PLAIN,
    *,
    sampler: str = "tpe",
    objectives: Sequence[str] = ("val_accuracy",),
    **shared: Any,
) -> WarmStart:
    return plan_warm_start(
        donor,
        parse_space("here.yaml", space),
        {**SHARED, **shared},
        data_hash=DATA,
        train_images=TRAIN_IMAGES,
        objectives=objectives,
        sampler=sampler,
    )


MakeSearch = Callable[..., AmpSearch]


@pytest.fixture
def make_search(tmp_path: Path) -> MakeSearch:
    def make(
        space: str,
        warm_start: WarmStart | None,
        *,
        sampler: str = "tpe",
        objectives: Sequence[str] = ("val_accuracy",),
        name: str = "run",
        seed: int = 3,
        past: Sequence[RecordedTrial] = (),
    ) -> AmpSearch:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return AmpSearch(
            parse_space("here.yaml", space),
            SHARED,
            train_images=TRAIN_IMAGES,
            objectives=objectives,
            seed=seed,
            folder=folder,
            study_name=name,
            sampler=sampler,
            num_samples=16,
            warm_start=warm_start,
            past=past,
        )

    return make


# ---- read ----

BEST, SECOND, LAST = make_old("best", 0.95, lr=0.02), make_old("second", 0.93, lr=0.01), make_old("last", 0.2, lr=0.5)
DEFAULT = BestRow(rank=None, trial=make_old(DEFAULT_ID, None))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose best file says, as a confirmation might, that the search's second is first."""
    folder = tmp_path / "old"
    folder.mkdir()
    write_trials(folder, [LAST, SECOND, BEST], make_provenance())
    write_best(folder, [*rank_trials([SECOND, BEST]), DEFAULT], make_provenance())
    return folder


def ids(trials: Sequence[TrialRecord]) -> list[str]:
    return [trial.trial_id for trial in trials]


def load(path: Path, **changes: Any) -> Donor:
    return load_donor(path, **{"objectives": ("val_accuracy",), "top_k": 2, **changes})


@pytest.mark.parametrize("name", [".", "best.parquet"])
def test_winners_are_the_ranked_rows_of_the_best_file_and_trials_lie_beside_it(run: Path, name: str) -> None:
    donor = load(run / name)
    assert ids(donor.winners) == ["second", "best"]
    assert ids(donor.trials) == ["last", "second", "best"]
    assert donor.checksum == hashlib.sha256((run / "best.parquet").read_bytes()).hexdigest()
    assert donor.description == f"run {PROVENANCE.run}, best.parquet, sha256:{donor.checksum}"


def test_winners_of_a_file_of_trials_are_the_best_by_what_is_sought_now(run: Path) -> None:
    assert ids(load(run / "trials.parquet").winners) == ["best", "second"]
    assert ids(load(run / "trials.parquet", top_k=1).winners) == ["best"]
    assert ids(load(run / "best.parquet", top_k=1).winners) == ["second"]
    (run / "best.parquet").unlink()
    assert ids(load(run).winners) == ["best", "second"]


def test_no_more_winners_than_asked_for_are_taken_from_a_pareto_set(tmp_path: Path) -> None:
    trials = [
        make_trial(str(n), config=make_config(), epochs=(make_epoch(4, val_accuracy=n / 9, train_seconds=n),))
        for n in (1, 2, 3)
    ]
    write_trials(tmp_path, trials, make_provenance())
    assert len(load(tmp_path, objectives=("val_accuracy", "train_seconds"), top_k=2).winners) == 2
    assert len(load(tmp_path, objectives=("val_accuracy", "train_seconds"), top_k=9).winners) == 3


def test_a_best_file_alone_or_beside_the_trials_of_another_run_has_winners_only(run: Path) -> None:
    write_trials(run, [LAST, SECOND, BEST], make_provenance(run="another"))
    assert load(run).trials == ()
    (run / "trials.parquet").unlink()
    (run / "renamed.parquet").write_bytes((run / "best.parquet").read_bytes())
    donor = load(run / "renamed.parquet")
    assert (ids(donor.winners), donor.trials) == (["second", "best"], ())
    warm_start = plan(donor)
    assert warm_start.describe()[0].endswith("not added: no trials.parquet of its run lies beside it")
    assert len(warm_start.suggestions) == 2


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nothing", "nothing: must be a Parquet file or the folder of a run, but does not exist"),
        ("empty", "empty: must hold best.parquet or trials.parquet"),
        ("epochs.parquet", "epochs.parquet: kind: must be best or trials, got 'epochs'"),
        ("damaged.parquet", "damaged.parquet: must be a readable, undamaged Parquet file of tune_amp"),
        ("others.parquet", "others.parquet: must be written by tune_amp"),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_command_before_anything_starts(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, complaint: str
) -> None:
    (run / "empty").mkdir()
    (run / "damaged.parquet").write_bytes((run / "best.parquet").read_bytes()[:-100])
    pq.write_table(pq.read_table(run / "best.parquet").replace_schema_metadata(None), run / "others.parquet")
    results = run / "results"
    assert search_command(["--warm-start", str(run / name), "--results-dir", str(results)]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert f"error: {run}" in printed.err
    assert complaint in printed.err
    assert not results.exists()


# ---- from settings to suggestions ----


@pytest.mark.parametrize("source", ["mnist_amp", "precision", "quick", "stress", CONDITIONAL])
def test_every_setting_that_a_space_gives_is_suggested_back_exactly(source: str) -> None:
    space = parse_space("x", source) if "\n" in source else load_space(source)
    shared = {**SHARED, "max_epochs": 3}
    for settings in space.sample(100, seed=1, train_images=5_000, max_epochs=3):
        config = TrialConfig(**{**shared, **settings})
        suggestion = find_suggestion(config, space, 5_000, train_images=5_000, max_epochs=3)
        trial = optuna.trial.FixedTrial(dict(suggestion.params))
        assert TrialConfig(**{**shared, **space.suggest(trial, train_images=5_000, max_epochs=3)}) == config
        assert set(suggestion.params) == set(suggestion.distributions)


OPTIMIZERS = "parameters:\n  optimizer: {choices: [adamw, sgd]}\n"


@pytest.mark.parametrize(
    ("space", "settings", "complaint"),
    [
        (PLAIN, {"lr": 2.0}, "lr: must be 0.0001 to 1.0, got 2.0"),
        (PLAIN, {"lr": 9.9e-5}, "lr: must be 0.0001 to 1.0, got 9.9e-05"),
        (PLAIN, {"batch_size": 100}, "batch_size: must be a power of two from 64 to 1024, got 100"),
        (PLAIN, {"batch_size": 32}, "batch_size: must be a power of two from 64 to 1024, got 32"),
        (PLAIN, {"weight_decay": 0.1}, "weight_decay: must be 0.0, as it is not searched here, got 0.1"),
        (PLAIN, {"precision": "bf16"}, "precision: must be 'fp32', as it is not searched here, got 'bf16'"),
        (OPTIMIZERS, {}, "optimizer: must be one of adamw, sgd, got 'adam'"),
        (CONDITIONAL, {"precision": "fp32", "batch_size": 256}, "precision: must be one of bf16, fp16, got 'fp32'"),
        (CONDITIONAL, {"precision": "bf16"}, "batch_size: must be 256, as it is not searched here, got 64"),
        (
            CONDITIONAL,
            {"precision": "fp16", "batch_size": 256, "growth_interval": 100},
            "growth_interval: must be 0.02 to 0.5 of the trial's 160 steps, got 100",
        ),
        (
            CONDITIONAL,
            {"precision": "fp16", "batch_size": 256, "growth_interval": 40, "backoff_factor": 0.9},
            "backoff_factor: must be 0.5, as it is not searched here, got 0.9",
        ),
    ],
)
def test_settings_that_the_space_does_not_have_are_refused_by_name(
    space: str, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError) as caught:
        find_suggestion(make_config(**settings), parse_space("here.yaml", space), TRAIN_IMAGES, **SIZES)
    assert str(caught.value) == complaint


def test_inactive_settings_are_not_suggested() -> None:
    space = parse_space("here.yaml", CONDITIONAL)
    bf16 = find_suggestion(make_config(precision="bf16", batch_size=256), space, TRAIN_IMAGES, **SIZES)
    assert bf16.params == {"precision": "bf16", "lr": 1e-3}
    config = make_config(precision="fp16", batch_size=256, init_scale=2.0**10, growth_interval=40)
    fp16 = find_suggestion(config, space, TRAIN_IMAGES, **SIZES)
    expected = {"precision": "fp16", "lr": 1e-3, "log2(init_scale)": 10, "growth_interval/trial_steps": 0.25}
    assert fp16.params == expected


@pytest.mark.parametrize(
    ("old_epochs", "old_images", "interval", "fraction"),
    [(4, TRAIN_IMAGES, 40, 0.25), (8, TRAIN_IMAGES, 80, 0.25), (4, TRAIN_IMAGES // 2, 20, 0.25), (400, 256, 60, 0.15)],
)
def test_an_interval_relative_to_the_trial_is_the_same_share_of_a_longer_or_shorter_one(
    old_epochs: int, old_images: int, interval: int, fraction: float
) -> None:
    space = parse_space("here.yaml", CONDITIONAL)
    settings = {"precision": "fp16", "batch_size": 256, "growth_interval": interval, "max_epochs": old_epochs}
    suggestion = find_suggestion(make_config(**settings), space, old_images, **SIZES)
    assert suggestion.params["growth_interval/trial_steps"] == fraction


@pytest.mark.parametrize("fractions", ["low: 0.02, high: 0.5, log: true", "choices: [0.03, 0.1, 0.33]"])
@pytest.mark.parametrize(("old_epochs", "epochs"), [(1, 8), (2, 8), (3, 8), (8, 2)])
def test_every_relative_interval_of_the_same_space_is_suggested_again(
    fractions: str, old_epochs: int, epochs: int
) -> None:
    """Though its fraction was lost when it was rounded to whole steps, it is one of the space's fractions."""
    text = f"parameters:\n  growth_interval: {{{fractions}, fraction_of_trial: true}}\nfixed: {{precision: fp16}}\n"
    space = parse_space("here.yaml", text)
    old, here = ({"train_images": TRAIN_IMAGES, "max_epochs": count} for count in (old_epochs, epochs))
    for settings in space.sample(100, seed=0, **old):
        winner = make_config(**settings, max_epochs=old_epochs)
        suggestion = find_suggestion(winner, space, TRAIN_IMAGES, **here)
        fraction = settings["growth_interval"] / winner.count_full_steps(TRAIN_IMAGES)
        assert suggestion.params["growth_interval/trial_steps"] == pytest.approx(fraction, abs=0.02)


def test_an_interval_in_steps_stays_in_steps() -> None:
    text = "parameters:\n  growth_interval: {low: 1, high: 500, log: true}\nfixed: {precision: fp16}\n"
    config = make_config(precision="fp16", growth_interval=80, max_epochs=8)
    suggestion = find_suggestion(config, parse_space("here.yaml", text), TRAIN_IMAGES, **SIZES)
    assert suggestion.params == {"growth_interval": 80}


# ---- the plan ----


def test_winners_that_do_not_fit_are_named_and_the_others_suggested() -> None:
    donor = make_donor_of([make_old("a", lr=2.0), make_old("b", lr=0.01), make_old("c", weight_decay=0.1)], winners=3)
    warm_start = plan(donor)
    assert warm_start.suggestions == ({"lr": 0.01, "log2(batch_size)": 6},)
    assert warm_start.describe() == [
        "1 suggestion from old/best.parquet; 1 of its 3 trials added",
        "trial 'a' is not suggested: lr: must be 0.0001 to 1.0, got 2.0",
        "trial 'c' is not suggested: weight_decay: must be 0.0, as it is not searched here, got 0.1",
    ]


def test_no_settings_are_suggested_twice_nor_the_defaults_that_are_tried_anyway() -> None:
    donor = make_donor_of([make_old("a", lr=0.01), make_old("b"), make_old("c", lr=0.01, seed=5)], winners=3)
    warm_start = plan(donor)
    assert [suggestion["lr"] for suggestion in warm_start.suggestions] == [0.01]
    assert warm_start.left_out == (
        "trial 'b' has the settings of the default configuration, which is tried anyway",
        "trial 'c' has the settings of another winner, which is tried anyway",
    )


@pytest.mark.parametrize("winners", [0, 2])
def test_a_file_of_which_nothing_fits_is_said_and_is_no_error(winners: int) -> None:
    trials = [make_old("a", lr=2.0), make_old("b", lr=3.0)]
    warm_start = plan(make_donor_of(trials, winners=winners, data_hash="another"))
    assert warm_start.describe()[0] == (
        "no suggestions from old/best.parquet; its trials are not added: the data differ"
    )
    assert len(warm_start.left_out) == max(winners, 1)
    json.dumps(warm_start.describe_as_json(), allow_nan=False)


TORCH = list_versions("torch")["torch"]


@pytest.mark.parametrize(
    ("changes", "shared", "objective", "reason"),
    [
        ({"space": PLAIN.replace("1.0,", "0.5,")}, {}, "val_accuracy", "the spaces differ"),
        ({"space": PLAIN + "fixed: {weight_decay: 0.0}\n"}, {}, "val_accuracy", "the spaces differ"),
        ({"space": "no: space"}, {}, "val_accuracy", "the spaces differ"),
        ({"space": "#" * 100_000}, {}, "val_accuracy", "the spaces differ"),
        ({"data_hash": "sha256:4567"}, {}, "val_accuracy", "the data differ"),
        ({}, {}, "val_loss", "the objectives differ ('val_accuracy' there, 'val_loss' here)"),
        ({}, {"model": "vit"}, "val_accuracy", "model differs (simple_net there, vit here)"),
        ({}, {"max_epochs": 8}, "val_accuracy", "max_epochs differs (4 there, 8 here)"),
        ({"versions": {"torch": "1.13.1"}}, {}, "val_accuracy", "the versions of torch differ ('1.13.1' there,"),
        ({"versions": {"torch": TORCH}}, {}, "val_accuracy", "the versions of tune_amp differ ('unknown' there,"),
        (
            {"objective": "val_accuracy,train_seconds"},
            {},
            "val_accuracy,train_seconds",
            "train_seconds depends on the machine",
        ),
    ],
)
def test_trials_that_would_be_measured_otherwise_here_are_suggestions_only(
    changes: dict[str, Any], shared: dict[str, Any], objective: str, reason: str
) -> None:
    donor = make_donor_of([make_old("a"), make_old("b", lr=0.01)], **changes)
    warm_start = plan(donor, objectives=objective.split(","), **shared)
    assert warm_start.old_trials == ()
    assert (warm_start.obstacle or "").startswith(reason)
    assert len(warm_start.suggestions) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"space": "# another comment\nparameters:\n" + "\n".join(reversed(PLAIN.splitlines()[1:])) + "\n"},
        {"versions": {**list_versions(*DECISIVE_VERSIONS), "torch": TORCH.split("+")[0] + "+another", "ray": "0.1"}},
        {"versions": {**list_versions(*DECISIVE_VERSIONS), "python": "3.9.1"}},
        {"seed": 99, "scheduler": "none", "sampler": "random", "device": "cuda", "validation_images": 1},
    ],
)
def test_what_does_not_change_a_trials_value_does_not_keep_it_out(changes: dict[str, Any]) -> None:
    warm_start = plan(make_donor_of([make_old("a"), make_old("b", lr=0.01)], **changes))
    assert (warm_start.obstacle, len(warm_start.old_trials)) == (None, 2)


def test_nothing_that_a_file_names_is_run(write_module: Callable[[str], str], tmp_path: Path) -> None:
    module = write_module(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    theirs: dict[str, Any] = {"model": f"{module}:build", "dataset": f"{module}:load"}
    folder = tmp_path / "old"
    folder.mkdir()
    trials = [make_old("a", lr=0.01, **theirs)]
    write_trials(folder, trials, make_provenance(dataset=theirs["dataset"]))
    write_best(folder, rank_trials(trials), make_provenance(dataset=theirs["dataset"]))
    warm_start = plan(load(folder))
    assert (len(warm_start.suggestions), warm_start.obstacle) == (
        1,
        f"model differs ({module}:build there, simple_net here)",
    )
    own = plan(load(folder), **theirs)
    assert own.obstacle == "the model is your own, and its code may have changed"
    assert not (tmp_path / "ran").exists()


# ---- the study ----


def finish(search: AmpSearch, trial_id: str, record: TrialRecord) -> None:
    """Tell a search of a trial as Tune would have told of ``record``."""
    search.suggest(trial_id)
    for epoch in record.epochs:
        search.on_trial_result(trial_id, {**vars(epoch), "status": "running"})
    last = vars(record.last) if record.last else {}
    ended = "running" if record.status is TrialStatus.STOPPED else str(record.status)
    search.on_trial_complete(trial_id, {**last, "status": ended, "done": True})


def told(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.state, trial.values, trial.intermediate_values, trial.constraints, trial.user_attrs["status"]


def make_endings() -> list[TrialRecord]:
    """A trial of every end that says something of its settings."""
    settings = make_config(lr=0.02)
    nan = make_epoch(2, val_loss=NAN, train_loss=INF)
    return [
        make_old("completed", lr=0.01),
        make_trial("stopped", status=TrialStatus.STOPPED, config=settings),
        make_trial("diverged", status=TrialStatus.DIVERGED, config=settings, epochs=(make_epoch(1), nan)),
        make_trial("at once", status=TrialStatus.DIVERGED, config=settings, epochs=()),
        make_trial("no loss", status=TrialStatus.COMPLETED, config=settings, epochs=(make_epoch(1), nan)),
        make_trial("stopped for its loss", status=TrialStatus.STOPPED, config=settings, epochs=(make_epoch(1), nan)),
    ]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_an_old_trial_is_told_as_if_it_had_ended_here(make_search: MakeSearch, sampler: str, objective: str) -> None:
    records = make_endings()
    settings: dict[str, Any] = {"sampler": sampler, "objectives": (objective,)}
    own = make_search(PLAIN, None, name="own", **settings)
    for record in records:
        finish(own, record.trial_id, record)
    warm_start = plan(make_donor_of(records, objective=objective), **settings)
    warm = make_search(PLAIN, warm_start, name="warm", **settings)
    added = {t.user_attrs["trial_id"]: t for t in warm.study.trials if t.state is not TrialState.WAITING}
    assert len(added) == len(records)
    for trial in own.study.trials:
        same = added[trial.user_attrs["trial_id"]]
        assert told(same) == told(trial)
        assert same.user_attrs["of run"] == PROVENANCE.run
        assert same.distributions == trial.distributions
    assert added["completed"].params == {"lr": 0.01, "log2(batch_size)": 6}


@pytest.mark.parametrize("status", [TrialStatus.FAILED, TrialStatus.INTERRUPTED, TrialStatus.OUT_OF_MEMORY])
def test_ends_that_say_nothing_of_the_settings_here_are_left_out(status: TrialStatus) -> None:
    record = make_trial("x", status=status, config=make_config(lr=0.02))
    warm_start = plan(make_donor_of([record, make_old("a")], winners=0))
    assert [old.record.trial_id for old in warm_start.old_trials] == ["a"]
    unmeasured = make_trial("x", config=make_config(), epochs=(make_epoch(4, val_accuracy=None),))
    assert plan(make_donor_of([unmeasured], winners=0)).old_trials == ()


def test_several_objectives_take_over_what_completed_or_diverged(make_search: MakeSearch) -> None:
    objectives = ("val_accuracy", "val_loss")
    donor = make_donor_of(make_endings(), objective=",".join(objectives))
    warm_start = plan(donor, objectives=objectives)
    search = make_search(PLAIN, warm_start, objectives=objectives)
    added = {t.user_attrs["trial_id"]: t.values for t in search.study.trials if t.state is TrialState.COMPLETE}
    worst = [0.0, 1e9]
    assert added == {"completed": [0.9, 0.5], "diverged": worst, "at once": worst, "no loss": worst}
    search.suggest("next")


def test_defaults_come_first_then_the_winners_best_first(make_search: MakeSearch) -> None:
    donor = make_donor_of([make_old("a", lr=0.5), make_old("b", lr=0.02, batch_size=512), make_old("c", lr=0.03)])
    search = make_search(PLAIN, plan(donor))
    suggested = [search.suggest(str(number)) for number in range(4)]
    assert [(config.lr, config.batch_size) for config in suggested[:3]] == [
        (1e-3, 64),
        (0.5, 64),
        (0.02, 512),
    ]
    assert {config.seed for config in suggested} == {SHARED["seed"]}
    assert suggested[3].lr not in (0.5, 0.02, 0.03)


def test_old_trials_are_none_of_the_searchs_own(make_search: MakeSearch) -> None:
    warm_start = plan(make_donor_of(make_endings()))
    search = make_search(PLAIN, warm_start)
    before = [(t.number, t.state, t.values) for t in search.study.trials if t.state.is_finished()]
    finish(search, "mine", make_old("mine", 0.8))
    search.suggest("never told")
    search.close()
    after = {
        t.user_attrs["trial_id"]: t
        for t in search.study.trials
        if "of run" not in t.user_attrs
        if t.user_attrs.get("trial_id")
    }
    assert set(after) == {"mine", "never told"}
    assert [(t.number, t.state, t.values) for t in search.study.trials if "of run" in t.user_attrs] == before
    assert TrialState.RUNNING not in {t.state for t in search.study.trials}


def test_a_search_that_goes_on_takes_nothing_over_again(make_search: MakeSearch) -> None:
    warm_start = plan(make_donor_of(make_endings()))
    search = make_search(PLAIN, warm_start)
    finish(search, "mine", make_old("mine", 0.8))
    count = len(search.study.trials)
    mine = made.recorded("mine", search.find_number("mine"), status="completed")
    again = make_search(PLAIN, warm_start, past=[mine])
    assert len(again.study.trials) == count
    assert again.suggest("next").lr == 0.01  # the best winner, which was waiting


def make_teachers(space: str, count: int = 40) -> list[TrialRecord]:
    """Trials that are the better the nearer their learning rate is to 0.01."""
    parsed = parse_space("here.yaml", space)
    settings = list(parsed.sample(count, seed=9, **SIZES))
    return [
        make_old(str(number), 0.9 - 0.2 * abs(math.log10(each["lr"] / 0.01)), **each)
        for number, each in enumerate(settings)
    ]


@pytest.mark.parametrize(("space", "sampler"), [(PLAIN, "tpe"), (CONDITIONAL, "tpe"), (PLAIN, "gp")])
def test_the_sampler_has_learned_before_the_search_tells_it_anything(
    make_search: MakeSearch, space: str, sampler: str
) -> None:
    donor = make_donor_of(make_teachers(space), space, winners=0)
    errors = {}
    for name, known in (
        ("warm", donor),
        ("stripped", make_donor_of(make_teachers(space), space, winners=0, data_hash=OTHER)),
    ):
        rates = []
        for seed in range(4):
            warm_start = plan(known, space, sampler=sampler)
            search = make_search(space, warm_start, sampler=sampler, name=f"{name}-{seed}", seed=seed)
            rates += [search.suggest(str(number)).lr for number in range(9)][1:]  # the first are the defaults
        errors[name] = statistics.median(abs(math.log10(rate / 0.01)) for rate in rates)
    assert errors["warm"] < 0.7 < errors["stripped"]


@pytest.mark.parametrize("sampler", ["random", "cmaes", "nsga2"])
def test_samplers_that_would_not_learn_from_old_trials_get_suggestions(make_search: MakeSearch, sampler: str) -> None:
    warm_start = plan(make_donor_of([make_old("a", lr=0.5), make_old("b", lr=0.02)]), sampler=sampler)
    assert warm_start.obstacle == f"{sampler} does not learn from them"
    search = make_search(PLAIN, warm_start, sampler=sampler)
    for number in range(12):
        finish(search, str(number), make_old(str(number), 0.5 + number / 100))
    rates = [trial.params["lr"] for trial in search.study.trials]
    assert rates[:3] == [1e-3, 0.5, 0.02]
    assert len(set(rates)) >= 8  # a child may inherit its parent's


@pytest.mark.parametrize("sampler", ["cmaes", "nsga2"])
def test_these_samplers_indeed_suggest_the_same_whatever_old_trials_say(make_search: MakeSearch, sampler: str) -> None:
    """Should Optuna learn to use them, they may be told."""
    teachers = make_teachers(PLAIN)
    lies = [dataclasses.replace(t, config=o.config) for t, o in zip(teachers, reversed(teachers), strict=True)]
    suggested = []
    for name, old in (("truth", teachers), ("lies", lies)):
        search = make_search(PLAIN, plan(make_donor_of(old, winners=0)), sampler=sampler, name=name)
        assert len(search.study.trials) > len(old)
        for number in range(12):
            finish(search, str(number), make_old(str(number), 0.5 + number / 100))
        suggested.append([trial.params for trial in search.study.trials if "of run" not in trial.user_attrs])
    assert suggested[0] == suggested[1]


# ---- negative transfer ----

SEEDS, BUDGET = 8, 48


@pytest.fixture(scope="module")
def table() -> CurveTable:
    return CurveTable(make_stress_table())


@pytest.fixture(scope="module")
def cold(table: CurveTable) -> list[float]:
    return [best_of(table, seed, None) for seed in range(SEEDS)]


def best_of(table: CurveTable, seed: int, warm_start: WarmStart | None) -> float:
    """What a search has found when its budget is spent."""
    return max(trace_replay(table, replay_search(table, seed, warm_start, BUDGET), None).accuracies)


def make_misleading(table: CurveTable, chosen: Callable[[TrialConfig], bool], seed: int, **changes: Any) -> Donor:
    """A donor whose winners are of one kind, and all of whose trials are the better the more they are of that kind."""
    donor = make_donor(table, replay_search(table, seed + 100, None, BUDGET), BUDGET)
    curves = table.curves
    winners = [
        make_trial(str(number), config=config, epochs=curves.epochs[number])
        for number, config in enumerate(curves.configs)
        if chosen(config)
    ][seed : seed + 3]
    assert len(winners) == 3
    provenance = dataclasses.replace(donor.provenance, **changes)
    return dataclasses.replace(donor, winners=tuple(winners), provenance=provenance)


@pytest.mark.parametrize(
    "chosen",
    [lambda config: config.lr > 0.3, lambda config: config.lr < 3e-4],
    ids=["all winners diverge here", "the optimum lies elsewhere"],
)
def test_winners_that_are_bad_here_leave_the_search_no_worse_than_a_cold_one(
    table: CurveTable, cold: list[float], chosen: Callable[[TrialConfig], bool]
) -> None:
    misled = []
    for seed in range(SEEDS):
        warm_start = plan_replay(table, make_misleading(table, chosen, seed % 3, data_hash=OTHER))
        assert len(warm_start.suggestions) == 3
        misled.append(best_of(table, seed, warm_start))
    difference = paired_interval(misled, cold)
    assert difference.high >= 0
    assert difference.mean > -statistics.stdev(cold)


# ---- as a user runs it ----


def check_events(events: list[dict[str, Any]], folder: Path) -> None:
    """The lines of JSON tell every trial, every run of the confirmation, and the result."""
    best, confirmation = events[-1]["best"], events[-1]["confirmation"]
    told = [(row["rank"], row["trial_id"]) for row in confirmation["confirmed"]]
    assert [rank for rank, _ in told] == [1, 2, 3, 4]
    assert told == [(row["rank"], row["trial_id"]) for row in best]
    assert {trial_id for _, trial_id in told} < {event.get("trial_id") for event in events[1:5]} | {DEFAULT_ID}
    assert load_best(folder / events[-1]["best_parquet"]).lr == best[0]["config"]["lr"]
    assert confirmation["verdict"]["recommended"] == best[0]["trial_id"]
    assert confirmation["verdict"]["gain_low"] < confirmation["verdict"]["gain_high"]
    assert [event["event"] for event in events] == [
        "start",
        *["trial"] * 4,
        *["confirmed_run"] * 9,
        "result",
    ]  # a trial is the default


@pytest.mark.slow
def test_a_search_starts_from_an_earlier_run(digits: Dataset, tmp_path: Path) -> None:
    space = load_space("quick")
    shared = {"dataset": "digits", "max_epochs": 2, "precision": "fp16", "batch_size": 512}
    trials = [make_old(str(n), 0.5 + n / 10, **shared, lr=lr, init_scale=2.0**12) for n, lr in enumerate((4e-3, 8e-3))]
    too_fast = make_old("2", 0.9, **shared, lr=0.5, init_scale=2.0**12)
    old = {"run": "old", "dataset": "digits", "data_hash": digits.content_hash, "train_images": len(digits.train)}
    provenance = make_provenance(space.text, **old)
    (tmp_path / "old").mkdir()
    write_trials(tmp_path / "old", [*trials, too_fast], provenance)
    write_best(tmp_path / "old", rank_trials([trials[1], too_fast, trials[0]]), provenance)

    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "quick", "--dataset", "digits", "--max-epochs", "2"]
    command += ["--num-samples", "4", "--max-concurrent", "1", "--name", "new", "--warm-start", "old", "--json"]
    command += ["--confirm-seeds", "3", "--dashboard", "off"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    check_events(events, tmp_path)
    assert events[0]["warm_start"] == {
        "path": "old/best.parquet",
        "run": "old",
        "suggestions": 2,
        "left_out": ["trial '2' is not suggested: lr: must be 0.0003 to 0.01, got 0.5"],
        "trials_added": 2,
        "not_added_because": None,
    }
    run = tmp_path / "results" / "new"
    assert [(t.config.lr, t.config.batch_size) for t in load_trials(run)[:3]] == [(1e-3, 64), (8e-3, 512), (4e-3, 512)]
    assert len(load_trials(run)) == 4
    checksum = hashlib.sha256((tmp_path / "old" / "best.parquet").read_bytes()).hexdigest()
    assert load_provenance(run).warm_start == f"run old, best.parquet, sha256:{checksum}"
    study = optuna.load_study(study_name="new", storage=open_storage(RunFolder(run).study))
    assert [trial.values for trial in study.trials if "of run" in trial.user_attrs] == [[0.5], [0.6]]
    assert all(trial.state.is_finished() for trial in study.trials)
