"""Fixtures that more than one test file uses."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder of MNIST's four original files: ``$TUNE_AMP_DATA``, or ``shared/data/mnist`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
    folder = Path(os.environ.get("TUNE_AMP_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"MNIST is not in {folder}: set TUNE_AMP_DATA to its folder")
    return folder
