"""A user's code may do to its process what it likes: nothing of it stays, and its exits are its errors."""

import random
import signal
import site
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tune_amp.training import own_code
from tune_amp.training.own_code import exits_as_errors, find_place, import_function, unchanged_process

NOISY = """
import random
import warnings

import numpy
import torch

for generator in (random, numpy.random):
    generator.seed(1)
torch.manual_seed(1)
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
warnings.simplefilter("error")


def make():
    return 7
"""


def numpy_state() -> list[int]:
    _, state, *_ = np.random.get_state(legacy=True)  # noqa: NPY002 - the user's
    return list(state)


def test_what_an_import_sets_and_draws_is_undone(write_module: Callable[[str], str]) -> None:
    before = torch.get_rng_state(), numpy_state(), random.getstate(), list(warnings.filters)
    assert import_function(f"{write_module(NOISY)}:make")() == 7
    assert torch.equal(torch.get_rng_state(), before[0])
    assert numpy_state() == before[1]
    assert (random.getstate(), list(warnings.filters)) == before[2:]
    assert torch.is_grad_enabled()
    made = torch.zeros(1)
    assert (made.dtype, made.device) == (torch.float32, torch.device("cpu"))


def test_settings_of_the_caller_stay_as_they_were() -> None:
    with torch.no_grad():
        with unchanged_process():
            torch.set_grad_enabled(True)
        assert not torch.is_grad_enabled()


def exit_with_a_code() -> None:
    sys.exit("no data")


def interrupt() -> None:
    raise KeyboardInterrupt


EXITS = [(exit_with_a_code, "the code called sys.exit('no data')"), (interrupt, "the code raised KeyboardInterrupt")]


@pytest.mark.parametrize(("leave", "message"), EXITS)
def test_exit_of_the_code_is_an_error_in_any_thread(leave: Callable[[], None], message: str) -> None:
    messages: list[str] = []

    def run() -> None:
        with pytest.raises(RuntimeError) as caught, exits_as_errors():
            leave()
        messages.append(str(caught.value))

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert messages == [message] * 2


def test_ctrl_c_stays_an_interruption() -> None:
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), exits_as_errors(), exits_as_errors():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_signal_that_ends_a_worker_ends_it() -> None:
    """Ray's workers answer SIGTERM by SystemExit."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with pytest.raises(SystemExit), exits_as_errors():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), exits_as_errors():
        _ = 1 / 0


def test_an_error_is_placed_at_the_innermost_line_of_the_users_own_code(write_module: Callable[[str], str]) -> None:
    module = write_module("import json\n\n\ndef run(text):\n    return json.loads(text)\n")
    run = import_function(f"{module}:run")
    with pytest.raises(ValueError, match="Expecting value") as caught:
        run("no JSON")
    assert find_place(caught.value) == f" ({module}.py:5)"
    assert find_place(ValueError("raised nowhere")) == ""


def test_code_of_packages_and_of_tune_amp_is_not_the_users_but_a_file_beside_it_is() -> None:
    package = str(Path(own_code.__file__).parents[1])
    assert f"{site.getusersitepackages()}/torch/nn/module.py".startswith(own_code.NOT_OWN)
    assert f"{package}/training/run.py".startswith(own_code.NOT_OWN)
    assert not f"{package}_mine.py".startswith(own_code.NOT_OWN)
