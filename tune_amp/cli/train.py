"""The command ``tune-amp train``, which ``scripts/train.py`` runs too: arguments, calls and printing."""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from tune_amp.cli.console import (
    EXIT_DONE,
    EXIT_NO_RESULT,
    OneLineParser,
    add_winner_arguments,
    choose_device,
    choose_output,
    complain,
    load_searched_data,
    open_console,
    run_winner_command,
    say,
    take_consent,
    torch_threads,
)
from tune_amp.results.files import claimed_folder
from tune_amp.results.run_folder import RunFolder
from tune_amp.reuse.markdown import format_settings, list_settings
from tune_amp.search.options import name_flag, naming_flags
from tune_amp.trial.config import InputError, TrialConfig, is_function_name
from tune_amp.trial.objectives import metric_of, show_value
from tune_amp.trial.text import describe_error, format_scale, printable

if TYPE_CHECKING:
    import torch

    from tune_amp.results.records import BestFile
    from tune_amp.reuse.final import FinalResult, FinalTraining, OwnResult, OwnTraining
    from tune_amp.training.data import Dataset
    from tune_amp.trial.config import EpochMetrics


MOST_RECALLS = 10
"""Most classes named in a line; the file has them all."""


def train_command(arguments: Sequence[str] | None = None, program: str = "scripts/train.py") -> int:
    """Train a configuration from a Parquet file and print its test accuracy. Return the exit code."""
    return run_winner_command(_train_parser(program), arguments, _train)


def _train_parser(program: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        program, "Train a configuration that a search found on the whole training set, and test it once."
    )
    add_winner_arguments(parser, saved="what is saved (train-...")
    add = parser.add_argument
    add("--seed", type=int, metavar="N", help="another seed than the trial's")
    add("--max-epochs", type=int, metavar="N", help="another number of epochs than the trial's")
    add("--replay", action="store_true", help="repeat the trial instead, and compare it with the record bit by bit")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from tune_amp.results.records import load_best_file

    best = load_best_file(arguments.best)  # read once: a confirmation in progress will rank it anew
    record = best.pick(arguments.rank).trial
    take_consent(arguments, record.config)
    dataset = load_searched_data(record.config, arguments.data_dir, best.provenance.data_hash)
    if arguments.replay:
        try:
            return _replay(arguments, best, dataset)
        except Exception as error:
            if isinstance(error, InputError) or record.config.train is None:
                raise
            return _fail(f"{record.config.train} failed: {describe_error(error)}")
    return _train_anew(arguments, best, dataset)


def _train_anew(arguments: argparse.Namespace, best: "BestFile", dataset: "Dataset") -> int:
    """Train a configuration for use, test it once and save it. Return the exit code."""
    from tune_amp.reuse.final import FinalTraining, OwnTraining
    from tune_amp.training.memory import is_out_of_memory

    given = {name: value for name in ("seed", "max_epochs") if (value := getattr(arguments, name)) is not None}
    with naming_flags():
        config = dataclasses.replace(best.pick(arguments.rank).trial.config, **given)
    device, console = choose_device(arguments.device), open_console()
    is_own = bool(config.train or config.task)
    own_code = config.train or config.task or (config.model if is_function_name(config.model) else None)
    _check_own_model(config, dataset, device)
    name = f"train-rank{arguments.rank}-seed{config.seed}-epochs{config.max_epochs}"
    with claimed_folder(choose_output(arguments, name)) as output:
        try:
            metrics = [metric_of(objective) for objective in best.provenance.objectives]
            training = (
                OwnTraining(config, dataset, device, metrics) if is_own else FinalTraining(config, dataset, device)
            )
            _print_training(console, arguments, config, device)
            for epoch in training.epochs():
                line = _describe_epoch(epoch, config.max_epochs, by_loss=not is_own)
                console.print(line, markup=False, soft_wrap=True)
            if training.divergence:
                return _fail(f"diverged, nothing saved: {training.divergence}")
            result = training.test()
        except Exception as error:  # the user's own code may raise anything
            if is_out_of_memory(error):
                return _fail(f"out of memory, nothing saved: {describe_error(error)}")
            if isinstance(error, InputError) or own_code is None:
                raise
            return _fail(f"{own_code} failed, nothing saved: {describe_error(error)}")
        tested, card = _describe(training, result, arguments, best)
        for line in tested:  # before anything can fail: the test set is read once
            say(console, line)
        saved = training.save(output, result, {"source": str(arguments.best), "rank": arguments.rank}, card)
    console.print(printable(f"saved   {output}: {', '.join(saved)}"), markup=False, soft_wrap=True)
    return EXIT_DONE


def _fail(line: str) -> int:
    complain(line)
    return EXIT_NO_RESULT


def _describe(
    training: "FinalTraining | OwnTraining",
    result: "FinalResult | OwnResult",
    arguments: argparse.Namespace,
    best: "BestFile",
) -> tuple[list[str], str]:
    """Return lines about the test, and the model card."""
    from tune_amp.results.provenance import list_versions
    from tune_amp.reuse.card import describe_card, describe_own_card
    from tune_amp.reuse.final import FinalResult

    rank, versions = arguments.rank, list_versions("tune_amp", "torch", "numpy", "safetensors")
    if isinstance(result, FinalResult):
        card = describe_card(result, best=best, rank=rank, versions=versions)
        accuracy = f"test accuracy {result.test_accuracy:.2%} on {result.test_images:,} images, in fp32, read once"
        lines = [accuracy, describe_recalls(result.test_recalls)]
    else:
        card = describe_own_card(result, list(training.models), best=best, rank=rank, versions=versions)
        values = [f"{name} {show_value(name, value)}" for name, value in result.tested.items()]
        lines = [f"{value}, measured after the last epoch" for value in values]
    return lines, card


def _describe_epoch(metrics: "EpochMetrics", max_epochs: int, *, by_loss: bool = False) -> str:
    """Return an epoch in a line: all its metrics, or only the average training loss."""
    from tune_amp.reuse.card import list_metrics

    parts = [f"{name} {show_value(name, value)}" for name, value in list_metrics(metrics).items()]
    if by_loss:
        parts = [f"average loss {metrics.train_loss:.4f}"]
    if metrics.loss_scale is not None:
        skipped = f"{metrics.skipped_steps} of {metrics.steps} steps skipped"
        parts.append(f"loss scale {format_scale(metrics.loss_scale)}, {skipped}")
    return "  ".join([f"epoch {metrics.epoch}/{max_epochs}", *parts])


def _check_own_model(config: TrialConfig, dataset: "Dataset", device: "torch.device") -> None:
    """Refuse a user's own model that changed since the search or does not run here, before anything is written."""
    from tune_amp.search.preflight import check_training

    if is_function_name(config.model) and config.train is None and config.task is None:
        precisions, optimizers = (config.precision,), (config.optimizer,)
        check_training(
            config.model, dataset, precisions=precisions, optimizers=optimizers, device=device, own=config.own
        )


def _print_training(
    console: Console, arguments: argparse.Namespace, config: TrialConfig, device: "torch.device"
) -> None:
    from tune_amp.training.amp import describe_hardware

    settings = format_settings(list_settings(config))
    say(console, f"rank {arguments.rank} of {arguments.best} on {device}: {settings}")
    notice = describe_hardware(config.precision, device)
    if notice:
        say(console, f"note: {notice}", style="yellow")


def _replay(arguments: argparse.Namespace, best: "BestFile", dataset: "Dataset") -> int:
    """Repeat the trial and compare every epoch with its record. Return the exit code."""
    from tune_amp.reuse.final import EPOCH_FIELDS, find_differences, replay_trial

    record = best.pick(arguments.rank).trial
    for flag in ("seed", "max_epochs", "output"):
        if getattr(arguments, flag) is not None:
            raise InputError(f"{name_flag(flag)}: has no meaning with --replay, which repeats the trial as it was")
    if not record.epochs:
        raise InputError(f"--replay: rank {arguments.rank}, the default configuration, holds no trial to repeat")
    console = open_console()
    recorded = {metrics.epoch: metrics for metrics in record.epochs}
    left_out = () if best.has_epochs else EPOCH_FIELDS
    if left_out:
        beside = RunFolder(best.path.parent).epochs
        say(console, f"note: {beside} is missing: only the last epoch is compared, without {', '.join(left_out)}")
    equal = True
    recorded_on = "cpu" if record.device == "cpu" else "cuda"
    device = choose_device(recorded_on if arguments.device == "auto" else arguments.device)
    _check_own_model(record.config, dataset, device)
    with torch_threads(max(1, record.num_threads)):  # sums are split among threads: their number changes the last bits
        for metrics in itertools.islice(replay_trial(record.config, dataset, device), max(recorded)):
            line = _describe_epoch(metrics, record.config.max_epochs)
            if metrics.epoch in recorded:
                differences = find_differences(recorded[metrics.epoch], metrics, left_out)
                equal = equal and not differences
                line += (
                    f"  differs in {', '.join(differences)}" if differences else "  equal to the record, bit for bit"
                )
            console.print(line, markup=False, soft_wrap=True)
    return EXIT_DONE if equal else EXIT_NO_RESULT


def describe_recalls(recalls: Sequence[float]) -> str:
    """Return one line with the share of correctly classified images of each class, worst first, ten classes at most."""
    found = sorted((recall, label) for label, recall in enumerate(recalls) if not math.isnan(recall))
    shown = ", ".join(f"{label}: {recall:.2%}" for recall, label in found[:MOST_RECALLS])
    left = f", {len(found) - MOST_RECALLS} better ones" if len(found) > MOST_RECALLS else ""
    return f"recall by class, the worst first: {shown}{left}"
