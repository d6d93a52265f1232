"""Parameters that matter are found, those that do not are called noise, and budgets are never mixed."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from records import NAN, PROVENANCE, make_epoch, make_trial

from tune_amp.results.importance import (
    ImportanceResult,
    ParameterImportance,
    _restore_suggestion,
    _select_by_holm,
    describe_importance,
    load_importance,
    measure_importance,
    write_importance,
)
from tune_amp.results.parquet import write_parquet
from tune_amp.results.records import TrialRecord, load_provenance, rank_trials, write_best
from tune_amp.space.space import SearchSpace, load_space
from tune_amp.trial.config import InputError, TrainingState, TrialConfig, TrialStatus

TRAIN_IMAGES, MAX_EPOCHS = 55_000, 4

LR = "lr: {low: 1.0e-4, high: 1.0e-1, log: true}"
SCALE = "init_scale: {low: 1, high: 2^24, power_of_two: true}"
BATCH = "batch_size: {choices: [64, 128, 256, 512]}"
INTERVAL = "growth_interval: {low: 0.01, high: 1, log: true, fraction_of_trial: true}"


@pytest.fixture
def make_space(tmp_path: Path) -> Callable[..., SearchSpace]:
    def make(*parameters: str, fixed: str = "fixed: {precision: fp16}") -> SearchSpace:
        path = tmp_path / "space.yaml"
        path.write_text("\n  ".join(["parameters:", *parameters]) + f"\n{fixed}\n")
        return load_space(str(path))

    return make


def sample_configs(space: SearchSpace, count: int, seed: int = 0) -> list[TrialConfig]:
    sampled = space.sample(count, seed=seed, train_images=TRAIN_IMAGES, max_epochs=MAX_EPOCHS)
    return [TrialConfig(max_epochs=MAX_EPOCHS, **settings) for settings in sampled]


def make_trials(configs: Sequence[TrialConfig], losses: Sequence[float]) -> list[TrialRecord]:
    return [
        make_trial(f"{i:08x}", config=config, epochs=(make_epoch(1, val_loss=float(loss)),))
        for i, (config, loss) in enumerate(zip(configs, losses, strict=True))
    ]


def noise(count: int, seed: int = 0) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).normal(size=count)]


def lr_losses(configs: Sequence[TrialConfig], seed: int = 0) -> list[float]:
    """Best at the middle of the range, with some noise."""
    return [
        (math.log10(config.lr) + 2.5) ** 2 + 0.1 * value
        for config, value in zip(configs, noise(len(configs), seed), strict=True)
    ]


def measure(space: SearchSpace, trials: Sequence[TrialRecord], objective: str = "val_loss", **changes: Any) -> Any:
    return measure_importance(space, trials, objective, train_images=TRAIN_IMAGES, **changes)


def told(result: ImportanceResult) -> set[str]:
    return {row.parameter for row in result.rows if row.told_from_noise}


# ---- what is found ----


def test_the_learning_rate_is_found_where_nothing_else_matters(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(LR, SCALE, BATCH, INTERVAL)
    configs = sample_configs(space, 32)
    result = measure(space, make_trials(configs, lr_losses(configs)))
    assert told(result) == {"lr"}
    assert (result.rows[0].parameter, result.epoch, result.trials) == ("lr", 1, 32)
    assert sum(row.importance for row in result.rows) == pytest.approx(1)
    assert result.rows[0].importance > result.rows[0].null_95
    assert result.rows[0].p_value == 1 / 200


@pytest.mark.parametrize("which", ["batch_size", "init_scale", "growth_interval"])
def test_choices_powers_of_two_and_fractions_are_found_too(make_space: Callable[..., SearchSpace], which: str) -> None:
    space = make_space(LR, SCALE, BATCH, INTERVAL)
    configs = sample_configs(space, 60)
    column = [_relative_interval(c) if which == "growth_interval" else getattr(c, which) for c in configs]
    losses = [math.log(value) + 0.1 * other for value, other in zip(column, noise(60), strict=True)]
    result = measure(space, make_trials(configs, losses), permutations=99)
    # Of the others one may be falsely told: the level is 5 %, and nine are looked at here.
    assert result.rows[0].parameter == which
    assert which in told(result)


def _relative_interval(config: TrialConfig) -> float:
    assert config.growth_interval is not None
    return config.growth_interval / (TRAIN_IMAGES // config.batch_size * MAX_EPOCHS)


def test_a_parameter_that_matters_in_one_branch_only_is_found(make_space: Callable[..., SearchSpace]) -> None:
    conditional = SCALE.replace("}", ", when: {precision: fp16}}")
    space = make_space(LR, "precision: {choices: [fp32, fp16]}", conditional, fixed="")
    configs = sample_configs(space, 60)
    noisy = noise(60)
    losses = [
        noisy[i] if config.init_scale is None else math.log2(config.init_scale) / 4 - 3 + 0.1 * noisy[i]
        for i, config in enumerate(configs)
    ]
    result = measure(space, make_trials(configs, losses), permutations=99)
    assert "init_scale" in told(result)
    assert "lr" not in told(result)
    # The same values of init_scale among trials without any effect of it.
    assert "init_scale" not in told(measure(space, make_trials(configs, noise(60, seed=5)), permutations=99))


def test_in_pure_noise_false_findings_stay_near_the_stated_level(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(LR, SCALE)
    results = []
    for seed in range(60):
        configs = sample_configs(space, 20, seed=seed)
        trials = make_trials(configs, noise(20, seed=1000 + seed))
        results.append(measure(space, trials, permutations=39, seed=seed))
    # Binomial(60, 0.05): 10 or more in one of 1,000 such tests.
    assert sum(bool(told(result)) for result in results) <= 9
    p_values = [row.p_value for result in results for row in result.rows]
    # Binomial(120, 0.5): within 42..78 in 999 of 1,000. p-values of noise are spread evenly, not merely large.
    assert 42 <= sum(p <= 0.5 for p in p_values) <= 78
    rows = [row for result in results for row in result.rows]
    assert all((row.importance > row.null_95) == (row.p_value <= 0.05) for row in rows)


def test_chance_that_reaches_many_times_the_importance_is_a_file_that_can_be_read(
    make_space: Callable[..., SearchSpace], tmp_path: Path
) -> None:
    """The best third may have nearly the same share of each choice as all trials."""
    space = make_space("optimizer: {choices: [adam, sgd]}")
    levels = []
    for seed in range(12):
        result = measure(space, make_trials(sample_configs(space, 20, seed), noise(20, seed)), permutations=19)
        write_importance(tmp_path, result, PROVENANCE)
        assert load_importance(tmp_path) == result
        levels.append(result.rows[0].null_95)
    assert max(levels) == 100


def test_a_setting_that_drifts_along_with_one_that_matters_is_noise(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(LR, SCALE)
    # A sampler that learns: from block to block of 8 trials the values get better, and init_scale moves for no reason.
    configs = [
        dataclasses.replace(config, init_scale=2.0 ** (3 * (i // 8) + i % 3))
        for i, config in enumerate(sample_configs(space, 64))
    ]
    losses = [-(i // 8) + 0.5 * value for i, value in enumerate(noise(64))]
    trials = make_trials(configs, losses)
    assert "init_scale" not in told(measure(space, trials, permutations=99))
    # The same trials as a random search would have made them: without an order in time, it is no drift.
    shuffled = [trials[i] for i in np.random.default_rng(0).permutation(64)]
    assert "init_scale" in told(measure(space, shuffled, permutations=99))


def test_high_accuracies_are_as_good_as_low_losses(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(LR, SCALE)
    configs = sample_configs(space, 24)
    losses = lr_losses(configs)
    epochs = [make_epoch(1, val_loss=loss, val_accuracy=1 - loss) for loss in losses]
    trials = [make_trial(str(i), config=configs[i], epochs=(epochs[i],)) for i in range(24)]
    by_loss, by_accuracy = (measure(space, trials, name, permutations=19) for name in ("val_loss", "val_accuracy"))
    assert by_accuracy.rows == by_loss.rows


def test_the_same_seed_gives_the_same_result(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(LR, SCALE)
    trials = make_trials(sample_configs(space, 24), noise(24))
    first, again, other = (measure(space, trials, permutations=19, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert [row.null_95 for row in first.rows] != [row.null_95 for row in other.rows]
    assert [row.raw for row in first.rows] == [row.raw for row in other.rows]


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ({"a": 0.01, "b": 0.02, "c": 0.03}, {"a", "b", "c"}),  # times 3, 2, 1
        ({"a": 0.03, "b": 0.02, "c": 0.01}, {"a", "b", "c"}),
        ({"a": 0.01, "b": 0.03, "c": 0.03}, {"a"}),  # without correction: all
        ({"a": 0.02, "b": 0.02, "c": 0.02}, set()),  # step-up procedures would select all
        ({"a": 0.05}, {"a"}),
        ({}, set()),
    ],
)
def test_holm_selects_from_the_smallest_up_to_the_first_that_fails(
    p_values: dict[str, float], expected: set[str]
) -> None:
    assert _select_by_holm(p_values) == expected


# ---- which trials count, and at which epoch ----


def test_trials_are_compared_at_the_epoch_that_all_reached(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(LR, SCALE)
    configs = sample_configs(space, 32)
    losses = lr_losses(configs)
    short = make_trials(configs, losses)
    # Half goes on to epoch 4, and there the values depend on init_scale alone and are better than any at epoch 1.
    trials = [
        dataclasses.replace(trial, status=TrialStatus.STOPPED)
        if i % 2
        else dataclasses.replace(trial, epochs=(*trial.epochs, make_epoch(4, val_loss=-9.0 - (_scale(configs[i])))))
        for i, trial in enumerate(short)
    ]
    result = measure(space, trials, permutations=19)
    assert (result.epoch, result.trials) == (1, 32)
    assert result == measure(space, short, permutations=19)


def _scale(config: TrialConfig) -> float:
    assert config.init_scale is not None
    return math.log2(config.init_scale)


@pytest.mark.parametrize(("stopped", "epoch"), [(0, 4), (3, 4), (4, 1)])
def test_a_tenth_of_the_trials_may_have_stopped_before_and_counts_as_worst(
    make_space: Callable[..., SearchSpace], stopped: int, epoch: int
) -> None:
    space = make_space(LR, SCALE)
    configs = sample_configs(space, 32)
    first, last = noise(32, seed=1), noise(32, seed=2)
    trials = [
        make_trial(
            str(i),
            config=config,
            status=TrialStatus.STOPPED if i < stopped else TrialStatus.COMPLETED,
            epochs=(make_epoch(1, val_loss=first[i]), make_epoch(4, val_loss=last[i]))[: 1 if i < stopped else 2],
        )
        for i, config in enumerate(configs)
    ]
    result = measure(space, trials, permutations=19)
    assert (result.epoch, result.trials) == (epoch, 32)
    expected = first if epoch == 1 else [1e9 if i < stopped else value for i, value in enumerate(last)]
    assert result.rows == measure(space, make_trials(configs, expected), permutations=19).rows


HOPELESS: list[dict[str, Any]] = [
    {"status": TrialStatus.OUT_OF_MEMORY, "epochs": ()},
    {"status": TrialStatus.FAILED, "config_fault": True, "epochs": ()},
    {"status": TrialStatus.DIVERGED, "epochs": ()},
    {"status": TrialStatus.DIVERGED, "epochs": (make_epoch(1, val_loss=NAN),)},
    {"status": TrialStatus.DIVERGED, "epochs": (make_epoch(1, val_loss=-99.0, state=TrainingState.COLLAPSED),)},
]


@pytest.mark.parametrize("changes", HOPELESS)
def test_a_hopeless_trial_counts_as_worse_than_all_others(
    make_space: Callable[..., SearchSpace], changes: dict[str, Any]
) -> None:
    space = make_space(LR, SCALE)
    configs = sample_configs(space, 32)
    losses = noise(32)
    is_hopeless = [_scale(config) >= 16 for config in configs]
    trials = [
        dataclasses.replace(trial, **changes) if hopeless else trial
        for trial, hopeless in zip(make_trials(configs, losses), is_hopeless, strict=True)
    ]
    result = measure(space, trials, permutations=19)
    assert result.trials == 32
    worst = [1e9 if hopeless else loss for hopeless, loss in zip(is_hopeless, losses, strict=True)]
    assert result.rows == measure(space, make_trials(configs, worst), permutations=19).rows


def test_a_trial_that_diverged_after_the_epoch_counts_with_its_value(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(LR, SCALE)
    trials = make_trials(sample_configs(space, 32), noise(32))
    bad = make_epoch(2, val_loss=NAN, state=TrainingState.DIVERGED)
    later = [
        trial if i % 4 else dataclasses.replace(trial, status=TrialStatus.DIVERGED, epochs=(*trial.epochs, bad))
        for i, trial in enumerate(trials)
    ]
    assert measure(space, later, permutations=19) == measure(space, trials, permutations=19)


@pytest.mark.parametrize(
    "changes",
    [
        {"status": TrialStatus.FAILED},
        {"status": TrialStatus.FAILED, "epochs": ()},
        {"status": TrialStatus.INTERRUPTED, "epochs": ()},
        {"epochs": (make_epoch(1, val_loss=None),)},
    ],
)
def test_trials_that_say_nothing_about_their_settings_do_not_count(
    make_space: Callable[..., SearchSpace], changes: dict[str, Any]
) -> None:
    space = make_space(LR, SCALE)
    trials = make_trials(sample_configs(space, 32), noise(32))
    silent = [dataclasses.replace(trial, **changes) for trial in trials[:8]]
    result = measure(space, [*silent, *trials[8:]], permutations=19)
    assert result == measure(space, trials[8:], permutations=19)
    assert result.trials == 24


# ---- where nothing can be said ----


def test_fifteen_trials_are_enough_and_fourteen_are_not(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(LR, SCALE)
    trials = make_trials(sample_configs(space, 15), noise(15))
    assert measure(space, trials, permutations=19).reason is None
    result = measure(space, trials[1:])
    assert (result.rows, result.trials) == ((), 14)
    assert describe_importance(result) == (
        "importance: not measured: needs at least 15 trials with a value at one epoch, got 14"
    )


@pytest.mark.parametrize("better", [0, 10])
def test_values_that_hardly_differ_are_said_to(make_space: Callable[..., SearchSpace], better: int) -> None:
    space = make_space(LR, SCALE)
    configs = sample_configs(space, 32)
    result = measure(space, make_trials(configs, [0.1] * better + [0.2] * (32 - better)))
    assert result.rows == ()
    assert result.reason == "needs a best third that stands out, but most of the 32 trials share the worst value"
    assert measure(space, make_trials(configs, [0.1] * 11 + [0.2] * 21), permutations=19).rows


def test_an_objective_that_was_not_measured_and_a_search_without_trials_are_no_error(
    make_space: Callable[..., SearchSpace],
) -> None:
    space = make_space(LR, SCALE)
    trials = make_trials(sample_configs(space, 32), noise(32))  # on a CPU: peak_memory_bytes is null
    for result in (measure(space, trials, "peak_memory_bytes"), measure(space, [])):
        assert result.reason == "needs at least 15 trials with a value at one epoch, got 0"


@pytest.mark.parametrize("active", [0, 1])
def test_a_parameter_that_was_hardly_ever_active_is_noise_without_a_warning(
    make_space: Callable[..., SearchSpace], capfd: pytest.CaptureFixture[str], active: int
) -> None:
    conditional = SCALE.replace("}", ", when: {precision: fp16}}")
    space = make_space(LR, "precision: {choices: [fp32, fp16]}", conditional, fixed="")
    configs = [TrialConfig(lr=config.lr) for config in sample_configs(space, 32)]
    configs[:active] = [TrialConfig(lr=0.01, precision="fp16")] * active
    optuna.logging.set_verbosity(optuna.logging.INFO)
    result = measure(space, make_trials(configs, lr_losses(configs)), permutations=99)
    assert told(result) == {"lr"}
    assert {row.parameter: row.p_value for row in result.rows}["init_scale"] == 1
    assert capfd.readouterr() == ("", "")


# ---- what Optuna suggested ----


@pytest.mark.parametrize("source", ["mnist_amp", "precision", "quick", "stress"])
def test_suggestions_are_restored_from_the_configurations_of_each_bundled_space(source: str) -> None:
    check_restored(load_space(source))


def test_suggestions_of_every_kind_are_restored(make_space: Callable[..., SearchSpace]) -> None:
    check_restored(
        make_space(
            "precision: {choices: [bf16, fp16]}",
            "lr: {low: 0.1, high: 0.2}",
            "batch_size: {low: 64, high: 1000}",
            "grad_clip: {choices: [null, 1.0, 2.5]}",
            "init_scale: {low: 2^-20, high: 2^40, power_of_two: true, when: {precision: fp16}}",
            "growth_interval: {choices: [0.01, 0.1, 2.0], fraction_of_trial: true, when: {precision: fp16}}",
            fixed="",
        )
    )


def check_restored(space: SearchSpace) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        asked = study.ask()
        settings = space.suggest(asked, train_images=TRAIN_IMAGES, max_epochs=MAX_EPOCHS)
        restored = _restore_suggestion(space, TrialConfig(max_epochs=MAX_EPOCHS, **settings), TRAIN_IMAGES)
        assert restored.distributions == asked.distributions
        for name, value in asked.params.items():
            rounded = name == "growth_interval/trial_steps"  # to whole steps, of which a trial has 200 or more
            assert restored.params[name] == (pytest.approx(value, abs=1 / 200) if rounded else value)


def test_a_fraction_that_rounding_took_out_of_its_range_is_no_warning(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space("growth_interval: {low: 1.0e-7, high: 1.1e-6, log: true, fraction_of_trial: true}", LR)
    configs = sample_configs(space, 24)
    assert {config.growth_interval for config in configs} == {1}
    assert measure(space, make_trials(configs, noise(24)), permutations=9).rows


# ---- sentences ----


def make_row(parameter: str, importance: float, *, told_from_noise: bool) -> ParameterImportance:
    return ParameterImportance(
        parameter=parameter,
        importance=importance,
        null_95=0.1,
        p_value=0.0025 if told_from_noise else 0.4,
        told_from_noise=told_from_noise,
        raw=importance / 3,
    )


def make_result(*rows: ParameterImportance) -> ImportanceResult:
    return ImportanceResult(objective="val_accuracy", epoch=1, trials=32, method="PED-ANOVA", rows=rows)


LR_ROW, BATCH_ROW = (
    make_row(name, share, told_from_noise=True) for name, share in (("lr", 0.81), ("batch_size", 0.12))
)
NOISE_ROWS = [make_row(name, 0.035, told_from_noise=False) for name in ("growth_interval", "init_scale", "grad_clip")]


def test_one_line_says_where_trials_are_compared() -> None:
    line = "importance at epoch 1 (32 trials), and what permuted values reach in 5 %:"
    assert describe_importance(make_result(LR_ROW, *NOISE_ROWS)) == line
    line = "importance at epoch 1 (32 trials): no parameter is distinguishable from noise"
    assert describe_importance(make_result(*NOISE_ROWS)) == line


# ---- the file ----


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_importance(tmp_path, make_result(LR_ROW, NOISE_ROWS[0]), PROVENANCE)
    return tmp_path / "importance.parquet"


def test_what_is_read_equals_what_was_written(file: Path) -> None:
    written = make_result(LR_ROW, NOISE_ROWS[0])
    assert load_importance(file) == load_importance(file.parent) == load_importance(str(file)) == written


def test_the_file_has_one_row_a_parameter_with_types_and_descriptions(file: Path) -> None:
    table = pq.read_table(file)
    kinds = {"epoch": "int64", "trials": "int64", "told_from_noise": "bool"}
    texts = ("objective", "method", "parameter")
    names = ["objective", "epoch", "trials", "method", "parameter", "importance", "null_95", "p_value"]
    assert table.column_names == [*names, "told_from_noise", "raw"]
    for column in table.schema:
        expected = kinds.get(column.name, "string" if column.name in texts else "double")
        assert (str(column.type), column.nullable) == (expected, column.name == "epoch")
        assert column.metadata[b"description"]
    assert table["parameter"].to_pylist() == ["lr", "growth_interval"]


def test_the_file_carries_the_provenance(file: Path) -> None:
    assert load_provenance(file) == PROVENANCE


def test_a_result_without_rows_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_importance(tmp_path, make_result(), PROVENANCE)
    assert list(tmp_path.iterdir()) == []


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_importance(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(file)
    write_parquet(change(table).replace_schema_metadata(table.schema.metadata), file)


def test_a_file_that_is_missing_or_no_parquet_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: must hold importance.parquet"
    (tmp_path / "importance.parquet").write_bytes(b"PAR1 no more PAR1")
    assert "must be a readable, undamaged Parquet file of tune_amp" in refusal(tmp_path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    write_best(tmp_path, rank_trials([make_trial()]), PROVENANCE)
    assert refusal(tmp_path / "best.parquet").endswith("kind: must be importance, got 'best'")


def test_a_value_changed_behind_our_back_is_noticed(file: Path) -> None:
    index = pq.read_schema(file).get_field_index("told_from_noise")
    rewrite(file, lambda table: table.set_column(index, table.schema.field(index), pa.array([True, True])))
    assert refusal(file).startswith(f"{file}: told_from_noise: must match its checksum")


def test_a_missing_column_and_a_file_without_rows_are_named(file: Path) -> None:
    rewrite(file, lambda table: table.drop_columns(["p_value"]))
    assert refusal(file) == f"{file}: p_value: must be a column, once, got it 0 times"


def test_importing_needs_no_torch_and_no_ray() -> None:
    code = "import sys, tune_amp.results.importance; print([name for name in ('torch', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
