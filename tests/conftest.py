"""Fixtures that more than one test file uses."""

import atexit
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

with contextlib.suppress(ModuleNotFoundError):  # the suite for one GPU runs where it may be missing
    from hypothesis import HealthCheck, settings

    # How long an example takes depends on what else the machine does.
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")

# Before torch is imported: the tensors of tests are tiny, and on a busy machine threads wait for each other, up to 50x.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Under nohup, or in the background of a script, all that a test starts would ignore these signals too. A handler ends
# with exec: what is started has the default again.
for number, handler in ((signal.SIGHUP, lambda *_: None), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# DuckDB and triton list on standard error, after pytest's end, what Python has not freed by then: pages of it. Their
# nanobind can be told to be silent in C++ only.
atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from simulated_cluster import SimulatedCluster

    from tune_amp.space.space import SearchSpace
    from tune_amp.training.data import (
        Dataset,  # fixtures import it themselves: torch takes seconds, and not every test needs it
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first: a process that gets one of them last keeps all others waiting for it."""
    starting = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in starting)


@pytest.fixture(autouse=True)
def no_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test names is not consented to in the next: the record belongs to the process."""
    from tune_amp.trial import consent

    monkeypatch.setattr("tune_amp.trial.consent._consent", consent._Consent())


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder of MNIST's four original files: ``$TUNE_AMP_DATA``, or ``shared/data/mnist`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
    folder = Path(os.environ.get("TUNE_AMP_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"MNIST is not in {folder}: set TUNE_AMP_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def mnist(mnist_dir: Path) -> "Dataset":
    from tune_amp.training.data import load_dataset

    return load_dataset("mnist", mnist_dir)


@pytest.fixture(scope="session")
def digits() -> "Dataset":
    from tune_amp.training.data import load_dataset

    return load_dataset("digits", None)


@pytest.fixture(scope="module")
def cluster() -> "Iterator[SimulatedCluster]":
    """A cluster of one node with one CPU; each test adds its own and takes them away."""
    from simulated_cluster import SimulatedCluster

    with SimulatedCluster(num_cpus=1) as started:
        yield started


BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A real one, that shows its pages to nobody."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(BROWSER_FLAGS))
        yield launched
        launched.close()


@pytest.fixture
def closed_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, closed_port: int) -> Path:
    """No test reaches the real cache or the network: the home folder is empty and nothing answers for the mirrors."""
    import torchvision  # type: ignore[import-untyped]

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("TUNE_AMP_DATA", raising=False)
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "mirrors", [f"http://127.0.0.1:{closed_port}/"])
    return home / ".cache" / "tune_amp"


@pytest.fixture
def enter_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make ``tmp_path`` the current folder; what is imported from there is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def write_module(tmp_path: Path, enter_folder: None) -> Callable[[str], str]:
    """Write a module into the current folder, consent to run it, and return its name."""
    from tune_amp.trial.consent import consent_to

    numbers = itertools.count()

    def write(text: str) -> str:
        name = f"user_module_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        consent_to(*(f"{name}:{word}" for word in ("net", "load", *re.findall(r"\w+", text))))
        return name

    return write


@pytest.fixture
def make_space(tmp_path: Path) -> "Callable[[str], SearchSpace]":
    """A search space from its YAML."""
    from tune_amp.space.space import load_space

    def make(text: str) -> "SearchSpace":
        (tmp_path / "space.yaml").write_text(text)
        return load_space(str(tmp_path / "space.yaml"))

    return make
