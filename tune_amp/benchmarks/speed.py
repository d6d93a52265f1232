"""How fast a search is: ours beside the obvious program (``obvious.py``), which trains the same configurations.

Pairs of commands in turn. Ours first, as a user runs it, with a seed of its own in each repeat; what it trained, and
for how many epochs, becomes the plan of the obvious program. Both have the same slots, one CPU each, and the machine to
themselves. Everything is timed from outside, from the command's start to its end.
"""

import contextlib
import dataclasses
import datetime
import gzip
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from tune_amp.benchmarks.machine import count_cores, describe_machine, describe_versions, render_versions
from tune_amp.benchmarks.spread import Spread, render_spread, summarise
from tune_amp.config import InputError, described
from tune_amp.idx_files import locate_files
from tune_amp.parquet import build_columns, build_table, read_origin, read_rows, write_parquet
from tune_amp.results import TrialRecord, load_trials
from tune_amp.run_files import SPACE_FILE

PRECISIONS = ("fp32", "bf16", "fp16")
TRIALS = (16, 64)
REPEATS = 3
MAX_EPOCHS = 8
OURS, OBVIOUS = "ours", "obvious"
PROGRAMS = (OURS, OBVIOUS)

TARGET_TRIALS = 64
"""The targets are for searches of so many trials."""
CPU_RATIOS = {"fp32": 10.0, "bf16": 10.0, "fp16": 2.0}
GPU_RATIO = 50.0
LEAST_EFFICIENCY = 0.9
MOST_STARTUP_SECONDS = 8.0
MOST_POINTS_APART = 1.0
"""Of best accuracy: they validate on different 5,000 images (two standard errors: 0.7), with different seeds."""

MEMORY_SAMPLE_SECONDS = 0.5

# The ranges of the default space, mnist_amp; inputs are scaled as in the obvious program.
SPACE_START = """\
parameters:
  lr: {low: 1.0e-4, high: 3.0e-2, log: true}
  batch_size: {low: 64, high: 1024, power_of_two: true}
"""
SCALER_PARAMETERS = """\
  init_scale: {low: 2^0, high: 2^24, power_of_two: true}
  growth_interval: {low: 0.02, high: 0.5, log: true, fraction_of_trial: true}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One command."""

    program: str = described("ours or obvious")
    precision: str = described("of every trial")
    trials: int = described("trials of the search")
    repeat: int = described("number of the pair, from 0: the seed of our search")
    max_epochs: int = described("full budget of a trial", unit="epochs")
    gpus_per_trial: float = described("share of a GPU that a trial gets; 0: the CPU")
    slots: int = described("trials at a time")
    wall_seconds: float = described("from the command's start to its end", unit="s")
    startup_seconds: float = described("from the command's start to the first trial's first training step", unit="s")
    trial_epochs: int = described("epochs trained, of all trials", unit="epochs")
    train_seconds: float = described("time in training loops, of all trials", unit="s")
    peak_memory_bytes: int | None = described(
        "largest sum of the resident memory of the command's processes, what they share counted in each; null but on "
        "Linux",
        unit="B",
    )
    best_val_accuracy: float = described("best validation accuracy of any epoch")

    @property
    def epochs_per_second(self) -> float:
        """Trial-epochs a second of the whole command."""
        return self.trial_epochs / self.wall_seconds

    @property
    def efficiency(self) -> float:
        """Share of the slots' time that was spent in training loops."""
        return self.train_seconds / (self.slots * self.wall_seconds)

    @property
    def setting(self) -> "Setting":
        """What all repeats have in common."""
        return self.precision, self.trials, self.max_epochs, self.gpus_per_trial, self.slots

    @property
    def pair(self) -> "tuple[Setting, int]":
        """Setting and repeat, which two rows have in common."""
        return self.setting, self.repeat


Setting = tuple[str, int, int, float, int]
"""Precision, trials, full budget, share of a GPU and slots."""


SCHEMA = pa.schema(build_columns(SpeedRow))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """The result of the benchmark, or as much of it as there is."""

    rows: tuple[SpeedRow, ...]
    machine: Mapping[str, str]
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairing:
    """What both programs of a pair are given."""

    data_dir: Path
    """MNIST's four files, as ``--data-dir`` takes them."""
    precision: str
    trials: int
    repeat: int
    max_epochs: int
    slots: int
    gpus_per_trial: float

    @property
    def pair(self) -> tuple[Setting, int]:
        """As that of its rows."""
        return (self.precision, self.trials, self.max_epochs, self.gpus_per_trial, self.slots), self.repeat


def measure_speed(
    data_dir: Path,
    *,
    path: Path,
    precisions: Sequence[str] = PRECISIONS,
    trials: Sequence[int] = TRIALS,
    repeats: int = REPEATS,
    max_epochs: int = MAX_EPOCHS,
    slots: int | None = None,
    gpus_per_trial: float = 0.0,
    before: Sequence[SpeedRow] = (),
    announce: Callable[[str], object] = lambda line: None,
) -> SpeedResult:
    """Run every pair that ``before`` does not hold. ``path`` is written after each, so that nothing measured is lost.

    Args:
        data_dir: MNIST, in torchvision's layout or as a folder of the four files.
        path: Parquet file of the rows.
        precisions: of every trial of a search.
        trials: sizes of the searches.
        repeats: pairs of each precision and size.
        max_epochs: full budget of a trial.
        slots: trials at a time, of both programs; None for as many as fit.
        gpus_per_trial: share of a GPU, of both programs; 0 trains on the CPU.
        before: rows of earlier measurements on this machine, of other settings too.
        announce: is told of each command's end.

    Raises:
        InputError: the data are not there, or no GPU.
        RuntimeError: a command failed; the message ends with the last lines of its output.
    """
    slots = slots or plan_slots(gpus_per_trial)
    result = SpeedResult(rows=tuple(before), machine=describe_here(), versions=describe_versions())
    known = {row.pair for row in before}
    with torchvision_folder(data_dir) as root:
        for repeat in range(repeats):  # outermost: a slow hour of the machine falls on all precisions and sizes
            for precision in precisions:
                for count in trials:
                    pairing = Pairing(
                        data_dir=data_dir,
                        precision=precision,
                        trials=count,
                        repeat=repeat,
                        max_epochs=max_epochs,
                        slots=slots,
                        gpus_per_trial=gpus_per_trial,
                    )
                    if pairing.pair in known:
                        continue
                    pair = []
                    for row in measure_pair(pairing, root):
                        announce(describe_row(row))
                        pair.append(row)
                    result = dataclasses.replace(result, rows=(*result.rows, *pair))
                    write_speed(path, result)
    return result


def plan_slots(gpus_per_trial: float) -> int:
    """As many trials at a time as Ray places on this machine, with one core each.

    Raises:
        InputError: trials shall have a share of a GPU, and there is none.
    """
    if gpus_per_trial == 0:
        return count_cores()
    import torch

    from tune_amp.resources import count_gpus, count_slots

    gpus = count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    if not (0 < gpus_per_trial <= 1 and gpus):
        rule = f"must be between 0 and 1, and 0 without a GPU; torch sees {gpus}"
        raise InputError(f"--gpus-per-trial: {rule}, got {gpus_per_trial:g}")
    return count_slots({"CPU": count_cores(), "GPU": gpus}, 1, gpus_per_trial)


def describe_here() -> dict[str, str]:
    """This machine, its GPU included where there is one, also for what trains on the CPU: it is the same machine."""
    import torch

    return describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def measure_pair(pairing: Pairing, torchvision_root: Path) -> Iterator[SpeedRow]:
    """Both commands, one after the other."""
    with tempfile.TemporaryDirectory(dir=_short_folder()) as name:
        folder = Path(name)
        cost = run_measured(list_our_command(pairing, folder), folder / "ours.log")
        trained = load_trials(folder / "results" / OURS)
        yield summarise_ours(pairing, trained, cost)
        plan = plan_obvious(pairing, trained)
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        log = folder / "obvious.log"
        environment = {**private_ray(folder), **hide_gpus(pairing)}
        cost = run_measured(list_obvious_command(folder, torchvision_root), log, environment)
        yield summarise_obvious(pairing, read_obvious(folder, len(plan["configs"]), log), cost)


# ---- ours ----


def list_our_command(pairing: Pairing, folder: Path) -> list[str]:
    """The search as a user runs it, with its space and its results below ``folder``."""
    space = folder / SPACE_FILE
    space.write_text(write_space(pairing.precision), encoding="utf-8")
    # The program tune-amp itself, also where its script is not on the path.
    program = [sys.executable, "-c", "from tune_amp.cli import main; raise SystemExit(main())", "search"]
    arguments = {
        "--dataset": "mnist",
        "--data-dir": pairing.data_dir,
        "--num-samples": pairing.trials,
        "--max-epochs": pairing.max_epochs,
        "--seed": pairing.repeat,
        "--cpus-per-trial": 1,
        "--confirm-seeds": 0,  # theirs does nothing of the kind
        "--gpus-per-trial": pairing.gpus_per_trial,  # 0 too: left out, the search would take the GPU that it finds
        "--max-concurrent": pairing.slots,
        "--results-dir": folder / "results",
        "--name": OURS,
    }
    return [*program, str(space), *(str(part) for item in arguments.items() for part in item)]


def write_space(precision: str) -> str:
    """YAML of the default space with its precision exchanged; the scaler is searched in fp16 only."""
    fixed = f"fixed:\n  precision: {precision}\n  input_scaling: standard\n"
    return SPACE_START + (SCALER_PARAMETERS if precision == "fp16" else "") + fixed


def summarise_ours(pairing: Pairing, trials: Sequence[TrialRecord], cost: "CommandCost") -> SpeedRow:
    """Our row, from what the run folder tells."""
    lasts = [trial.last for trial in trials if trial.last is not None]
    accuracies = [epoch.val_accuracy for trial in trials for epoch in trial.epochs if epoch.val_accuracy is not None]
    return _build_row(
        OURS,
        pairing,
        cost,
        # A trial's clock starts when its worker has the data in place; model and optimizer come before the first step.
        first_step=min(
            trial.started.timestamp() + trial.setup_seconds for trial in trials if trial.started is not None
        ),
        trial_epochs=sum(len(trial.epochs) for trial in trials),
        train_seconds=sum(last.train_seconds for last in lasts),
        accuracies=accuracies,
    )


def _build_row(
    program: str,
    pairing: Pairing,
    cost: "CommandCost",
    *,
    first_step: float,
    trial_epochs: int,
    train_seconds: float,
    accuracies: Sequence[float],
) -> SpeedRow:
    return SpeedRow(
        program=program,
        precision=pairing.precision,
        trials=pairing.trials,
        repeat=pairing.repeat,
        max_epochs=pairing.max_epochs,
        gpus_per_trial=pairing.gpus_per_trial,
        slots=pairing.slots,
        wall_seconds=cost.wall_seconds,
        startup_seconds=first_step - cost.started,
        trial_epochs=trial_epochs,
        train_seconds=train_seconds,
        peak_memory_bytes=cost.peak_memory_bytes,
        best_val_accuracy=max(accuracies),
    )


# ---- the obvious program ----


def plan_obvious(pairing: Pairing, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """What the obvious program is to train: what ours did, in its order; a trial without an epoch is left out."""
    names = ["lr", "batch_size", *(["init_scale", "growth_interval"] if pairing.precision == "fp16" else [])]
    configs = [
        {**{name: getattr(trial.config, name) for name in names}, "epochs": len(trial.epochs)}
        for trial in trials
        if trial.epochs
    ]
    return {
        "precision": pairing.precision,
        "max_epochs": pairing.max_epochs,
        "slots": pairing.slots,
        "gpus_per_trial": pairing.gpus_per_trial,
        "configs": configs,
    }


def list_obvious_command(folder: Path, torchvision_root: Path) -> list[str]:
    """The obvious program on the plan in ``folder``, with its output beside it."""
    output = folder / OBVIOUS
    output.mkdir()
    arguments = {"--plan": folder / "plan.json", "--data-dir": torchvision_root, "--output": output}
    program = [sys.executable, "-m", "tune_amp.benchmarks.obvious"]
    return [*program, *(str(part) for item in arguments.items() for part in item)]


def read_obvious(folder: Path, count: int, log: Path) -> list[dict[str, Any]]:
    """The lines that its ``count`` trials left.

    Raises:
        RuntimeError: some did not come to their end, which Tune's ``fit`` does not raise.
    """
    path = folder / OBVIOUS / "trials.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) != count:
        raise RuntimeError(f"{len(lines)} of {count} trials of the obvious program ended well\n{_read_tail(log)}")
    return [json.loads(line) for line in lines]


def summarise_obvious(pairing: Pairing, trials: Sequence[Mapping[str, Any]], cost: "CommandCost") -> SpeedRow:
    """The obvious program's row, from the lines that its trials left."""
    return _build_row(
        OBVIOUS,
        pairing,
        cost,
        first_step=min(trial["first_step"] for trial in trials),
        trial_epochs=sum(len(trial["val_accuracies"]) for trial in trials),
        train_seconds=sum(trial["train_seconds"] for trial in trials),
        accuracies=[accuracy for trial in trials for accuracy in trial["val_accuracies"]],
    )


@contextlib.contextmanager
def torchvision_folder(data_dir: Path) -> Iterator[Path]:
    """MNIST as torchvision wants it, whatever the layout of ``data_dir``: unpacked, in ``MNIST/raw``.

    Raises:
        InputError: a file is missing.
    """
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for source in locate_files("mnist", data_dir):
            target = raw / source.name.removesuffix(".gz")
            if source.suffix == ".gz":
                with gzip.open(source) as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            else:
                target.symlink_to(source.resolve())
        yield Path(name)


def private_ray(folder: Path) -> dict[str, str]:
    """Environment in which a plain ``ray.init`` listens on loopback only, asks for a token and writes below ``folder``.

    The program is the documentation's; what it leaves on the machine need not be.
    """
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux it makes the node's address loopback
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "RAY_ADDRESS": "local",  # a stale file of another session is not obeyed
    }


def hide_gpus(pairing: Pairing) -> dict[str, str]:
    """Environment in which torch sees no GPU where trials shall have none: Ray 2.60 leaves all visible to them."""
    return {} if pairing.gpus_per_trial else {"CUDA_VISIBLE_DEVICES": ""}


def _short_folder() -> str:
    """Ray's sockets below it must stay under 107 characters."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= len("/var/folders") else "/tmp"  # noqa: S108 - a private folder is made in it


# ---- a command, watched ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandCost:
    """What a command took."""

    started: float
    """``time.time()`` when it was started."""
    wall_seconds: float
    peak_memory_bytes: int | None


def run_measured(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> CommandCost:
    """Run a command to its end, its output in ``log``.

    Raises:
        RuntimeError: it failed.
    """
    with log.open("wb") as output:
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(  # noqa: S603
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        with watched_memory(process.pid) as peak:
            code = process.wait()
        seconds = time.perf_counter() - clock
    if code != 0:
        raise RuntimeError(f"the command ended with exit code {code}: {' '.join(command)}\n{_read_tail(log)}")
    return CommandCost(started=started, wall_seconds=seconds, peak_memory_bytes=max(peak, default=None))


def _read_tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])


@contextlib.contextmanager
def watched_memory(pid: int) -> Iterator[list[int]]:
    """A list to which a thread adds the memory of ``pid`` and its descendants, for the length of a ``with`` block."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(MEMORY_SAMPLE_SECONDS):
            total = sum_memory(pid)
            if total is not None:
                seen.append(total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def sum_memory(root: int, proc: Path = Path("/proc")) -> int | None:
    """Resident memory of a process and its descendants, added up; None where there is no ``/proc``."""
    if not (proc / "self").exists():
        return None
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            # The program's name stands in brackets and may hold blanks and brackets: what follows it counts.
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(folder.name)], pages[int(folder.name)] = int(fields[1]), int(fields[21])
    ours = {root}
    while True:
        children = {pid for pid, parent in parents.items() if parent in ours} - ours
        if not children:
            return sum(pages.get(pid, 0) for pid in ours) * os.sysconf("SC_PAGE_SIZE")
        ours |= children


# ---- the file ----


def write_speed(path: Path, result: SpeedResult) -> None:
    """Write the rows; machine and versions stand in the metadata."""
    origin = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": dict(result.machine),
        "versions": dict(result.versions),
    }
    write_parquet(build_table("speed", SCHEMA, [vars(row) for row in result.rows], origin), path)


def load_speed(path: Path) -> SpeedResult:
    """Read what ``write_speed`` wrote.

    Raises:
        InputError: the file is missing, damaged, or not this benchmark's.
    """
    origin = read_origin(path)
    rows = tuple(SpeedRow(**row) for row in read_rows(path, "speed", SCHEMA))
    return SpeedResult(rows=rows, machine=origin["machine"], versions=origin["versions"])


def load_measured(path: Path) -> tuple[SpeedRow, ...]:
    """Rows of an earlier measurement to go on from; none where there is no file.

    Raises:
        InputError: they were measured on another machine or with other versions.
    """
    if not path.exists():
        return ()
    result = load_speed(path)
    here = {**describe_here(), **describe_versions()}
    there = {**result.machine, **result.versions}
    for name in {**here, **there}:
        expected, got = here.get(name, "absent"), there.get(name, "absent")
        if got != expected:
            raise InputError(f"{path}: {name}: must be {expected}, to be gone on from here, got {got}")
    return result.rows


# ---- the table ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All repeats of a setting."""

    ours: tuple[SpeedRow, ...]
    obvious: tuple[SpeedRow, ...]
    """In the order of ``ours``: each with the same repeat."""

    @property
    def first(self) -> SpeedRow:
        """A row that tells the setting."""
        return self.ours[0]

    @property
    def ratios(self) -> list[float]:
        """Our trial-epochs a second over theirs, pair by pair."""
        return [a.epochs_per_second / b.epochs_per_second for a, b in self._pairs()]

    @property
    def ratio(self) -> Spread:
        """Of the pairs."""
        return summarise(self.ratios)

    @property
    def points_apart(self) -> float:
        """Our best accuracy minus theirs, in points: the median of the pairs."""
        return statistics.median(100 * (a.best_val_accuracy - b.best_val_accuracy) for a, b in self._pairs())

    def _pairs(self) -> Iterator[tuple[SpeedRow, SpeedRow]]:
        return zip(self.ours, self.obvious, strict=True)


def compare_rows(rows: Sequence[SpeedRow]) -> list[Comparison]:
    """A comparison for each setting; a row without its counterpart is left out."""
    by_program = {name: {row.pair: row for row in rows if row.program == name} for name in PROGRAMS}
    pairs = sorted(by_program[OURS].keys() & by_program[OBVIOUS].keys(), key=lambda pair: pair[1])
    comparisons = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [pair for pair in pairs if pair[0] == setting]
        if own:
            comparisons.append(
                Comparison(
                    ours=tuple(by_program[OURS][pair] for pair in own),
                    obvious=tuple(by_program[OBVIOUS][pair] for pair in own),
                )
            )
    return comparisons


def render_speed(result: SpeedResult) -> str:
    """Markdown: a table by setting, and the targets with what became of them."""
    comparisons = compare_rows(result.rows)
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    lines = [
        "Ours / the obvious program, which trains the same configurations for as many epochs. Medians of n pairs, the "
        "smallest and largest in brackets; the ratio is taken pair by pair. Efficiency is the time in training loops "
        "over slots x wall time: the obvious program's loops read and convert images one by one, and that counts as "
        f"training there. {machine}; {render_versions(result.versions)}.",
        "",
        "| precision | trials | epochs at most | GPU a trial | slots | n | trial-epochs/s, ratio | wall "
        "| trial-epochs/s | start-up | efficiency | memory | best accuracy |",
        "|---" * 13 + "|",
        *(_render_comparison(comparison) for comparison in comparisons),
        "",
        *(line for comparison in comparisons for line in judge_targets(comparison)),
    ]
    return "\n".join(lines) + "\n"


def judge_targets(comparison: Comparison) -> list[str]:
    """A line for each target, met or missed, and one where the programs did not learn alike."""
    first = comparison.first
    where = _describe_setting(first)
    lines = []
    if first.trials == TARGET_TRIALS:
        least = GPU_RATIO if first.gpus_per_trial else CPU_RATIOS[first.precision]
        ratio = comparison.ratio.median
        lines.append(f"- {where}: {ratio:.1f}x trial-epochs/s, target at least {least:g}x: {_verdict(ratio >= least)}")
        efficiency = statistics.median(row.efficiency for row in comparison.ours)
        text = f"efficiency {efficiency:.0%}, target at least {LEAST_EFFICIENCY:.0%}"
        lines.append(f"- {where}: {text}: {_verdict(efficiency >= LEAST_EFFICIENCY)}")
    startup = statistics.median(row.startup_seconds for row in comparison.ours)
    text = f"start-up {startup:.1f} s, target under {MOST_STARTUP_SECONDS:g} s"
    lines.append(f"- {where}: {text}: {_verdict(startup < MOST_STARTUP_SECONDS)}")
    if abs(comparison.points_apart) > MOST_POINTS_APART:
        text = f"best accuracies are {comparison.points_apart:+.2f} points apart, more than {MOST_POINTS_APART:g}"
        lines.append(f"- {where}: {text}: the programs do not train alike")
    return lines


def describe_row(row: SpeedRow) -> str:
    """One line, while the benchmark runs."""
    return (
        f"{_describe_setting(row)}, repeat {row.repeat}, {row.program}: {row.wall_seconds:.1f} s, "
        f"{row.trial_epochs} trial-epochs, start-up {row.startup_seconds:.1f} s, efficiency {row.efficiency:.0%}, "
        f"best accuracy {row.best_val_accuracy:.2%}"
    )


def _describe_setting(row: SpeedRow) -> str:
    share = f", {row.gpus_per_trial:g} GPU" if row.gpus_per_trial else ""
    return f"{row.precision}, {row.trials} trials of at most {row.max_epochs} epochs{share}"


def _render_comparison(comparison: Comparison) -> str:
    def both(render: Callable[[Sequence[SpeedRow]], str]) -> str:
        return f"{render(comparison.ours)} / {render(comparison.obvious)}"

    cells = [
        comparison.first.precision,
        str(comparison.first.trials),
        str(comparison.first.max_epochs),
        f"{comparison.first.gpus_per_trial:g}",
        str(comparison.first.slots),
        str(comparison.ratio.count),
        render_spread(comparison.ratios, "{:.1f}x"),
        both(lambda rows: render_spread([row.wall_seconds for row in rows], "{:.0f} s")),
        both(lambda rows: f"{statistics.median(row.epochs_per_second for row in rows):.2f}"),
        both(lambda rows: f"{statistics.median(row.startup_seconds for row in rows):.1f} s"),
        both(lambda rows: f"{statistics.median(row.efficiency for row in rows):.0%}"),
        both(_render_memory),
        both(lambda rows: f"{statistics.median(row.best_val_accuracy for row in rows):.2%}"),
    ]
    return f"| {' | '.join(cells)} |"


def _render_memory(rows: Sequence[SpeedRow]) -> str:
    known = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
    return f"{statistics.median(known) / 2**30:.1f} GiB" if known else "-"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"
