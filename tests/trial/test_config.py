import dataclasses
import inspect
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tune_amp.trial.config import (
    FIELD_TYPES,
    LARGEST_SCALE,
    SCALER_DEFAULTS,
    SMALLEST_SCALE,
    EpochMetrics,
    InputError,
    TrialConfig,
    TrialStatus,
    checked_type,
    is_function_name,
)
from tune_amp.trial.text import describe_error, one_line, shown

FUNCTION = "or module:function"
MODELS = f"must be one of simple_net, conv_net, vit, {FUNCTION}"
DATASETS = f"must be one of mnist, fashion_mnist, kmnist, digits, {FUNCTION}"
SCALE_RULE = "must be between 2^-126 and 2^127 (fp32's normal range)"


def test_default_configuration_is_the_tutorial_s() -> None:
    assert dataclasses.asdict(TrialConfig()) == {
        "lr": 1e-3,
        "batch_size": 64,
        "precision": "fp32",
        "init_scale": None,
        "growth_factor": None,
        "backoff_factor": None,
        "growth_interval": None,
        "model": "simple_net",
        "dataset": "mnist",
        "imbalance": 1.0,
        "optimizer": "adam",
        "weight_decay": 0.0,
        "grad_clip": None,
        "input_scaling": "minmax",
        "class_weighting": "none",
        "curriculum": "none",
        "max_epochs": 5,
        "seed": 0,
        "accumulate": 1,
        "task": None,
        "train": None,
        "own": {},
    }


def test_scaler_fields_left_out_get_what_grad_scaler_itself_would_take() -> None:
    signature = inspect.signature(torch.amp.GradScaler.__init__)
    config = TrialConfig(precision="fp16")
    for name, default in SCALER_DEFAULTS.items():
        value = getattr(config, name)
        assert value == default == signature.parameters[name].default
        assert type(value) is type(default)


def test_scaler_fields_that_are_given_are_kept() -> None:
    config = TrialConfig(precision="fp16", init_scale=2, growth_factor=3, backoff_factor=0.25, growth_interval=4)
    assert (config.init_scale, config.growth_factor, config.backoff_factor, config.growth_interval) == (2, 3, 0.25, 4)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name", SCALER_DEFAULTS)
def test_scaler_field_is_refused_outside_fp16(precision: str, name: str) -> None:
    assert getattr(TrialConfig(precision=precision), name) is None
    with pytest.raises(InputError) as caught:
        TrialConfig(**{"precision": precision, name: SCALER_DEFAULTS[name]})  # type: ignore[arg-type]
    assert str(caught.value) == f"{name}: must be left out unless precision is fp16, got {SCALER_DEFAULTS[name]!r}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr: must be greater than 0, got 0.0"),
        ({"lr": -1e-3}, "lr: must be greater than 0, got -0.001"),
        ({"lr": math.nan}, "lr: must be a finite number, got nan"),
        ({"lr": math.inf}, "lr: must be a finite number, got inf"),
        ({"lr": None}, "lr: must be a number, got None"),
        ({"lr": True}, "lr: must be a number, got True"),
        ({"lr": "1e-4"}, "lr: must be a number, got '1e-4'"),
        ({"lr": "fast"}, "lr: must be a number, got 'fast'"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"batch_size": 64.0}, "batch_size: must be a whole number, got 64.0"),
        ({"batch_size": False}, "batch_size: must be a whole number, got False"),
        ({"batch_size": "1e3"}, "batch_size: must be a whole number, got '1e3'"),
        ({"batch_size": 2**63}, "batch_size: must fit in 64 bits, got 9223372036854775808"),
        ({"batch_size": 10**5000}, "batch_size: must fit in 64 bits, got <int too long to show>"),
        ({"precision": "fp8"}, "precision: must be one of fp32, tf32, bf16, fp16, got 'fp8'"),
        ({"precision": "FP16"}, "precision: must be one of fp32, tf32, bf16, fp16, got 'FP16'"),
        ({"precision": 16}, "precision: must be a text, got 16"),
        ({"model": "resnet"}, f"model: {MODELS}, got 'resnet'"),
        ({"model": "package.module:"}, f"model: {MODELS}, got 'package.module:'"),
        ({"model": "module:f\n"}, rf"model: {MODELS}, got 'module:f\n'"),
        ({"dataset": "cifar10"}, f"dataset: {DATASETS}, got 'cifar10'"),
        ({"optimizer": "lion"}, "optimizer: must be one of adam, adamw, sgd, got 'lion'"),
        ({"optimizer": "torch:sgd"}, "optimizer: must be one of adam, adamw, sgd, got 'torch:sgd'"),
        ({"weight_decay": -0.1}, "weight_decay: must be at least 0, got -0.1"),
        ({"grad_clip": 0}, "grad_clip: must be greater than 0, got 0.0"),
        ({"grad_clip": "1"}, "grad_clip: must be a number or null, got '1'"),
        ({"input_scaling": "none"}, "input_scaling: must be one of minmax, standard, got 'none'"),
        ({"class_weighting": "yes"}, "class_weighting: must be one of none, balanced, got 'yes'"),
        ({"class_weighting": None}, "class_weighting: must be a text, got None"),
        ({"curriculum": "cosine"}, "curriculum: must be one of none, linear, root, step, got 'cosine'"),
        ({"imbalance": 0.99}, "imbalance: must be at least 1, got 0.99"),
        ({"imbalance": math.inf}, "imbalance: must be a finite number, got inf"),
        ({"max_epochs": 0}, "max_epochs: must be at least 1, got 0"),
        ({"seed": -1}, "seed: must be between 0 and 2^63 - 1, got -1"),
        ({"seed": 2**63}, "seed: must fit in 64 bits, got 9223372036854775808"),
        ({"precision": "fp16", "init_scale": 0}, f"init_scale: {SCALE_RULE}, got 0.0"),
        ({"precision": "fp16", "init_scale": -1}, f"init_scale: {SCALE_RULE}, got -1.0"),
        ({"precision": "fp16", "init_scale": math.inf}, "init_scale: must be a finite number, got inf"),
        ({"precision": "fp16", "init_scale": 2.0**-127}, f"init_scale: {SCALE_RULE}, got 5.877471754111438e-39"),
        ({"precision": "fp16", "init_scale": 2.0**128}, f"init_scale: {SCALE_RULE}, got 3.402823669209385e+38"),
        ({"precision": "fp16", "growth_factor": 1}, "growth_factor: must be greater than 1, got 1.0"),
        ({"precision": "fp16", "backoff_factor": 1}, "backoff_factor: must be between 0 and 1, both excluded, got 1.0"),
        ({"precision": "fp16", "backoff_factor": 0}, "backoff_factor: must be between 0 and 1, both excluded, got 0.0"),
        ({"precision": "fp16", "growth_interval": 0}, "growth_interval: must be at least 1, got 0"),
        ({"precision": "fp16", "growth_interval": 2.0}, "growth_interval: must be a whole number or null, got 2.0"),
    ],
)  # fmt: skip
def test_bad_setting_is_refused_with_field_rule_and_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        TrialConfig(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 5e-324},
        {"batch_size": 1},
        {"batch_size": 2**63 - 1},
        {"weight_decay": 0},
        {"max_epochs": 1},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"model": "module:function"},
        {"dataset": "a.b_1.c:f"},
        {"precision": "fp16", "init_scale": SMALLEST_SCALE},
        {"precision": "fp16", "init_scale": LARGEST_SCALE},
        {"precision": "fp16", "growth_factor": math.nextafter(1, 2)},
        {"precision": "fp16", "backoff_factor": math.nextafter(1, 0)},
        {"precision": "fp16", "backoff_factor": 5e-324},
        {"precision": "fp16", "growth_interval": 1},
    ],
)
def test_setting_at_the_edge_of_its_rule_is_accepted(settings: dict[str, Any]) -> None:
    config = TrialConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_scale_limits_are_the_powers_of_two_that_fp32_holds_at_full_precision() -> None:
    assert torch.finfo(torch.float32).tiny == SMALLEST_SCALE
    assert LARGEST_SCALE <= torch.finfo(torch.float32).max < 2 * LARGEST_SCALE


def test_whole_number_becomes_a_float_where_a_float_is_due() -> None:
    config = TrialConfig(lr=1, grad_clip=2, weight_decay=0, precision="fp16", init_scale=4)
    assert all(type(value) is float for value in (config.lr, config.grad_clip, config.weight_decay, config.init_scale))


def test_configuration_is_frozen_checked_again_when_replaced_and_named_only() -> None:
    config = TrialConfig(precision="fp16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]
    with pytest.raises(InputError, match=r"^lr: must be greater than 0, got -1\.0$"):
        dataclasses.replace(config, lr=-1)
    with pytest.raises(TypeError):
        TrialConfig(1e-3)  # type: ignore[call-arg]


def test_configurations_compare_hash_and_pickle_by_value() -> None:
    config = TrialConfig(precision="fp16", init_scale=8)
    same = pickle.loads(pickle.dumps(config))
    assert same == config
    assert hash(same) == hash(config)
    assert config != TrialConfig(precision="fp16", init_scale=16)


@pytest.mark.parametrize("name", ["a:b", "a.b:c", "_a1.b2:_c", "é:f"])
def test_module_and_function_make_a_function_name(name: str) -> None:
    assert is_function_name(name)


@pytest.mark.parametrize(
    "name", ["", ":", "a", "a.b", "a:", ":b", "a:b:c", "a:b.c", ".a:b", "a.:b", "1a:b", "a:1", "a b:c"]
)
def test_anything_else_makes_none(name: str) -> None:
    assert not is_function_name(name)


def test_every_field_tells_what_it_is() -> None:
    for owner in (TrialConfig, EpochMetrics):
        for field in dataclasses.fields(owner):
            assert field.metadata["doc"], field.name
            assert set(field.metadata) == {"doc", "rule", "unit", "epoch_only"}, field.name


def test_only_lists_are_kept_out_of_the_trials_table() -> None:
    epoch_only = [field.name for field in dataclasses.fields(EpochMetrics) if field.metadata["epoch_only"]]
    assert epoch_only == ["loss_scale_steps", "loss_scale_values", "val_recalls"]
    assert not any(field.metadata["epoch_only"] for field in dataclasses.fields(TrialConfig))


def test_statuses_are_the_words_written_to_parquet() -> None:
    assert [str(status) for status in TrialStatus] == [
        "completed",
        "stopped",
        "diverged",
        "out_of_memory",
        "failed",
        "interrupted",
    ]


def test_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)


def test_config_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import tune_amp.trial.config; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'tune_amp'}\n"


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@given(name=st.sampled_from(list(FIELD_TYPES)), value=ANY_VALUE)
def test_any_value_is_either_of_the_field_s_type_or_refused_in_one_line(name: str, value: Any) -> None:
    try:
        checked = checked_type(name, value, FIELD_TYPES[name])
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{name}: must ")
        assert len(message.splitlines()) == 1
        assert len(message) < 400
    else:
        assert isinstance(checked, FIELD_TYPES[name])
        assert not isinstance(checked, bool)
        assert checked == value


def test_long_values_are_shortened_in_messages() -> None:
    assert len(shown("x" * 1000)) < 50
    assert len(shown(list(range(1000)))) < 50
    assert shown(16**5000) == "<int too long to show>"


def test_one_line_is_one_line_and_no_longer_than_its_limit() -> None:
    assert one_line(" two\n\tlines ") == "two lines"
    assert one_line("x" * 300) == "x" * 300
    assert one_line("x" * 301) == "x" * 296 + " ..."
    assert one_line("a b", limit=3) == "a b"
    assert len(one_line("long " * 100, limit=40)) == 40
    assert one_line("a\x1b[2Jb\x07 \udcff") == "a\ufffd[2Jb\ufffd \ufffd"
    one_line("\udcff").encode()


def test_error_is_described_by_type_and_text_on_one_line() -> None:
    assert describe_error(KeyError("x")) == "KeyError: 'x'"
    assert describe_error(SystemExit(3)) == "SystemExit: 3"
    assert describe_error(RuntimeError("two\nlines")) == "RuntimeError: two lines"
