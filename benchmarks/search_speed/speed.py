"""How fast a search is: ours beside the obvious program (``obvious.py``), which trains the same configurations.

Pairs of commands in turn. Ours first, as a user runs it, with a seed of its own in each repeat; what it trained, and
for how many epochs, becomes the plan of the obvious program. Both have the same slots, one CPU each, and the machine to
themselves. Everything is timed from outside, from the command's start to its end.
"""

import contextlib
import dataclasses
import gzip
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.search_speed.command_cost import CommandCost, read_tail, run_measured
from benchmarks.search_speed.speed_table import (
    OBVIOUS,
    OURS,
    Setting,
    SpeedResult,
    SpeedRow,
    describe_row,
    load_speed,
    write_speed,
)
from tune_amp.cluster.cpus import count_cpus
from tune_amp.results.records import TrialRecord, load_trials
from tune_amp.results.run_folder import RunFolder
from tune_amp.training.mnist_files import locate_files
from tune_amp.trial.config import InputError

PRECISIONS = ("fp32", "bf16", "fp16")

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
class Pairing:
    """What both programs of a pair are given."""

    data_dir: Path
    """MNIST, in torchvision's layout or as a folder of the four files, as ``--data-dir`` takes them."""
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


def list_pairings(
    data_dir: Path,
    *,
    precisions: Sequence[str],
    trials: Sequence[int],
    repeats: int,
    max_epochs: int,
    gpus_per_trial: float = 0.0,
    slots: int | None = None,
) -> list[Pairing]:
    """The pairs of a measurement, the repeats outermost: a slow hour of the machine falls on all settings.

    Without ``slots`` there are as many as fit. Raises InputError where trials shall have a share of a GPU, and there is
    none.
    """
    return [
        Pairing(
            data_dir=data_dir,
            precision=precision,
            trials=count,
            repeat=repeat,
            max_epochs=max_epochs,
            slots=slots or plan_slots(gpus_per_trial),
            gpus_per_trial=gpus_per_trial,
        )
        for repeat in range(repeats)
        for precision in precisions
        for count in trials
    ]


def measure_speed(
    pairings: Sequence[Pairing],
    *,
    path: Path,
    before: Sequence[SpeedRow] = (),
    announce: Callable[[str], object] = lambda line: None,
) -> SpeedResult:
    """Run every pair that ``before`` does not hold. ``path`` is written after each, so that nothing measured is lost.

    Args:
        pairings: all of the same data.
        path: Parquet file of the rows.
        before: rows of earlier measurements on this machine, of other settings too.
        announce: is told of each command's end.

    Raises:
        InputError: the data are not there.
        RuntimeError: a command failed; the message ends with the last lines of its output.
    """
    result = SpeedResult(rows=tuple(before), machine=describe_here(), versions=describe_versions())
    known = {row.pair for row in before}
    with torchvision_folder(pairings[0].data_dir) as root:
        for pairing in pairings:
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
        return count_cpus()
    import torch

    from tune_amp.cluster.resources import count_gpus, count_slots

    gpus = count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    if not (0 < gpus_per_trial <= 1 and gpus):
        rule = f"must be between 0 and 1, and 0 without a GPU; torch sees {gpus}"
        raise InputError(f"--gpus-per-trial: {rule}, got {gpus_per_trial:g}")
    return count_slots({"CPU": count_cpus(), "GPU": gpus}, 1, gpus_per_trial)


def describe_here() -> dict[str, str]:
    """This machine, its GPU included where there is one, also for what trains on the CPU: it is the same machine."""
    import torch

    return describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def measure_pair(pairing: Pairing, torchvision_root: Path) -> Iterator[SpeedRow]:
    """Both commands, one after the other."""
    # Ray's last processes may still write there after the program has ended.
    with tempfile.TemporaryDirectory(dir=short_folder(), ignore_cleanup_errors=True) as name:
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
    # The program tune-amp itself, also where its script is not on the path.
    program = [sys.executable, "-c", "from tune_amp.cli.main import run; run()", "search"]
    # The obvious program confirms nothing.
    return [*program, *list_our_arguments(pairing, folder, confirm_seeds=0)]


def list_our_arguments(pairing: Pairing, folder: Path, confirm_seeds: int | None) -> list[str]:
    """The arguments of a search below ``folder``, whose space is written there; None confirms as by default."""
    space = RunFolder(folder).space
    space.write_text(write_space(pairing.precision), encoding="utf-8")
    arguments = {
        "--dataset": "mnist",
        "--data-dir": pairing.data_dir,
        "--num-samples": pairing.trials,
        "--max-epochs": pairing.max_epochs,
        "--seed": pairing.repeat,
        "--cpus-per-trial": 1,
        "--gpus-per-trial": pairing.gpus_per_trial,  # 0 too: left out, the search would take the GPU that it finds
        "--max-concurrent": pairing.slots,
        "--results-dir": folder / "results",
        "--name": OURS,
        **({} if confirm_seeds is None else {"--confirm-seeds": confirm_seeds}),
    }
    return [str(space), *(str(part) for item in arguments.items() for part in item)]


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
    program = [sys.executable, "-m", "benchmarks.search_speed.obvious"]
    return [*program, *(str(part) for item in arguments.items() for part in item)]


def read_obvious(folder: Path, count: int, log: Path) -> list[dict[str, Any]]:
    """The lines that its ``count`` trials left.

    Raises:
        RuntimeError: some did not come to their end, which Tune's ``fit`` does not raise.
    """
    path = folder / OBVIOUS / "trials.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) != count:
        raise RuntimeError(f"{len(lines)} of {count} trials of the obvious program ended well\n{read_tail(log)}")
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


def short_folder() -> str:
    """Ray's sockets below it must stay under 107 characters."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= len("/var/folders") else "/tmp"  # noqa: S108 - a private folder is made in it


# ---- what was measured before ----


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
