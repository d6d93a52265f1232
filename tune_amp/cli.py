"""The commands ``tune-amp search`` and ``tune-amp train``, which the scripts of the same names run too.

Arguments, calls and printing only. torch, Ray and Optuna are imported inside the commands: ``--help`` and a mistyped
flag answer at once.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import importlib
import itertools
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.markup import escape

from tune_amp import __version__
from tune_amp.config import DATASETS, MODELS, OBJECTIVES, InputError, TrialConfig, is_function_name

if TYPE_CHECKING:
    import torch

    from tune_amp.config import EpochMetrics
    from tune_amp.data import Dataset
    from tune_amp.options import SearchOptions
    from tune_amp.recorder import Observer
    from tune_amp.resources import TrialResources
    from tune_amp.results import TrialRecord
    from tune_amp.search import SearchResult
    from tune_amp.session import RaySession
    from tune_amp.space import SearchSpace

DEFAULT_SPACE = "mnist_amp"

SLOW_EPOCH_SECONDS = 120.0

EXIT_DONE, EXIT_NO_RESULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Errors are one line, like every other wrong input, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """``tune-amp``: search, or train.

    Returns:
        The exit code: 0 done, 1 no result, 2 bad input, 130 interrupted.
    """
    commands = {"search": search_command, "train": train_command}
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in commands:
        name = arguments[0]
        return commands[name](arguments[1:], program=f"tune-amp {name}")
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"tune-amp {__version__}")  # noqa: T201
        return EXIT_DONE
    usage = f"usage: tune-amp {{{','.join(commands)}}} ... (each has its own --help); tune-amp --version"
    wanted_help = bool(arguments) and arguments[0] in ("-h", "--help")
    print(usage, file=sys.stdout if wanted_help else sys.stderr)
    return EXIT_DONE if wanted_help else EXIT_BAD_INPUT


def search_command(arguments: Sequence[str] | None = None, program: str = "scripts/search.py") -> int:
    """Run a search and print what it found. Returns the exit code."""
    command = sys.argv[1:] if arguments is None else list(arguments)
    return _answer_bad_input(lambda: _search(_search_parser(program).parse_args(command), program, command))


def train_command(arguments: Sequence[str] | None = None, program: str = "scripts/train.py") -> int:
    """Train a configuration from a Parquet file and print its test accuracy. Returns the exit code."""
    return _answer_bad_input(lambda: _train(_train_parser(program).parse_args(arguments)))


def _answer_bad_input(command: Callable[[], int]) -> int:
    try:
        return command()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED


def _search_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Search for the settings under which mixed-precision training works best.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("space", nargs="?", default=DEFAULT_SPACE, metavar="SPACE", help="YAML file, or a bundled space's name")
    data = f"auto, {', '.join(DATASETS)} or MODULE:FUNCTION"
    add("--dataset", default="auto", help=f"{data}; auto is MNIST where it can be had, else scikit-learn's digits")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the data files, or TUNE_AMP_DATA")
    add("--model", default="simple_net", help=f"{', '.join(MODELS)} or MODULE:FUNCTION")
    add("--num-samples", type=int, default=32, metavar="N", help="trials")
    add("--max-epochs", type=int, default=8, metavar="N", help="full budget of a trial")
    add("--grace-period", type=int, default=1, metavar="N", help="epochs before a trial can be stopped early")
    add("--reduction-factor", type=float, default=2.0, metavar="X", help="one trial in X goes on from rung to rung")
    add("--objective", default=OBJECTIVES[0], help=" or ".join(OBJECTIVES))
    add("--seed", type=int, default=0, metavar="N", help="of the sampler and of every trial")
    add("--gpus-per-trial", type=_gpu_share, default="auto", metavar="auto|X", help="0.25 lets four share a GPU")
    add("--cpus-per-trial", type=int, metavar="N", help="CPU threads of a trial (1)")
    add("--max-concurrent", type=int, metavar="N", help="most trials at a time (as many as fit)")
    add("--time-budget", type=float, metavar="SECONDS", help="interrupt what still runs after so long")
    add("--top-k", type=int, default=3, metavar="N", help="configurations written to best.parquet")
    add("--name", metavar="RUN", help="name of the run (space, date and time)")
    add("--results-dir", type=Path, default=Path("results"), metavar="DIR", help="where run folders are made")
    add("--address", metavar="ADDR", help="join a Ray cluster: auto, host:port or ray://host:port")
    add("--storage-path", metavar="URL", help="where a cluster's nodes keep checkpoints")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="print the path of best.parquet and nothing else")
    shown.add_argument("--json", action="store_true", help="print JSON lines")
    return parser


def _train_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Train a configuration that a search found on the whole training set, and test it once.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("best", type=Path, metavar="BEST.parquet", help="best.parquet, or the run folder")
    add("--rank", type=int, default=1, metavar="N", help="which of the ranked configurations")
    add("--seed", type=int, metavar="N", help="another seed than the trial's")
    add("--max-epochs", type=int, metavar="N", help="another number of epochs than the trial's")
    add("--output", type=Path, metavar="DIR", help="folder for weights and metrics (train-... beside BEST.parquet)")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the data files, or TUNE_AMP_DATA")
    add("--model", metavar="MODULE:FUNCTION", help="consent to run the model function that the file names")
    add("--dataset", metavar="MODULE:FUNCTION", help="consent to run the data function that the file names")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--replay", action="store_true", help="repeat the trial instead, and compare it with the record bit by bit")
    return parser


def _gpu_share(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number, got {text!r}") from None


def _search(arguments: argparse.Namespace, program: str, command: Sequence[str]) -> int:
    from tune_amp.options import check_fit, run_folder
    from tune_amp.space import load_space

    options = _search_options(arguments)
    space = load_space(arguments.space)
    dataset = _load_dataset(arguments.dataset, arguments.data_dir)
    check_fit(space, dataset, options)
    run = arguments.name or f"{Path(arguments.space).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005
    with run_folder(arguments.results_dir, run) as folder:
        return _search_with_ray(arguments, space, dataset, options, folder, (program, *command))


def _say(console: Console, prose: str, style: str | None = None) -> None:
    """Print a sentence: wrapped between words in a terminal, on one line in a log."""
    console.print(prose, style=style, markup=False, soft_wrap=not console.is_terminal)


def _search_options(arguments: argparse.Namespace) -> "SearchOptions":
    from tune_amp.options import SearchOptions

    names = [field.name for field in dataclasses.fields(SearchOptions)]
    return SearchOptions(**{name: getattr(arguments, name) for name in names})


def _load_dataset(name: str, data_dir: Path | None) -> "Dataset":
    """The data set, and loudly what its loader has to say."""
    from tune_amp.data import load_dataset

    dataset = load_dataset(name, data_dir)
    if dataset.notice:
        _say(Console(stderr=True, highlight=False), f"NOTE: {dataset.notice}", style="bold yellow")
    return dataset


def _search_with_ray(
    arguments: argparse.Namespace,
    space: "SearchSpace",
    dataset: "Dataset",
    options: "SearchOptions",
    folder: Path,
    command: Sequence[str],
) -> int:
    # Ray reads parts of its environment on import: the session comes before everything that imports it.
    from tune_amp.session import ray_session

    console = Console(quiet=arguments.quiet or arguments.json, highlight=False)
    modules = _user_modules(arguments.model)
    with ray_session(arguments.address, run=folder.name, modules=modules) as session:
        from tune_amp.search import plan_resources, run_search

        _print_start(console, space, dataset, options, session, plan_resources(options))
        if arguments.json:
            _print_json_start(folder, dataset, session)
        with _sigterm_as_ctrl_c(), _choose_observer(arguments, console) as observer:
            result = run_search(
                space,
                dataset,
                options,
                folder=folder,
                observer=observer,
                command=command,
                storage_path=arguments.storage_path,
            )
    _print_end(console, result, _reuse_command(arguments, result.best_path, command[0]))
    if arguments.quiet and result.ranked:
        print(result.best_path)  # noqa: T201
    if arguments.json:
        _print_json_end(result)
    if result.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_DONE if result.ranked else EXIT_NO_RESULT


def _user_modules(*names: str) -> tuple[ModuleType, ...]:
    """The top-level packages of a user's own functions, which the workers of a joined cluster do not have."""
    tops = {name.partition(":")[0].partition(".")[0] for name in names if is_function_name(name)}
    return tuple(importlib.import_module(top) for top in sorted(tops))


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Tune ends a run cleanly on SIGINT; SIGTERM would drop it."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _choose_observer(arguments: argparse.Namespace, console: Console) -> "contextlib.AbstractContextManager[Observer]":
    from tune_amp.monitoring import JsonLines, LiveTable, PlainLines, Quiet

    if arguments.json:
        return contextlib.nullcontext(JsonLines(sys.stdout))
    if arguments.quiet:
        return contextlib.nullcontext(Quiet())
    return LiveTable(console) if console.is_terminal else contextlib.nullcontext(PlainLines(console))


def _print_start(
    console: Console,
    space: "SearchSpace",
    dataset: "Dataset",
    options: "SearchOptions",
    session: "RaySession",
    resources: "TrialResources",
) -> None:
    import torch

    from tune_amp.amp import describe_hardware

    sizes = f"{len(dataset.train):,} training and {len(dataset.validation):,} validation images"
    subject = f"[bold]{escape(options.model)}[/] on [bold]{escape(dataset.name)}[/]"
    console.print(f"{subject}: {sizes}; the test set stays unread", soft_wrap=True)
    console.print(f"space      {escape(space.source)}: {', '.join(p.name for p in space.parameters)}", soft_wrap=True)
    console.print(f"resources  {resources.reason}", soft_wrap=True)
    if session.dashboard_url:
        way_in = f", token in {session.token_path}" if session.token_path else ""
        console.print(f"dashboard  {session.dashboard_url}{way_in}", soft_wrap=True)
    device = torch.device("cuda" if resources.gpus and torch.cuda.is_available() else "cpu")
    for precision in _list_precisions(space):
        notice = describe_hardware(precision, device)
        if notice:
            _say(console, f"note       {precision}: {notice}", style="yellow")
        if device.type == "cpu":
            _warn_of_slow_epochs(console, options.model, precision, dataset, resources.cpus)


def _warn_of_slow_epochs(console: Console, model: str, precision: str, dataset: "Dataset", num_threads: int) -> None:
    """Hours of waiting should not come as a surprise: a step is timed before the search."""
    import torch

    from tune_amp.training import estimate_epoch_seconds

    torch.set_num_threads(num_threads)
    config = TrialConfig(model=model, precision=precision)
    try:
        seconds = estimate_epoch_seconds(config, dataset.train, dataset.num_classes, torch.device("cpu"))
    except Exception:  # a user's model may raise anything in training: its trials will say what
        return
    if seconds >= SLOW_EPOCH_SECONDS:
        text = f"an epoch of {model} will take about {seconds / 60:.0f} min here; the first report comes after that"
        _say(console, f"slow       {precision}: {text}", style="bold yellow")


def _list_precisions(space: "SearchSpace") -> tuple[str, ...]:
    searched = [choice for p in space.parameters if p.name == "precision" for choice in p.choices]
    return tuple(searched) or (space.fixed.get("precision", TrialConfig().precision),)


def _reuse_command(arguments: argparse.Namespace, best: Path, program: str) -> str:
    """The line that trains the winner: with the same data, and with consent to the user's own code."""
    parts = ["tune-amp", "train"] if program.startswith("tune-amp") else ["python", "scripts/train.py"]
    parts.append(str(best))
    if arguments.data_dir is not None:
        parts += ["--data-dir", str(arguments.data_dir)]
    for flag in ("model", "dataset"):
        if is_function_name(getattr(arguments, flag)):
            parts += [f"--{flag}", getattr(arguments, flag)]
    return shlex.join(parts)


def _print_end(console: Console, result: "SearchResult", reuse: str) -> None:
    from tune_amp.monitoring import describe_counts, describe_ties, render_ranking

    console.print(describe_counts(result.trials))
    if result.interrupted:
        console.print("[magenta]interrupted[/]: everything that was reported is kept")
    if not result.ranked:
        _print_no_result(result)
        return
    console.print()
    console.print(render_ranking(result.ranked))
    if result.provenance.objective == "val_accuracy":
        _say(console, describe_ties(result.ranked, result.provenance))
    console.print()
    console.print(
        f"files    {escape(str(result.folder))}: best.parquet, trials.parquet, epochs.parquet, space.yaml",
        soft_wrap=True,
    )
    console.print(f"reuse    {reuse}", markup=False, soft_wrap=True)


def _print_no_result(result: "SearchResult") -> None:
    """Say on the error stream, whatever the verbosity, why there is no winner: the commonest reasons first."""
    console = Console(stderr=True, highlight=False)
    console.print("[bold red]no trial produced a result[/]:")
    reasons = collections.Counter(f"{trial.status}: {trial.error or 'no usable result'}" for trial in result.trials)
    for reason, count in reasons.most_common(3):
        _say(console, f"  {count} {reason}")
    console.print(f"every trial is in {result.folder / 'trials.parquet'}", markup=False, soft_wrap=True)


def _print_json_start(folder: Path, dataset: "Dataset", session: "RaySession") -> None:
    from tune_amp.monitoring import JsonLines

    token = None if session.token_path is None else str(session.token_path)
    where = {"folder": str(folder), "dashboard": session.dashboard_url, "token_path": token}
    JsonLines(sys.stdout).write("start", {"run": folder.name, "dataset": dataset.name, **where})


def _print_json_end(result: "SearchResult") -> None:
    from tune_amp.monitoring import JsonLines, describe_as_json

    ranked = [{"rank": rank, **describe_as_json(trial)} for rank, trial in enumerate(result.ranked, start=1)]
    best = str(result.best_path) if ranked else None
    JsonLines(sys.stdout).write("result", {"best": ranked, "best_parquet": best, "interrupted": result.interrupted})


def _train(arguments: argparse.Namespace) -> int:
    from tune_amp.results import load_best_record, load_provenance

    record = load_best_record(arguments.best, arguments.rank)
    _check_consent(arguments, record.config)
    dataset = _load_dataset(record.config.dataset, arguments.data_dir)
    provenance = load_provenance(arguments.best)
    if dataset.content_hash != provenance.data_hash:
        raise InputError(
            f"--data-dir: must hold the data that the search used (sha256 {provenance.data_hash[:12]}...), "
            f"got other {dataset.name} data (sha256 {dataset.content_hash[:12]}...)"
        )
    if arguments.replay:
        return _replay(arguments, record, dataset)
    return _train_final(arguments, record.config, dataset)


def _check_consent(arguments: argparse.Namespace, config: TrialConfig) -> None:
    """A file may come from anybody: code that it names runs only where the command line names it too."""
    for flag, named in (("model", config.model), ("dataset", config.dataset)):
        given = getattr(arguments, flag)
        if given is not None and given != named:
            raise InputError(f"--{flag}: must be {named}, which {arguments.best} was searched with, got {given}")
        if is_function_name(named) and given is None:
            raise InputError(f"{arguments.best}: {flag}: names your own code; to run it, add --{flag} {named}")


def _train_final(arguments: argparse.Namespace, chosen: TrialConfig, dataset: "Dataset") -> int:
    from tune_amp.reuse import FinalTraining, output_folder

    wanted = {"seed": arguments.seed, "max_epochs": arguments.max_epochs}
    config = dataclasses.replace(chosen, **{name: value for name, value in wanted.items() if value is not None})
    device = _choose_device(arguments.device)
    console = Console(highlight=False)
    training = FinalTraining(config, dataset, device)
    with output_folder(arguments.output or _default_output(arguments, config)) as output:
        _print_training(console, arguments, config, device)
        for metrics in training.epochs():
            console.print(_describe_epoch(metrics, config.max_epochs), markup=False, soft_wrap=True)
        if training.divergence:
            print(f"diverged, nothing saved: {training.divergence}", file=sys.stderr)  # noqa: T201
            return EXIT_NO_RESULT
        result = training.test()
        training.save(output, result, {"source": str(arguments.best), "rank": arguments.rank})
    console.print(f"test accuracy {result.test_accuracy:.2%} on {result.test_images:,} images, in fp32, read once")
    console.print(f"saved   {output}: model.safetensors, metrics.json", markup=False, soft_wrap=True)
    return EXIT_DONE


def _print_training(
    console: Console, arguments: argparse.Namespace, config: TrialConfig, device: "torch.device"
) -> None:
    from tune_amp.amp import describe_hardware

    settings = {name: value for name, value in vars(config).items() if value not in (None, "none")}
    listed = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )
    _say(console, f"rank {arguments.rank} of {arguments.best} on {device}: {listed}")
    notice = describe_hardware(config.precision, device)
    if notice:
        _say(console, f"note: {notice}", style="yellow")


def _replay(arguments: argparse.Namespace, record: "TrialRecord", dataset: "Dataset") -> int:
    """Train as the trial did and compare every epoch with the record."""
    import torch

    from tune_amp.reuse import find_differences, replay_trial

    for flag in ("seed", "max_epochs", "output"):
        if getattr(arguments, flag) is not None:
            raise InputError(
                f"--{flag.replace('_', '-')}: has no meaning with --replay, which repeats the trial as it was"
            )
    torch.set_num_threads(record.num_threads)  # sums are split among threads: another number, other last bits
    console = Console(highlight=False)
    recorded = {metrics.epoch: metrics for metrics in record.epochs}
    equal = True
    for metrics in itertools.islice(
        replay_trial(record.config, dataset, _choose_device(arguments.device)), max(recorded)
    ):
        line = f"{_describe_epoch(metrics, record.config.max_epochs)}  val accuracy {metrics.val_accuracy:.4f}"
        if metrics.epoch in recorded:
            differences = find_differences(recorded[metrics.epoch], metrics)
            equal = equal and not differences
            line += f"  differs in {', '.join(differences)}" if differences else "  equal to the record, bit for bit"
        console.print(line, markup=False, soft_wrap=True)
    return EXIT_DONE if equal else EXIT_NO_RESULT


def _describe_epoch(metrics: "EpochMetrics", max_epochs: int) -> str:
    line = f"epoch {metrics.epoch}/{max_epochs}  average loss {metrics.train_loss:.4f}"
    if metrics.loss_scale is not None:
        line += f"  loss scale {metrics.loss_scale:g}, {metrics.skipped_steps} of {metrics.steps} steps skipped"
    return line


def _choose_device(name: str) -> "torch.device":
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device: cuda is not available on this machine")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _default_output(arguments: argparse.Namespace, config: TrialConfig) -> Path:
    best: Path = arguments.best
    folder = best if best.is_dir() else best.parent
    return folder / f"train-rank{arguments.rank}-seed{config.seed}-epochs{config.max_epochs}"
