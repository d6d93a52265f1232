"""What a search says as it begins."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tune_amp.cli import search_output
from tune_amp.cli.search import _show_dashboard
from tune_amp.cli.search_output import describe_unfit, print_dashboard, print_start
from tune_amp.cluster.resources import TrialResources
from tune_amp.cluster.session import RaySession
from tune_amp.search.options import SearchOptions
from tune_amp.search.plan import SearchPlan
from tune_amp.space.space import SearchSpace
from tune_amp.training.data import Dataset


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (0.0, "fp16: mine:Net does not run here (E: no kernel): such trials are recorded as infeasible"),
        (0.5, "fp16: mine:Net does not run on this machine's CPU (E: no kernel); trials run on GPUs"),
    ],
)
def test_precision_that_does_not_run_on_this_cpu_concerns_trials_on_cpus_only(gpus: float, expected: str) -> None:
    resources = TrialResources(cpus=1, gpus=gpus, max_concurrent=1, reason="")
    assert describe_unfit("mine:Net", "fp16", "E: no kernel", resources) == expected


@pytest.mark.parametrize(("gpus", "shown"), [(0.5, True), (1.0, False), (2.0, False)])
def test_line_on_mps_is_printed_if_trials_share_a_gpu(
    gpus: float, shown: bool, make_space: Callable[[str], SearchSpace], digits: Dataset, tmp_path: Path
) -> None:
    plan = SearchPlan(
        space=make_space("parameters:\n  lr: {low: 1.0e-4, high: 1.0e-2}\n"),
        dataset=digits,
        options=SearchOptions(),
        folder=tmp_path,
        resources=TrialResources(cpus=1, gpus=gpus, max_concurrent=2, reason="as many as fit"),
        unfit={},
    )
    text = io.StringIO()
    print_start(Console(file=text), plan, make_session(mps="private MPS"))
    assert ("resources  as many as fit\nmps        private MPS\n" in text.getvalue()) is shown
    assert ("MPS" in text.getvalue()) is shown


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_prose_is_wrapped_between_words_and_what_is_copied_is_not(
    make_space: Callable[[str], SearchSpace], digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    plan = SearchPlan(
        space=make_space("parameters:\n  lr: {low: 1.0e-4, high: 1.0e-2}\n"),
        dataset=digits,
        options=SearchOptions(),
        folder=Path("results/a-rather-long-name"),
        resources=TrialResources(cpus=1, gpus=0, max_concurrent=2, reason="2 trials at a time, 1 CPU each"),
        unfit={},
    )
    text = Screen()
    print_start(
        Console(file=text, width=30, force_terminal=True, color_system=None), plan, make_session(), (), ["wandb"]
    )
    lines = text.getvalue().splitlines()
    assert lines[0].strip() == "simple_net on digits: 1,413"
    assert lines[lines.index("resources  2 trials at a time,") + 1] == "1 CPU each"
    assert "tracker    wandb sync results/a-rather-long-name/wandb/offline-run-*" in lines


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({}, "dashboard  none: this Ray could not start it; pip install 'ray[default]' has what it needs\n"),
        (
            {"dashboard_url": "http://127.0.0.1:8265", "token_path": Path("/tmp/home/token")},
            "dashboard  http://127.0.0.1:8265, token in /tmp/home/token "
            "(not the one that `ray get-auth-token` prints)\n",
        ),
        ({"dashboard_url": "http://10.0.0.1:8265", "authenticated": False}, "dashboard  http://10.0.0.1:8265\n"),
    ],
)
def test_dashboard_is_named_with_its_token(found: dict[str, Any], line: str) -> None:
    text = io.StringIO()
    print_dashboard(Console(file=text), make_session(**found))
    assert text.getvalue() == line


@pytest.mark.parametrize(("at_a_time", "noted"), [(1, False), (2, True)])
def test_training_time_is_no_sound_objective_of_trials_side_by_side(
    at_a_time: int, noted: bool, make_space: Callable[[str], SearchSpace], digits: Dataset, tmp_path: Path
) -> None:
    plan = SearchPlan(
        space=make_space("parameters:\n  lr: {low: 1.0e-4, high: 1.0e-2}\n"),
        dataset=digits,
        options=SearchOptions(objective="val_accuracy,train_seconds"),
        folder=tmp_path,
        resources=TrialResources(cpus=1, gpus=1.0, max_concurrent=at_a_time, reason=""),
        unfit={},
    )
    text = io.StringIO()
    print_start(Console(file=text), plan, make_session())
    assert ("train_seconds: trials that run side by side slow each other down" in text.getvalue()) is noted


def test_slow_epochs_are_announced_and_a_notebook_keeps_its_threads(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(search_output, "SLOW_EPOCH_SECONDS", 0.0)
    [line] = search_output._find_slow_epochs("simple_net", "fp32", digits, 1)
    assert line.startswith("fp32: an epoch of simple_net will take about 0 min here")
    assert threads == [1, 7]
    monkeypatch.setattr(search_output, "SLOW_EPOCH_SECONDS", 3600.0)
    assert search_output._find_slow_epochs("simple_net", "fp32", digits, 1) == []


@pytest.mark.parametrize(("before", "now", "warnings"), [(True, True, 0), (True, False, 1), (False, False, 0)])
def test_dashboard_that_needs_no_token_is_warned_of_once(
    before: bool, now: bool, warnings: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was known before the search has been told at its start."""
    stdout, url = io.StringIO(), "http://10.0.0.1:8265"
    session = make_session(dashboard_url=url, authenticated=now)
    _show_dashboard(Console(quiet=True), stdout, make_session(authenticated=before), session)
    told = {"event": "dashboard", "url": url, "token_path": None, "authenticated": now}
    assert json.loads(stdout.getvalue()) == told
    errors = capsys.readouterr().err
    assert errors.count(f"WARNING: this Ray cluster (dashboard {url}) requires no token: anyone ") == warnings
    assert bool(errors) is bool(warnings)


def make_session(**changes: Any) -> RaySession:
    plain: dict[str, Any] = {"dashboard_url": None, "token_path": None, "authenticated": True}
    return RaySession(**(plain | changes))
