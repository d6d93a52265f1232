"""What TensorBoard, MLflow and Weights & Biases keep of a search, read back with readers of their own formats."""

import contextlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from past_runs import as_report
from records import INF, NAN, make_epoch

from tune_amp.cli.main import main
from tune_amp.cluster.session import ray_session
from tune_amp.cluster.trainable import REPORT, failure_report, progress_report
from tune_amp.monitor import trackers as trackers_module
from tune_amp.monitor.trackers import (
    TrackedTrial,
    Tracker,
    Writer,
    build_trackers,
    describe_tracker,
    find_mlflow_store,
    find_wandb_service,
    select_values,
)
from tune_amp.results.progress import Observer
from tune_amp.results.records import TrialRecord, load_trials
from tune_amp.search.options import TRACKERS, SearchOptions, check_trackers
from tune_amp.search.plan import plan_search
from tune_amp.search.run import SearchResult, run_search
from tune_amp.space.space import load_space
from tune_amp.training.data import Dataset
from tune_amp.trial.config import EpochMetrics, InputError, TrialConfig, field_types, list_values
from tune_amp.trial.consent import consent_to

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrialConfig(precision="fp16", lr=0.01, batch_size=256)
SPACE = """
parameters:
  precision: {choices: [fp16, bf16]}
  lr: {low: 1.0e-3, high: 1.0e-2, log: true}
fixed: {batch_size: 128}
"""
MORTAL_MODEL = """
import os, pathlib, torch
class Net(torch.nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layer = torch.nn.Linear(torch.Size(shape).numel(), classes)
        self.steps = 0
    def forward(self, images):
        self.steps += self.training and len(images) == 128
        if self.steps == 20 and not MARKER.exists():
            MARKER.touch()
            os._exit(1)
        return self.layer(images.flatten(1))
def net(shape, classes):
    return Net(shape, classes)
MARKER = pathlib.Path(PATH)
"""
Epochs = dict[str, dict[int, dict[str, float]]]
"""Of a trial, of an epoch, the numbers by their names."""


@pytest.fixture(scope="module", autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads the settings of whoever runs it, and what these libraries keep at home goes elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        yield


@pytest.fixture(scope="module")
def one_ray(own_settings: None) -> Iterator[None]:
    with ray_session(num_cpus=1, run="test_trackers"):
        yield


def search(folder: Path, digits: Dataset, trackers: list[Any], *, num_samples: int = 3, **options: Any) -> SearchResult:
    folder.mkdir(exist_ok=True)
    (folder.parent / "space.yaml").write_text(SPACE)
    settings = {"num_samples": num_samples, "max_epochs": 3, "confirm_seeds": 0} | options
    plan = plan_search(load_space(str(folder.parent / "space.yaml")), digits, SearchOptions(**settings), folder=folder)
    return run_search(plan, Observer(), trackers=trackers)


@pytest.fixture(scope="module")
def tracked(one_ray: None, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search with all trackers, one of whose trials lost its worker in its second epoch."""
    folder = tmp_path_factory.mktemp("tracked") / "a run, 100%?"  # a name that breaks a URL
    module = folder.parent / "mortal_module.py"
    module.write_text(MORTAL_MODEL.replace("PATH", repr(str(folder.parent / "died"))))
    warnings = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(warnings):
        patch.syspath_prepend(folder.parent)
        consent_to("mortal_module:net")
        trackers = build_trackers(list(TRACKERS), folder)
        search(folder, digits, trackers, num_samples=4, model="mortal_module:net")
    assert (folder.parent / "died").exists()
    assert "switched off" not in warnings.getvalue()
    return folder


def expected(trials: list[TrialRecord]) -> Epochs:
    """What ``epochs.parquet`` says."""
    return {trial.trial_name: {epoch.epoch: select_values(epoch) for epoch in trial.epochs} for trial in trials}


CLOCKS = ("train_seconds", "val_seconds", "data_seconds", "probe_seconds", "samples_per_second")


def assert_equal(read: Epochs, folder: Path, rel: float = 0.0) -> None:
    """All that was recorded was sent, and nothing else.

    Of an epoch that a trial repeated, the first report was sent and the last is recorded: other seconds, same numbers.
    """
    recorded = expected(load_trials(folder))
    assert read.keys() == recorded.keys()
    assert sum(map(len, recorded.values())) >= 6
    for name, epochs in recorded.items():
        assert read[name].keys() == epochs.keys()
        for epoch, values in epochs.items():
            assert read[name][epoch].keys() == values.keys()
            exact = {key: value for key, value in values.items() if key not in CLOCKS}
            assert {key: read[name][epoch][key] for key in exact} == pytest.approx(exact, rel=rel, abs=0)


def read_tensorboard(folder: Path) -> tuple[Epochs, dict[str, dict[str, Any]]]:
    """Scalars and hyperparameters by the name of the folder, which TensorBoard takes as the run's."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]

    epochs: Epochs = {}
    settings = {}
    for path in (folder / "tensorboard").iterdir():
        events = EventAccumulator(str(path))
        events.Reload()
        epochs[path.name] = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                values = epochs[path.name].setdefault(event.step, {})
                assert tag not in values
                values[tag] = event.value
        session = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
        found = session.session_start_info.hparams
        settings[path.name] = {key: getattr(found[key], found[key].WhichOneof("kind")) for key in found}
    return epochs, settings


def read_wandb(path: Path) -> list[Any]:
    """The records of an offline run: LevelDB's log format with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, place, whole, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        part = data[place + 7 : place + 7 + size]
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            records.append(Record.FromString(whole))
        place += 7 + size
    return records


@pytest.mark.slow
def test_tensorboard_shows_every_epoch_once_under_the_names_of_the_trials(tracked: Path) -> None:
    epochs, settings = read_tensorboard(tracked)
    assert_equal(epochs, tracked, rel=1e-6)  # its numbers are float32
    for trial in load_trials(tracked):
        wanted = {name: value for name, value in list_values(trial.config).items() if value is not None}
        assert settings[trial.trial_name] == {**wanted, "status": str(trial.status)}


@pytest.mark.slow
def test_mlflow_holds_every_epoch_once_with_settings_and_status(tracked: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(find_mlflow_store(tracked))
    assert (tracked / "mlflow.db").exists()
    experiment = client.get_experiment_by_name(tracked.name)
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    epochs: Epochs = {}
    for name, run in runs.items():
        epochs[name] = {}
        for metric in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, metric):
                values = epochs[name].setdefault(point.step, {})
                assert metric not in values
                values[metric] = point.value
    assert_equal(epochs, tracked)
    for trial in load_trials(tracked):
        run = runs[trial.trial_name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["status"] == trial.status
        wanted = {name: str(value) for name, value in list_values(trial.config).items() if value is not None}
        assert run.data.params == wanted


@pytest.mark.slow
def test_wandb_keeps_every_epoch_once_in_runs_that_were_not_uploaded(tracked: Path) -> None:
    trials = {trial.trial_id: trial for trial in load_trials(tracked)}
    epochs: Epochs = {}
    for path in (tracked / "wandb").glob("offline-run-*/*.wandb"):
        records = read_wandb(path)
        [run] = [record.run for record in records if record.HasField("run")]
        trial = trials.pop(run.run_id)
        assert (run.display_name, run.run_group, run.project) == (trial.trial_name, tracked.name, "tune_amp")
        config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
        assert config == {name: value for name, value in list_values(trial.config).items() if value is not None}
        summary = {item.key: item.value_json for record in records for item in record.summary.update}
        assert json.loads(summary["status"]) == trial.status
        epochs[trial.trial_name] = {}
        for record in records:
            if record.HasField("history"):
                values = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                step = values["_step"]
                assert step not in epochs[trial.trial_name]
                epochs[trial.trial_name][step] = {name: values[name] for name in values if not name.startswith("_")}
    assert trials == {}
    assert_equal(epochs, tracked)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_search_goes_on_without_a_tracker_that_fails(
    digits: Dataset,
    tmp_path: Path,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tensorboard").write_text("no folder")
    trackers = build_trackers(["tensorboard", "mlflow"], folder)
    result = search(folder, digits, trackers)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracker ")]
    assert len(result.ranked) == 3
    assert sorted(warning.split(" (")[0] for warning in warnings) == [
        "tracker mlflow is switched off",
        "tracker tensorboard is switched off",
    ]
    assert all(warning.endswith("; the search continues") for warning in warnings)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{closed_port}"


@pytest.mark.slow
def test_no_data_leave_the_machine_unless_the_user_says_so(tmp_path: Path) -> None:
    """All that these libraries would send to anybody goes through a proxy, which writes down what it is asked for."""
    with listing_requests() as (port, asked):
        proxy = f"http://127.0.0.1:{port}"
        # Without the signs of a test: MLflow tells nothing where it sees them.
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", "CI")}
        proxies = {f"{kind}_PROXY": proxy for kind in ("HTTP", "HTTPS", "ALL")}
        soon = {"RAY_USAGE_STATS_REPORT_INTERVAL_S": "1"}  # Ray's first report would come after a minute
        environment = {**kept, **proxies, **soon, "NO_PROXY": "127.0.0.1,localhost", "HOME": str(tmp_path)}
        command = [sys.executable, str(ROOT / "scripts" / "search.py"), "quick", "--dataset", "digits"]
        command += ["--num-samples", "2", "--max-epochs", "1", "--confirm-seeds", "0", "--name", "private"]
        command += ["--max-concurrent", "1"]
        command += ["--tracker", "tensorboard,mlflow", "--tracker", "wandb"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "results" / "private"
    for name in TRACKERS:
        assert f"tracker    {describe_tracker(name, Path('results/private'))}\n" in done.stdout
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert (run / "mlflow.db").stat().st_size > 0
    assert not (tmp_path / "mlruns").exists()
    # Ray asks the machine's own cloud, if it has one, which it is.
    own_cloud = ("http://169.254.169.254/", "http://metadata.google.internal/")
    assert [line for line in asked if not any(address in line for address in own_cloud)] == []


@contextlib.contextmanager
def listing_requests() -> Iterator[tuple[int, list[str]]]:
    """A server that refuses everything and lists it."""
    asked: list[str] = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.requestline)
            self.send_error(403)

        do_CONNECT = do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


class FakeTrial:
    """What a tracker reads of ray.tune.Trial."""

    def __init__(self, trial_id: str = "7422e802") -> None:
        self.trial_id = trial_id
        self.config = dict(vars(CONFIG))
        self.last_result: dict[str, Any] = {}
        self.error_file: str | None = None

    def __str__(self) -> str:
        return f"name-of-{self.trial_id}"


class Listing:
    """A writer that keeps what it is to write."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def start(self, trial: TrackedTrial) -> None:
        self.seen.append(("start", trial.name))

    def report(self, trial: TrackedTrial, epoch: int, values: Mapping[str, float]) -> None:
        self.seen.append(("epoch", trial.name, epoch, values["val_accuracy"]))

    def end(self, trial: TrackedTrial) -> None:
        self.seen.append(("end", trial.name, str(trial.status), trial.has_failed))


@pytest.fixture
def listing() -> Listing:
    return Listing()


@pytest.fixture
def make_tracker() -> Callable[[Writer], Tracker]:
    def make(writer: Writer) -> Tracker:
        tracker = Tracker("mlflow", lambda: writer)
        tracker.setup()
        return tracker

    return make


MakeTracker = Callable[[Writer], Tracker]


def report(tracker: Tracker, trial: FakeTrial, epoch: int, status: str = "running", **changes: Any) -> None:
    result = progress_report(make_epoch(epoch, **changes), status)
    trial.last_result = {**result, REPORT: as_report(result)}
    tracker.on_trial_result(0, [], trial, trial.last_result)


def test_each_epoch_is_sent_once_though_a_trial_was_retried(make_tracker: MakeTracker, listing: Listing) -> None:
    tracker, trial = make_tracker(listing), FakeTrial()
    tracker.on_trial_start(0, [], trial)
    report(tracker, trial, 1)
    report(tracker, trial, 2)
    tracker.on_trial_start(0, [], trial)
    report(tracker, trial, 1)
    report(tracker, trial, 2)
    report(tracker, trial, 3, "completed")
    tracker.on_trial_complete(0, [], trial)
    tracker.on_experiment_end([trial])
    name = "name-of-7422e802"
    epochs = [("epoch", name, epoch, 0.9) for epoch in (1, 2, 3)]
    assert listing.seen == [("start", name), *epochs, ("end", name, "completed", False)]


def test_the_end_of_each_trial_is_sent_with_its_status(make_tracker: MakeTracker, listing: Listing) -> None:
    tracker = make_tracker(listing)
    stopped, failed, dead, running = map(FakeTrial, ("stopped", "failed", "dead", "running"))
    for trial in (stopped, failed, running):
        tracker.on_trial_start(0, [], trial)
    report(tracker, stopped, 1)
    stopped.last_result["done"] = True  # as Tune does where the scheduler stops a trial
    tracker.on_trial_complete(0, [], stopped)
    result = failure_report(ValueError("no good"))
    failed.last_result = {**result, REPORT: as_report(result)}
    tracker.on_trial_result(0, [], failed, failed.last_result)
    tracker.on_trial_complete(0, [], failed)
    tracker.on_trial_error(0, [], dead)  # its worker died before it started
    tracker.on_experiment_end([])
    assert [seen for seen in listing.seen if seen[0] == "end"] == [
        ("end", "name-of-stopped", "stopped", False),
        ("end", "name-of-failed", "failed", True),
        ("end", "name-of-dead", "failed", True),
        ("end", "name-of-running", "interrupted", False),
    ]
    assert sum(seen[0] == "start" for seen in listing.seen) == 4
    assert sum(seen[0] == "epoch" for seen in listing.seen) == 1


def test_a_tracker_that_raises_is_switched_off_and_says_so_once(
    make_tracker: MakeTracker, listing: Listing, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Listing):
        def report(self, trial: TrackedTrial, epoch: int, values: Mapping[str, float]) -> None:
            raise OSError(28, "No space left\non device")

    full = Full()
    tracker, trial = make_tracker(full), FakeTrial()
    tracker.on_trial_start(0, [], trial)
    for epoch in (1, 2, 3):
        report(tracker, trial, epoch)
    tracker.on_trial_complete(0, [], trial)
    tracker.on_experiment_end([trial])
    assert full.seen == [("start", "name-of-7422e802")]
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("tracker mlflow is switched off (")
    assert "No space left on device" in warning


SWITCHED_OFF = """
import contextlib, subprocess, sys, time
from pathlib import Path
from tune_amp.monitor.trackers import Tracker

def fail():
    raise OSError("no answer")

def start(program, *arguments):
    command = [program, "-c", "read line", *arguments]
    return stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE))

service = Path(sys.argv[1])
with contextlib.ExitStack() as stack:
    before = start(service)
    trackers = [Tracker("wandb", fail, service=service)]
    after, other = start(service), start("/bin/sh", str(service))
    trackers.append(Tracker("mlflow", fail))
    for tracker in trackers:
        tracker.setup()
    print(after.wait(60))
    for tracker in trackers:
        tracker.on_experiment_end([])
    time.sleep(0.2)
    print(before.poll(), other.poll())
"""


def test_service_of_a_tracker_that_is_switched_off_is_ended_and_no_other_child(tmp_path: Path) -> None:
    """It would try to reach its server for minutes, and Python would wait for it in the end."""
    service = tmp_path / "wandb-core"
    shutil.copy("/bin/sh", service)
    command = [sys.executable, "-c", SWITCHED_OFF, str(service)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{-signal.SIGKILL}\nNone None\n"


WITHOUT_KEY = """
import sys
from pathlib import Path
from tune_amp.monitor.trackers import build_trackers

[tracker] = build_trackers(["wandb"], Path(sys.argv[1]))
tracker.setup()
tracker.on_experiment_end([])
"""


def test_wandb_online_without_a_key_is_switched_off_and_does_not_ask_for_one(tmp_path: Path) -> None:
    environment = os.environ | {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    command = [sys.executable, "-c", WITHOUT_KEY, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    reason = "ValueError: no API key was found: set WANDB_API_KEY, or run: wandb login"
    assert done.stderr == f"tracker wandb is switched off ({reason}); the search continues\n"


def test_service_of_wandb_is_where_the_package_has_it() -> None:
    service = find_wandb_service()
    assert service is not None
    assert os.access(service, os.X_OK)


def test_a_tracker_that_hangs_holds_nothing_up(
    make_tracker: MakeTracker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers_module, "LONGEST_SILENCE_SECONDS", 0.2)
    released = threading.Event()
    waited: list[bool] = []

    class Hanging(Listing):
        def start(self, trial: TrackedTrial) -> None:
            waited.append(released.wait(100))

    tracker, trial = make_tracker(Hanging()), FakeTrial()
    tracker.on_trial_start(0, [], trial)
    report(tracker, trial, 1)
    tracker.on_experiment_end([trial])
    assert waited == []  # it still hangs
    released.set()
    expected = "tracker mlflow is switched off (no answer within 0.2 s); the search continues\n"
    assert capsys.readouterr().err == expected


def test_a_tracker_that_is_slow_but_works_is_waited_for(
    make_tracker: MakeTracker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers_module, "LONGEST_SILENCE_SECONDS", 0.5)

    class Slow(Listing):
        def report(self, trial: TrackedTrial, epoch: int, values: Mapping[str, float]) -> None:
            time.sleep(0.1)
            super().report(trial, epoch, values)

    slow = Slow()
    tracker, trial = make_tracker(slow), FakeTrial()
    tracker.on_trial_start(0, [], trial)
    for epoch in range(1, 11):
        report(tracker, trial, epoch)
    tracker.on_experiment_end([trial])
    assert len(slow.seen) == 12
    assert capsys.readouterr().err == ""


def test_reports_do_not_pile_up_without_end(
    make_tracker: MakeTracker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers_module, "MOST_WAITING", 5)
    released = threading.Event()

    class Hanging(Listing):
        def start(self, trial: TrackedTrial) -> None:
            released.wait(30)

    tracker, trial = make_tracker(Hanging()), FakeTrial()
    tracker.on_trial_start(0, [], trial)
    for epoch in range(1, 11):
        report(tracker, trial, epoch)
    released.set()
    tracker.on_experiment_end([trial])
    expected = "tracker mlflow is switched off (5 reports wait for it); the search continues\n"
    assert capsys.readouterr().err == expected


def test_what_a_writer_gets_does_not_change_with_the_trial(make_tracker: MakeTracker) -> None:
    kept: list[Any] = []

    class Keeping(Listing):
        def start(self, trial: TrackedTrial) -> None:
            kept.append(trial)

    tracker, trial = make_tracker(Keeping()), FakeTrial()
    tracker.on_trial_start(0, [], trial)
    trial.config["lr"] = 1.0
    tracker.on_experiment_end([trial])
    assert kept[0].settings["lr"] == CONFIG.lr
    assert "grad_clip" not in kept[0].settings  # None: TensorBoard knows no such setting


def test_a_tracker_can_be_pickled_while_it_works(make_tracker: MakeTracker, tmp_path: Path, listing: Listing) -> None:
    [tracker] = build_trackers(["tensorboard"], tmp_path)
    tracker.setup()
    tracker.on_trial_start(0, [], FakeTrial())
    copy = pickle.loads(pickle.dumps(tracker))
    report(copy, FakeTrial(), 1)
    copy.on_experiment_end([])
    tracker.on_experiment_end([])


def test_only_finite_numbers_are_sent() -> None:
    values = select_values(make_epoch(3, val_loss=NAN, train_loss=INF, loss_scale=None))
    assert values["val_accuracy"] == 0.9
    assert values["skipped_steps"] == 3
    all_values = select_values(make_epoch(3, peak_memory_bytes=1))
    fields = {*field_types(EpochMetrics)}
    texts_and_lists = {"state", "loop", "loss_scale_steps", "loss_scale_values", "val_recalls"}
    assert all_values.keys() == fields - texts_and_lists - {"epoch"}
    assert all_values.keys() - values.keys() == {"val_loss", "train_loss", "loss_scale", "peak_memory_bytes"}


def test_names_may_be_given_several_times_and_joined_by_commas() -> None:
    assert check_trackers([]) == []
    assert check_trackers(["wandb, mlflow", "tensorboard", "mlflow"]) == ["wandb", "mlflow", "tensorboard"]


@pytest.mark.parametrize("name", ["aim", "", "mlflow,", "MLflow"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"^--tracker: must be one of tensorboard, mlflow, wandb, or several"):
        check_trackers([name])


@pytest.mark.parametrize(
    ("name", "missing"),
    [("tensorboard", "tensorboardX"), ("mlflow", "mlflow"), ("mlflow", "alembic"), ("wandb", "wandb")],
)
def test_a_missing_package_is_named_with_its_extra_before_ray_starts(
    name: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomllib

    monkeypatch.setitem(sys.modules, missing, None)  # Python's own sign for it
    monkeypatch.chdir(tmp_path)
    assert main(["search", "quick", "--dataset", "digits", "--tracker", name]) == 2
    line = f"error: --tracker: {name} is not installed: pip install 'tune_amp[{name}]'\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "results").exists()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {"mlflow": "mlflow-skinny"}
    assert any(requirement.startswith(packages.get(missing, missing)) for requirement in extras[name])


def test_the_users_own_settings_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_tracker("mlflow", Path("results/a b")) == (
        "mlflow ui --backend-store-uri sqlite:///results/a%20b/mlflow.db"
    )
    assert describe_tracker("wandb", Path("results/a b")) == "wandb sync 'results/a b/wandb'/offline-run-*"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert describe_tracker("mlflow", tmp_path) == "mlflow ui --backend-store-uri http://127.0.0.1:5000"
    assert describe_tracker("wandb", tmp_path) == "wandb, online"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db/mlflow")
    assert describe_tracker("mlflow", tmp_path) == "mlflow ui --backend-store-uri 'postgresql://***@db/mlflow'"
