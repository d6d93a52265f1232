"""The known attack on an open Ray (CVE-2023-48022, "ShadowRay"), against a search of ours and against an open head.

The attack runs code through the dashboard's jobs API, or by joining the cluster. What must be refused is listed by Ray
itself: the routes that its servers registered, and every port on which a process of the search listens.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fault_runs import prepare

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

ROOT = Path(__file__).resolve().parents[1]
WRONG_TOKEN = "0" * 64
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}

# Pages that the dashboard shows to anybody, because a browser has no token yet. They say nothing of the run.
PUBLIC_ROUTES = {
    "/",
    "/favicon.ico",
    "/api/authentication_mode",
    "/api/authenticate",  # compares a token
    "/api/healthz",
    "/api/gcs_healthz",
    "/api/local_raylet_healthz",
    "/static",
}

# One method of each of Ray's services that reads and needs no argument.
GRPC_METHODS = (
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A Ray that is attacked."""

    pid: int
    dashboard: str
    """host:port"""
    folder: Path
    """Of Ray's session: logs, and files with the ports."""
    token: str | None

    def port(self, name: str) -> int:
        """The port that Ray wrote down as ``name``."""
        [path] = wait_for(lambda: list(self.folder.glob(f"{name}_*")), f"{name} in {self.folder}")
        return int(wait_for(path.read_text, f"a number in {path}"))

    @property
    def gcs(self) -> str:
        """The address that a node or a driver joins."""
        return f"127.0.0.1:{self.port('gcs_server_port')}"


def wait_for(find: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.1)
    return found


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """Of somebody who knows nothing of the search, but for how to reach a node that listens on loopback only."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return plain | {"HOME": str(home), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **more}


@contextlib.contextmanager
def running(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """A process that prints a line of JSON with its dashboard's ``url``; interrupted in the end."""
    errors = folder / "stderr"
    with (
        errors.open("w") as stream,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=stream, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            lines = map(json.loads, process.stdout)
            told = next((line for line in lines if "url" in line), None)
            assert told is not None, errors.read_text()[-3000:]
            yield process.pid, told
        finally:
            process.send_signal(signal.SIGINT)
            process.stdout.read()


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A search that goes on until the tests are over, started as users start it. Most of the time its trials sleep."""
    folder = prepare(tmp_path_factory.mktemp("search"), step_seconds=0.05)
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "space.yaml", "--dataset", "digits", "--json"]
    command += ["--model", "slow:net", "--num-samples", "2000", "--max-concurrent", "1", "--confirm-seeds", "0"]
    with running(command, folder, os.environ | {"PYTHONPATH": str(ROOT)}) as (pid, start):
        assert start["authenticated"] is True
        token_path = Path(start["token_path"])
        dashboard = start["url"].removeprefix("http://")
        session = token_path.parent / "ray" / "session_latest"
        yield Target(pid=pid, dashboard=dashboard, folder=session, token=token_path.read_text())


OPEN_HEAD = """
import functools, json, sys, threading
import ray
from ray._private import parameter

# Ray's own choice is always 52365, where another Ray of this machine may be.
parameter.RayParams = functools.partial(parameter.RayParams, dashboard_agent_listen_port=0)
context = ray.init("local", num_cpus=1, num_gpus=0, _temp_dir=sys.argv[1], include_dashboard=True, log_to_driver=False)
print(json.dumps({"url": context.dashboard_url}), flush=True)
try:
    threading.Event().wait()
except KeyboardInterrupt:
    ray.shutdown()
"""


@pytest.fixture(scope="module")
def open_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A Ray without a token, as it was the default for years. On loopback, or these tests were the hole."""
    folder = tmp_path_factory.mktemp("open")
    # Sockets need a short path. Ray's last processes may still write there after ray.shutdown() has returned.
    with tempfile.TemporaryDirectory(prefix="open_", dir="/tmp", ignore_cleanup_errors=True) as short:
        environment = clean_environment(folder, RAY_AUTH_MODE="disabled")
        command = [sys.executable, "-c", OPEN_HEAD, f"{short}/ray"]
        with running(command, folder, environment) as (pid, start):
            session = Path(short, "ray", "session_latest")
            yield Target(pid=pid, dashboard=start["url"], folder=session, token=None)


# ---- asking ----


def ask(
    address: str, path: str, token: str | None = None, *, method: str = "GET", body: object = None, **headers: str
) -> tuple[int, str]:
    """Status and text of an HTTP answer; a status of 0 where what listens does not speak HTTP."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        way_in = {"Authorization": f"Bearer {token}"} if token else {}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"Content-Type": "application/json", **way_in, **given})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (http.client.HTTPException, OSError):
        return 0, ""
    finally:
        connection.close()


def call(address: str, method: str, token: str | None = None) -> str:
    """Status of an empty gRPC message."""
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        metadata = [("authorization", f"Bearer {token}")] if token else None
        try:
            channel.unary_unary(method)(b"", timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def submit(target: Target, mark: Path, token: str | None = None, **headers: str) -> tuple[int, str]:
    """The attack itself: a shell command for the cluster to run."""
    body = {"entrypoint": f"touch {mark}"}
    return ask(target.dashboard, "/api/jobs/", token, method="POST", body=body, **headers)


# ---- the attack through the jobs API ----


def test_open_head_runs_whatever_anybody_posts_to_its_jobs(open_head: Target, tmp_path: Path) -> None:
    status, _ = submit(open_head, tmp_path / "mark")
    assert status == 200
    wait_for((tmp_path / "mark").exists, "mark of the job: the attack is no attack")


def test_search_refuses_the_job_without_its_token_and_runs_it_with_it(search: Target, tmp_path: Path) -> None:
    assert submit(search, tmp_path / "none") == (401, "Unauthorized: Missing authentication token")
    assert submit(search, tmp_path / "wrong", WRONG_TOKEN) == (403, "Forbidden: Invalid authentication token")
    assert submit(search, tmp_path / "right", search.token)[0] == 200
    wait_for((tmp_path / "right").exists, "mark of the job that has the token")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


READING = (
    "/api/version",
    "/api/jobs/",
    "/nodes?view=summary",
    "/logical/actors",
    "/api/v0/actors",
    "/api/v0/logs?node_ip=127.0.0.1",
    "/api/v0/logs/file?node_ip=127.0.0.1&filename=gcs_server.out&lines=5",
    "/api/cluster_status",
    "/api/prometheus/sd",
)


@pytest.mark.parametrize("path", READING)
def test_what_an_attacker_reads_first_needs_the_token(path: str, search: Target, open_head: Target) -> None:
    assert ask(open_head.dashboard, path)[0] == 200
    assert [ask(search.dashboard, path, token)[0] for token in (None, WRONG_TOKEN, search.token)] == [401, 403, 200]


def test_package_of_code_is_uploaded_with_the_token_only(search: Target, open_head: Target) -> None:
    def upload(target: Target, token: str | None) -> int:
        path = "/api/packages/gcs/_ray_pkg_0123456789abcdef.zip"
        return ask(target.dashboard, path, token, method="PUT", body=b"PK\x05\x06" + bytes(18))[0]

    assert upload(open_head, None) == 200
    assert [upload(search, token) for token in (None, WRONG_TOKEN, search.token)] == [401, 403, 200]


def test_jobs_are_stopped_with_the_token_only(search: Target, tmp_path: Path) -> None:
    body = {"entrypoint": f"touch {tmp_path}/started; sleep 600", "submission_id": "sleeper"}
    assert ask(search.dashboard, "/api/jobs/", search.token, method="POST", body=body)[0] == 200
    wait_for((tmp_path / "started").exists, "start of the job")

    def stop(token: str | None) -> int:
        return ask(search.dashboard, "/api/jobs/sleeper/stop", token, method="POST")[0]

    def state() -> str:
        return str(json.loads(ask(search.dashboard, "/api/jobs/sleeper", search.token)[1])["status"])

    assert [stop(None), stop(WRONG_TOKEN), state()] == [401, 403, "RUNNING"]
    assert stop(search.token) == 200
    wait_for(lambda: state() == "STOPPED", "stop of the job")


def list_routes(log: Path) -> list[tuple[str, str]]:
    """Method and path of each route that a server of Ray's wrote into its log when it started."""
    found = re.findall(r"Route \[(\w+)\] <\w+ +([^ >]+)", log.read_text())
    return [(method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in found]


def test_every_route_of_the_dashboard_but_the_public_ones_asks_for_the_token(search: Target) -> None:
    routes = wait_for(lambda: list_routes(search.folder / "logs" / "dashboard.log"), "list of routes")
    assert {("POST", "/api/jobs/"), ("GET", "/nodes"), ("GET", "/api/v0/logs/x")} <= set(routes)  # the attack's own
    assert len(routes) > 60
    guarded = [(method, path) for method, path in routes if path not in PUBLIC_ROUTES]
    assert len(guarded) > 50
    for token, status in ((None, 401), (WRONG_TOKEN, 403)):
        answers = {(method, path): ask(search.dashboard, path, token, method=method)[0] for method, path in guarded}
        assert {route: answer for route, answer in answers.items() if answer != status} == {}


def test_every_route_of_the_nodes_agent_asks_for_the_token(search: Target) -> None:
    agent = f"127.0.0.1:{search.port('dashboard_agent_listen_port')}"
    routes = wait_for(lambda: list_routes(search.folder / "logs" / "dashboard_agent.log"), "list of routes")
    guarded = [(method, path) for method, path in routes if path not in PUBLIC_ROUTES and method != "OPTIONS"]
    assert ("POST", "/api/job_agent/jobs/") in guarded
    for token, status in ((None, 401), (WRONG_TOKEN, 403)):
        answers = {(method, path): ask(agent, path, token, method=method)[0] for method, path in guarded}
        assert {route: answer for route, answer in answers.items() if answer != status} == {}


def test_agents_take_jobs_and_environments_from_anybody_where_there_is_no_token(
    search: Target, open_head: Target, tmp_path: Path
) -> None:
    def post(target: Target, port: str, path: str, token: str | None = None, **body: str) -> int:
        return ask(f"127.0.0.1:{target.port(port)}", path, token, method="POST", body=body)[0]

    jobs = ("dashboard_agent_listen_port", "/api/job_agent/jobs/")
    assert post(open_head, *jobs, entrypoint=f"touch {tmp_path}/open") == 200
    wait_for((tmp_path / "open").exists, "mark of the job")
    assert post(search, *jobs, entrypoint=f"touch {tmp_path}/none") == 401
    assert post(search, *jobs, search.token, entrypoint=f"touch {tmp_path}/right") == 200
    wait_for((tmp_path / "right").exists, "mark of the job that has the token")
    environments = f"127.0.0.1:{search.port('runtime_env_agent_port')}"
    tokens = (None, WRONG_TOKEN, search.token)
    # An empty message; what it takes is Protocol Buffers.
    listed = [ask(environments, "/get_runtime_envs_info", token, method="POST", body=b"")[0] for token in tokens]
    assert listed == [401, 403, 200]
    assert {path.name for path in tmp_path.iterdir()} == {"open", "right"}


def test_agent_of_a_search_does_not_take_the_one_port_that_rays_agents_all_want(search: Target) -> None:
    """Beside another Ray it would have no HTTP at all; and who waits at a known port may get what was meant for it."""
    assert search.port("dashboard_agent_listen_port") not in (-1, 52365)


# ---- browsers ----

BROWSER = {"User_Agent": "Mozilla/5.0 (X11; Linux x86_64)", "Origin": "https://evil.example"}


def test_page_of_another_site_cannot_post_a_job_even_with_the_users_cookie(search: Target, tmp_path: Path) -> None:
    connection = http.client.HTTPConnection(search.dashboard, timeout=30)
    connection.request("POST", "/api/authenticate", headers={"Authorization": f"Bearer {search.token}"})
    cookie = connection.getresponse().getheader("Set-Cookie") or ""
    connection.close()
    assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))  # no script reads it, no other site sends it
    pair = cookie.partition(";")[0]
    assert ask(search.dashboard, "/api/jobs/", Cookie=pair)[0] == 200  # the cookie is good
    assert submit(search, tmp_path / "cookie", Cookie=pair, **BROWSER)[0] == 405
    assert submit(search, tmp_path / "none", **BROWSER)[0] == 401
    # As no preflight asks: a simple request, from a form or a script's no-cors fetch.
    assert submit(search, tmp_path / "simple", Content_Type="text/plain", Cookie=pair, **BROWSER)[0] == 405
    assert list(tmp_path.iterdir()) == []


ATTACKING_PAGE = """<!doctype html><title>attack</title>
<iframe name="sink"></iframe>
<form method="post" enctype="text/plain" target="sink"><input></form>
<script>
  const [address, mark] = location.hash.slice(1).split(",");
  const job = JSON.stringify({ entrypoint: `touch ${mark}`, ignored: "=" });
  const url = `http://${address}/api/jobs/`;
  const form = document.querySelector("form"), [name, ...value] = job.split("=");
  form.action = url;
  Object.assign(form.firstChild, { name, value: value.join("=") });
  document.querySelector("iframe").onload = () => { document.title = "done"; };
  fetch(url, { method: "POST", mode: "no-cors", credentials: "include", body: job })
    .catch(() => undefined)
    .then(() => form.submit());
</script>"""


@contextlib.contextmanager
def serving(page: str) -> Iterator[str]:
    """The address of a web server with this page: another origin than the dashboard, but of the same site."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its name there
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_real_browser_that_is_logged_in_posts_no_job_for_another_page(
    search: Target, open_head: Target, browser: "Browser", tmp_path: Path
) -> None:
    statuses = []
    with serving(ATTACKING_PAGE) as address:
        for target in (search, open_head):
            context = browser.new_context()
            if target.token:
                cookie = {
                    "name": "ray-authentication-token",
                    "value": target.token,
                    "url": f"http://{target.dashboard}",
                }
                context.add_cookies([cookie])  # type: ignore[list-item]
            page = context.new_page()
            page.on("response", lambda answer: statuses.append(answer.status) if "/api/jobs/" in answer.url else None)
            page.goto(f"{address}#{target.dashboard},{tmp_path}/mark")
            page.wait_for_function("() => document.title === 'done'", timeout=60_000)
            context.close()
    assert statuses == [405] * 4  # by script and by form, with the user's cookie and where none is needed
    assert list(tmp_path.iterdir()) == []


def test_name_that_was_bound_anew_to_loopback_opens_nothing(search: Target) -> None:
    """DNS rebinding: to the browser the dashboard is the attacker's own site, whose cookies are not the dashboard's."""
    for path in READING:
        assert ask(search.dashboard, path, Host="evil.example:8265")[0] == 401


# ---- joining, and everything else that listens ----

JOINING = """
import sys
import ray

address, mark = sys.argv[1:]
ray.init(address, log_to_driver=False)
ray.get(ray.remote(num_cpus=0)(lambda: open(mark, "w").close()).remote())
"""


def run(
    command: list[str], target: Target, folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command of somebody else's, that joins the cluster."""
    return subprocess.run(
        [sys.executable, *command, target.gcs, *arguments],
        env=clean_environment(folder, **environment),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def join(target: Target, home: Path, mark: Path, token: str | None = None) -> str:
    """What a driver that joins the cluster complains of; empty where its task ran."""
    more = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = run(["-c", JOINING], target, home, str(mark), **more)
    return done.stderr if done.returncode else ""


def test_driver_joins_with_the_token_only(search: Target, open_head: Target, tmp_path: Path) -> None:
    marks = [tmp_path / name for name in ("open", "none", "wrong", "right")]
    targets = (open_head, search, search, search)
    tokens = (None, None, WRONG_TOKEN, search.token)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # Ray takes 20 s to give up
        found = list(pool.map(join, targets, [tmp_path] * 4, marks, tokens))
    assert (found[0], found[3]) == ("", "")
    assert "ConnectionError" in found[1]
    assert "Error" in found[2]
    assert [mark.exists() for mark in marks] == [True, False, False, True]


def find_processes(pid: int) -> set[int]:
    """The process and all that it started."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, before = {pid}, set[int]()
    while found != before:
        before, found = found, found | {child for child, parent in parents.items() if parent in found}
    return found


def find_sockets(pids: set[int]) -> list[tuple[str, str, int]]:
    """Protocol, address in the kernel's hexadecimal and port of each socket on which they wait for others."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            inodes |= {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    found = []
    for name, waiting in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == waiting and f"socket:[{inode}]" in inodes:
                address, _, port = local.partition(":")
                found.append((name, address, int(port, 16)))
    return found


def test_no_process_of_the_search_listens_beyond_loopback(search: Target) -> None:
    sockets = find_sockets(find_processes(search.pid))
    assert len(sockets) >= 8  # GCS, raylet, dashboard, agents, metrics, the driver, a worker
    assert [socket for socket in sockets if socket[1] not in LOOPBACK] == []


def test_every_port_of_the_search_asks_for_the_token_but_those_of_metrics(search: Target) -> None:
    def find_ports() -> set[int]:
        return {port for name, _, port in find_sockets(find_processes(search.pid)) if name.startswith("tcp")}

    ports = find_ports()
    assert 10001 not in ports  # Ray Client
    kinds: dict[str, set[int]] = {"refuses": set(), "metrics": set(), "open": set()}
    for port in ports:
        address = f"127.0.0.1:{port}"
        # Health checks and the page that asks for the token are open; any other path comes to the check.
        status, _ = ask(address, "/api/jobs/")
        if status == 0:
            answers = [call(address, method) for method in GRPC_METHODS]
            kind = "refuses" if "UNAUTHENTICATED" in answers and "OK" not in answers else "open"
        elif status == 401:
            kind = "refuses"
        else:
            kind = "metrics" if "# TYPE" in ask(address, "/metrics")[1] else "open"
        kinds[kind].add(port)
    assert kinds["open"] & find_ports() == set()  # a worker may have ended meanwhile
    assert search.port("metrics_export_port") in kinds["metrics"]
    assert len(kinds["metrics"]) <= 3  # of the node, the dashboard and the autoscaler
    assert len(kinds["refuses"]) >= 6
    for port in kinds["metrics"]:
        text = ask(f"127.0.0.1:{port}", "/metrics")[1]
        assert str(search.token) not in text
        assert ask(f"127.0.0.1:{port}", "/api/jobs/", method="POST", body={"entrypoint": "true"})[0] in (404, 405, 200)


def test_servers_that_speak_grpc_let_the_token_in(search: Target) -> None:
    """Else the test above would be content with servers that refuse everybody."""
    answers = {
        name: [call(address, method, token) for token in (None, WRONG_TOKEN, search.token)]
        for name, address, method in (
            ("gcs", search.gcs, GRPC_METHODS[0]),
            ("agent", f"127.0.0.1:{search.port('metrics_agent_port')}", GRPC_METHODS[-1]),
        )
    }
    assert list(answers.values()) == [["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"]] * 2


# ---- the token ----


def test_token_is_in_no_command_line_log_or_file_but_its_own(search: Target) -> None:
    assert search.token is not None
    home = search.folder.parents[1]
    token = search.token.encode()
    processes = find_processes(search.pid)
    assert len(processes) > 5
    for pid in processes:
        with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
            assert token not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert stat.S_IMODE(Path(f"/proc/{pid}/environ").stat().st_mode) == 0o400
    holding = []
    for path in home.rglob("*"):
        with contextlib.suppress(OSError):  # a socket, or gone
            if path.is_file() and not path.is_symlink() and token in path.read_bytes():
                holding.append(path)
    assert holding == [home / "token"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home, home / "token")] == [0o700, 0o600]
    assert home.stat().st_uid == os.getuid()


def test_whatever_the_session_writes_lies_where_others_cannot_enter(search: Target) -> None:
    """Ray makes folders that all may write, and its sockets are as good as its ports: the folder above closes them."""
    home = search.folder.parents[1]
    inside = {str(path) for path in search.folder.resolve().rglob("*")}
    assert any(path.endswith("/sockets/raylet") for path in inside)
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if line.count("/")]
    own = [path for path in sockets if "/sockets/" in path and str(home) in path]
    assert own
    assert all(Path(path).resolve().is_relative_to(home.resolve()) for path in own)


# ---- clusters that others started ----


def test_search_on_a_cluster_without_a_token_is_warned_of_loudly(open_head: Target, tmp_path: Path) -> None:
    options = "--dataset digits --num-samples 1 --max-epochs 1 --confirm-seeds 0 --json --name run"
    script = [str(ROOT / "scripts" / "search.py"), "quick", *options.split(), "--address"]
    done = run(script, open_head, tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    [warning] = [line for line in done.stderr.splitlines() if line.startswith("WARNING: ")]
    assert (
        f"(dashboard http://{open_head.dashboard}) requires no token: anyone who reaches its ports can run" in warning
    )
    told = [event for event in map(json.loads, done.stdout.splitlines()) if "authenticated" in event]
    assert [(event["event"], event["authenticated"]) for event in told] == [("start", False), ("dashboard", False)]


JOINED = """
import json, sys
from tune_amp.cluster.session import ray_session

with ray_session(sys.argv[1]) as session:
    print(json.dumps([session.authenticated, session.exposure]))
"""


def join_as_ours(target: Target, folder: Path, token: str) -> list[Any]:
    """Whether a session of ours on the cluster is authenticated, and its warning."""
    way_in = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = run(["-c", JOINED], target, folder, **way_in, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout))


def test_cluster_with_a_token_is_joined_without_a_warning(search: Target, tmp_path: Path) -> None:
    assert search.token is not None
    assert join_as_ours(search, tmp_path, search.token) == [True, None]


def test_setting_of_the_environment_does_not_make_an_open_cluster_look_closed(
    open_head: Target, tmp_path: Path
) -> None:
    assert join_as_ours(open_head, tmp_path, WRONG_TOKEN)[0] is False
