"""Searches as a user runs them, in a process of their own, for tests that harm them; and what must hold afterwards."""

import collections
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from small_runs import untimed

from tune_amp.results.journal import read_journal
from tune_amp.results.records import load_best_rows, load_confirmed, load_trials
from tune_amp.results.rows import build_from
from tune_amp.results.run_folder import RunFolder
from tune_amp.trial.config import EpochMetrics, TrialStatus

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 240.0
"""Seconds that a test waits for anything: a busy machine takes 40 to start Ray."""

SPACE = """
parameters:
  lr: {low: 1.0e-3, high: 3.0e-2, log: true}
  init_scale: {low: 2^8, high: 2^16, power_of_two: true}
fixed: {precision: fp16, batch_size: 256}
"""

MODEL = """
import os, pathlib, sys, time
import torch

HERE = pathlib.Path(__file__).parent

def is_trial():  # not a run on a fresh seed, nor the driver's look at the model
    if "RAY_JOB_ID" not in os.environ:
        return False
    import ray
    return ray.get_runtime_context().get_actor_id() is not None

class Net(torch.nn.Linear):
    steps = 0

    def forward(self, images):
        if self.training and self.slow:
            Net.steps += 1
            time.sleep(0 if (HERE / "hurry").exists() else {step_seconds})
            fault(self, images)
        return super().forward(images.flatten(1))

def net(shape, classes):
    made = Net(784, classes)
    made.slow = is_trial()
    return made

def once(name):  # true for the first process that asks
    try:
        (HERE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def fault(self, images):
    pass
"""
"""A model that is the same on every run, and so slow that a test can hit it: 6 steps are an epoch of digits."""

STEP_SECONDS = 0.04
ALONE = ("--max-concurrent", "1")
"""One slot: TPE and ASHA see the same trials in the same order, whatever happens."""
SIDE_BY_SIDE = ("--max-concurrent", "2", "--sampler", "random", "--scheduler", "none")
"""Two slots, in which nothing depends on who is first."""
BUDGET = ("--num-samples", "6", "--max-epochs", "8", "--grace-period", "2", "--top-k", "3")

CUT_OFF = "ends with the command to resume"
"""What most faults that end a search come to."""

Events = Sequence[Mapping[str, Any]]
Follow = Callable[["Search"], "Search"]
"""A fixture that ends a search with its test."""
Undisturbed = Callable[[str], "Ended"]
"""A fixture that gives the end of an undisturbed run, by name."""


class Search:
    """A search in its own process, with whatever processes it starts.

    Args:
        folder: where it is run; the model and the space lie there.
        arguments: of the command.
        environment: beside ours.
        prefix: what runs it, such as ``setpriv``.
        command: instead of the script and the arguments, a line for the shell.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        command: str | None = None,
    ) -> None:
        self.folder = folder
        self._mark = f"TUNE_AMP_FAULT={uuid.uuid4().hex}"
        self._homes: set[str] = set()
        self._seen: dict[int, str] = {}
        name, _, value = self._mark.partition("=")
        self._output = folder / f"output-{value[:8]}.txt"
        self._errors = folder / f"errors-{value[:8]}.txt"
        quick = () if "--dashboard" in arguments else ("--dashboard", "off")  # it takes 2 s of CPU time
        shell = [*prefix, sys.executable, str(ROOT / "scripts" / "search.py"), *arguments, *quick]
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self.began = time.monotonic()
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"] if command else shell,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), **(environment or {}), name: value},
                stdout=output,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own, as a shell gives to each command
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        return self._errors.read_text(errors="replace")

    @property
    def stdout(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end; the exit code."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            text = f"still runs after {timeout:.0f} s: {self.stdout[-2000:]} {self.stderr[-2000:]}"
            self.destroy()
            raise AssertionError(text) from None

    def wait_until(self, holds: Callable[[], object], timeout: float = PATIENCE) -> None:
        """Wait for something to hold while the search goes on."""
        end = time.monotonic() + timeout
        while not holds():
            assert not self.is_over, f"over too early: {self.stdout[-2000:]} {self.stderr[-2000:]}"
            if time.monotonic() > end:
                self.destroy()
                raise AssertionError(f"never held: {self.stdout[-2000:]} {self.stderr[-2000:]}")
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        """As a terminal does: to all of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """End the driver as the kernel's own killer of processes does."""
        self._process.send_signal(signal.SIGSTOP)  # it does nothing more while we look for the others
        self.list_processes()
        self._process.kill()
        self._process.wait()

    def destroy(self) -> None:
        """Leave nothing behind, whatever the test found."""
        self.kill()
        for pid in self.list_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def list_processes(self, name: str = "") -> list[int]:
        """Processes of this search but the driver itself, those whose command line holds ``name``."""
        lines = {pid: line for pid, line in _list_command_lines() if pid != self.pid}
        for pid, line in lines.items():
            if self._is_ours(pid, line):
                self._homes.update(re.findall(r"(/\S*tune-amp-home-[^/\s]+)/ray", line))
        found = [pid for pid, line in lines.items() if name in line and self._is_ours(pid, line)]
        self._seen |= {pid: lines[pid] for pid in found}
        return found

    def wait_for_processes(self, name: str) -> list[int]:
        """Those of that name, once there are some."""
        found: list[int] = []

        def look() -> bool:
            found[:] = self.list_processes(name)
            return bool(found)

        self.wait_until(look)
        return found

    def find_left(self, patience: float = 20.0) -> list[str]:
        """Processes that outlive the search, by the time that Ray takes to notice."""
        end = time.monotonic() + patience
        while True:
            left = [self._seen[pid].strip() for pid in self.list_processes()]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.3)

    def _is_ours(self, pid: int, line: str) -> bool:
        if any(home in line for home in self._homes):
            return True
        folder = Path("/proc") / str(pid)
        with contextlib.suppress(OSError):
            if self._mark.encode() in (folder / "environ").read_bytes():
                return True
        # A worker writes its title over its environment, but holds its log open.
        with contextlib.suppress(OSError):
            for descriptor in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if any(str(descriptor.readlink()).startswith(home) for home in self._homes):
                        return True
        return False


def _list_command_lines() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes()
                if line and (folder / "stat").read_text().rpartition(") ")[2][0] not in "ZX":
                    yield int(folder.name), line.replace(b"\0", b" ").decode(errors="replace")


def prepare(folder: Path, fault: str = "", *, step_seconds: float = STEP_SECONDS, space: str = SPACE) -> Path:
    """A folder with a model and a space to search; ``fault`` is Python that replaces a part of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slow.py").write_text(MODEL.format(step_seconds=step_seconds) + fault)
    (folder / "space.yaml").write_text(space)
    return folder


def hurry(folder: Path) -> None:
    """Let the model wait no more: nothing is left to be hit."""
    (folder / "hurry").touch()


def begin(folder: Path, *arguments: str, results: str = "results", **settings: Any) -> Search:
    """Begin the standard search, as the run ``run``."""
    return Search(folder, name_arguments(*arguments, results=results), **settings)


def name_arguments(*more: str, results: str = "results") -> tuple[str, ...]:
    """Those of the standard search."""
    standard = ("space.yaml", "--dataset", "digits", "--model", "slow:net", "--name", "run", "--results-dir", results)
    confirm = () if "--confirm-seeds" in more else ("--confirm-seeds", "0")
    return (*standard, *BUDGET, *confirm, *more)


def resume(folder: Path, *arguments: str, run: str = "run", **settings: Any) -> Search:
    """Go on with it."""
    return Search(folder, ("--resume", run, "--model", "slow:net", *arguments), **settings)


def read_events(run: Path) -> list[dict[str, Any]]:
    """The journal so far; of a search that goes on, too."""
    return read_journal(RunFolder(run).journal) if RunFolder(run).journal.exists() else []


def count_events(run: Path, kind: str) -> int:
    return sum(event["event"] == kind for event in read_events(run))


def load_study_trials(run: Path) -> list[FrozenTrial]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(RunFolder(run).study)))
    return optuna.load_study(study_name=None, storage=storage).trials


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A run as it ended, without what differs between two of the same: ids and clocks."""

    trials: tuple[tuple[Any, ...], ...]
    """Settings, status and epochs of each, in the order of submission."""
    ranking: tuple[tuple[Any, ...], ...]
    """Rank, settings and validation accuracy of each row of ``best.parquet``."""
    confirmed: tuple[tuple[Any, ...], ...]
    """Place of the trial, seed, status and accuracies of each run on a fresh seed."""


def read_end(run: Path) -> Ended:
    """What two undisturbed runs have in common."""
    trials = [
        (repr(trial.config), str(trial.status), tuple(repr(untimed(epoch)) for epoch in trial.epochs))
        for trial in load_trials(run)
    ]
    rows = load_best_rows(run) if (run / "best.parquet").exists() else []
    ranking = [
        (row.rank, repr(row.trial.config), row.trial.last.val_accuracy if row.trial.last else None) for row in rows
    ]
    places = {trial.trial_id: place for place, trial in enumerate(load_trials(run))}
    confirmed = [
        (places.get(known.trial_id), known.seed, str(known.status), known.val_accuracy, known.test_accuracy)
        for known in (load_confirmed(run) if RunFolder(run).confirm.exists() else ())
    ]
    return Ended(trials=tuple(trials), ranking=tuple(ranking), confirmed=tuple(confirmed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """What became of the reports of a run."""

    reports: int
    """That were made, over all sessions."""
    kept: int
    """Rows of ``epochs.parquet``."""
    lost: int
    """Reported epochs that are not in it."""
    doubled: int
    """That are in it more than once."""
    repeated: int
    """Epochs that were trained, and reported, again."""


def check_run(run: Path, *, fallen_back: int = 0) -> Count:
    """What holds after any fault, and after every ``--resume``.

    Args:
        run: the run folder; nothing may be writing it.
        fallen_back: trials whose last checkpoint was spoiled, so that they began anew: Tune keeps one of each.
    """
    events = read_events(run)
    count = _check_reports(run, events)
    check_study(run)
    check_no_needless_work(events, fallen_back)
    assert list(run.glob(".*")) == []  # no half-written file
    for trial in load_trials(run):
        assert [epoch.epoch for epoch in trial.epochs] == list(range(1, len(trial.epochs) + 1))
        assert trial.error is None or "\n" not in trial.error
    return count


def _check_reports(run: Path, events: Events) -> Count:
    """Each reported epoch is in the Parquet exactly once, as it was reported last."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    reported: dict[tuple[str, int], list[EpochMetrics]] = collections.defaultdict(list)
    for event in events:
        if event["event"] == "report" and event["metrics"]:
            metrics = build_from(EpochMetrics, event["metrics"])
            reported[event["trial_id"], metrics.epoch].append(metrics)
    rows = pq.read_table(run / "epochs.parquet").to_pylist()
    kept = collections.Counter((row["trial_id"], row["epoch"]) for row in rows)
    for row in rows:
        assert repr(build_from(EpochMetrics, row)) == repr(reported[row["trial_id"], row["epoch"]][-1])
    for again in reported.values():  # training is the same each time: so are the reports
        assert len({repr(untimed(metrics)) for metrics in again}) <= 1
    made = sum(map(len, reported.values()))
    count = Count(
        reports=made,
        kept=len(rows),
        lost=len(reported.keys() - kept.keys()),
        doubled=sum(times - 1 for times in kept.values()),
        repeated=made - len([again for again in reported.values() if again]),
    )
    assert (count.lost, count.doubled) == (0, 0)
    by_id = {trial.trial_id: trial for trial in load_trials(run)}
    assert {(trial_id, epoch.epoch) for trial_id, trial in by_id.items() for epoch in trial.epochs} == kept.keys()
    return count


def check_study(run: Path) -> None:
    """No trial runs, and study and Parquet say the same of each."""
    by_id = {trial.trial_id: trial for trial in load_trials(run)}
    last: dict[str, FrozenTrial] = {}
    for told in load_study_trials(run):
        assert told.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.WAITING)
        if "trial_id" in told.user_attrs:  # an orphan, of which nobody had heard, has none
            last[told.user_attrs["trial_id"]] = told
    assert by_id.keys() <= last.keys()
    for trial_id, told in last.items():
        assert told.user_attrs["status"] == (by_id[trial_id].status if trial_id in by_id else TrialStatus.INTERRUPTED)
        if trial_id in by_id and told.state is not TrialState.FAIL:
            known = {epoch.epoch: epoch.val_accuracy for epoch in by_id[trial_id].epochs}
            assert told.intermediate_values.items() <= known.items()


def check_no_needless_work(events: Events, fallen_back: int = 0) -> None:
    """No trial is run that was over, and none is trained again but for what lay behind its last checkpoint."""
    over: set[str] = set()
    saved: dict[str, list[int]] = collections.defaultdict(lambda: [0])
    last: dict[str, int] = collections.defaultdict(int)
    allowed = fallen_back
    for event in events:
        trial_id = event.get("trial_id", "")
        if event["event"] in ("start", "report"):
            assert trial_id not in over, f"{trial_id} was over, and run again"
        if event["event"] == "report" and event["metrics"]:
            epoch = event["metrics"]["epoch"]
            if epoch != last[trial_id] + 1:
                behind = [known for known in saved[trial_id] if known >= epoch]
                allowed -= bool(behind)
                assert allowed >= 0, f"{trial_id}: epoch {epoch} again, though {behind} were saved"
            last[trial_id] = epoch
        elif event["event"] == "checkpoint":
            saved[trial_id].append(last[trial_id])
        elif event["event"] == "end":
            over.add(trial_id)


def find_resume_command(search: Search) -> str:
    """The line that it printed."""
    lines: list[str] = re.findall(r"^resume +(.*)$", search.stderr, re.MULTILINE)
    assert len(lines) == 1, search.stderr
    return lines[0]


def measure_returns(run: Path) -> list[float]:
    """Of each time that a run went on: seconds from the command until a trial ran, or until there was nothing to do."""
    seconds: list[float] = []
    waiting: float | None = None
    for event in read_events(run)[1:]:
        if event["event"] == "session":
            waiting = event["at"]
        elif waiting is not None and event["event"] in ("start", "finish"):
            seconds.append(event["at"] - waiting)
            waiting = None
    return seconds[1:]


def check_readable(run: Path) -> None:
    """A run that was killed can be read at any moment: what its files hold was reported."""
    if not (run / "trials.parquet").exists():
        return
    reported = {(event["trial_id"], event["metrics"]["epoch"]) for event in read_events(run) if event.get("metrics")}
    for trial in load_trials(run):
        assert {(trial.trial_id, epoch.epoch) for epoch in trial.epochs} <= reported


def check_end(search: Search, run: Path, expected: Ended, *, fallen_back: int = 0) -> Count:
    """The search ends as one that nothing disturbed, and leaves no process."""
    assert search.wait() == 0, search.stderr
    assert read_end(run) == expected
    count = check_run(run, fallen_back=fallen_back)
    assert search.find_left() == []
    return count


def check_resumes(
    fault: str, search: Search, run: Path, expected: Ended, follow: Follow, *, ended: float, outcome: str = CUT_OFF
) -> None:
    """The command that a search printed as it was cut off, ``ended`` seconds after the fault, completes the run."""
    assert "Traceback" not in search.stderr
    before = count_events(run, "report")
    hurry(search.folder)
    count = check_end(follow(Search(search.folder, command=find_resume_command(search))), run, expected)
    resumed = measure_returns(run)[-1]
    note_fault(fault, outcome, count, ended=ended, resumed=resumed, before=before, ranking_equal=True)


# ---- the table of faults ----

ROWS_VARIABLE = "TUNE_AMP_FAULT_ROWS"
"""Environment variable: a file that gets a line of JSON for each fault that a test caused."""


def note_fault(fault: str, outcome: str, count: Count, **measured: Any) -> None:
    """Keep what a fault came to, for ``fault_table.py``; nothing where nobody asked."""
    if os.environ.get(ROWS_VARIABLE):
        with Path(os.environ[ROWS_VARIABLE]).open("a") as file:
            machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
            row = {"fault": fault, "outcome": outcome, **dataclasses.asdict(count), **measured, **machine}
            file.write(json.dumps(row) + "\n")
