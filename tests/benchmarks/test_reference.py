"""What lies in ``results/reference``: recorded runs on real MNIST whose end is known, and the tables of the pages."""

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


def test_pages_quote_the_measured_tables_as_they_are() -> None:
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("performance.md", "trust.md"))
    tables = re.findall(r"<!-- ([\w-]+\.md) -->", pages)
    assert len(tables) == len(set(tables))
    expected = {"search-quality.md", "search-profile.md", "search-speed.md", "loop.md", "scale.md", "load.md"}
    assert set(tables) == expected | {"telemetry.md", "extensions.md"}
    for name in tables:
        measured = set((REFERENCE / name).read_text().splitlines())
        [section] = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", pages, re.DOTALL)
        rows = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|-")]
        assert len(rows) >= 3
        assert [row for row in rows if row not in measured] == []


def read_rows(name: str) -> list[list[str]]:
    """The cells of each row of a measured table's file."""
    lines = (REFERENCE / name).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_readme_keeps_three_measured_answers() -> None:
    answers = re.findall(r"^\| [^|]+\? \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    quality, speed, faults = answers

    text = (REFERENCE / "search-quality.md").read_text().partition("### mnist_amp, val_accuracy")[2]
    means = re.findall(r"^\|(?: tune_amp| stock Ray Tune \+ Optuna) \|.*", text, re.MULTILINE)[:2]
    ours, stock = (row.split("|")[7].strip() for row in means)
    assert ours in quality
    assert [number for number in re.findall(r"-?\d\.\d{3}", stock) if number not in quality] == []

    ratios = {tuple(row[:2]): row[6] for row in read_rows("search-speed.md")}
    assert [number for number in re.findall(r"\d+\.\d", ratios["bf16", "64"]) if number not in speed] == []
    assert [number for number in re.findall(r"\d+\.\d", ratios["fp16", "64"]) if number not in speed] == []

    harmed = [row for row in read_rows("faults.md") if row[1].isdigit()]
    assert f"{sum(int(row[1]) for row in harmed)} deliberate faults" in faults
    assert {(row[7], row[8]) for row in harmed} == {("0", "0")}  # lost, doubled
