import contextlib
import errno
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tune_amp
from tune_amp.cluster.session import (
    MOST_PARENT_BYTES,
    RaySession,
    StartError,
    _check_room,
    _choose_parent,
    _find_dashboard,
    _find_source,
    _start_error,
    ray_session,
)
from tune_amp.trial.config import InputError

pytestmark = pytest.mark.slow

# Runs in a process of its own: what Ray reads of the environment, and when, is part of what is tested.
SCRIPT = """
import json, os, stat, sys, tempfile, threading, time, urllib.error, urllib.request
from pathlib import Path

if sys.argv[1] == "ray first":
    import ray
os.umask(0)
import tune_amp.cluster.session
from tune_amp.cluster.session import ray_session

tune_amp.cluster.session.DASHBOARD_DELAY = 0.0
VARIABLES = ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_AUTH_TOKEN")


def find_descendants():
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass
    found, before = {os.getpid()}, set()
    while found != before:
        before, found = found, found | {pid for pid, parent in parents.items() if parent in found}
    return found


def find_listeners(pids):
    '''The addresses, in the kernel's hexadecimal, on which any of the processes accepts TCP connections.'''
    inodes = set()
    for pid in pids:
        try:
            inodes |= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            pass
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes]


def ask(url, token):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None


def watch(run):
    environment, announced = dict(os.environ), []
    preload = ("colorsys", "this_module_is_missing")
    ready, told = threading.Event(), []

    def tell(session):
        told.append(session)
        ready.set()

    with (
        ray_session(run=run, num_cpus=1, num_gpus=2, preload=preload, announce=announced.append) as session,
        session.dashboard(tell),
    ):
        import ray

        assert session.dashboard_url is None and session.authenticated
        assert ready.wait(60)
        [session] = told
        assert session.authenticated

        token = session.token_path.read_text()
        paths = ("/api/version", "/api/jobs/", "/logical/actors")
        descendants = find_descendants() - {os.getpid()}
        with ray_session(run="inner") as inner:
            joined = [inner.token_path, inner.dashboard_url == session.dashboard_url]
        seen = {
            "run": run,
            "token": token,
            "listeners": find_listeners(descendants),
            "answers": {
                path: [ask(session.dashboard_url + path, way_in)[0] for way_in in (None, "0" * 64, "foreign", token)]
                for path in paths
            },
            "jobs": ask(session.dashboard_url + "/api/jobs/", token)[1],
            "modes": [stat.S_IMODE(path.stat().st_mode) for path in (session.token_path, session.token_path.parent)],
            "resources": {name: ray.cluster_resources().get(name) for name in ("CPU", "GPU")},
            "joined": joined,
            "alive_after_joining": ray.is_initialized() and ray.get(ray.remote(lambda: 42).remote()),
            "variables": {name: os.environ.get(name) for name in VARIABLES},
            "places": [str(session.token_path.parents[1]), ray.get(ray.remote(tempfile.gettempdir).remote())],
            "listens_to_dashboard": list(session.token_path.parent.glob("pymp-*/listener-*")) != [],
            "worker_path": ray.get(ray.remote(lambda: sys.path).remote()),
            "preloaded": ray.get(ray.remote(lambda: "colorsys" in sys.modules).remote()),
            "announced": announced,
        }
    return seen | {
        "folder_left": session.token_path.parent.exists(),
        "environment_restored": dict(os.environ) == environment,
        "initialized_after": ray.is_initialized(),
        "descendants": sorted(descendants),
    }


def find_left(pids):
    '''Ray's agents take some seconds to notice that their raylet is gone.'''
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


sessions = []
for run in sys.argv[2:]:
    if sessions:  # one between two others that ends while its dashboard starts
        with ray_session(num_cpus=1, num_gpus=0) as hasty, hasty.dashboard(print):
            time.sleep(0.5)
    sessions.append(watch(run))
for session in sessions:
    session["processes_left"] = find_left(session["descendants"])
print(json.dumps(sessions))
"""


ORDERS = {"ray first": ("only-run",), "tune_amp first": ("first-run", "second-run")}


@pytest.fixture(scope="module", params=ORDERS)
def sessions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A private session, or two, one after the other in one process, as seen from inside and outside."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    folder, script = tmp_path_factory.mktemp("session"), tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(SCRIPT)
    modules = [folder / f"{name}.py" for name in ("IPython", "multiprocessing", "psutil", "starlette")]
    for module in modules:
        module.write_text(f"open({str(folder / 'imported')!r}, 'a').write({module.name!r})")
    # What must not lead astray: another cluster's address and token, modules in the current folder, and a home folder
    # to be left alone. Ray's sockets have just enough room in the temporary folder.
    with temporary_folder(MOST_PARENT_BYTES) as temporary:
        foreign = {"RAY_ADDRESS": "192.0.2.99:6379", "RAY_AUTH_TOKEN": "foreign", "HOME": str(folder)}
        done = subprocess.run(
            [sys.executable, str(script), request.param, *ORDERS[request.param]],
            env=os.environ | foreign | {"TMPDIR": str(temporary)},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        seen: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        left = [path.name for path in (*folder.iterdir(), *temporary.iterdir()) if path not in modules]
        return [session | {"folder": str(folder), "temporary": str(temporary), "left": left} for session in seen]


@contextlib.contextmanager
def temporary_folder(length: int) -> Iterator[Path]:
    """An empty folder whose path has that many bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as base:  # Ray's last may still write
        folder = Path(base) / ("x" * (length - len(f"{base}/")))
        folder.mkdir()
        yield folder


def test_private_ray_listens_on_loopback_only(sessions: list[dict[str, Any]]) -> None:
    for session in sessions:
        assert len(session["listeners"]) >= 5  # GCS, raylet, dashboard, agents, a worker
        loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
        assert set(session["listeners"]) <= loopback


def test_dashboard_refuses_those_without_the_token(sessions: list[dict[str, Any]]) -> None:
    for session in sessions:
        for answers in session["answers"].values():
            assert answers == [401, 403, 403, 200]  # none, a wrong one, the environment's, ours


def test_second_session_of_a_process_has_a_token_of_its_own(sessions: list[dict[str, Any]]) -> None:
    tokens = [session["token"] for session in sessions]
    assert len(set(tokens)) == len(tokens)
    assert {len(token) for token in tokens} == {64}


def test_token_is_readable_by_its_owner_alone_whatever_the_umask(sessions: list[dict[str, Any]]) -> None:
    for session in sessions:
        assert session["modes"] == [0o600, 0o700]


def test_list_of_jobs_shows_the_name_of_the_run(sessions: list[dict[str, Any]]) -> None:
    for session in sessions:
        assert [job["metadata"].get("tune_amp") for job in session["jobs"]] == [session["run"]]


def test_private_ray_offers_what_it_was_told(sessions: list[dict[str, Any]]) -> None:
    for session in sessions:
        assert session["resources"] == {"CPU": 1.0, "GPU": 2.0}


def test_ray_that_runs_already_is_joined_and_not_shut_down(sessions: list[dict[str, Any]]) -> None:
    for session in sessions:
        assert session["joined"] == [None, True]  # no token of ours to show, the same dashboard
        assert session["alive_after_joining"] == 42


def test_session_leaves_nothing_behind(sessions: list[dict[str, Any]]) -> None:
    for session in sessions:
        assert session["variables"] == {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_AUTH_TOKEN": None}
        assert session["environment_restored"]
        assert not session["folder_left"]
        assert session["left"] == []  # no ~/.ray/auth_token, no ~/ray_results, no pymp-* in the temporary folder
        assert session["listens_to_dashboard"]  # in the folder that is gone now
        assert not session["initialized_after"]
        assert session["processes_left"] == []


def test_modules_in_the_current_folder_are_imported_by_none_of_rays_processes(sessions: list[dict[str, Any]]) -> None:
    for session in sessions:
        assert "imported" not in session["left"]
        assert session["folder"] not in session["worker_path"]


def test_workers_import_what_they_are_told_as_they_start_and_go_on_without_what_is_missing(
    sessions: list[dict[str, Any]],
) -> None:
    assert [session["preloaded"] for session in sessions] == [True] * len(sessions)


def test_longest_temporary_folder_that_leaves_room_for_sockets_is_used(sessions: list[dict[str, Any]]) -> None:
    """By Ray's own files, and by what workers write."""
    for session in sessions:
        assert session["places"] == [session["temporary"]] * 2
        assert session["announced"] == []


@pytest.mark.parametrize(
    ("is_ours", "wanted", "expected"), [(True, True, ["started"]), (True, False, []), (False, False, ["told"])]
)
def test_dashboard_that_is_not_wanted_never_starts(is_ours: bool, wanted: bool, expected: list[str]) -> None:
    """That of a Ray which was joined is named all the same: it runs anyway."""
    events: list[str] = []

    def starting(delay: float, tell: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        events.append("started")
        return contextlib.nullcontext()

    ours: Any = SimpleNamespace(starting=starting) if is_ours else None
    plain: dict[str, Any] = {"dashboard_url": None, "token_path": None, "authenticated": True}
    with RaySession(**plain, late_dashboard=ours).dashboard(lambda _: events.append("told"), wanted=wanted):
        assert events == expected


@pytest.mark.parametrize(("is_refused", "expected"), [(True, True), (None, True), (False, False)])
def test_dashboard_that_has_started_and_refuses_nobody_is_an_exposure(
    is_refused: bool | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not answer is none, for example because Ray has just died: the GCS did refuse."""
    monkeypatch.setattr("tune_amp.cluster.ray_patches.find_dashboard", lambda: "http://127.0.0.1:1")
    monkeypatch.setattr("tune_amp.cluster.session._is_refused_by_dashboard", lambda url: is_refused)
    session = _find_dashboard(RaySession(dashboard_url=None, token_path=None, authenticated=True))
    assert (session.dashboard_url, session.authenticated) == ("http://127.0.0.1:1", expected)


# Clusters that cannot be joined


def refusal(address: str) -> str:
    before = dict(os.environ)
    with pytest.raises(InputError) as caught, ray_session(address):
        pytest.fail("was joined")
    assert dict(os.environ) == before
    return str(caught.value)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}"])
def test_address_where_nobody_listens_is_refused_at_once(
    form: str, closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    address = form.format(closed_port)
    assert refusal(address) == (
        f"--address: {address} cannot be joined (ConnectionRefusedError: [Errno 111] Connection refused); "
        "a cluster that requires a token needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; "
        "it is joined from a node of the cluster, and from elsewhere a search is submitted to it (ray job submit)"
    )


@pytest.mark.parametrize("by_variable", [False, True])
def test_ray_client_is_refused_with_the_command_that_submits_a_search(
    by_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = "ray://user:secret@head:10001"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if by_variable:
        monkeypatch.setenv("RAY_ADDRESS", client)
    assert refusal("auto" if by_variable else client) == (
        "--address: ray://***@head:10001 is not supported, because a search runs on a node of the cluster; submit it "
        "there: ray job submit --address http://HEAD:8265 -- tune-amp search --address auto"
    )


@pytest.mark.parametrize("address", ["local", "nonsense", "http://127.0.0.1:8265", ":6379", "127.0.0.1:"])
@pytest.mark.parametrize("place", ["argument", "variable"])
def test_address_of_another_kind_is_refused(address: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``local`` Ray would start one that listens on all interfaces, and none of our settings would hold."""
    if place == "variable":
        monkeypatch.setenv("RAY_ADDRESS", address)
    message = refusal("auto" if place == "variable" else address)
    assert message == f"--address: must be auto or host:port, got {address}"


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_address_that_is_none_is_refused_on_one_line(address: str) -> None:
    message = refusal(address)
    assert message.startswith(f"--address: {address} cannot be joined (")
    assert "\n" not in message


def test_token_mode_without_a_token_is_refused_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert "\n" not in refusal(f"127.0.0.1:{closed_port}")


def test_ray_that_does_not_start_is_one_line_and_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def fail(address: str, _temp_dir: str, **options: Any) -> None:
        homes.append(Path(_temp_dir).parent)
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does

    homes: list[Path] = []
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(
        StartError, match=r"^Ray did not start: Exception: The current node timed out during startup\.$"
    ):
        ray_session().__enter__()
    assert [home.exists() for home in homes] == [False]


def test_ray_that_filled_the_temporary_folder_as_it_started_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def fail(address: str, _temp_dir: str, **options: Any) -> None:
        (Path(_temp_dir).parent / "room").symlink_to("/dev/full")
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(StartError, match=f"^Ray did not start: the temporary folder {tempfile.gettempdir()} is full; "):
        ray_session().__enter__()


def test_full_temporary_folder_is_named_with_the_setting_that_moves_it(tmp_path: Path) -> None:
    _check_room(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "room").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        _check_room(tmp_path)
    assert str(_start_error(caught.value, tmp_path)) == (
        f"Ray did not start: the temporary folder {tmp_path} is full; free 8 MiB there, or set TMPDIR to another"
    )
    over_quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert f"the temporary folder {tmp_path} is full" in str(_start_error(over_quota, tmp_path))
    assert "is full" not in str(_start_error(PermissionError(errno.EACCES, "Permission denied"), tmp_path))


@pytest.mark.parametrize("excess", [0, 1])
def test_temporary_folder_is_the_users_where_sockets_allow_it(excess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with temporary_folder(MOST_PARENT_BYTES + excess) as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(tempfile, "tempdir", None)
        assert _choose_parent(lines.append) == (Path("/tmp") if excess else folder)
    assert lines == excess * [
        f"Ray's files go to /tmp: the path of the temporary folder {folder} is too long for Ray's sockets "
        f"({MOST_PARENT_BYTES + 1} bytes, at most {MOST_PARENT_BYTES}); a shorter TMPDIR moves them"
    ]


def test_temporary_folder_that_is_none_is_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    places = _choose_parent(lines.append)
    missing = f"TMPDIR ({tmp_path / 'missing'}) is full, or no folder that you may write to"
    assert lines[0] == f"Ray's files go to {places}: {missing}"


def test_session_without_a_home_folder_is_refused_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def fail(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", fail)
    with pytest.raises(InputError, match=r"^HOME: must name a folder"):
        ray_session().__enter__()


def test_source_of_a_users_code_is_its_folder_or_file(
    write_module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = write_module("")
    monkeypatch.syspath_prepend(tmp_path)
    assert _find_source(importlib.import_module(module)) == str(tmp_path / f"{module}.py")
    assert _find_source(tune_amp) == str(Path(tune_amp.__file__).parent)
