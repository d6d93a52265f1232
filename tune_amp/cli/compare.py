"""The command ``tune-amp compare``, which ``scripts/compare.py`` runs too: arguments, calls and printing."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tune_amp.cli.console import (
    OneLineParser,
    add_winner_arguments,
    answer_bad_input,
    choose_device,
    choose_output,
    load_searched_data,
    open_console,
    parse_winner,
    take_consent,
)
from tune_amp.cluster.interrupt import interrupted_by_signals
from tune_amp.results.files import claimed_folder
from tune_amp.reuse.precision_verdicts import LEAST_SEEDS
from tune_amp.search.options import MOST_SEEDS
from tune_amp.trial.config import MODELS, PRECISIONS, InputError, TrialConfig, check, checked_field, shown
from tune_amp.trial.consent import consent_to

if TYPE_CHECKING:
    import torch

    from tune_amp.training.data import Dataset

CPU_SEEDS, CUDA_SEEDS = 3, 5


def compare_command(arguments: Sequence[str] | None = None, program: str = "scripts/compare.py") -> int:
    """Compare the precisions on a configuration from a Parquet file. Return the exit code."""
    command = tuple(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        with interrupted_by_signals():
            return _compare(parse_winner(_compare_parser(program), command), (program, *command))

    return answer_bad_input(run)


def _compare_parser(program: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=program,
        description="Train a configuration that a search found in every precision, and say what differs.",
        allow_abbrev=False,
    )
    add_winner_arguments(parser, saved="results (compare-rank...")
    add = parser.add_argument
    add("--seeds", type=int, metavar="N", help=f"seeds for every precision ({CPU_SEEDS}; with CUDA {CUDA_SEEDS})")
    precisions = ",".join(PRECISIONS)
    add("--precisions", default=precisions, metavar="A,B", help="what is compared; fp32 always is (%(default)s)")
    add("--max-epochs", type=int, metavar="N", help="epochs of a run (the configuration's, or as many as fit in 7 min)")
    add("--models", metavar="A,B", help=f"map these models too: {', '.join(MODELS)} or MODULE:FUNCTION")
    add("--batch-sizes", metavar="N,N", help="map these batch sizes too")
    return parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """The values of the flags, checked as far as possible without the data."""

    precisions: tuple[str, ...]
    seeds: int | None
    max_epochs: int | None
    models: tuple[str, ...]
    """Models of the map; empty if there is no map, or if it keeps the configuration's model."""
    batch_sizes: tuple[int, ...]


def read_options(arguments: argparse.Namespace) -> ComparisonOptions:
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
        rule = f"must be at least {LEAST_SEEDS} (one run does not show the noise)"
        check("--seeds", seeds, seeds >= LEAST_SEEDS, rule)
        check("--seeds", seeds, seeds <= MOST_SEEDS, f"must be at most {MOST_SEEDS:,}")
    if max_epochs is not None:
        check("--max-epochs", max_epochs, max_epochs >= 2, "must be at least 2 (the first epoch is not timed)")
        checked_field("--max-epochs", max_epochs, TrialConfig, "max_epochs")
    batch_sizes = tuple(_read_size(text) for text in _split("--batch-sizes", arguments.batch_sizes))
    return ComparisonOptions(
        precisions=precisions, seeds=seeds, max_epochs=max_epochs, models=models, batch_sizes=batch_sizes
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
    options = read_options(arguments)
    from tune_amp.results.records import load_best_file

    best = load_best_file(arguments.best)
    record = best.pick(arguments.rank).trial
    config = record.config
    take_consent(arguments, config)
    if config.train or config.task:
        rule = (
            "must be a configuration of the built-in training: compare measures accuracy, time and memory of its loop"
        )
        raise InputError(f"{arguments.best}: rank {arguments.rank}: {rule}, got {config.train or config.task}")
    consent_to(*options.models)
    from tune_amp.cli.comparison import Comparison, describe_origin
    from tune_amp.reuse.precision_runs import choose_arms, cpu_threads, fresh_seeds
    from tune_amp.training.amp import describe_hardware
    from tune_amp.training.data import make_long_tail

    given = load_searched_data(config, arguments.data_dir, best.provenance.data_hash)
    dataset = make_long_tail(given, config.imbalance)
    device = choose_device(arguments.device)
    arms = choose_arms(config, options.precisions, device)
    _check_fit(options, config, arms, dataset, device)
    left_out = {}
    if "tf32" in options.precisions and "tf32" not in arms:
        left_out["tf32"] = describe_hardware("tf32", device) or "the device computes it as fp32"
    has_map = bool(options.models or options.batch_sizes)
    output = choose_output(arguments, f"compare-rank{arguments.rank}")
    # As many threads as the trial had: with one thread a core, threads wait for each other on a busy machine.
    with cpu_threads(record.num_threads), claimed_folder(output) as folder:
        origin = describe_origin(
            command,
            arguments.rank,
            record,
            best.provenance,
            arms,
            dataset,
            device,
            left_out=left_out,
            seeds=fresh_seeds(config, options.seeds or (CPU_SEEDS if device.type == "cpu" else CUDA_SEEDS)),
            epochs=options.max_epochs or config.max_epochs,
        )
        comparison = Comparison(
            config=config,
            arms=arms,
            max_epochs=options.max_epochs,
            models=options.models or (config.model,) if has_map else (),
            batch_sizes=options.batch_sizes or (config.batch_size,),
            dataset=dataset,
            device=device,
            origin=origin,
            folder=folder,
            console=open_console(),
        )
        return comparison.make()


def _check_fit(
    options: ComparisonOptions,
    config: TrialConfig,
    arms: Mapping[str, TrialConfig],
    dataset: "Dataset",
    device: "torch.device",
) -> None:
    from tune_amp.search.preflight import check_training

    for size in options.batch_sizes:
        if size > len(dataset.train):
            rule = f"must be at most the {len(dataset.train):,} training images of {dataset.name}"
            raise InputError(f"--batch-sizes: {rule}, got {size}")
    for model in (config.model, *options.models):
        check_training(model, dataset, precisions=tuple(arms), optimizers=(config.optimizer,), device=device)
