"""The command ``tune-amp compare``, which ``scripts/compare.py`` runs too: arguments, calls and printing."""

import argparse
import sys
from collections.abc import Sequence

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
from tune_amp.cluster.cpus import count_cpus
from tune_amp.cluster.interrupt import interrupted_by_signals
from tune_amp.results.files import claimed_folder
from tune_amp.reuse.precision_verdicts import LEAST_SEEDS
from tune_amp.search.options import MOST_SEEDS
from tune_amp.trial.config import MODELS, PRECISIONS, InputError, TrialConfig, check, checked_field, shown
from tune_amp.trial.consent import consent_to

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
        program, "Train a configuration that a search found in every precision, and say what differs."
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


def _check_flags(arguments: argparse.Namespace) -> None:
    """Check the flags as far as possible without the data, and replace lists of names by tuples.

    Raises:
        InputError: a flag breaks its rule.
    """
    arguments.precisions = _split("--precisions", arguments.precisions, "precision")
    arguments.models = _split("--models", arguments.models, "model")
    seeds, max_epochs = arguments.seeds, arguments.max_epochs
    if seeds is not None:
        rule = f"must be at least {LEAST_SEEDS} (one run does not show the noise)"
        check("--seeds", seeds, seeds >= LEAST_SEEDS, rule)
        check("--seeds", seeds, seeds <= MOST_SEEDS, f"must be at most {MOST_SEEDS:,}")
    if max_epochs is not None:
        check("--max-epochs", max_epochs, max_epochs >= 2, "must be at least 2 (the first epoch is not timed)")
        checked_field("--max-epochs", max_epochs, TrialConfig, "max_epochs")
    arguments.batch_sizes = _split("--batch-sizes", arguments.batch_sizes, "batch_size")


def _split(flag: str, text: str | None, field: str) -> tuple[str | int, ...]:
    """Return the values that a flag joins by commas, each checked as the ``field`` of a ``TrialConfig``."""
    names: list[str | int] = [] if text is None else [name.strip() for name in text.split(",")]
    check(flag, text, "" not in names, "must be names joined by commas")
    check(flag, text, len(set(names)) == len(names), "must name none twice")
    if field == "batch_size":
        for place, name in enumerate(names):
            try:
                names[place] = int(name)
            except ValueError:
                raise InputError(f"{flag}: must be whole numbers joined by commas, got {shown(name)}") from None
    return tuple(checked_field(flag, name, TrialConfig, field) for name in names)


def _compare(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    _check_flags(arguments)
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
    consent_to(*arguments.models)
    import torch

    from tune_amp.cli.comparison import Comparison, describe_origin
    from tune_amp.reuse.precision_runs import choose_arms, fresh_seeds
    from tune_amp.search.preflight import check_training
    from tune_amp.training.amp import describe_hardware
    from tune_amp.training.data import make_long_tail

    given = load_searched_data(config, arguments.data_dir, best.provenance.data_hash)
    dataset = make_long_tail(given, config.imbalance)
    device = choose_device(arguments.device)
    arms = choose_arms(config, arguments.precisions, device)
    for size in arguments.batch_sizes:
        rule = f"must be at most the {len(dataset.train):,} training images of {dataset.name}"
        check("--batch-sizes", size, size <= len(dataset.train), rule)
    for model in (config.model, *arguments.models):
        check_training(model, dataset, precisions=tuple(arms), optimizers=(config.optimizer,), device=device)
    left_out = {}
    if "tf32" in arguments.precisions and "tf32" not in arms:
        left_out["tf32"] = describe_hardware("tf32", device) or "the device computes it as fp32"
    has_map = bool(arguments.models or arguments.batch_sizes)
    # As many threads as the trial had: with one thread a core, threads wait for each other on a busy machine.
    torch.set_num_threads(min(record.num_threads, count_cpus()))
    with claimed_folder(choose_output(arguments, f"compare-rank{arguments.rank}")) as folder:
        origin = describe_origin(
            command,
            arguments.rank,
            record,
            best.provenance,
            arms,
            dataset,
            device,
            left_out=left_out,
            seeds=fresh_seeds(config, arguments.seeds or (CPU_SEEDS if device.type == "cpu" else CUDA_SEEDS)),
            epochs=arguments.max_epochs or config.max_epochs,
        )
        comparison = Comparison(
            arms=arms,
            max_epochs=arguments.max_epochs,
            models=arguments.models or (config.model,) if has_map else (),
            batch_sizes=arguments.batch_sizes or (config.batch_size,),
            dataset=dataset,
            device=device,
            origin=origin,
            folder=folder,
            console=open_console(),
        )
        return comparison.make()
