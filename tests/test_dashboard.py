"""A search that runs, watched from outside: Ray's dashboard in a browser, its metrics, and a real Prometheus."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fault_runs import prepare
from test_docs import OTHER_PROGRAMS, blocks

from tune_amp.cli.grafana import read_dashboard
from tune_amp.monitor.prometheus import ALL_SERIES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SPACE = """
parameters:
  lr: {low: 1.0e-3, high: 1.0e-2, log: true}
fixed: {precision: fp16, batch_size: 128, init_scale: 2^20}
"""
NUM_SAMPLES = 1000
TITLE = r"ray::AmpTrainable \d+-fp16-lr[\d.]+-b128-scale2\^20 epoch \d+/60"


@dataclasses.dataclass(frozen=True)
class Running:
    """A search in a process of its own, and how to get at it."""

    dashboard: dict[str, Any]
    """The line of ``--json`` on the dashboard."""

    @property
    def address(self) -> str:
        return str(self.dashboard["url"])

    @property
    def token(self) -> str:
        return Path(self.dashboard["token_path"]).read_text()

    @property
    def folder(self) -> Path:
        """Ray's, beside the token."""
        return Path(self.dashboard["token_path"]).parent / "ray"

    def ask(self, path: str) -> Any:
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A search that would take long, of trials that sleep most of the time; it is ended as by a user, with Ctrl-C."""
    folder = prepare(tmp_path_factory.mktemp("watched"), step_seconds=0.02, space=SPACE)
    command = f"space.yaml --dataset digits --model slow:net --num-samples {NUM_SAMPLES} --max-epochs 60"
    command += " --scheduler none --name watched --confirm-seeds 0 --max-concurrent 1 --json"
    with (folder / "errors").open("w") as errors:
        search = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "search.py"), *command.split()],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            | {"RAY_metrics_report_interval_ms": "1000"},  # ten times as often
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert search.stdout is not None
        try:
            told = [json.loads(search.stdout.readline() or "null") for _ in range(2)]  # a trial takes long
            assert None not in told, (folder / "errors").read_text()
            assert [event["event"] for event in told] == ["start", "dashboard"]
            yield Running(told[1])
            assert search.poll() is None, "the search ended before it could be watched"
            search.send_signal(signal.SIGINT)
            rest = search.communicate(timeout=120)[0]
            assert search.returncode == 130
            assert json.loads(rest.splitlines()[-1])["event"] == "result"
            assert "metrics ended" not in (folder / "errors").read_text()
        finally:
            search.kill()
            search.wait()


def wait_for(condition: Callable[[], Any], seconds: float = 150) -> Any:
    """What ``condition`` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.3)
    return found


# The dashboard's API


def test_without_the_token_the_dashboard_tells_nothing(running: Running) -> None:
    for path in ("/api/jobs/", "/logical/actors", "/nodes?view=summary"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(running.address + path, timeout=30)
        assert refused.value.code == 401
        refused.value.close()


def test_the_job_bears_the_name_of_the_run(running: Running) -> None:
    [job] = running.ask("/api/jobs/")
    assert job["status"] == "RUNNING"
    assert job["metadata"]["job_name"] == "watched"


@pytest.mark.long
def test_workers_bear_a_readable_name_and_their_trials_move_on(running: Running) -> None:
    def titles() -> set[str]:
        actors = running.ask("/logical/actors")["data"]["actors"].values()
        assert {actor["actorClass"] for actor in actors} <= {"AmpTrainable"}
        found = [((actor.get("processStats") or {}).get("cmdline") or [""])[0] for actor in actors]
        return {title for title in found if re.fullmatch(TITLE, title)}

    before = wait_for(titles)
    wait_for(lambda: titles() - before)


# Its pages


@pytest.fixture(scope="module")
def page(browser: "Browser", running: Running) -> "Page":
    """The dashboard as a user gets in: the token is asked for, a wrong one refused."""

    def keep_local(route: "Route") -> None:
        local = urllib.parse.urlsplit(route.request.url).hostname == "127.0.0.1"
        route.continue_() if local else route.abort()

    page = browser.new_page(viewport={"width": 1500, "height": 1200})
    page.route("**/*", keep_local)
    page.set_default_timeout(60_000)
    page.goto(running.address)
    for token in ("0" * 64, running.token):
        field = page.get_by_placeholder("Enter your authentication token")
        field.fill(token)
        page.get_by_role("button", name="Submit").click()
        if token != running.token:
            page.get_by_text("invalid", exact=False).first.wait_for()
    field.wait_for(state="detached")
    return page


def test_the_list_of_jobs_shows_the_run_by_its_name(page: "Page", running: Running) -> None:
    page.goto(f"{running.address}/#/jobs")
    row = page.get_by_role("row").filter(has_text="scripts/search.py")
    row.get_by_role("cell", name="watched", exact=True).wait_for()
    assert "RUNNING" in row.inner_text()


def test_the_list_of_actors_shows_the_workers_by_their_class(page: "Page", running: Running) -> None:
    page.goto(f"{running.address}/#/actors")
    page.get_by_role("cell", name="AmpTrainable", exact=True).first.wait_for()


@pytest.mark.long
def test_the_list_of_nodes_shows_trials_and_epochs_that_move_on_by_themselves(page: "Page", running: Running) -> None:
    def titles() -> set[str]:
        return set(re.findall(TITLE, page.locator("body").inner_text()))

    page.goto(f"{running.address}/#/cluster")
    before = wait_for(titles)
    wait_for(lambda: titles() - before)


# Metrics


def read_metrics(running: Running) -> dict[str, dict[str, float]]:
    """Name -> labels -> value, of all that Ray's nodes offer of the search."""
    found: dict[str, dict[str, float]] = {}
    [group] = json.loads((running.folder / "prom_metrics_service_discovery.json").read_text())
    for target in group["targets"]:
        assert target.startswith("127.0.0.1:")
        text = ""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
            text = answer.read().decode()  # Ray's own servers, also in the list, may not have come up
        for name, labels, value in re.findall(r"^ray_(tune_amp_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            assert 'run="watched"' in labels
            own = sorted(re.findall(r'\b(?:status|kind|slot|objective|state)="[^"]*"', labels))
            found.setdefault(name, {})[",".join(own)] = float(value)
    return found


def test_every_series_is_on_the_metrics_endpoint_while_the_search_runs(running: Running) -> None:
    names = {series.name for series in ALL_SERIES}
    before = wait_for(lambda: seen if names <= set(seen := read_metrics(running)) else None)
    assert set(before) == names

    def read_later() -> dict[str, dict[str, float]] | None:
        seen = read_metrics(running)
        return seen if seen["tune_amp_epochs_total"][""] > before["tune_amp_epochs_total"][""] else None

    after = wait_for(read_later)
    assert sum(after["tune_amp_trials"].values()) == NUM_SAMPLES
    slots = range(1, int(after["tune_amp_slots"][""]) + 1)
    assert set(after["tune_amp_slot_trial"]) <= {f'slot="{slot}"' for slot in slots}
    assert 0 < after["tune_amp_skipped_steps_total"][""] < after["tune_amp_steps_total"][""]
    assert 0 < after["tune_amp_best"]['objective="val_accuracy"'] <= 1
    assert all(scale < 2**20 for scale in after["tune_amp_loss_scale"].values())
    assert after["tune_amp_slot_seconds_total"]['kind="training"'] > 0


@pytest.fixture
def prometheus(running: Running, tmp_path: Path) -> Iterator[str]:
    """Prometheus, started by the command that the page on monitoring gives; yields its address."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on this machine")
    [command] = [text for language, text in blocks(ROOT / "docs" / "monitoring.md") if language == OTHER_PROGRAMS]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = re.sub(r"/tmp/tune-amp-home-\w+/ray", str(running.folder), command).replace(":9090", f":{port}")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(shlex.split(command), cwd=tmp_path, stdout=log, stderr=log)
        try:
            with contextlib.suppress(AssertionError):
                wait_for(lambda: is_ready(f"http://127.0.0.1:{port}") or server.poll() is not None, 60)
            assert is_ready(f"http://127.0.0.1:{port}"), (tmp_path / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=30)


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/-/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def query(address: str, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers now, with its variables as Grafana would fill them in."""
    filled = expression.replace("$run", "watched|other").replace("$__rate_interval", "1m")
    with urllib.request.urlopen(
        f"{address}/api/v1/query?{urllib.parse.urlencode({'query': filled})}", timeout=30
    ) as answer:
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return result


def test_prometheus_finds_every_series_that_the_grafana_dashboard_asks_for(prometheus: str) -> None:
    dashboard = json.loads(read_dashboard())
    expressions = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert len(expressions) >= 10
    left = dict.fromkeys(sorted(expressions))

    def ask() -> bool:
        for expression in list(left):
            if query(prometheus, expression):
                del left[expression]
        return not left

    with contextlib.suppress(AssertionError):
        wait_for(ask)
    assert list(left) == []
    [info] = query(prometheus, "ray_tune_amp_run_info")  # what the variable of the dashboard offers
    assert info["metric"]["run"] == "watched"
    rate = 'rate(ray_tune_amp_epochs_total{run="watched"}[1m])'
    wait_for(lambda: [float(found["value"][1]) > 0 for found in query(prometheus, rate)] == [True])


# Without a dashboard


@pytest.mark.long
def test_a_search_goes_on_without_the_dashboard_and_says_so(tmp_path: Path) -> None:
    """``ray[default]`` brings aiohttp_cors; here it is missing, as where only ``ray[tune]`` is installed."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "aiohttp_cors.py").write_text("raise ModuleNotFoundError(\"No module named 'aiohttp_cors'\")\n")
    prepare(tmp_path, step_seconds=0.05, space=SPACE)
    path = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = "space.yaml --dataset digits --model slow:net --num-samples 1000 --max-epochs 60 --confirm-seeds 0"
    with subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "search.py"), *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as search:
        assert search.stdout is not None
        said = next(line for line in search.stdout if line.startswith("dashboard"))
        search.send_signal(signal.SIGINT)
        errors = search.communicate(timeout=120)[1]
    assert said == "dashboard  none: this Ray could not start it; pip install 'ray[default]' has what it needs\n"
    assert search.returncode == 130
    assert "cut off  SIGINT\n" in errors
