"""The private MPS daemon of a search, with a stand-in for NVIDIA's program."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tune_amp.cli.main import main
from tune_amp.cluster import mps
from tune_amp.cluster.mps import Mps, list_servers, provide_mps
from tune_amp.cluster.session import MOST_PARENT_BYTES, PATH_BYTES, StartError, ray_session
from tune_amp.trial.config import InputError

TAKE_TURNS = "GPU processes take turns, so sharing gains little"

# A stand-in for NVIDIA's program, which keeps in a file what it was asked.
SCRIPT = """#!/bin/sh
pipes="${CUDA_MPS_PIPE_DIRECTORY:-$FAKE_MPS_DEFAULT}"
if [ "$*" = -d ]; then asked=-d; else read -r asked; fi
echo "$asked $pipes $CUDA_MPS_LOG_DIRECTORY ${CUDA_VISIBLE_DEVICES-all}" >> "$FAKE_MPS_LOG"
case "$FAKE_MPS:$asked" in
    "hang $asked:"*) exec sleep 600 ;;
    "fail $asked:"*) echo "starting ..."; echo "no permission" >&2; exit 1 ;;
    "deaf $asked:"*) exit 0 ;;
esac
if [ "$asked" = -d ]; then touch "$pipes/daemon"; exit; fi
if ! [ -e "$pipes/daemon" ]; then echo "Cannot find MPS control daemon process"; exit 1; fi
if [ "$asked" = quit ]; then rm "$pipes/daemon"; exit; fi
[ "$FAKE_MPS" = "unused" ] || echo 4711
"""


@dataclasses.dataclass(frozen=True)
class FakeMps:
    """The stand-in on PATH; ``daemon`` is there while the system's daemon runs."""

    folder: Path

    @property
    def daemon(self) -> Path:
        return self.folder / "nvidia-mps" / "daemon"

    def list_asked(self) -> list[list[str]]:
        """Return each question with the folders of pipes and logs, and the GPUs, that the program saw."""
        log = self.folder / "log"
        return [line.split(" ") for line in log.read_text().splitlines()] if log.exists() else []

    def list_commands(self) -> list[str]:
        """Return what started or ended a daemon."""
        return [asked[0] for asked in self.list_asked() if asked[0] != "get_server_list"]

    def wait_for(self, command: str) -> None:
        deadline = time.monotonic() + 60
        while command not in self.list_commands():
            assert time.monotonic() < deadline, self.list_asked()
            time.sleep(0.05)


@pytest.fixture
def fake_mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMps:
    """The stand-in first on PATH, no daemon, and a CUDA program that succeeds."""
    fake = FakeMps(tmp_path / "fake")
    (fake.folder / "nvidia-mps").mkdir(parents=True)
    program = fake.folder / mps.PROGRAM
    program.write_text(SCRIPT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.folder), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_MPS_LOG", str(fake.folder / "log"))
    monkeypatch.setenv("FAKE_MPS_DEFAULT", str(fake.folder / "nvidia-mps"))
    for name in (mps.PIPES, mps.LOGS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mps, "CLIENT", "")
    return fake


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def provided(wanted: str, home: Path) -> Iterator[Mps]:
    """MPS, after which the environment is as before."""
    before = list_variables()
    with provide_mps(wanted, home) as found:
        yield found
    assert list_variables() == before


def list_variables() -> dict[str, str]:
    """Return CUDA's variables; others may be set by a library that another thread imports."""
    return {name: value for name, value in os.environ.items() if name.startswith("CUDA")}


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_private_daemon_is_started_once_in_the_private_folder_and_ended_once(
    wanted: str, home: Path, fake_mps: FakeMps
) -> None:
    with provided(wanted, home) as found:
        pipes, logs = home / "mps", home / "mps-logs"
        assert found.variables == {mps.PIPES: str(pipes), mps.LOGS: str(logs)}
        assert found.description == "private MPS: trials that share a GPU compute at the same time"
        assert {folder.stat().st_mode & 0o777 for folder in (pipes, logs)} == {0o700}
        assert fake_mps.list_commands() == ["-d"]
        assert list_servers(os.environ | found.variables) == [4711]
    assert fake_mps.list_commands() == ["-d", "quit"]
    started, ended = (asked for asked in fake_mps.list_asked() if asked[0] in ("-d", "quit"))
    assert started[1:] == ended[1:] == [str(pipes), str(logs), "all"]


def test_daemon_is_ended_if_what_it_serves_fails(home: Path, fake_mps: FakeMps) -> None:
    with pytest.raises(KeyError), provide_mps("auto", home):
        raise KeyError
    assert fake_mps.list_commands() == ["-d", "quit"]


@pytest.mark.parametrize("wanted", ["auto", "on"])
@pytest.mark.parametrize("by_user", [False, True])
def test_daemon_that_runs_is_used_as_it_is_and_never_ended(
    wanted: str, by_user: bool, home: Path, fake_mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_user:
        monkeypatch.setenv(mps.PIPES, str(home))
    (home / "daemon" if by_user else fake_mps.daemon).touch()
    with provided(wanted, home) as found:
        assert found == Mps(variables={}, description="the MPS daemon that already runs is used as it is")
    assert fake_mps.list_commands() == []


def test_folder_that_the_user_set_is_not_replaced_although_no_daemon_answers_there(
    home: Path, fake_mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(mps.PIPES, "/dev/null")
    with provided("auto", home) as found:
        assert found.variables == {}
        assert "no daemon answers at CUDA_MPS_PIPE_DIRECTORY, which is set" in found.description
    assert fake_mps.list_commands() == []


@pytest.mark.parametrize(
    ("fault", "reason", "commands"),
    [
        ("fail -d", "the daemon failed: no permission", ["-d", "quit"]),
        ("hang -d", "the daemon took longer than 0.5 s", ["-d", "quit"]),
        ("deaf -d", "the daemon does not answer", ["-d", "quit"]),
        ("hang get_server_list", "the daemon does not answer", ["-d", "quit"]),
        ("unused", "a CUDA program did not reach the daemon", ["-d", "quit"]),
    ],
)
def test_daemon_that_is_of_no_use_is_ended_and_auto_continues_without(
    fault: str, reason: str, commands: list[str], home: Path, fake_mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", fault)
    monkeypatch.setattr(mps, "START_SECONDS", 0.5 if fault == "hang -d" else 60.0)
    monkeypatch.setattr(mps, "ANSWER_SECONDS", 0.5 if reason.endswith("answer") else 60.0)
    with provided("auto", home) as found:
        assert fake_mps.list_commands() == commands
        assert found == Mps(variables={}, description=f"no MPS ({reason}): {TAKE_TURNS}")
    assert fake_mps.list_commands() == commands
    (again := home / "again").mkdir()
    with pytest.raises(InputError) as caught, provide_mps("on", again):
        pass
    assert str(caught.value) == f"--mps: on needs MPS, which cannot be had ({reason}); auto searches without"


def test_cuda_that_does_not_work_under_the_daemon_is_seen_before_any_trial_is(
    home: Path, fake_mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "CLIENT", "import sys; sys.exit('cuInit: CUDA error 805')")
    with provided("auto", home) as found:
        assert found.description == f"no MPS (a CUDA program failed: cuInit: CUDA error 805): {TAKE_TURNS}"
    assert fake_mps.list_commands() == ["-d", "quit"]


def test_daemon_that_does_not_end_is_not_waited_for_long(
    home: Path, fake_mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "hang quit")
    monkeypatch.setattr(mps, "QUIT_SECONDS", 0.5)
    with provided("auto", home):
        pass
    fake_mps.wait_for("quit")


def test_watchdog_lives_until_the_daemon_was_asked_to_quit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the daemon would outlive a process that is killed while it sends ``quit``."""
    start, watchdogs, asked = subprocess.Popen, list[Any](), list[Any]()

    def keep(*arguments: Any, **options: Any) -> Any:
        watchdogs.append(start(*arguments, **options))
        return watchdogs[-1]

    monkeypatch.setattr(subprocess, "Popen", keep)
    monkeypatch.setattr(mps, "_ask", lambda question, *_: asked.append((question, watchdogs[0].poll())))
    with mps._quitting(os.environ):
        pass
    assert asked == [("quit", None)]
    assert [watchdog.returncode for watchdog in watchdogs] == [-signal.SIGKILL]


def test_without_the_program_nothing_happens(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    with provided("auto", home) as found:
        assert found == Mps(variables={}, description=f"no MPS ({mps.PROGRAM} is not on PATH): {TAKE_TURNS}")
    assert list(home.iterdir()) == []
    with pytest.raises(InputError, match=f"^--mps: on needs MPS, which cannot be had \\({mps.PROGRAM} is not on PATH"):
        provide_mps("on", home).__enter__()


def test_off_asks_nobody(home: Path, fake_mps: FakeMps) -> None:
    fake_mps.daemon.touch()
    with provided("off", home) as found:
        assert found.variables == {}
    assert fake_mps.list_asked() == []


@pytest.mark.parametrize(
    ("visible", "seen"),
    [("1,0", "all"), ("GPU-8a,GPU-9b", "GPU-8a,GPU-9b"), ("MIG-1", "MIG-1"), ("MIG-1,MIG-2", None)],
)
def test_daemon_gets_the_names_of_gpus_but_not_their_indices(
    visible: str, seen: str | None, home: Path, fake_mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It renumbers GPUs, and CUDA programs would apply the indices of ``CUDA_VISIBLE_DEVICES`` to the new numbers."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with provided("auto", home) as found:
        assert [asked[3] for asked in fake_mps.list_asked() if asked[0] == "-d"] == ([seen] if seen else [])
        assert bool(found.variables) is bool(seen)


def test_daemon_of_a_process_that_is_killed_is_ended(home: Path, fake_mps: FakeMps) -> None:
    script = "import sys; from pathlib import Path; from tune_amp.cluster import mps; mps.CLIENT = ''\n"
    script += "with mps.provide_mps('on', Path(sys.argv[1])): print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert fake_mps.list_commands() == ["-d"]
        process.send_signal(signal.SIGKILL)
    fake_mps.wait_for("quit")
    assert fake_mps.list_commands() == ["-d", "quit"]


# In a session


def test_sockets_have_room_in_the_longest_temporary_folder() -> None:
    folder = "x" * MOST_PARENT_BYTES
    assert len(f"{folder}/tune-amp-home-12345678/mps/control_privileged") <= PATH_BYTES


def test_ray_starts_under_the_daemon_which_ends_although_ray_fails(
    fake_mps: FakeMps, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def fail(address: str, _temp_dir: str, **options: Any) -> None:
        seen.append((os.environ.get(mps.PIPES), str(Path(_temp_dir).parent / "mps")))
        seen.append(fake_mps.list_commands())
        raise Exception("no")  # noqa: TRY002 - as Ray does

    seen: list[Any] = []
    monkeypatch.setattr(ray, "init", fail)
    before = list_variables()
    with pytest.raises(StartError):
        ray_session(num_gpus=2, mps="auto").__enter__()
    [(given, folder), commands] = seen
    assert (given, commands) == (folder, ["-d"])
    assert fake_mps.list_commands() == ["-d", "quit"]
    assert not Path(folder).parent.exists()
    assert list_variables() == before


@pytest.mark.slow
def test_workers_share_gpus_by_the_daemon_which_ends_after_them(fake_mps: FakeMps) -> None:
    import ray

    with ray_session(num_cpus=1, num_gpus=1, mps="auto") as session:
        assert session.token_path is not None
        folder = str(session.token_path.parent / "mps")
        assert ray.get(ray.remote(lambda: os.environ.get("CUDA_MPS_PIPE_DIRECTORY")).remote()) == folder
        assert session.mps == "private MPS: trials that share a GPU compute at the same time"
        with ray_session(mps="auto") as inner:
            assert inner.mps is None
        with pytest.raises(InputError, match="on is not allowed in a Ray that runs already"):
            ray_session(mps="on").__enter__()
        assert fake_mps.list_commands() == ["-d"]
    assert fake_mps.list_commands() == ["-d", "quit"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--address", "127.0.0.1:6379"],
            "--mps: on is not allowed in a Ray that runs already (--address): MPS is started on its nodes, before it",
        ),
        (
            ["--gpus-per-trial", "1"],
            "--mps: must be auto or off where no trials share a GPU (--gpus-per-trial 1), got on",
        ),
        ([], "--mps: on needs a GPU, and Ray finds none here"),
    ],
)
def test_mps_that_cannot_be_had_is_refused_in_one_line(
    flags: list[str],
    message: str,
    tmp_path: Path,
    fake_mps: FakeMps,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = ["search", "quick", "--dataset", "digits", "--results-dir", str(tmp_path / "results"), "--mps", "on"]
    assert main([*command, *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert fake_mps.list_asked() == []
