"""The command ``tune-amp compare``, which ``scripts/compare.py`` runs too: arguments, calls and printing."""

import argparse
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tune_amp.cli.console import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_NO_RESULT,
    OneLineParser,
    answer_bad_input,
    choose_device,
    load_searched_data,
    name_beside,
    open_console,
    read_path,
    say,
    take_consent,
)
from tune_amp.cluster.interrupt import interrupted_by_signals
from tune_amp.results.files import check_free, claimed_folder, write_atomically
from tune_amp.reuse.precision_page import CPU_MEANING, describe_settings, render_comparison
from tune_amp.reuse.precision_verdicts import BASELINE, LEAST_SEEDS, ComparedRun, ComparisonOrigin, MapCell
from tune_amp.search.options import MOST_SEEDS
from tune_amp.trial.config import (
    MODELS,
    PRECISIONS,
    SCALER_DEFAULTS,
    InputError,
    TrialConfig,
    TrialStatus,
    check,
    checked_field,
    shown,
)
from tune_amp.trial.consent import consent_to
from tune_amp.trial.text import hide_credentials, printable

if TYPE_CHECKING:
    import torch

    from tune_amp.results.records import Provenance, TrialRecord
    from tune_amp.reuse.precision_runs import ComparisonPlan
    from tune_amp.training.data import Dataset
    from tune_amp.trial.config import EpochMetrics

PAGE_FILE = "compare.md"
CPU_SEEDS, CUDA_SEEDS = 3, 5
QUIET_SECONDS = 10.0
"""Seconds without a line after which a run also reports its epochs."""
BUSY_SHARE = 0.25
"""Share of the cores from which the load of other programs is reported."""


def compare_command(arguments: Sequence[str] | None = None, program: str = "scripts/compare.py") -> int:
    """Compare the precisions on a configuration from a Parquet file. Return the exit code."""
    command = tuple(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        with interrupted_by_signals():
            return _compare(_compare_parser(program).parse_args(command), (program, *command))

    return answer_bad_input(run)


def _compare_parser(program: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=program,
        description="Train a configuration that a search found in every precision, and say what differs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("best", type=read_path, metavar="BEST.parquet", help="best.parquet, or the run folder")
    add("--rank", type=int, default=1, metavar="N", help="which of the ranked configurations (%(default)s)")
    add("--seeds", type=int, metavar="N", help=f"seeds for every precision ({CPU_SEEDS}; with CUDA {CUDA_SEEDS})")
    precisions = ",".join(PRECISIONS)
    add("--precisions", default=precisions, metavar="A,B", help="what is compared; fp32 always is (%(default)s)")
    add("--max-epochs", type=int, metavar="N", help="epochs of a run (the configuration's, or as many as fit in 7 min)")
    add("--models", metavar="A,B", help=f"map these models too: {', '.join(MODELS)} or MODULE:FUNCTION")
    add("--batch-sizes", metavar="N,N", help="map these batch sizes too")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train (%(default)s)")
    add("--output", type=read_path, metavar="DIR", help="folder for the results (compare-rank... beside BEST.parquet)")
    add("--data-dir", type=read_path, metavar="DIR", help="folder of the data files, or TUNE_AMP_DATA")
    add("--model", metavar="MODULE:FUNCTION", help="consent to run the model function that the file names")
    add("--dataset", metavar="MODULE:FUNCTION", help="consent to run the data function that the file names")
    return parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """The values of the flags, checked as far as possible without the data."""

    precisions: tuple[str, ...]
    seeds: int | None
    max_epochs: int | None
    models: tuple[str, ...]
    """Models of the map; empty if there is no map, or if it keeps the configuration's model."""
    batch_sizes: tuple[int, ...]

    @property
    def has_map(self) -> bool:
        """Whether the flags ask for a map."""
        return bool(self.models or self.batch_sizes)


def read_wishes(arguments: argparse.Namespace) -> Wishes:
    """Return the flags, parsed and checked.

    Raises:
        InputError: a flag breaks its rule.
    """
    precisions, models = _split("--precisions", arguments.precisions), _split("--models", arguments.models)
    for name in precisions:
        checked_field("--precisions", name, TrialConfig, "precision")
    for name in models:
        checked_field("--models", name, TrialConfig, "model")
    seeds, max_epochs = arguments.seeds, arguments.max_epochs
    if seeds is not None:
        check(
            "--seeds", seeds, seeds >= LEAST_SEEDS, f"must be at least {LEAST_SEEDS} (one run tells nothing of noise)"
        )
        check("--seeds", seeds, seeds <= MOST_SEEDS, f"must be at most {MOST_SEEDS:,}")
    if max_epochs is not None:
        check("--max-epochs", max_epochs, max_epochs >= 2, "must be at least 2 (the first epoch is not timed)")
        checked_field("--max-epochs", max_epochs, TrialConfig, "max_epochs")
    return Wishes(
        precisions=precisions,
        seeds=seeds,
        max_epochs=max_epochs,
        models=models,
        batch_sizes=tuple(_read_size(text) for text in _split("--batch-sizes", arguments.batch_sizes)),
    )


def _split(flag: str, text: str | None) -> tuple[str, ...]:
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    check(flag, text, "" not in names, "must be names joined by commas")
    check(flag, text, len(set(names)) == len(names), "must name none twice")
    return names


def _read_size(text: str) -> int:
    try:
        size = int(text)
    except ValueError:
        raise InputError(f"--batch-sizes: must be whole numbers joined by commas, got {shown(text)}") from None
    checked_field("--batch-sizes", size, TrialConfig, "batch_size")
    return size


def _compare(arguments: argparse.Namespace, command: tuple[str, ...]) -> int:
    wishes = read_wishes(arguments)
    from tune_amp.results.records import load_best_file
    from tune_amp.training.data import make_long_tail

    best = load_best_file(arguments.best)
    record, provenance = best.pick(arguments.rank), best.provenance
    take_consent(arguments, record.config)
    consent_to(*wishes.models)
    given = load_searched_data(record.config.dataset, arguments.data_dir, provenance.data_hash)
    dataset = make_long_tail(given, record.config.imbalance)
    device = choose_device(arguments.device)
    _check_fit(wishes, record.config, dataset, device)
    console = open_console()
    from tune_amp.reuse.precision_runs import cpu_threads

    # As many threads as the trial had: with one thread a core, threads wait for each other on a busy machine.
    with cpu_threads(record.num_threads), claimed_folder(arguments.output or _default_output(arguments)) as folder:
        origin = _describe_origin(arguments, command, wishes, record, provenance, dataset, device)
        return Comparison(wishes, record.config, dataset, device, origin, folder, console).make()


def _check_fit(wishes: Wishes, config: TrialConfig, dataset: "Dataset", device: "torch.device") -> None:
    from tune_amp.reuse.precision_runs import choose_arms
    from tune_amp.search.preflight import check_training

    for size in wishes.batch_sizes:
        if size > len(dataset.train):
            rule = f"must be at most the {len(dataset.train):,} training images of {dataset.name}"
            raise InputError(f"--batch-sizes: {rule}, got {size}")
    for model in (config.model, *wishes.models):
        check_training(
            model,
            dataset,
            precisions=tuple(choose_arms(config, wishes.precisions, device)),
            optimizers=(config.optimizer,),
            device=device,
        )


def _default_output(arguments: argparse.Namespace) -> Path:
    return name_beside(arguments.best, f"compare-rank{arguments.rank}")


def _describe_origin(
    arguments: argparse.Namespace,
    command: tuple[str, ...],
    wishes: Wishes,
    record: "TrialRecord",
    provenance: "Provenance",
    dataset: "Dataset",
    device: "torch.device",
) -> ComparisonOrigin:
    """Return the facts that are known before anything is timed."""
    import torch

    from tune_amp.results.records import list_versions
    from tune_amp.reuse.precision_runs import choose_arms, fresh_seeds
    from tune_amp.training.amp import describe_hardware

    arms = choose_arms(record.config, wishes.precisions, device)
    notices = [describe_hardware(precision, device) for precision in arms]
    on_cpu = device.type == "cpu"
    return ComparisonOrigin(
        run=provenance.run,
        rank=arguments.rank,
        trial_id=record.trial_id,
        command=tuple(map(hide_credentials, command)),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=dataclasses.asdict(record.config),
        scaler={name: getattr(arms["fp16"], name) for name in SCALER_DEFAULTS} if "fp16" in arms else {},
        precisions=tuple(arms),
        left_out={} if "tf32" in arms or "tf32" not in wishes.precisions else {"tf32": _explain_tf32(device)},
        seeds=fresh_seeds(record.config, wishes.seeds or (CPU_SEEDS if on_cpu else CUDA_SEEDS)),
        epochs=wishes.max_epochs or record.config.max_epochs,
        dataset=dataset.name,
        data_hash=dataset.content_hash,
        train_images=len(dataset.train),
        validation_images=len(dataset.validation),
        data_bytes=sum(part.nbytes for split in (dataset.train, dataset.validation) for part in vars(split).values()),
        device="cpu" if on_cpu else torch.cuda.get_device_name(device),
        num_threads=torch.get_num_threads(),
        notices=tuple(notice for notice in (*notices, _describe_load()) if notice),
        versions=list_versions("tune_amp", "torch", "numpy", "pyarrow"),
    )


def _explain_tf32(device: "torch.device") -> str:
    from tune_amp.training.amp import describe_hardware

    return describe_hardware("tf32", device) or "the device computes it as fp32"


def _describe_load() -> str | None:
    """Return a notice if other programs load the machine before the first step is timed, since they affect times."""
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy < BUSY_SHARE * cores:
        return None
    return f"other programs kept {busy:.1f} of {cores} cores busy when this began: times are noisier, and may be longer"


class Comparison:
    """A comparison in progress. Its files hold everything measured so far.

    Args:
        wishes: the values of the flags.
        config: the chosen configuration.
        dataset: the data set that ``config`` was chosen on.
        device: where to train.
        origin: the facts that are known before the comparison begins.
        folder: where its files are written.
        console: where its lines are printed.
    """

    def __init__(
        self,
        wishes: Wishes,
        config: TrialConfig,
        dataset: "Dataset",
        device: "torch.device",
        origin: ComparisonOrigin,
        folder: Path,
        console: Console,
    ) -> None:
        self._wishes = wishes
        self._config = config
        self._dataset = dataset
        self._device = device
        self._origin = origin
        self._folder = folder
        self._console = console
        self._runs: list[ComparedRun] = []
        self._cells: list[MapCell] = []
        self._is_written = False

    def make(self) -> int:
        """Measure, write and print. Return the exit code."""
        try:
            self._print_start()
            self._run_all()
            self._map_all()
        except KeyboardInterrupt:
            self._print_end()
            print(f"interrupted: {self._describe_kept()}", file=sys.stderr)  # noqa: T201
            return EXIT_INTERRUPTED
        self._print_end()
        completed = {run.precision for run in self._runs if run.status is TrialStatus.COMPLETED}
        return EXIT_DONE if BASELINE in completed else EXIT_NO_RESULT

    def _print_start(self) -> None:
        origin = self._origin
        say(self._console, f"rank {origin.rank} of {origin.run} on {origin.place}: {describe_settings(origin)}")
        say(self._console, "validation accuracy decides; the test set is not read")
        for precision, reason in origin.left_out.items():
            say(self._console, f"left out: {precision}: {reason}", style="yellow")
        for notice in origin.notices:
            say(self._console, f"note: {notice}", style="yellow")
        if self._device.type == "cpu":
            say(self._console, f"note: {CPU_MEANING}", style="yellow")

    def _run_all(self) -> None:
        from tune_amp.reuse.precision_runs import compare_runs

        plan = self._plan()
        progress = Progress(self._console, plan.epochs)
        numbered = list(enumerate(plan.runs, start=1))
        progress.begin(self._name_run(numbered[0], len(numbered)))
        for run in compare_runs(plan, self._dataset, self._device, progress.on_epoch):
            self._runs.append(run)
            self._write()
            progress.end(describe_run(run))
            if len(self._runs) < len(numbered):
                progress.begin(self._name_run(numbered[len(self._runs)], len(numbered)))

    @staticmethod
    def _name_run(numbered: tuple[int, tuple[int, str]], count: int) -> str:
        number, (seed, precision) = numbered
        return f"run {number} of {count}  seed {seed}  {precision}"

    def _plan(self) -> "ComparisonPlan":
        from tune_amp.reuse.precision_runs import choose_arms, plan_comparison

        arms = choose_arms(self._config, self._wishes.precisions, self._device)
        seeds, wanted = self._origin.seeds, self._wishes.max_epochs
        plan = plan_comparison(arms, self._dataset, self._device, seeds=seeds, max_epochs=wanted)
        left_out = {**self._origin.left_out, **plan.left_out}
        notices = (*self._origin.notices, *_explain_epochs(plan, self._config, wanted))
        self._origin = dataclasses.replace(
            self._origin, precisions=tuple(plan.arms), epochs=plan.epochs, left_out=left_out, notices=notices
        )
        for precision, reason in plan.left_out.items():
            say(
                self._console, f"left out: {precision}: {reason}; --max-epochs measures it all the same", style="yellow"
            )
        for notice in _explain_epochs(plan, self._config, wanted):
            say(self._console, f"note: {notice}", style="yellow")
        text = f"{len(plan.runs)} runs of {plan.epochs} epochs, one at a time: about {_clock(plan.seconds)}"
        say(self._console, text + self._estimate_map(len(plan.arms)))
        return plan

    def _estimate_map(self, precisions: int) -> str:
        from tune_amp.reuse.precision_runs import PILOT_EPOCHS, TURN_SECONDS, TURNS

        if not self._wishes.has_map:
            return ""
        models, batch_sizes = self._map_axes()
        cells = len(models) * len(batch_sizes)
        seconds = cells * precisions * (PILOT_EPOCHS + 1 + TURNS) * TURN_SECONDS
        return f"; then a map of {cells} cells: at least {_clock(seconds)}"

    def _map_axes(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        return self._wishes.models or (self._config.model,), self._wishes.batch_sizes or (self._config.batch_size,)

    def _map_all(self) -> None:
        from tune_amp.reuse.precision_runs import TURN_SECONDS, choose_arms, measure_map

        if not self._wishes.has_map:
            return
        models, batch_sizes = self._map_axes()
        for cells in measure_map(
            self._config,
            self._dataset,
            self._device,
            models=models,
            batch_sizes=batch_sizes,
            precisions=tuple(choose_arms(self._config, self._wishes.precisions, self._device)),
            turn_seconds=TURN_SECONDS,
        ):
            self._cells += cells
            self._write()
            say(self._console, describe_cells(cells))

    def _write(self) -> None:
        from tune_amp.reuse.precision_runs import COMPARE_FILE, MAP_FILE, write_map, write_runs

        if not self._is_written:
            check_free(*(self._folder / name for name in (COMPARE_FILE, MAP_FILE, PAGE_FILE)))
            self._is_written = True
        write_runs(self._folder, self._runs, self._origin)
        if self._cells:
            write_map(self._folder, self._cells, self._origin)
        page = render_comparison(self._origin, self._runs, self._cells)
        write_atomically(self._folder / PAGE_FILE, lambda file: file.write(page.encode()))

    def _describe_kept(self) -> str:
        if not self._runs:
            return "nothing was measured yet"
        return f"{len(self._runs)} runs are kept in {self._folder}"

    def _print_end(self) -> None:
        if not self._runs:
            return
        self._write()  # again: an interruption may have come between a run and its file
        self._console.print()
        page = (self._folder / PAGE_FILE).read_text(encoding="utf-8")
        for line in page.splitlines():
            self._console.print(printable(line), markup=False, soft_wrap=True)
        names = ", ".join(sorted(path.name for path in self._folder.iterdir()))
        self._console.print(printable(f"files    {self._folder}: {names}"), markup=False, soft_wrap=True)


class Progress:
    """Prints a line when a run ends, and in long runs a line for an epoch now and then.

    Args:
        console: where to print.
        epochs: number of epochs of a run.
        clock: returns the time in seconds.
    """

    def __init__(self, console: Console, epochs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._epochs = epochs
        self._clock = clock
        self._name = ""
        self._told = clock()

    def begin(self, name: str) -> None:
        """Begin a run."""
        self._name = name
        self._told = self._clock()

    def on_epoch(self, metrics: "EpochMetrics") -> None:
        """Print the epoch that has ended, if no line was printed for ``QUIET_SECONDS``."""
        if self._clock() - self._told >= QUIET_SECONDS and metrics.epoch < self._epochs:
            self._print(f"epoch {metrics.epoch}/{self._epochs}  {metrics.samples_per_second:,.0f} images/s")

    def end(self, result: str) -> None:
        """Print the result of the run."""
        self._print(result)

    def _print(self, text: str) -> None:
        self._console.print(printable(f"{self._name:<30}{text}"), markup=False, soft_wrap=True)
        self._told = self._clock()


def describe_run(run: ComparedRun) -> str:
    """Return a finished run in one line."""
    parts = [] if run.status is TrialStatus.COMPLETED else [f"{run.status}: {run.error}"]
    if run.epoch_seconds is not None:
        parts.append(f"epoch {run.epoch_seconds:.3g} s  {run.samples_per_second:,.0f} images/s")
    if run.peak_memory_bytes is not None:
        parts.append(f"{run.peak_memory_bytes / 1e6:,.1f} MB")
    if run.val_accuracy is not None:
        parts.append(f"val accuracy {100 * run.val_accuracy:.2f} %")
    if run.skipped_steps:
        parts.append(f"{run.skipped_steps} of {run.steps} steps skipped")
    return "  ".join(parts)


def describe_cells(cells: Sequence[MapCell]) -> str:
    """Return a cell of the map in one line."""
    import statistics

    told = [
        f"{cell.precision} {cell.reason or f'{statistics.median(cell.turn_rates):,.0f} images/s'}" for cell in cells
    ]
    return f"map  {cells[0].model}  batch {cells[0].batch_size}  {', '.join(told)}"


def _explain_epochs(plan: "ComparisonPlan", config: TrialConfig, wanted: int | None) -> list[str]:
    """Return why the runs differ in length from the trial; nothing if the user chose their length."""
    from tune_amp.reuse.precision_runs import BUDGET_SECONDS

    if wanted is not None or plan.epochs == config.max_epochs:
        return []
    if plan.epochs > config.max_epochs:
        return [f"{plan.epochs} epochs instead of {config.max_epochs}: the first of a run is not timed"]
    limit = f"all {config.max_epochs} would take longer than {_clock(BUDGET_SECONDS)}; --max-epochs measures them"
    return [f"{plan.epochs} epochs a run: {limit}"]


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
