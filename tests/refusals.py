"""How tests ask for the line with which an input is refused."""

from pathlib import Path

import pytest

from tune_amp.training.data import load_dataset
from tune_amp.trial.config import InputError


def refusal(name: str, data_dir: Path | None = None) -> str:
    """The one line with which ``load_dataset`` refuses."""
    with pytest.raises(InputError) as caught:
        load_dataset(name, data_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message
