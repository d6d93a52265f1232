import itertools
import math
import pickle
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_amp.space import space as space_module
from tune_amp.space.space import SearchSpace, load_space
from tune_amp.trial.config import CURRICULA, FIELD_TYPES, INPUT_SCALINGS, SCALER_DEFAULTS, InputError, TrialConfig

BUNDLED = ("extensions", "mnist_amp", "precision", "quick", "stress")
KNOWN = (
    "lr, batch_size, precision, init_scale, growth_factor, backoff_factor, growth_interval, optimizer, weight_decay, "
    "grad_clip, input_scaling, class_weighting, curriculum, accumulate"
)
TRIAL = {"train_images": 55_000, "max_epochs": 8}  # MNIST: 6,872 steps at batch size 64, 424 at 1,024
LR = "lr: {low: 1.0e-4, high: 0.1}"
FP16 = "\nfixed: {precision: fp16}"
SHAPE = "must be a mapping with low and high, or with choices"

optuna.logging.set_verbosity(optuna.logging.WARNING)

Load = Callable[[str], SearchSpace]


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spaces") / "space.yaml"


@pytest.fixture(scope="session")
def load(file: Path) -> Load:
    def write_and_load(text: str) -> SearchSpace:
        file.write_bytes(text.encode())
        return load_space(str(file))

    return write_and_load


def suggest_many(space: SearchSpace, n: int, seed: int = 0) -> list[dict[str, Any]]:
    return list(space.sample(n, seed=seed, **TRIAL))


# The bundled spaces


def test_default_space_searches_exactly_the_four_settings_of_fp16_training() -> None:
    space = load_space("mnist_amp")
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    suggested = space.suggest(trial, **TRIAL)
    assert trial.distributions == {
        "lr": optuna.distributions.FloatDistribution(1e-4, 3e-2, log=True),
        "log2(batch_size)": optuna.distributions.IntDistribution(6, 10),
        "log2(init_scale)": optuna.distributions.IntDistribution(0, 24),
        "growth_interval/trial_steps": optuna.distributions.FloatDistribution(0.02, 0.5, log=True),
    }
    steps = 55_000 // suggested["batch_size"] * 8
    assert suggested == {
        "precision": "fp16",
        "lr": trial.params["lr"],
        "batch_size": 2 ** trial.params["log2(batch_size)"],
        "init_scale": 2.0 ** trial.params["log2(init_scale)"],
        "growth_interval": round(trial.params["growth_interval/trial_steps"] * steps),
    }
    bounds = {name: space.bounds(name) for name in ("lr", "batch_size", "init_scale")}
    assert bounds == {"lr": (1e-4, 3e-2), "batch_size": (64, 1024), "init_scale": (1.0, 2.0**24)}
    assert not space.is_conditional


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_space_suggests_valid_configurations_that_reach_every_value_it_lists(name: str) -> None:
    space = load_space(name)
    suggestions = suggest_many(space, 50)
    configs = [TrialConfig(**suggestion) for suggestion in suggestions]
    assert "fp16" in {config.precision for config in configs}, "every bundled space is about AMP"
    for parameter in space.parameters:
        values = {suggestion[parameter.name] for suggestion in suggestions if parameter.name in suggestion}
        if not parameter.fraction_of_trial:  # else the trial has steps, not the fractions that are listed
            assert values >= set(parameter.choices)
        assert len(values) >= max(2, len(parameter.choices))


def test_bundled_precision_space_varies_the_scaler_in_fp16_trials_only() -> None:
    space = load_space("precision")
    assert space.is_conditional
    for suggestion in suggest_many(space, 50):
        scaler = set(suggestion) & set(SCALER_DEFAULTS)
        assert scaler == ({"init_scale", "growth_interval"} if suggestion["precision"] == "fp16" else set())


def test_bundled_names_are_all_the_files_in_the_checkout() -> None:
    folder = Path(__file__).parents[2] / "search_spaces"
    assert {file.stem for file in folder.iterdir()} == set(BUNDLED)


# Where a space is read from


def test_file_that_exists_wins_over_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"parameters: {{{LR}}}  # ä\r\n"
    (tmp_path / "quick").write_bytes(text.encode())
    space = load_space("quick")
    assert space.text == text
    assert space.source == "quick"
    assert [parameter.name for parameter in space.parameters] == ["lr"]


def test_directory_does_not_hide_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    bundled = Path(__file__).parents[2] / "search_spaces" / "quick.yaml"
    assert load_space("quick").text == bundled.read_text(encoding="utf-8")


def test_installed_wheel_brings_its_own_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "tune_amp"
    (package / "search_spaces").mkdir(parents=True)
    (package / "search_spaces" / "mine.yaml").write_text(f"parameters: {{{LR}}}")
    monkeypatch.setattr(space_module, "__file__", str(package / "space" / "space.py"))
    assert load_space("mine").source == "mine"
    with pytest.raises(InputError, match=r"^quick: is neither a file nor a bundled search space \(mine\)$"):
        load_space("quick")


@pytest.mark.parametrize(
    ("source", "shown", "nearest"),
    [
        ("mnist", "mnist", "mnist_amp"),
        ("", "''", None),
        ("quick.yaml", "quick.yaml", "quick"),
        ("../quick", "../quick", "quick"),
        ("a\nb", r"'a\nb'", None),
        ("\0", r"'\x00'", None),
        ("\ud800", r"'\ud800'", None),
    ],
)
def test_unknown_name_lists_the_bundled_ones_and_the_nearest(
    source: str, shown: str, nearest: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_space(source)
    hint = f"; did you mean {nearest}?" if nearest else ""
    assert str(caught.value) == f"{shown}: is neither a file nor a bundled search space ({', '.join(BUNDLED)}){hint}"


def test_a_space_is_loaded_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("parameters:\n  lr: {low: 1.0e-4, high: 0.1}\n")
    assert load_space(path) == load_space(str(path))


def test_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_space(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: is a directory, not a file"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that root cannot read either is Linux's")
def test_unreadable_file_is_refused_with_the_system_s_reason() -> None:
    with pytest.raises(InputError) as caught:
        load_space("/proc/self/mem")
    assert str(caught.value) == "/proc/self/mem: cannot be read: Input/output error"


def test_file_of_one_mebibyte_is_read_and_one_byte_more_is_refused(file: Path) -> None:
    text = f"parameters: {{{LR}}}\n#".encode()
    file.write_bytes(text.ljust(2**16, b"#"))
    assert load_space(str(file)).bounds("lr") == (1e-4, 0.1)
    file.write_bytes(text.ljust(2**16 + 1, b"#"))
    with pytest.raises(InputError) as caught:
        load_space(str(file))
    assert str(caught.value) == f"{file}: is larger than 64 KiB, too large for a search space"


def test_text_that_is_not_utf_8_is_refused(file: Path) -> None:
    file.write_bytes("parameters: ä".encode("latin-1"))
    with pytest.raises(InputError) as caught:
        load_space(str(file))
    assert str(caught.value) == f"{file}: must be UTF-8, got byte 0xe4 at position 12"


# What is refused, and in which words

YAML_ERRORS = [
    ("parameters:\n  lr: {low: 1\n  x: y", "line 3: not valid YAML: expected ',' or '}', but got ':'"),
    ("parameters:\n  lr: a: b", "line 2: not valid YAML: mapping values are not allowed here"),
    ("parameters:\n\t- 1", "line 2: not valid YAML: found character '\\t' that cannot start any token"),
    ("a: 1\n---\nb: 2", "line 2: not valid YAML: but found another document"),
    ("parameters:\n lr: \0", "line 2: not valid YAML: character '\\x00' is not allowed"),
    ('\nlr: "\\UFFFFFFFF"', "line 2: not valid YAML: a number out of range"),
    ("a: 1\nparameters: {}\na: 2", "line 3: key 'a' stands twice"),
    ("parameters:\n  lr: {low: 1, high: 2}\n  'lr': {low: 3, high: 4}", "line 3: key 'lr' stands twice"),
    ("parameters:\n  lr: {low: 1,\n low: 2, high: 3}", "line 3: key 'low' stands twice"),
    ("parameters: &a {lr: 1}", "line 1: anchors and aliases (& and *) are not allowed"),
    ("parameters:\n  lr: &a 1", "line 2: anchors and aliases (& and *) are not allowed"),
    ("parameters: *a", "line 1: anchors and aliases (& and *) are not allowed"),
    ("parameters:\n  lr: !!python/object/apply:os.system ['true']", "line 2: tags (!) are not allowed"),
    ("parameters:\n  lr: !!float 1", "line 2: tags (!) are not allowed"),
    ("parameters:\n\n  1: {}", "line 3: a key must be a text, got 1"),
    ("parameters:\n  ? [a]\n  : b", "line 2: a key must be a text, got ['a']"),
    ("\nlr: " + "9" * 5000, "line 2: not a valid YAML value: '999999999999...9999999999999'"),
    ("[" * 60_000, "line 1: must not be nested deeper than 10 levels"),
    ("\n" + "[" * 11 + "]" * 11, "line 2: must not be nested deeper than 10 levels"),
    ("[" * 10 + "]" * 10, "must be a mapping with the keys parameters and fixed, got [[[[[[[...]]]]]]]"),
]

SHAPE_ERRORS = [
    ("", "parameters: must name at least one field to search"),
    ("[]", "must be a mapping with the keys parameters and fixed, got []"),
    ("lr", "must be a mapping with the keys parameters and fixed, got 'lr'"),
    ("lr: {low: 1, high: 2}", "lr: unknown key (known: parameters, fixed, own)"),
    ("parameters:", "parameters: must name at least one field to search"),
    ("parameters: {}", "parameters: must name at least one field to search"),
    ("fixed: {lr: 1}", "parameters: must name at least one field to search"),
    ("parameters: [lr]", "parameters: must be a mapping of fields, got ['lr']"),
    (f"parameters: {{{LR}}}\nfixed: [1]", "fixed: must be a mapping of fields to values, got [1]"),
    (f"parameters: {{{LR}}}\nfixed: {{lr: 0.1}}", "fixed.lr: must not be searched as well (parameters.lr)"),
    ("parameters: {learning_rate: {low: 1, high: 2}}", f"parameters.learning_rate: unknown field (known: {KNOWN})"),
    ("parameters: {batchsize: {low: 1, high: 2}}",
     f"parameters.batchsize: unknown field; did you mean batch_size? (known: {KNOWN})"),
    (f"parameters: {{{LR}}}\nfixed: {{optimiser: adam}}",
     f"fixed.optimiser: unknown field; did you mean optimizer? (known: {KNOWN})"),
    ('parameters: {"q\\nq": 1}', rf"parameters.'q\nq': unknown field (known: {KNOWN})"),
    ("parameters: {model: {choices: [vit]}}", "parameters.model: is not part of a search space: set it with --model"),
    ("parameters: {dataset: {choices: [mnist]}}",
     "parameters.dataset: is not part of a search space: set it with --dataset"),
    ("parameters: {max_epochs: {low: 1, high: 9}}",
     "parameters.max_epochs: is not part of a search space: set it with --max-epochs"),
    (f"parameters: {{{LR}}}\nfixed: {{seed: 1}}", "fixed.seed: is not part of a search space: set it with --seed"),
    ("parameters: {lr: 0.1}", f"parameters.lr: {SHAPE}, got 0.1"),
    ("parameters: {lr: [0.1, 0.2]}", f"parameters.lr: {SHAPE}, got [0.1, 0.2]"),
    ("parameters: {lr: {}}", f"parameters.lr: {SHAPE}, got {{}}"),
    ("parameters: {lr: {low: 0.1}}", f"parameters.lr: {SHAPE}, got {{'low': 0.1}}"),
    ("parameters: {lr: {high: 0.1}}", f"parameters.lr: {SHAPE}, got {{'high': 0.1}}"),
    ("parameters: {lr: {low: 0.1, hihg: 2}}",
     "parameters.lr.hihg: unknown key (known: low, high, log, power_of_two, fraction_of_trial, choices, when)"),
    ("parameters: {lr: {low: 0.1, high: 1, choices: [1]}}",
     "parameters.lr.low: must be left out beside choices, got 0.1"),
    ("parameters: {lr: {high: 1, choices: [1]}}", "parameters.lr.high: must be left out beside choices, got 1"),
    ("parameters: {lr: {choices: [1], log: true}}", "parameters.lr.log: must be left out beside choices, got True"),
    ("parameters: {optimizer: {choices: [adam], power_of_two: true}}",
     "parameters.optimizer.power_of_two: must be left out beside choices, got True"),
    ("parameters: {optimizer: {low: adam, high: sgd, log: true}}",
     "parameters.optimizer: must have choices instead of low and high, because optimizer is a text"),
]  # fmt: skip

VALUE_ERRORS = [
    ("lr: {low: '1e-4', high: 0.1}", "lr.low: must be a number, got '1e-4'"),
    ("lr: {low: 2025-02-30, high: 0.1}", "lr.low: must be a number, got '2025-02-30'"),
    ("lr: {low: true, high: 0.1}", "lr.low: must be a number, got True"),
    ("lr: {low: null, high: 0.1}", "lr.low: must be a number, got None"),
    ("lr: {low: [1], high: 0.1}", "lr.low: must be a number, got [1]"),
    ("lr: {low: .nan, high: 0.1}", "lr.low: must be a finite number, got nan"),
    ("lr: {low: 0.1, high: .inf}", "lr.high: must be a finite number, got inf"),
    (f"lr: {{low: 0x{'f' * 5000}, high: 1}}", "lr.low: must be a finite number, got <int too long to show>"),
    ("grad_clip: {low: null, high: 0.1}", "grad_clip.low: must be a number, got None"),
    ("batch_size: {low: 64.0, high: 128}", "batch_size.low: must be a whole number, got 64.0"),
    ("batch_size: {low: '64', high: 128}", "batch_size.low: must be a whole number, got '64'"),
    ("batch_size: {low: 1e2, high: 128}", "batch_size.low: must be a whole number, got 100.0"),
    ("batch_size: {low: 64, high: 2^63}", "batch_size.high: must fit in 64 bits, got 9223372036854775808"),
    ("batch_size: {low: 2^-1, high: 2}", "batch_size.low: must be a whole number, got 0.5"),
    ("lr: {low: 2**-3, high: 1}", "lr.low: must be a number, got '2**-3'"),
    ("lr: {low: 2^-3, high: 2^1000}", "lr.high: must be a number, got '2^1000'"),
    ("lr: {low: 2^-1000, high: 1}", "lr.low: must be a number, got '2^-1000'"),
    ("lr: {low: 2^1.5, high: 4}", "lr.low: must be a number, got '2^1.5'"),
    ("lr: {low: ' 2^1', high: 4}", "lr.low: must be a number, got ' 2^1'"),
    ("lr: {low: 3^2, high: 10}", "lr.low: must be a number, got '3^2'"),
    ("lr: {low: 0.1, high: 0.1}", "lr: low < high must hold, got low=0.1, high=0.1"),
    ("lr: {low: 0.1, high: 0.01}", "lr: low < high must hold, got low=0.1, high=0.01"),
    ("lr: {low: 0.1, high: 1, log: 1}", "lr.log: must be true or false, got 1"),
    ("lr: {low: 0.1, high: 1, log: null}", "lr.log: must be true or false, got None"),
    ("lr: {low: 0.1, high: 1, power_of_two: yes}", "lr.power_of_two: must be true or false, got 'yes'"),
    ("weight_decay: {low: 0, high: 1, log: true}",
     "weight_decay.low: must be greater than 0 where log is true, got 0.0"),
    ("batch_size: {low: 1, high: 4, log: true, power_of_two: true}",
     "batch_size: log and power_of_two must not both be true (powers of two are a log scale)"),
    ("batch_size: {low: 3, high: 4, power_of_two: true}", "batch_size.low: must be a power of two, got 3"),
    ("batch_size: {low: 2, high: 6, power_of_two: true}", "batch_size.high: must be a power of two, got 6"),
    (f"batch_size: {{low: 2, high: {2**62 + 1}, power_of_two: true}}",
     f"batch_size.high: must be a power of two, got {2**62 + 1}"),
    ("weight_decay: {low: 0, high: 1, power_of_two: true}", "weight_decay.low: must be a power of two, got 0.0"),
    ("lr: {choices: []}", "lr.choices: must be a list of at least one value, got []"),
    ("lr: {choices: 0.1}", "lr.choices: must be a list of at least one value, got 0.1"),
    ("lr: {choices: [1, 2, 1.0]}", "lr.choices[2]: must not repeat a choice, got 1.0 again"),
    ("lr: {choices: [0.5, 2^-1]}", "lr.choices[1]: must not repeat a choice, got 0.5 again"),
    ("lr: {choices: [0.1, big]}", "lr.choices[1]: must be a number, got 'big'"),
    ("optimizer: {choices: [adam, 1]}", "optimizer.choices[1]: must be a text, got 1"),
    ("optimizer: {choices: [adam, lion]}", "optimizer.choices[1]: must be one of adam, adamw, sgd, got 'lion'"),
    ("optimizer: {choices: [2^1]}", "optimizer.choices[0]: must be one of adam, adamw, sgd, got '2^1'"),
    ("lr: {low: 0, high: 1}", "lr.low: must be greater than 0, got 0.0"),
    ("batch_size: {choices: [0, 1]}", "batch_size.choices[0]: must be at least 1, got 0"),
    ("backoff_factor: {low: 0.5, high: 1.5}", "backoff_factor.high: must be between 0 and 1, both excluded, got 1.5"),
    ("init_scale: {low: 2^-127, high: 1, power_of_two: true}",
     "init_scale.low: must be between 2^-126 and 2^127 (fp32's normal range), got 5.877471754111438e-39"),
    ("init_scale: {low: 1, high: 2^128, power_of_two: true}",
     "init_scale.high: must be between 2^-126 and 2^127 (fp32's normal range), got 3.402823669209385e+38"),
    ("init_scale: {choices: [null, 1]}", "init_scale.choices[0]: must be a number, got None"),
]  # fmt: skip

FIXED_ERRORS = [
    ("precision: fp8", "fixed.precision: must be one of fp32, tf32, bf16, fp16, got 'fp8'"),
    ("precision: fp16, growth_factor: 1", "fixed.growth_factor: must be greater than 1, got 1.0"),
    ("precision: fp16, init_scale: null", "fixed.init_scale: must be a number, got None"),
    ("batch_size: {low: 1, high: 2}", "fixed.batch_size: must be a whole number, got {'high': 2, 'low': 1}"),
    ("init_scale: 2", "fixed.init_scale: has no effect unless precision is fp16, and here it is fp32"),
]

CONDITION_ERRORS = [
    ("lr: {low: 0.1, high: 1, when: fp16}",
     "lr.when: must be a mapping of fields to the values they must have, got 'fp16'"),
    ("lr: {choices: [1], when: {}}", "lr.when: must be a mapping of fields to the values they must have, got {}"),
    ("lr: {choices: [1], when: null}", "lr.when: must be a mapping of fields to the values they must have, got None"),
    ("lr: {choices: [1], when: {precision: fp16}}",
     "lr.when.precision: must be a field that is searched or fixed here (lr, curriculum)"),
    ("lr: {choices: [1], when: {model: vit}}",
     "lr.when.model: must be a field that is searched or fixed here (lr, curriculum)"),
    ("lr: {choices: [1], when: {optimizer: []}}, optimizer: {choices: [adam]}",
     "lr.when.optimizer: must be a value or a list of at least one value, got []"),
    ("lr: {choices: [1], when: {optimizer: lion}}, optimizer: {choices: [adam]}",
     "lr.when.optimizer: must be one of adam, adamw, sgd, got 'lion'"),
    ("lr: {choices: [1], when: {optimizer: [adam, sgd]}}, optimizer: {choices: [adam, adamw]}",
     "lr.when.optimizer: must be one of ('adam', 'adamw'), as optimizer is, got 'sgd'"),
    ("lr: {choices: [1], when: {batch_size: 3}}, batch_size: {low: 2^0, high: 2^7, power_of_two: true}",
     "lr.when.batch_size: must be one of (1, 2, 4, 8, 16, 32, ...), as batch_size is, got 3"),
    ("lr: {choices: [1], when: {batch_size: 256}}, batch_size: {low: 2^0, high: 2^7, power_of_two: true}",
     "lr.when.batch_size: must be one of (1, 2, 4, 8, 16, 32, ...), as batch_size is, got 256"),
    ("lr: {choices: [1], when: {curriculum: [none, linear]}}",
     "lr.when.curriculum: must be 'none', its fixed value, got 'linear'"),
    ("lr: {choices: [1], when: {batch_size: 3}}, batch_size: {low: 1, high: 4}",
     "lr.when.batch_size: must have choices or power_of_two to be a condition, but is a plain range"),
    ("lr: {choices: [1], when: {weight_decay: 0.1}}, weight_decay: {low: 0, high: 4}",
     "lr.when.weight_decay: must have choices or power_of_two to be a condition, but is a plain range"),
    ("lr: {choices: [1], when: {lr: 1}}", "lr.when: conditions must not form a circle, got lr -> lr"),
    ("lr: {choices: [1], when: {optimizer: adam}}, optimizer: {choices: [adam], when: {lr: 1}}",
     "lr.when: conditions must not form a circle, got lr -> optimizer -> lr"),
    ("lr: {choices: [1], when: {optimizer: adam, batch_size: 1}},"
     "batch_size: {choices: [1], when: {optimizer: [sgd, adamw]}}, optimizer: {choices: [sgd, adam, adamw]}",
     "lr.when: can never hold: optimizer would have to be adam and sgd or adamw at once"),
]  # fmt: skip

FRACTION_ERRORS = [
    ("lr: {low: 0.1, high: 1, fraction_of_trial: true}", "lr.fraction_of_trial: is for growth_interval only, got True"),
    ("batch_size: {choices: [64], fraction_of_trial: false}",
     "batch_size.fraction_of_trial: is for growth_interval only, got False"),
    ("optimizer: {low: 1, high: 2, fraction_of_trial: true}",
     "optimizer.fraction_of_trial: is for growth_interval only, got True"),
    ("growth_interval: {low: 0.1, high: 1, fraction_of_trial: 1}",
     "growth_interval.fraction_of_trial: must be true or false, got 1"),
    ("growth_interval: {low: 0.1, high: 1, fraction_of_trial: false}",
     "growth_interval.low: must be a whole number, got 0.1"),
    ("growth_interval: {choices: [0.1]}", "growth_interval.choices[0]: must be a whole number, got 0.1"),
    ("growth_interval: {low: 0, high: 1, fraction_of_trial: true}",
     "growth_interval.low: must be greater than 0, got 0.0"),
    ("growth_interval: {low: 0.1, high: .inf, fraction_of_trial: true}",
     "growth_interval.high: must be a finite number, got inf"),
    ("growth_interval: {low: 0.5, high: 0.1, fraction_of_trial: true}",
     "growth_interval: low < high must hold, got low=0.5, high=0.1"),
    ("growth_interval: {low: 2^-3, high: 1, power_of_two: true, fraction_of_trial: true}",
     "growth_interval: power_of_two and fraction_of_trial must not both be true"),
    ("growth_interval: {choices: [0.1, null], fraction_of_trial: true}",
     "growth_interval.choices[1]: must be a number, got None"),
    ("growth_interval: {choices: [-0.1], fraction_of_trial: true}",
     "growth_interval.choices[0]: must be greater than 0, got -0.1"),
    ("growth_interval: {choices: [0.5, 2^-1], fraction_of_trial: true}",
     "growth_interval.choices[1]: must not repeat a choice, got 0.5 again"),
    ("growth_interval: {choices: [0.1], low: 0.1, fraction_of_trial: true}",
     "growth_interval.low: must be left out beside choices, got 0.1"),
    ("growth_interval: {choices: [2], fraction_of_trial: true}, lr: {choices: [1], when: {growth_interval: 2}}",
     "lr.when.growth_interval: must have choices or power_of_two to be a condition, but is a fraction of the trial"),
    ("growth_interval: {low: 1, high: 2, fraction_of_trial: true, when: {batch_size: 1}},"
     "batch_size: {choices: [1], when: {growth_interval: 1}}",
     "batch_size.when.growth_interval: must have choices or power_of_two to be a condition, "
     "but is a fraction of the trial"),
]  # fmt: skip

SCALER_ERRORS = [
    ("parameters: {growth_interval: {low: 0.1, high: 1, fraction_of_trial: true}}",
     "parameters.growth_interval: has no effect unless precision is fp16, and here it is fp32"),
    ("parameters: {init_scale: {low: 1, high: 2}}",
     "parameters.init_scale: has no effect unless precision is fp16, and here it is fp32"),
    ("parameters: {init_scale: {low: 1, high: 2, when: {precision: bf16}}}\nfixed: {precision: bf16}",
     "parameters.init_scale: has no effect unless precision is fp16, and here it is bf16"),
    ("parameters: {init_scale: {low: 1, high: 2}, precision: {choices: [fp32, bf16]}}",
     "parameters.init_scale: has no effect unless precision is fp16, and here it is fp32 or bf16"),
    ("parameters: {precision: {choices: [fp32, bf16]}}\nfixed: {backoff_factor: 0.5}",
     "fixed.backoff_factor: has no effect unless precision is fp16, and here it is fp32 or bf16"),
    ("parameters: {growth_interval: {low: 1, high: 2}, precision: {choices: [fp32, fp16]}}",
     "parameters.growth_interval: needs `when: {precision: fp16}`, because precision can be fp32 or fp16"),
    ("parameters: {init_scale: {low: 1, high: 2, when: {precision: [fp16, bf16]}},"
     "precision: {choices: [bf16, fp32, fp16]}}",
     "parameters.init_scale: needs `when: {precision: fp16}`, because precision can be fp16 or bf16"),
    ("parameters: {init_scale: {low: 1, high: 2}, precision: {choices: [fp16], when: {optimizer: sgd}},"
     "optimizer: {choices: [sgd, adam]}}",
     "parameters.init_scale: needs `when: {precision: fp16}`, because precision can be fp16 or fp32"),
    ("parameters: {lr: {choices: [1], when: {precision: bf16, init_scale: 2}}, precision: {choices: [bf16, fp16]}}"
     "\nfixed: {init_scale: 2}",
     "parameters.lr.when: can never hold: precision would have to be bf16 and fp16 at once"),
]  # fmt: skip

ERRORS = [
    *YAML_ERRORS,
    *SHAPE_ERRORS,
    *((f"parameters: {{{entries}}}{FP16}", f"parameters.{message}") for entries, message in VALUE_ERRORS),
    *((f"parameters: {{{entries}}}{FP16}", f"parameters.{message}") for entries, message in FRACTION_ERRORS),
    *((f"parameters: {{{LR}}}\nfixed: {{{entries}}}", message) for entries, message in FIXED_ERRORS),
    *(
        (f"parameters: {{{entries}}}\nfixed: {{curriculum: none}}", f"parameters.{message}")
        for entries, message in CONDITION_ERRORS
    ),
    *SCALER_ERRORS,
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[message[:60] for _, message in ERRORS])
def test_bad_space_is_refused_in_one_line_that_names_place_rule_and_value(
    text: str, message: str, load: Load, file: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load(text)
    assert str(caught.value) == f"{file}: {message}"


# What is suggested


def test_example_in_the_documentation_is_a_valid_space(load: Load) -> None:
    assert space_module.__doc__ is not None
    example = space_module.__doc__.split(".. code-block:: yaml\n")[1].split("\n``when``")[0]
    space = load(textwrap.dedent(example))
    names = {parameter.name for parameter in space.parameters}
    assert names == {"lr", "batch_size", "precision", "init_scale", "growth_interval", "own.hidden", "own.dropout"}
    assert space.fixed == {"backoff_factor": 0.25}


def test_power_of_two_is_suggested_by_exponent_and_converted_exactly(load: Load) -> None:
    space = load(f"parameters: {{init_scale: {{low: 2^-126, high: 2^127, power_of_two: true}}}}{FP16}")
    for exponent in range(-126, 128):
        value = space.suggest(optuna.trial.FixedTrial({"log2(init_scale)": exponent}), **TRIAL)["init_scale"]
        assert type(value) is float
        assert value == math.ldexp(1.0, exponent)


@pytest.mark.parametrize("exponent", [0, 1, 6, 53, 62])
def test_power_of_two_of_a_whole_number_field_is_an_int(exponent: int, load: Load) -> None:
    space = load("parameters: {batch_size: {low: 1, high: 2^62, power_of_two: true}}")
    value = space.suggest(optuna.trial.FixedTrial({"log2(batch_size)": exponent}), **TRIAL)["batch_size"]
    assert type(value) is int
    assert value == 1 << exponent


def test_power_of_two_written_as_text_is_read_wherever_a_number_is_due(load: Load) -> None:
    space = load(
        "parameters: {batch_size: {choices: [2^6, 96, 2^7]}, lr: {low: 2^-20, high: 2^0, when: {batch_size: [2^7]}}}\n"
        "fixed: {precision: fp16, init_scale: 2^16}"
    )
    batch_size, lr = space.parameters
    assert batch_size.choices == (64, 96, 128)
    assert (lr.low, lr.high) == (2.0**-20, 1.0)
    assert lr.when == {"batch_size": (128,)}
    assert space.fixed == {"precision": "fp16", "init_scale": 65536.0}
    assert type(space.fixed["init_scale"]) is float


def test_log_is_the_scale_that_values_are_drawn_on(load: Load) -> None:
    ranges = "lr: {{low: 1.0e-6, high: 1, log: {log}}}, batch_size: {{low: 1, high: 1000000, log: {log}}}"
    for log, share in (("true", 0.5), ("false", 0.001)):
        suggestions = suggest_many(load(f"parameters: {{{ranges.format(log=log)}}}"), 200)
        for name, middle in (("lr", 1e-3), ("batch_size", 1e3)):
            below = sum(suggestion[name] < middle for suggestion in suggestions) / 200
            assert below == pytest.approx(share, abs=0.15)


def test_nested_conditions_hold_whatever_order_they_are_written_in(load: Load) -> None:
    space = load(
        "parameters:\n"
        "  lr: {low: 0.1, high: 1, when: {weight_decay: 0.1, curriculum: [none, linear]}}\n"
        "  weight_decay: {choices: [0.1, 0.2], when: {optimizer: [adamw, sgd]}}\n"
        "  optimizer: {choices: [adam, adamw, sgd]}\n"
        "  curriculum: {choices: [none, linear]}\n"
    )
    names = [parameter.name for parameter in space.parameters]
    assert names.index("optimizer") < names.index("weight_decay") < names.index("lr")
    assert names.index("curriculum") < names.index("lr")
    seen = set()
    for suggestion in suggest_many(space, 60):
        assert ("weight_decay" in suggestion) == (suggestion["optimizer"] != "adam")
        assert ("lr" in suggestion) == (suggestion.get("weight_decay") == 0.1)
        seen.add((suggestion["optimizer"], suggestion.get("weight_decay")))
    assert len(seen) == 5


CHAIN = (
    "parameters:\n"
    "  backoff_factor: {low: 0.1, high: 0.9, when: {init_scale: [2^8, 2^9]}}\n"
    "  init_scale: {low: 2^6, high: 2^9, power_of_two: true, when: {precision: fp16, curriculum: linear}}\n"
    "  precision: {choices: [fp32, fp16], when: {optimizer: [adam, adamw], batch_size: 64}}\n"
    "  optimizer: {choices: [adam, adamw, sgd]}\n"
    "  batch_size: {choices: [64, 128]}\n"
    "  curriculum: {choices: [none, linear]}\n"
    "  grad_clip: {low: 0.5, high: 2, when: {optimizer: sgd, curriculum: [none, linear]}}\n"
    "  growth_interval: {low: 0.1, high: 0.9, fraction_of_trial: true, when: {init_scale: [2^6, 2^9]}}\n"
)


def expected_fields(suggestion: Mapping[str, Any]) -> set[str]:
    """The fields of a trial of ``CHAIN``, written out."""
    fields = {"optimizer", "batch_size", "curriculum"}
    if suggestion["optimizer"] == "sgd":
        fields.add("grad_clip")
    elif suggestion["batch_size"] == 64:
        fields.add("precision")
        if suggestion.get("precision") == "fp16" and suggestion["curriculum"] == "linear":
            fields.add("init_scale")
            if suggestion.get("init_scale") in (256.0, 512.0):
                fields.add("backoff_factor")
            if suggestion.get("init_scale") in (64.0, 512.0):
                fields.add("growth_interval")
    return fields


def test_conditions_three_levels_deep_with_many_parents_hold_in_every_suggestion(load: Load) -> None:
    suggestions = suggest_many(load(CHAIN), 400)
    assert all(set(suggestion) == expected_fields(suggestion) for suggestion in suggestions)
    assert len({frozenset(suggestion) for suggestion in suggestions}) == 7, "every combination of fields occurs"


def test_conditions_three_levels_deep_hold_where_tpe_suggests_from_a_model_of_each_group(load: Load) -> None:
    space = load(CHAIN)
    with pytest.warns(optuna.exceptions.ExperimentalWarning, match="group"):
        sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, group=True, n_startup_trials=5)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for _ in range(60):  # a warning, of a fall back to independent sampling for instance, would be an error here
        trial = study.ask()
        suggestion = space.suggest(trial, **TRIAL)
        assert set(suggestion) == expected_fields(suggestion)
        TrialConfig(**suggestion)
        study.tell(trial, len(suggestion))
    late = [len(trial.params) for trial in study.trials[30:]]
    assert sum(late) > 1.2 * sum(len(suggestion) for suggestion in suggest_many(space, 30)), "TPE learnt nothing"


def test_every_condition_of_a_parameter_must_hold(load: Load) -> None:
    space = load(
        "parameters: {lr: {choices: [1], when: {optimizer: sgd, curriculum: none}}, optimizer: {choices: [adam, sgd]},"
        "curriculum: {choices: [none, linear]}}"
    )
    for suggestion in suggest_many(space, 30):
        assert ("lr" in suggestion) == (suggestion["optimizer"] == "sgd" and suggestion["curriculum"] == "none")


def test_condition_on_a_fixed_field_is_settled_on_loading(load: Load) -> None:
    space = load(f"parameters: {{init_scale: {{low: 1, high: 2, when: {{precision: fp16}}}}}}{FP16}")
    assert not space.is_conditional
    assert "init_scale" in suggest_many(space, 1)[0]


def test_null_is_a_choice_where_the_field_allows_it(load: Load) -> None:
    space = load("parameters: {grad_clip: {choices: [null, 1]}, lr: {choices: [1], when: {grad_clip: null}}}")
    suggestions = suggest_many(space, 20)
    assert {suggestion["grad_clip"] for suggestion in suggestions} == {None, 1.0}
    assert all(("lr" in suggestion) == (suggestion["grad_clip"] is None) for suggestion in suggestions)


def test_fixed_scaler_fields_reach_fp16_trials_only(load: Load) -> None:
    space = load(
        "parameters: {lr: {choices: [0.5], when: {growth_interval: 7}}, precision: {choices: [fp32, bf16, fp16]}}\n"
        "fixed: {growth_interval: 7, weight_decay: 0.5}"
    )
    for suggestion in suggest_many(space, 30):
        precision = suggestion["precision"]
        only_fp16 = {"growth_interval": 7, "lr": 0.5} if precision == "fp16" else {}
        assert suggestion == {"precision": precision, "weight_decay": 0.5, **only_fp16}


def test_searched_scaler_needs_no_condition_where_every_trial_is_fp16(load: Load) -> None:
    space = load("parameters: {init_scale: {low: 1, high: 2}, precision: {choices: [fp16]}}")
    assert all(1 <= suggestion["init_scale"] <= 2 for suggestion in suggest_many(space, 5))


def test_scaler_field_may_depend_on_precision_through_another(load: Load) -> None:
    space = load(
        "parameters: {precision: {choices: [fp32, fp16]}, init_scale: {choices: [1, 2], when: {precision: fp16}},"
        "growth_interval: {low: 1, high: 9, when: {init_scale: 2}}}"
    )
    for suggestion in suggest_many(space, 30):
        assert ("growth_interval" in suggestion) == (suggestion.get("init_scale") == 2.0)
        TrialConfig(**suggestion)


def test_bounds_cover_ranges_choices_and_fixed_numbers(load: Load) -> None:
    space = load(
        "parameters: {lr: {low: 0.1, high: 1}, batch_size: {low: 2^3, high: 2^5, power_of_two: true},"
        "grad_clip: {choices: [5, null, 0.5]}, optimizer: {choices: [adam, sgd]}}\n"
        "fixed: {weight_decay: 1, curriculum: linear}"
    )
    bounds = {name: space.bounds(name) for name in FIELD_TYPES if space.bounds(name) is not None}
    expected = {"lr": (0.1, 1.0), "batch_size": (8, 32), "grad_clip": (0.5, 5.0), "weight_decay": (1.0, 1.0)}
    assert bounds == expected
    assert space.bounds("no such field") is None


def test_same_seed_gives_the_same_suggestions_and_another_seed_others() -> None:
    space = load_space("stress")
    assert suggest_many(space, 20, seed=7) == suggest_many(space, 20, seed=7)
    assert suggest_many(space, 20, seed=7) != suggest_many(space, 20, seed=8)


@pytest.mark.parametrize("name", BUNDLED)
def test_space_and_its_suggest_survive_the_standard_pickle(name: str) -> None:
    space = load_space(name)
    assert pickle.loads(pickle.dumps(space)) == space
    suggest = pickle.loads(pickle.dumps(space.suggest))
    trial, copy = (optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3)).ask() for _ in range(2))
    assert suggest(copy, **TRIAL) == space.suggest(trial, **TRIAL)


# Fractions of the trial


def suggest_interval(space: SearchSpace, fraction: float, others: Mapping[str, Any] = {}, **trial: int) -> Any:
    fixed = optuna.trial.FixedTrial({"growth_interval/trial_steps": fraction, **others})
    return space.suggest(fixed, **(TRIAL | trial))["growth_interval"]


@pytest.mark.parametrize(
    "batch_size",
    ["{choices: [64, 1024]}", "{choices: [64, 1024], when: {precision: fp16, curriculum: [none, linear]}}"],
)
@pytest.mark.parametrize("batch_size_first", [False, True])
def test_fraction_is_of_the_steps_at_the_searched_batch_size_whatever_the_order_in_the_file(
    batch_size: str, batch_size_first: bool, load: Load
) -> None:
    entries = [f"batch_size: {batch_size}", "growth_interval: {low: 0.0001, high: 3, fraction_of_trial: true}"]
    entries = entries if batch_size_first else entries[::-1]
    space = load(f"parameters: {{{', '.join([*entries, 'curriculum: {choices: [none, linear]}'])}}}{FP16}")
    for size, intervals in {64: [1, 1718, 6872, 20616], 1024: [1, 106, 424, 1272]}.items():
        for fraction, interval in zip([0.0001, 0.25, 1.0, 3.0], intervals, strict=True):
            value = suggest_interval(space, fraction, {"batch_size": size, "curriculum": "none"})
            assert value == interval
            assert type(value) is int


@pytest.mark.parametrize("accumulate_first", [False, True])
def test_fraction_is_of_the_steps_of_accumulated_batches_whatever_the_order_in_the_file(
    accumulate_first: bool, load: Load
) -> None:
    entries = ["accumulate: {choices: [1, 4]}", "growth_interval: {low: 0.1, high: 1, fraction_of_trial: true}"]
    space = load(f"parameters: {{{', '.join(entries if accumulate_first else entries[::-1])}}}{FP16}")
    for accumulate, interval in {1: 3436, 4: 856}.items():  # 859 and 214 steps an epoch
        assert suggest_interval(space, 0.5, {"accumulate": accumulate}) == interval


def test_fraction_is_of_the_whole_budget_at_a_fixed_batch_size(load: Load) -> None:
    entry = "growth_interval: {low: 0.1, high: 1, fraction_of_trial: true}"
    space = load(f"parameters: {{{entry}}}\nfixed: {{precision: fp16, batch_size: 100}}")
    for train_images, max_epochs, interval in [(999, 2, 9), (1000, 2, 10), (1000, 20, 100), (100, 1, 1), (99, 5, 1)]:
        assert suggest_interval(space, 0.5, train_images=train_images, max_epochs=max_epochs) == interval


def test_fraction_is_of_the_steps_at_the_default_batch_size_where_the_space_gives_none(load: Load) -> None:
    interval = "growth_interval: {low: 0.1, high: 1, fraction_of_trial: true}"
    assert suggest_interval(load(f"parameters: {{{interval}}}{FP16}"), 0.5) == 3436
    entries = "batch_size: {choices: [1024], when: {optimizer: sgd}}, optimizer: {choices: [adam, sgd]}"
    space = load(f"parameters: {{{interval}, {entries}}}{FP16}")
    assert suggest_interval(space, 0.5, {"optimizer": "adam"}) == 3436
    assert suggest_interval(space, 0.5, {"optimizer": "sgd", "batch_size": 1024}) == 212


@pytest.mark.parametrize(
    ("entry", "distribution"),
    [
        ("low: 2^-4, high: 2", optuna.distributions.FloatDistribution(0.0625, 2)),
        ("low: 1, high: 2, log: true", optuna.distributions.FloatDistribution(1, 2, log=True)),
        ("choices: [0.1, 1, 2^-1]", optuna.distributions.CategoricalDistribution((0.1, 1.0, 0.5))),
    ],
)
def test_fractions_stand_in_the_study_under_a_name_of_their_own(
    entry: str, distribution: optuna.distributions.BaseDistribution, load: Load
) -> None:
    space = load(f"parameters: {{growth_interval: {{{entry}, fraction_of_trial: true}}}}{FP16}")
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    space.suggest(trial, **TRIAL)
    assert trial.distributions == {"growth_interval/trial_steps": distribution}
    assert space.bounds("growth_interval") is None, "fractions are no values of the field"


@pytest.mark.parametrize("fraction", [5e-324, 1e-300, 1e30, 1.7e308])
def test_any_fraction_gives_an_interval_that_a_trial_accepts(fraction: float, load: Load) -> None:
    space = load(f"parameters: {{growth_interval: {{choices: [{fraction:.400f}], fraction_of_trial: true}}}}{FP16}")
    interval = suggest_many(space, 1)[0]["growth_interval"]
    assert TrialConfig(precision="fp16", growth_interval=interval).growth_interval == interval
    assert (interval == 1) == (fraction < 1)


# Properties

NUMBERS = st.floats(1e-9, 1e9)


@st.composite
def parameter_entries(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A valid entry for a field, without conditions."""
    texts = {"precision": ("fp32", "bf16", "fp16"), "input_scaling": INPUT_SCALINGS, "curriculum": CURRICULA}
    if name in texts:
        return {"choices": draw(st.lists(st.sampled_from(texts[name]), min_size=1, unique=True))}
    if name == "growth_interval" and draw(st.booleans()):
        low, high = sorted(draw(st.lists(NUMBERS, min_size=2, max_size=2, unique=True)))
        as_range = {"low": low, "high": high, "log": draw(st.booleans())}
        entry: dict[str, Any] = as_range if draw(st.booleans()) else {"choices": [high, low]}
        return entry | {"fraction_of_trial": True}
    whole = FIELD_TYPES[name] is int or name == "growth_interval"
    if draw(st.booleans()):
        low, high = sorted(draw(st.lists(st.integers(0 if whole else -120, 62), min_size=2, max_size=2, unique=True)))
        texts_or_numbers = draw(st.sampled_from([(f"2^{low}", f"2^{high}"), (2.0**low, 2.0**high)]))
        if whole and not isinstance(texts_or_numbers[0], str):
            texts_or_numbers = (2**low, 2**high)
        return {"low": texts_or_numbers[0], "high": texts_or_numbers[1], "power_of_two": True}
    numbers: st.SearchStrategy[Any] = st.integers(1, 2**63 - 1) if whole else NUMBERS
    if draw(st.booleans()):
        return {"choices": draw(st.lists(numbers, min_size=1, max_size=4, unique=True))}
    low_number, high_number = sorted(draw(st.lists(numbers, min_size=2, max_size=2, unique=True)))
    return {"low": low_number, "high": high_number, "log": draw(st.booleans())}


def listed(entry: Mapping[str, Any]) -> list[Any]:
    """The values that an entry can take, where they can be listed."""
    if entry.get("fraction_of_trial"):
        return []
    if not entry.get("power_of_two"):
        return list(entry.get("choices", []))
    low, high = number(entry["low"]), number(entry["high"])
    return [low * 2**step for step in range(round(math.log2(high / low)) + 1)]


def number(value: Any) -> Any:
    return 2 ** int(value[2:]) if isinstance(value, str) else value


@st.composite
def valid_documents(draw: st.DrawFn) -> dict[str, Any]:
    """Spaces whose conditions agree: all of those on one field ask for one value among others."""
    names = ["precision", "lr", "batch_size", "weight_decay", "input_scaling", "curriculum"]
    names = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    parameters = {name: draw(parameter_entries(name)) for name in names}
    fixed = {"optimizer": "sgd", "grad_clip": 0.5}
    if "precision" in names and "fp16" in parameters["precision"]["choices"]:
        for name in draw(st.lists(st.sampled_from(["init_scale", "growth_interval"]), unique=True)):
            parameters[name] = draw(parameter_entries(name)) | {"when": {"precision": "fp16"}}
    wanted: dict[str, Any] = {"optimizer": "sgd", "grad_clip": "2^-1"}
    for name, entry in parameters.items():
        when = entry.get("when", {})
        for parent in draw(st.lists(st.sampled_from(sorted(wanted)), max_size=3, unique=True)):
            many = [wanted[parent]] if parent in fixed else draw(st.permutations([wanted[parent]]))
            when.setdefault(parent, draw(st.sampled_from([wanted[parent], many])))
        if when and name != "precision":  # a conditional precision would be fp32 elsewhere
            entry["when"] = when
        values = listed(entry)
        if values:
            wanted[name] = "fp16" if "fp16" in values else draw(st.sampled_from(values))
    order = draw(st.permutations(list(parameters)))
    return {"parameters": {name: parameters[name] for name in order}, "fixed": fixed}


def is_active(name: str, document: Mapping[str, Any], suggestion: Mapping[str, Any]) -> bool:
    """The oracle: follows the conditions as they are written."""
    parameters = document["parameters"]
    for parent, values in parameters[name].get("when", {}).items():
        if parent in parameters and not is_active(parent, document, suggestion):
            return False
        choices = [
            number(v) if parent == "grad_clip" else v for v in (values if isinstance(values, list) else [values])
        ]
        if suggestion[parent] not in choices:
            return False
    return True


@settings(max_examples=120)
@given(document=valid_documents(), seed=st.integers(0, 2**32 - 1))
def test_any_valid_space_suggests_configurations_within_it(document: dict[str, Any], seed: int, load: Load) -> None:
    space = load(yaml.safe_dump(document, sort_keys=False))
    for suggestion in suggest_many(space, 4, seed):
        config = TrialConfig(**suggestion)
        active = {name for name in document["parameters"] if is_active(name, document, suggestion)}
        assert set(suggestion) == active | {"optimizer", "grad_clip"}
        assert (config.optimizer, config.grad_clip) == ("sgd", 0.5)
        for name in active:
            entry, value = document["parameters"][name], suggestion[name]
            assert value == getattr(config, name)
            assert type(value) is type(getattr(config, name))
            if entry.get("fraction_of_trial"):
                steps = 55_000 // config.batch_size * 8
                fractions = entry.get("choices") or [entry["low"], entry["high"]]
                possible = [max(1, round(fraction * steps)) for fraction in fractions]
                assert value in possible if "choices" in entry else possible[0] <= value <= possible[1]
                continue
            if listed(entry):
                assert value in listed(entry)
            else:
                assert entry["low"] <= value <= entry["high"]
            if not isinstance(value, str):
                low, high = space.bounds(name) or (math.nan, math.nan)
                assert low <= value <= high


SWITCHES = {
    "optimizer": ("adam", "adamw", "sgd"),
    "input_scaling": INPUT_SCALINGS,
    "curriculum": CURRICULA,
    "class_weighting": ("none", "balanced"),
}


@st.composite
def conditional_documents(draw: st.DrawFn) -> dict[str, Any]:
    """Any conditions between four fields, circles and contradictions included."""
    parameters: dict[str, Any] = {}
    for name, choices in SWITCHES.items():
        parents = draw(st.lists(st.sampled_from([parent for parent in SWITCHES if parent != name]), unique=True))
        when = {
            parent: draw(st.lists(st.sampled_from(SWITCHES[parent]), min_size=1, unique=True)) for parent in parents
        }
        parameters[name] = {"choices": list(choices)} | ({"when": when} if when else {})
    return {"parameters": parameters}


def has_circle(document: Mapping[str, Any]) -> bool:
    reach = {name: set(entry.get("when", {})) for name, entry in document["parameters"].items()}
    for middle, start in itertools.product(reach, reach):
        if middle in reach[start]:
            reach[start] |= reach[middle]
    return any(name in found for name, found in reach.items())


@settings(max_examples=300)
@given(document=conditional_documents())
def test_conditions_are_refused_exactly_where_some_parameter_can_never_be_active(
    document: dict[str, Any], load: Load
) -> None:
    text = yaml.safe_dump(document)
    if has_circle(document):
        with pytest.raises(InputError, match="circle"):
            load(text)
        return
    trials = [dict(zip(SWITCHES, values, strict=True)) for values in itertools.product(*SWITCHES.values())]
    if all(any(is_active(name, document, trial) for trial in trials) for name in SWITCHES):
        load(text)
        return
    with pytest.raises(InputError, match="can never hold"):
        load(text)


KEYS = ["parameters", "fixed", "low", "high", "log", "power_of_two", "fraction_of_trial", "choices", "when"]
WORDS = [*KEYS, "2^3", *SWITCHES, *FIELD_TYPES]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([*WORDS, "adam", "fp16", "1e-4", "2^-5"])
    | st.text(max_size=5)
    | st.dates()
    | st.binary(max_size=3)
)
STRUCTURES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=4)
        | st.dictionaries(SCALARS, inner, max_size=2)
    ),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "low": SCALARS,
        "high": SCALARS,
        "log": SCALARS,
        "power_of_two": st.booleans() | SCALARS,
        "fraction_of_trial": st.booleans() | SCALARS,
        "choices": STRUCTURES | st.lists(SCALARS, max_size=3),
        "when": STRUCTURES | st.dictionaries(st.sampled_from(list(FIELD_TYPES)), SCALARS, max_size=2),
    },
)
DOCUMENTS = STRUCTURES | st.fixed_dictionaries(
    {"parameters": st.dictionaries(st.sampled_from(list(FIELD_TYPES)), ENTRIES | STRUCTURES, max_size=3)},
    optional={"fixed": st.dictionaries(st.sampled_from(list(FIELD_TYPES)), SCALARS, max_size=3)},
)


def check_loads_or_refuses(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    try:
        space = load_space(str(file))
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{file}: ")
        assert len(message.splitlines()) == 1
    else:
        for suggestion in suggest_many(space, 2):
            TrialConfig(**suggestion)


@settings(max_examples=200)
@given(document=DOCUMENTS)
def test_any_structure_is_either_a_space_or_refused_in_one_line(document: Any, file: Path) -> None:
    check_loads_or_refuses(yaml.dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"), file)


YAML_PIECES = st.sampled_from(
    [
        *"{}[]:,-?|>!&*%@`#\"'\\ \n\t\0",
        *(": ", "\n  ", "---", "...", "<<", "=", "!!int", "&a", "*a", "0x_", "0b_", "1:99", "2001-99-99", "._"),
        *("%YAML 1.1\n", "%TAG ! x\n", "\\x", "\\U", "é", "\u2028", "\ufeff"),
        *WORDS,
    ]
)


@settings(max_examples=200)
@given(content=st.binary(max_size=40) | st.lists(YAML_PIECES, max_size=25).map(lambda parts: "".join(parts).encode()))
def test_any_bytes_are_either_a_space_or_refused_in_one_line(content: bytes, file: Path) -> None:
    check_loads_or_refuses(content, file)


# The settings that everybody starts from


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "parameters:\n"
            "  lr: {low: 1.0e-4, high: 1.0, log: true}\n"
            "  batch_size: {low: 16, high: 1024, power_of_two: true}\n"
            "  init_scale: {low: 1, high: 2^24, power_of_two: true}\n"
            "  growth_interval: {low: 1, high: 5000}\n"
            "  backoff_factor: {choices: [0.9, 0.5]}\n"
            "  optimizer: {choices: [sgd, adam]}\n"
            "fixed: {precision: fp16}\n",
            {
                "lr": 1e-3,
                "log2(batch_size)": 6,
                "log2(init_scale)": 16,
                "growth_interval": 2000,
                "backoff_factor": 0.5,
                "optimizer": "adam",
            },
        ),
        # the nearest of what there is; a text that is no choice is left to the sampler
        (
            "parameters:\n"
            "  lr: {low: 1.0e-2, high: 1.0}\n"
            "  batch_size: {choices: [256, 100, 512]}\n"
            "  init_scale: {low: 1, high: 2^8, power_of_two: true}\n"
            "  optimizer: {choices: [sgd, adamw]}\n"
            "  weight_decay: {low: 1.0e-6, high: 1.0e-2, log: true}\n"
            "fixed: {precision: fp16}\n",
            {"lr": 1e-2, "batch_size": 100, "log2(init_scale)": 8, "weight_decay": 1e-6},
        ),
        # relative to the trial: (1000 // 64) * 40 = 600 steps
        ("parameters: {growth_interval: {low: 0.1, high: 5.0, fraction_of_trial: true}}\nfixed: {precision: fp16}\n",
         {"growth_interval/trial_steps": 2000 / 600}),
        ("parameters: {growth_interval: {choices: [0.1, 0.5], fraction_of_trial: true}}\nfixed: {precision: fp16}\n",
         {"growth_interval/trial_steps": 0.5}),
        # conditions: those of the branch that the defaults take
        (
            "parameters:\n"
            "  precision: {choices: [fp32, fp16]}\n"
            "  init_scale: {low: 1, high: 2^24, power_of_two: true, when: {precision: fp16}}\n"
            "  weight_decay: {low: 0.1, high: 0.2, when: {precision: fp32}}\n",
            {"precision": "fp16", "log2(init_scale)": 16},
        ),
        ("parameters: {grad_clip: {low: 0.1, high: 1.0}}\n", {}),
        ("parameters: {grad_clip: {choices: [1.0, null]}}\n", {"grad_clip": None}),
    ],
)  # fmt: skip
def test_defaults_are_suggested_as_near_as_the_space_has_them(
    tmp_path: Path, text: str, expected: dict[str, Any]
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    space = load_space(str(path))
    assert space.find_defaults(train_images=1000, max_epochs=40) == expected


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_space_contains_the_defaults_and_a_study_takes_them(name: str) -> None:
    space = load_space(name)
    study = optuna.create_study()
    study.enqueue_trial(space.find_defaults(train_images=55_000, max_epochs=8))
    settings = space.suggest(study.ask(), train_images=55_000, max_epochs=8)
    defaults = vars(TrialConfig(precision="fp16"))
    assert settings == {key: defaults[key] for key in settings}
    assert TrialConfig(**settings | {"precision": "fp16"}) == TrialConfig(precision="fp16")


# Own parameters

OWN_SPACE = """
parameters: {lr: {low: 1.0e-4, high: 0.1, log: true}}
own:
  hidden: {choices: [64, 128]}
  width: {low: 8, high: 128, power_of_two: true}
  layers: {low: 1, high: 4}
  dropout: {low: 0, high: 0.5, default: 0.1}
  decay: {low: 1.0e-4, high: 1.0, log: true}
  act: {choices: [relu, gelu], default: gelu}
  slope: {low: 0.0, high: 0.2, when: {act: [relu]}}
"""


def test_own_parameters_are_suggested_with_the_types_of_their_values(load: Load) -> None:
    space = load(OWN_SPACE.replace("{act:", "{own.act:"))
    suggestions = list(space.sample(200, seed=0, train_images=0, max_epochs=1))
    types = {name: {type(s["own"][name]) for s in suggestions if name in s["own"]} for name in suggestions[0]["own"]}
    expected = {"hidden": int, "width": int, "layers": int, "dropout": float, "decay": float, "act": str}
    assert {name: types[name] for name in expected} == {name: {kind} for name, kind in expected.items()}
    assert {s["own"]["width"] for s in suggestions} == {8, 16, 32, 64, 128}
    assert {s["own"]["layers"] for s in suggestions} == {1, 2, 3, 4}
    assert all(("slope" in s["own"]) == (s["own"]["act"] == "relu") for s in suggestions)
    assert all(TrialConfig(**settings).own == settings["own"] for settings in suggestions)


def test_defaults_of_own_parameters_are_given_or_first_or_in_the_middle(load: Load) -> None:
    space = load(OWN_SPACE.replace("{act:", "{own.act:"))
    defaults = {"hidden": 64, "width": 32, "layers": 2, "dropout": 0.1, "decay": pytest.approx(0.01), "act": "gelu"}
    assert space.own_defaults == defaults  # slope is not active beside gelu
    enqueued = space.find_defaults(train_images=0, max_epochs=1)
    assert enqueued["log2(own.width)"] == 5
    assert enqueued["own.dropout"] == 0.1
    assert "own.slope" not in enqueued  # act is gelu there


def test_a_space_of_own_parameters_alone_is_enough(load: Load) -> None:
    assert [parameter.name for parameter in load("own: {hidden: {choices: [1, 2]}}").parameters] == ["own.hidden"]


@pytest.mark.parametrize(("text", "message"), [
    ("own: {hidden: 3}", "own.hidden: must be a mapping with low and high, or with choices, got 3"),
    ("own: {hidden: {low: 1}}", "own.hidden: must be a mapping with low and high, or with choices, got {'low': 1}"),
    ("own: {hidden: {choices: [1, a]}}", "own.hidden: must all be numbers, or all be texts, got [1, 'a']"),
    ("own: {hidden: {low: a, high: b}}",
     "own.hidden: must have choices instead of low and high, because own.hidden is a text"),
    ("own: {hidden: {choices: [true, false]}}", "own.hidden: must all be numbers, or all be texts, got [True, False]"),
    ("own: {hidden: {choices: []}}", "own.hidden.choices: must be a list of at least one value, got []"),
    ("own: {hidden: {low: 3, high: 2}}", "own.hidden: low < high must hold, got low=3, high=2"),
    ("own: {a-b: {choices: [1]}}", "own.'a-b': must be a name of letters, digits and _, got 'a-b'"),
    ("own: {hidden: {choices: [1], low: 2}}", "own.hidden.low: must be left out beside choices, got 2"),
    ("own: {hidden: {choices: [1], default: 2}}",
     "own.hidden.default: must be a value that the parameter can have, got 2"),
    ("own: {hidden: {low: 64, high: 128, power_of_two: true, default: 100}}",
     "own.hidden.default: must be a value that the parameter can have, got 100"),
    ("own: {hidden: {choices: [1], default: x}}", "own.hidden.default: must be a whole number, got 'x'"),
    ("own: {hidden: {choices: [1], step: 2}}",
     "own.hidden.step: unknown key (known: low, high, log, power_of_two, choices, default, when)"),
    ("own: [hidden]", "own: must be a mapping of names, got ['hidden']"),
])  # fmt: skip
def test_a_bad_own_parameter_is_refused_in_one_line(text: str, message: str, load: Load, file: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(text)
    assert str(caught.value) == f"{file}: {message}"
