"""A comparison of precisions, as ``tune-amp compare`` runs it: measuring, writing and printing."""

import argparse
import dataclasses
import datetime
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from tune_amp.cli.console import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_NO_RESULT,
    choose_device,
    choose_output,
    complain,
    load_searched_data,
    open_console,
    say,
    torch_threads,
)
from tune_amp.cluster.cpus import count_cpus
from tune_amp.monitor.tables import WideTable, format_clock
from tune_amp.results.files import check_free, claimed_folder
from tune_amp.results.provenance import list_versions
from tune_amp.results.records import BestFile
from tune_amp.reuse.precision_page import CPU_MEANING, FILES, describe_settings, write_comparison
from tune_amp.reuse.precision_runs import (
    BUDGET_SECONDS,
    PILOT_EPOCHS,
    TURN_SECONDS,
    TURNS,
    ComparisonPlan,
    choose_arms,
    compare_runs,
    fresh_seeds,
    measure_map,
    plan_comparison,
    with_model,
)
from tune_amp.reuse.precision_verdicts import (
    BASELINE,
    CPU_SEEDS,
    CUDA_SEEDS,
    ComparedRun,
    ComparisonOrigin,
    MapCell,
)
from tune_amp.search.preflight import check_training
from tune_amp.training.amp import describe_hardware, name_device
from tune_amp.training.data import Dataset, StreamedSplit, make_long_tail
from tune_amp.trial.config import SCALER_DEFAULTS, EpochMetrics, TrialConfig, TrialStatus, check
from tune_amp.trial.text import format_number, hide_credentials, printable

QUIET_SECONDS = 10.0
"""Seconds without a line after which a run also reports its epochs."""
BUSY_SHARE = 0.25
"""Share of the cores from which the load of other programs is reported."""


def compare_precisions(arguments: argparse.Namespace, command: Sequence[str], best: BestFile) -> int:
    """Compare the precisions on a configuration of ``best``. Return the exit code.

    Raises:
        InputError: data, model and flags do not fit together, or the folder of ``--output`` cannot be claimed.
    """
    record = best.pick(arguments.rank).trial
    config = record.config
    given = load_searched_data(config, arguments.data_dir, best.provenance.data_hash)
    dataset = make_long_tail(given, config.imbalance)
    train, validation = dataset.train, dataset.validation
    device = choose_device(arguments.device)
    arms = choose_arms(config, arguments.precisions, device)
    for size in arguments.batch_sizes:
        rule = f"must be at most the {len(train):,} training images of {dataset.name}"
        check("--batch-sizes", size, size <= len(train), rule)
    for model in (config.model, *arguments.models):
        own = with_model(config, model).own
        check_training(model, dataset, precisions=tuple(arms), optimizers=(config.optimizer,), device=device, own=own)
    if arguments.models or arguments.batch_sizes:
        arguments.models = arguments.models or (config.model,)
        arguments.batch_sizes = arguments.batch_sizes or (config.batch_size,)
    # As many threads as the trial had: with one thread a core, threads wait for each other on a busy machine.
    threads = torch_threads(max(1, min(record.num_threads, count_cpus())))
    with threads, claimed_folder(choose_output(arguments, f"compare-rank{arguments.rank}")) as folder:
        notices = [*(describe_hardware(precision, device) for precision in arms), _describe_load()]
        left_out = {}
        if "tf32" in arguments.precisions and "tf32" not in arms:
            left_out["tf32"] = describe_hardware("tf32", device) or "the device computes it as fp32"
        origin = ComparisonOrigin(
            run=best.provenance.run,
            rank=arguments.rank,
            trial_id=record.trial_id,
            command=tuple(map(hide_credentials, command)),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            config=dataclasses.asdict(config),
            scaler={name: getattr(arms["fp16"], name) for name in SCALER_DEFAULTS} if "fp16" in arms else {},
            precisions=tuple(arms),
            left_out=left_out,
            seeds=fresh_seeds(config, arguments.seeds or (CPU_SEEDS if device.type == "cpu" else CUDA_SEEDS)),
            epochs=arguments.max_epochs or config.max_epochs,
            dataset=dataset.name,
            data_hash=dataset.content_hash,
            train_images=len(train),
            validation_images=len(validation),
            data_bytes=sum(
                part.images.nbytes + part.labels.nbytes
                for part in (train, validation)
                if not isinstance(part, StreamedSplit)
            ),
            device=name_device(device),
            num_threads=torch.get_num_threads(),
            notices=tuple(notice for notice in notices if notice),
            versions=list_versions("tune_amp", "torch", "numpy", "pyarrow"),
        )
        return Comparison(
            arguments=arguments,
            arms=arms,
            dataset=dataset,
            device=device,
            origin=origin,
            folder=folder,
            console=open_console(),
        ).make()


@dataclasses.dataclass(kw_only=True)
class Comparison:
    """A comparison in progress. Its files hold everything measured so far."""

    arguments: argparse.Namespace
    """``max_epochs``, and ``models`` and ``batch_sizes`` of the map; both are empty if there is no map."""
    arms: Mapping[str, TrialConfig]
    """From ``choose_arms``."""
    dataset: Dataset
    device: torch.device
    origin: ComparisonOrigin
    """The facts that are known so far."""
    folder: Path
    """Where the files are written."""
    console: Console
    runs: list[ComparedRun] = dataclasses.field(default_factory=list)
    cells: list[MapCell] = dataclasses.field(default_factory=list)
    is_written: bool = False

    def make(self) -> int:
        """Measure, write and print. Return the exit code."""
        try:
            self._measure()
        except KeyboardInterrupt:
            self._print_end()
            kept = f"{len(self.runs)} runs are kept in {self.folder}" if self.runs else "nothing was measured yet"
            complain(f"interrupted: {kept}")
            return EXIT_INTERRUPTED
        self._print_end()
        completed = {run.precision for run in self.runs if run.status is TrialStatus.COMPLETED}
        return EXIT_DONE if BASELINE in completed else EXIT_NO_RESULT

    def _measure(self) -> None:
        origin, console = self.origin, self.console
        say(console, f"rank {origin.rank} of {origin.run} on {origin.place}: {describe_settings(origin)}")
        say(console, "validation accuracy decides; the test set is not read")
        meaning = [CPU_MEANING] if self.device.type == "cpu" else []
        self._print_notes(origin.left_out, (*origin.notices, *meaning))
        plan = self._plan()
        progress = Progress(console, plan)
        for run in compare_runs(plan, self.dataset, self.device, progress.on_epoch):
            self.runs.append(run)
            self._write()
            progress.on_end(run)
        models, sizes = self.arguments.models, self.arguments.batch_sizes
        for cells in measure_map(self.arms, self.dataset, self.device, models, sizes, turn_seconds=TURN_SECONDS):
            self.cells += cells
            self._write()
            rates = [
                f"{cell.precision} {cell.reason or f'{statistics.median(cell.turn_rates):,.0f} images/s'}"
                for cell in cells
            ]
            say(console, f"map  {cells[0].model}  batch {cells[0].batch_size}  {', '.join(rates)}")

    def _print_notes(self, left_out: Mapping[str, str], notices: Sequence[str], hint: str = "") -> None:
        lines = [f"left out: {precision}: {reason}{hint}" for precision, reason in left_out.items()]
        for line in [*lines, *(f"note: {notice}" for notice in notices)]:
            say(self.console, line, style="yellow")

    def _plan(self) -> ComparisonPlan:
        origin, max_epochs = self.origin, self.arguments.max_epochs
        plan = plan_comparison(self.arms, self.dataset, self.device, seeds=origin.seeds, max_epochs=max_epochs)
        wanted, notices = self.arms[BASELINE].max_epochs, []
        if max_epochs is None and plan.epochs > wanted:
            notices = [f"{plan.epochs} epochs instead of {wanted}: the first of a run is not timed"]
        elif max_epochs is None and plan.epochs < wanted:
            limit = f"all {wanted} would take longer than {format_clock(BUDGET_SECONDS)}; --max-epochs measures them"
            notices = [f"{plan.epochs} epochs a run: {limit}"]
        self.origin = dataclasses.replace(
            origin,
            precisions=tuple(plan.arms),
            epochs=plan.epochs,
            left_out={**origin.left_out, **plan.left_out},
            notices=(*origin.notices, *notices),
        )
        self._print_notes(plan.left_out, notices, "; --max-epochs measures it all the same")
        text = f"{len(plan.runs)} runs of {plan.epochs} epochs, one at a time: about {format_clock(plan.seconds)}"
        if cells := len(self.arguments.models) * len(self.arguments.batch_sizes):
            seconds = cells * len(plan.arms) * (PILOT_EPOCHS + 1 + TURNS) * TURN_SECONDS
            text += f"; then a map of {cells} cells: at least {format_clock(seconds)}"
        say(self.console, text)
        return plan

    def _write(self) -> str:
        """Write the files, and return the page."""
        if not self.is_written:
            check_free(*(self.folder / name for name in FILES))
            self.is_written = True
        return write_comparison(self.folder, self.origin, self.runs, self.cells)

    def _print_end(self) -> None:
        if not self.runs:
            return
        page = self._write()  # again: an interruption may have come between a run and its file
        print_page(self.console, page)
        names = ", ".join(sorted(path.name for path in self.folder.iterdir()))
        say(self.console, f"files    {self.folder}: {names}")


class Progress:
    """Prints a line when a run ends, and in long runs a line for an epoch now and then. ``clock`` returns seconds."""

    def __init__(self, console: Console, plan: ComparisonPlan, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._epochs = plan.epochs
        self._clock = clock
        count = len(plan.runs)
        self._names = [f"run {n} of {count}  seed {seed}  {name}" for n, (seed, name) in enumerate(plan.runs, start=1)]
        self._printed = clock()

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Print the epoch that has ended, if no line was printed for ``QUIET_SECONDS``."""
        if self._clock() - self._printed >= QUIET_SECONDS and metrics.epoch < self._epochs:
            self._print(f"epoch {metrics.epoch}/{self._epochs}  {metrics.samples_per_second:,.0f} images/s")

    def on_end(self, run: ComparedRun) -> None:
        """Print the run that has ended."""
        self._print(describe_run(run))
        del self._names[0]

    def _print(self, text: str) -> None:
        self._console.print(printable(f"{self._names[0]:<30}{text}"), markup=False, soft_wrap=True)
        self._printed = self._clock()


def describe_run(run: ComparedRun) -> str:
    """Return a finished run in one line."""
    parts = [] if run.status is TrialStatus.COMPLETED else [f"{run.status}: {run.error}"]
    if run.epoch_seconds is not None:
        parts.append(f"epoch {format_number(run.epoch_seconds, 3)} s  {run.samples_per_second:,.0f} images/s")
    if run.peak_memory_bytes is not None:
        parts.append(f"{run.peak_memory_bytes / 1e6:,.1f} MB")
    if run.val_accuracy is not None:
        parts.append(f"val accuracy {100 * run.val_accuracy:.2f} %")
    if run.skipped_steps:
        parts.append(f"{run.skipped_steps} of {run.steps} steps skipped")
    return "  ".join(parts)


def print_page(console: Console, page: str) -> None:
    """Print the page without its head, whose lines were printed before the runs, with tables for a terminal."""
    for block in page[page.index("\n## ") :].strip().split("\n\n"):
        console.print()
        lines = block.strip().splitlines()
        if lines[0].startswith("|"):
            titles, ruler, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            table = WideTable(titles, [title for title, rule in zip(titles, ruler, strict=True) if rule[-1] != ":"])
            for row in rows:
                table.add_row(*row)
            console.print(table)
            continue
        for line in lines:
            say(console, line.removeprefix("## ").replace("**", ""), style="bold" if line.startswith("## ") else None)


def _describe_load() -> str | None:
    """Return a notice if other programs load the machine before the first step is timed, since they affect times."""
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy < BUSY_SHARE * cores:
        return None
    return f"the load was {busy:.1f} on {cores} cores when this began: times are noisier, and may be longer"
