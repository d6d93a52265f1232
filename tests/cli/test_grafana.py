"""``tune-amp grafana``: a dashboard that asks for what a search keeps, in the form that Grafana imports."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tune_amp.cli.grafana import read_dashboard
from tune_amp.cli.main import main
from tune_amp.monitor.prometheus import ALL_SERIES

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}
DASHBOARD: dict[str, Any] = json.loads(read_dashboard())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_series_has_a_panel_and_every_panel_asks_for_series_that_exist() -> None:
    asked = {name for expression in EXPRESSIONS for name in re.findall(r"ray_\w+", expression)}
    assert asked == {f"ray_{series.name}" for series in ALL_SERIES}


def test_labels_in_expressions_and_legends_are_those_of_the_series() -> None:
    labels = {f"ray_{series.name}": {"run", *series.labels} for series in ALL_SERIES}
    for panel in PANELS:
        for target in panel["targets"]:
            names = re.findall(r"ray_\w+", target["expr"])
            used = re.findall(r"(\w+)!?[=~]+\"", target["expr"]) + re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            used += [name for group in re.findall(r"by \((.*?)\)", target["expr"]) for name in group.split(", ")]
            assert set(used) <= set.intersection(*(labels[name] for name in names)) | {"status"}, panel["title"]


def test_counters_are_shown_as_rates_and_gauges_are_not() -> None:
    counters = {f"ray_{series.name}" for series in ALL_SERIES if series.kind == "counter"}
    for expression in EXPRESSIONS:
        names = re.findall(r"(rate\()?(ray_\w+)", expression)
        assert all(bool(rate) == (name in counters) for rate, name in names), expression


def test_every_panel_is_explained_has_a_unit_and_follows_the_variables() -> None:
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == PROMETHEUS
        for target in panel["targets"]:
            assert target["datasource"] == PROMETHEUS
            assert target["expr"].count('run=~"$run"') == len(re.findall(r"ray_\w+", target["expr"]))


def test_variables_choose_data_source_and_run() -> None:
    source, run = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (run["name"], run["query"]["query"]) == ("run", "label_values(ray_tune_amp_run_info, run)")
    assert run["includeAll"]
    assert run["multi"]


def test_panels_have_their_own_number_and_place() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in itertools.combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def test_it_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grafana"]) == 0
    assert capsys.readouterr().out == read_dashboard()
    for _ in range(2):
        assert main(["grafana", str(tmp_path / "dashboard.json")]) == 0
        assert (tmp_path / "dashboard.json").read_text() == read_dashboard()
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_written_is_refused_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing" / "dashboard.json"
    assert main(["grafana", str(missing)]) == 2
    assert capsys.readouterr().err == f"error: FILE: {missing} cannot be written: No such file or directory\n"
    monkeypatch.chdir(tmp_path)
    assert main(["grafana", "."]) == 2
    expected = "error: FILE: . already exists and is another file: remove it, or name another\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("content", ["mine", read_dashboard().replace("10s", "1m")])
def test_another_file_and_a_dashboard_that_was_edited_are_left_alone(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dashboard.json"
    path.write_text(content)
    assert main(["grafana", str(path)]) == 2
    expected = f"error: FILE: {path} already exists and is another file: remove it, or name another\n"
    assert capsys.readouterr().err == expected
    assert path.read_text() == content


def test_the_wheel_holds_it(tmp_path: Path) -> None:
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    import zipfile

    wheel = tmp_path / done.stdout.splitlines()[-1]
    assert json.loads(zipfile.ZipFile(wheel).read("tune_amp/monitor/grafana/tune_amp.json")) == DASHBOARD
