"""Searches through Ray Client, as a user starts them, on a cluster of one node that asks for a token."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import past_runs as made
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from optuna import load_study
from optuna.trial import TrialState
from records import make_trial
from simulated_cluster import SimulatedCluster, find_free_port

from tune_amp.config import InputError, TrialStatus
from tune_amp.confirm import ConfirmProgress
from tune_amp.journal import Journal, read_journal
from tune_amp.recorder import SearchProgress
from tune_amp.remote import EventQueue, Growth, LocalCopy, News, RemoteSearch, SearchEvent, _read_past
from tune_amp.results import TrialRecord, load_trials
from tune_amp.run_files import JOURNAL_FILE, RUN_FILES, STUDY_FILE
from tune_amp.searcher import open_storage
from tune_amp.session import QUIET_TUNE

ROOT = Path(__file__).resolve().parents[1]


# ---- the copy, without a cluster ----


class Silent:
    def on_progress(self, progress: Any, ended: Any) -> None:
        """Stay silent."""

    def on_confirmation(self, progress: Any, ended: Any) -> None:
        """Stay silent."""


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteSearch]:
    for name, value in QUIET_TUNE.items():  # so that it is restored
        monkeypatch.setenv(name, value)
    search = RemoteSearch("run")
    yield search
    search.close()


def test_what_files_have_grown_by_is_sent_once_and_only_whole_lines(remote: RemoteSearch, tmp_path: Path) -> None:
    there, copy = remote._folder, LocalCopy(tmp_path, Silent())
    with copy:
        (there / JOURNAL_FILE).write_bytes(b"one\ntw")
        copy.take(remote.read(copy.sizes))
        assert (tmp_path / JOURNAL_FILE).read_bytes() == b"one\n"
        (there / JOURNAL_FILE).write_bytes(b"one\ntwo\n")
        (there / STUDY_FILE).write_bytes(b"a study\n")
        news = remote.read(copy.sizes)
        assert news.journal == Growth(name=JOURNAL_FILE, begin=4, data=b"two\n")
        copy.take(news)
        copy.take(remote.read(copy.sizes))
    assert (tmp_path / JOURNAL_FILE).read_bytes() == b"one\ntwo\n"
    assert (tmp_path / STUDY_FILE).read_bytes() == b"a study\n"


def test_file_that_was_cut_there_is_cut_here(remote: RemoteSearch, tmp_path: Path) -> None:
    there, copy = remote._folder, LocalCopy(tmp_path, Silent())
    with copy:
        (there / STUDY_FILE).write_bytes(b"one\ntwo\n")
        copy.take(remote.read(copy.sizes))
        (there / STUDY_FILE).write_bytes(b"one\n")
        copy.take(remote.read(copy.sizes))
        assert (tmp_path / STUDY_FILE).read_bytes() == b"one\n"
        assert copy.sizes[STUDY_FILE] == 4


def test_other_files_are_sent_when_they_change_and_no_file_of_another_name_is_written(
    remote: RemoteSearch, tmp_path: Path
) -> None:
    there, copy = remote._folder, LocalCopy(tmp_path, Silent())
    for name in ("best.parquet", "evil.sh"):
        (there / name).write_bytes(b"1")
    first = remote.read({})
    assert first.whole == {"best.parquet": b"1"}
    assert remote.read({}).whole == {}
    (there / "best.parquet").write_bytes(b"22")
    assert remote.read({}).whole == {"best.parquet": b"22"}
    copy.take(News(now=0.0, study=None, journal=None, whole={"../evil": b"", "evil.sh": b""}, events=(), lines=()))
    assert list(tmp_path.iterdir()) == []


def test_study_that_was_set_aside_here_comes_anew_and_what_is_announced_there_is_said_here(
    remote: RemoteSearch, tmp_path: Path
) -> None:
    lines: list[str] = []
    with made.written_past(tmp_path, made.session(), made.trial("a", 0)) as past:
        (tmp_path / STUDY_FILE).write_bytes(b"\xff\n")
        files = _read_past(tmp_path, past, lines.append)
        assert files == {JOURNAL_FILE: (tmp_path / JOURNAL_FILE).read_bytes()}
        assert len(lines) == 1
        (remote._folder / JOURNAL_FILE).write_bytes(files[JOURNAL_FILE])
        (remote._folder / STUDY_FILE).write_bytes(b"rebuilt\n")
        remote._lines += ["said there", "and there"]
        with LocalCopy(tmp_path, Silent(), past, lines.append) as copy:
            copy.take(remote.read(copy.sizes))
            copy.take(remote.read(copy.sizes))
    assert (tmp_path / STUDY_FILE).read_bytes() == b"rebuilt\n"
    assert (tmp_path / f"{STUDY_FILE}.damaged").read_bytes() == b"\xff\n"
    assert lines[1:] == ["said there", "and there"]


@pytest.mark.parametrize("name", RUN_FILES)
def test_file_that_was_put_into_the_folder_of_a_new_run_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: was put there by another program, and is left alone"):
        LocalCopy(tmp_path, Silent())
    assert (tmp_path / name).read_text() == "mine"


def test_journal_here_belongs_to_the_search_that_goes_on_there(remote: RemoteSearch, tmp_path: Path) -> None:
    (remote._folder / JOURNAL_FILE).write_bytes(b"one\n")
    with LocalCopy(tmp_path, Silent()) as copy:
        copy.take(remote.read(copy.sizes))
        with pytest.raises(InputError, match="the run still goes on in another process"):
            Journal(tmp_path / JOURNAL_FILE)
    with Journal(tmp_path / JOURNAL_FILE):
        pass


def test_trials_journaled_while_the_files_are_read_are_in_the_study_that_is_sent(
    remote: RemoteSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = remote._read_growth

    def grow(name: str, known: int) -> Growth | None:
        """The search submits another trial after each file that is read."""
        found = stock(name, known)
        for file in (STUDY_FILE, JOURNAL_FILE):
            with (remote._folder / file).open("a") as grown:
                grown.write("trial\n")
        return found

    grow(STUDY_FILE, 0)
    monkeypatch.setattr(remote, "_read_growth", grow)
    news = remote.read({})
    assert news.study is not None
    assert news.journal is not None
    assert news.study.data.count(b"\n") > news.journal.data.count(b"\n")


def test_what_only_goes_on_is_told_once_and_each_end_always() -> None:
    queue = EventQueue()
    progress: Any = ConfirmProgress(run="run", names={}, total=4, started=0.0)
    ends: list[Any] = ["first", "second"]
    for ended in (None, None, ends[0], None, ends[1], None, None):
        queue.on_confirmation(progress, ended)
    told: list[Any] = [event.ended for event in queue.take()]
    assert told == ["first", "second", None]
    assert queue.take() == []


def test_trials_that_have_not_changed_are_told_by_their_ids_and_shown_whole() -> None:
    shown: list[SearchProgress] = []

    class Watching(Silent):
        def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
            shown.append(progress)

    queue, copy = EventQueue(), LocalCopy(Path("unused"), Watching())
    first, second = make_trial("a"), make_trial("b")
    for trials in ((first,), (first, second)):
        about = {"model": "m", "dataset": "d", "objectives": ("val_accuracy",), "num_samples": 2, "time_budget": None}
        queue.on_progress(SearchProgress(run="run", started=100.0, trials=trials, **about), None)  # type: ignore[arg-type]
        events = queue.take()
        copy.take(News(now=time.monotonic() - 1000.0, study=None, journal=None, whole={}, events=events, lines=()))
    assert isinstance(events[0], SearchEvent)
    assert events[0].trials == ["a", second]
    assert [progress.trials for progress in shown] == [(first,), (first, second)]
    assert shown[0].started == pytest.approx(1100.0, abs=1.0)  # by the clock of this side


# ---- on a cluster ----

EPOCHS = 40
FILES = {
    "best.parquet",
    "trials.parquet",
    "epochs.parquet",
    "space.yaml",
    "study.journal",
    "reports.journal",
    "report.html",
}


class Client:
    """A cluster with a server of clients, and searches through it."""

    def __init__(self, cluster: SimulatedCluster, port: int) -> None:
        self.cluster, self.address = cluster, f"ray://127.0.0.1:{port}"

    @contextlib.contextmanager
    def searching(self, folder: Path, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
        """A search by ``scripts/search.py`` in the folder; what it prints is in the file ``printed``."""
        command = [sys.executable, str(ROOT / "scripts" / "search.py"), *map(str, arguments), "--address", self.address]
        environment = {name: value for name, value in self.cluster.environment.items() if name != "RAY_TMPDIR"}
        with (folder / "printed").open("w") as printed:
            process = subprocess.Popen(
                command, cwd=folder, env=os.environ | environment, stdout=printed, stderr=printed, text=True
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def search(self, folder: Path, *arguments: object) -> str:
        """A search that must end well; returns what it printed."""
        with self.searching(folder, *arguments) as process:
            code = process.wait(300)
        printed = (folder / "printed").read_text()
        assert code == 0, printed
        assert "INFO" not in printed
        assert "Traceback" not in printed
        assert "WARNING" not in printed  # the cluster asks for a token
        return printed

    def find_actor(self) -> int:
        """The process that runs a search."""
        raylet = self.cluster._raylets[self.cluster.head]
        for process in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split():
            if b"RemoteSearch" in Path(f"/proc/{process}/cmdline").read_bytes():
                return int(process)
        raise AssertionError("no search runs")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    port = find_free_port()
    with SimulatedCluster(num_cpus=2, include_dashboard=True, ray_client_server_port=port) as cluster:
        yield Client(cluster, port)


def wait_until(holds: Callable[[], bool], process: "subprocess.Popen[str]", folder: Path) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        assert process.poll() is None, (folder / "printed").read_text()
        assert time.monotonic() < deadline, (folder / "printed").read_text()
        time.sleep(0.05)


def count_reports(run: Path) -> int:
    journal = run / JOURNAL_FILE
    return journal.read_bytes().count(b'"event":"report"') if journal.exists() else 0


def begin(num_samples: int) -> list[object]:
    common = ["quick", "--dataset", "digits", "--scheduler", "none", "--sampler", "random", "--confirm-seeds", 0]
    return [*common, "--num-samples", num_samples, "--max-epochs", EPOCHS, "--name", "run"]


def check_nothing_is_lost(run: Path, num_samples: int) -> None:
    """Every trial ended well, each of its epochs is in the files once, and the study holds nothing that runs."""
    trials = load_trials(run)
    assert [trial.status for trial in trials] == [TrialStatus.COMPLETED] * num_samples
    rows = pq.read_table(run / "epochs.parquet", columns=["trial_id", "epoch"]).to_pylist()
    told = Counter((row["trial_id"], row["epoch"]) for row in rows)
    assert told == {(trial.trial_id, epoch): 1 for trial in trials for epoch in range(1, EPOCHS + 1)}
    events = [event for event in read_journal(run / JOURNAL_FILE) if event["event"] == "report" and event["metrics"]]
    assert {(event["trial_id"], event["metrics"]["epoch"]) for event in events} == set(told)
    assert TrialState.RUNNING not in find_states(run)
    assert find_states(run).count(TrialState.COMPLETE) == num_samples


def find_states(run: Path) -> list[TrialState]:
    study = load_study(study_name="run", storage=open_storage(run / STUDY_FILE))
    return [trial.state for trial in study.trials]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_search_through_ray_client_leaves_the_files_of_any_other(client: Client, tmp_path: Path) -> None:
    asked = ["--num-samples", 4, "--max-epochs", 3, "--confirm-seeds", 2, "--top-k", 1, "--name", "run"]
    printed = client.search(tmp_path, "quick", "--dataset", "digits", *asked)
    assert "[4/4]" in printed
    assert "[confirm 4/4]" in printed
    run = tmp_path / "results" / "run"
    assert {path.name for path in run.iterdir()} == FILES | {"confirm.parquet"}
    events = read_journal(run / JOURNAL_FILE)
    reported = Counter((e["trial_id"], e["metrics"]["epoch"]) for e in events if e["event"] == "report")
    rows = pq.read_table(run / "epochs.parquet", columns=["trial_id", "epoch"]).to_pylist()
    assert Counter((row["trial_id"], row["epoch"]) for row in rows) == reported
    assert TrialState.RUNNING not in find_states(run)
    with Journal(run / JOURNAL_FILE):  # nobody holds it any more
        pass


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_client_killed_halfway_loses_nothing_that_reached_it(client: Client, tmp_path: Path) -> None:
    run = tmp_path / "results" / "run"
    with client.searching(tmp_path, *begin(5)) as process:
        wait_until(lambda: count_reports(run) > 1.5 * EPOCHS, process, tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = [event for event in read_journal(run / JOURNAL_FILE) if event["event"] == "report"]
    assert len(before) > 1.5 * EPOCHS
    client.search(tmp_path, "--resume", "run")
    check_nothing_is_lost(run, 5)
    kept = [event for event in read_journal(run / JOURNAL_FILE) if event["event"] == "report"][: len(before)]
    assert kept == before


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_ctrl_c_ends_the_search_on_the_cluster_cleanly(client: Client, tmp_path: Path) -> None:
    run = tmp_path / "results" / "run"
    with client.searching(tmp_path, *begin(6)) as process:
        wait_until(lambda: count_reports(run) > EPOCHS / 2, process, tmp_path)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    printed = (tmp_path / "printed").read_text()
    assert "cut off  SIGINT" in printed
    assert "--resume run" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert {path.name for path in run.iterdir()} == FILES
    assert TrialState.RUNNING not in find_states(run)
    assert read_journal(run / JOURNAL_FILE)[-1]["event"] == "finish"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_death_of_the_search_on_the_cluster_is_a_cut_off_that_goes_on(client: Client, tmp_path: Path) -> None:
    run = tmp_path / "results" / "run"
    with client.searching(tmp_path, *begin(4)) as process:
        wait_until(lambda: count_reports(run) > EPOCHS / 2, process, tmp_path)
        os.kill(client.find_actor(), signal.SIGKILL)
        assert process.wait(120) == 130
    printed = (tmp_path / "printed").read_text()
    assert "cut off  " in printed
    assert "the search's process on the cluster has died" in printed
    assert "Traceback" not in printed
    client.search(tmp_path, "--resume", "run")
    check_nothing_is_lost(run, 4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.long
def test_bad_input_that_is_found_on_the_cluster_is_answered_as_here(client: Client, tmp_path: Path) -> None:
    taken = tmp_path / "storage" / "run"
    taken.mkdir(parents=True)
    with client.searching(tmp_path, *begin(2), "--storage-path", tmp_path / "storage") as process:
        assert process.wait(120) == 2
    printed = (tmp_path / "printed").read_text().splitlines()
    assert printed[-1].startswith("error: --storage-path: ")
    assert printed[-1].endswith("already holds a run run; choose another --name")
    assert not (tmp_path / "results").exists()
