"""What lies in ``results/reference``: recorded runs on real MNIST whose end is known, and the tables of the README."""

import re
from pathlib import Path

import pytest

from benchmarks.quality.curves import Curves, load_curves, sample_configs
from benchmarks.quality.search_quality import check_states, find_hopeless_epoch
from tune_amp.space.space import load_space
from tune_amp.trial.config import HOPELESS_STATES

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results" / "reference"


@pytest.fixture(scope="module", params=["stress", "mnist_amp"])
def curves(request: pytest.FixtureRequest) -> Curves:
    return load_curves(REFERENCE / f"curves-{request.param}.parquet")


def test_none_of_the_recorded_runs_that_our_states_would_end_learned_anything_afterwards(curves: Curves) -> None:
    """Every run was trained on to its full budget, whatever our states said."""
    check = check_states(curves)
    assert len(curves.configs) >= 100
    assert (check.recovered, check.count(hopeless=False, stopped=True)) == (0, 0)
    assert check.largest_gain <= 0.005  # nor did guessing better by chance make much of a difference


def test_recorded_runs_that_were_hopeless_are_ended_unless_a_step_was_applied() -> None:
    """Half of them. The others move, at learning rates that lead nowhere: that is for the scheduler to compare."""
    curves = load_curves(REFERENCE / "curves-stress.parquet")
    check = check_states(curves)
    hopeless = check.count(hopeless=True, stopped=True) + check.count(hopeless=True, stopped=False)
    assert hopeless >= 10
    assert check.count(hopeless=True, stopped=True) / hopeless >= 0.5
    for config, epochs in zip(curves.configs, curves.epochs, strict=True):
        if find_hopeless_epoch(epochs) is not None and not any(e.state in HOPELESS_STATES for e in epochs):
            assert epochs[-1].applied_steps > 0
            assert config.lr > 0.1


def test_runs_that_never_applied_a_step_are_ended_with_their_first_epoch() -> None:
    curves = load_curves(REFERENCE / "curves-stress.parquet")
    untrained = [epochs for epochs in curves.epochs if epochs[-1].applied_steps == 0]
    assert untrained
    assert [epochs[0].state for epochs in untrained] == ["collapsed"] * len(untrained)


def test_recorded_configurations_are_those_that_their_space_and_seed_give(curves: Curves, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(curves.origin["space_text"])
    first = curves.configs[0]
    shared = {name: getattr(first, name) for name in ("model", "dataset", "max_epochs", "seed")}
    sampled = sample_configs(
        load_space(str(tmp_path / "space.yaml")),
        len(curves.configs),
        seed=curves.origin["seed"],
        train_images=curves.origin["train_images"],
        shared=shared,
    )
    assert tuple(sampled) == curves.configs


def test_readme_quotes_the_measured_tables_as_they_are() -> None:
    readme = (ROOT / "README.md").read_text()
    tables = re.findall(r"<!-- ([\w-]+\.md) -->", readme)
    assert len(tables) == len(set(tables))
    assert {"search-quality.md", "search-speed.md", "loop.md", "scale.md", "extensions.md"} <= set(tables)
    for name in tables:
        measured = set((REFERENCE / name).read_text().splitlines())
        [section] = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", readme, re.DOTALL)
        rows = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|-")]
        assert len(rows) >= 3
        assert [row for row in rows if row not in measured] == []
