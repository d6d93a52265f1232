"""The request of a search, from the arguments of a command or of ``tune_amp.tune``: a new run, or one to resume."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tune_amp.cli.console import find_run, find_run_folder
from tune_amp.search.options import SearchOptions, build_options, check_trackers, make_run_name, run_folder
from tune_amp.trial.config import TrialConfig, checked_field

if TYPE_CHECKING:
    from tune_amp.search.history import RunHistory
    from tune_amp.search.warm_start import Donor
    from tune_amp.space.space import SearchSpace


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """The request of a command line, checked."""

    arguments: argparse.Namespace
    space: "SearchSpace"
    donor: "Donor | None" = None
    history: "RunHistory | None" = None
    """The run to resume; None for a new run."""
    notes: Sequence[str] = ()
    """Changes since the resumed run began."""
    command: Sequence[str]
    """The program and its arguments."""
    begun: float
    """``time.monotonic()`` when the command began."""

    @property
    def options(self) -> SearchOptions:
        """The options of the search."""
        return build_options(vars(self.arguments))


@contextlib.contextmanager
def begun_request(
    arguments: argparse.Namespace, space: "SearchSpace", name: str, command: Sequence[str], begun: float
) -> Iterator[tuple[SearchRequest, Path]]:
    """Check the arguments of a new run; yield its request and its folder, claimed for the ``with`` block.

    Args:
        arguments: of the command's parser, after ``adopt_own_code``.
        space: what is searched.
        name: what the run's default name begins with.
        command: the program and its arguments.
        begun: ``time.monotonic()`` when the command began.

    Raises:
        InputError: an argument or the space is not valid, or the folder cannot be made.
    """
    from tune_amp.search.samplers import build_sampler
    from tune_amp.search.warm_start import load_donor

    options = build_options(vars(arguments))
    checked_field("--imbalance", arguments.imbalance, TrialConfig, "imbalance")
    arguments.tracker = check_trackers(arguments.tracker)
    # Built only to refuse bad options early: before Ray starts, and before data are loaded and perhaps downloaded.
    build_sampler(options.sampler, space, seed=0, objectives=options.objectives, num_samples=options.num_samples)
    donor = None
    if arguments.warm_start is not None:
        donor = load_donor(
            find_run(arguments.warm_start, arguments.results_dir), objectives=options.objectives, top_k=options.top_k
        )
    run = make_run_name(name) if arguments.name is None else arguments.name
    with run_folder(arguments.results_dir, run, numbered=arguments.name is None) as folder:
        yield SearchRequest(arguments=arguments, space=space, donor=donor, command=command, begun=begun), folder


@contextlib.contextmanager
def resumed_request(
    run: str,
    results_dir: Path,
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    command: Sequence[str],
    begun: float,
) -> Iterator[tuple[SearchRequest, Path]]:
    """Open a run to resume for the ``with`` block; yield its request and its folder.

    Args:
        run: name or folder of the run.
        results_dir: where a name is looked up.
        parser: the command's parser.
        words: the command's arguments, ``--resume`` among them.
        command: the program and its arguments, for the record.
        begun: ``time.monotonic()`` when the command began.

    Raises:
        InputError: there is no such run, another process has it, or an argument would change what its trials share.
    """
    from tune_amp.cli.resume import describe_changes, restore_arguments
    from tune_amp.search.history import open_history
    from tune_amp.space.space import parse_space

    folder = find_run_folder(run, results_dir, "--resume")
    with open_history(folder) as history:
        arguments = restore_arguments(parser, words, history)
        arguments.tracker = check_trackers(arguments.tracker)
        notes = describe_changes(history, folder)
        space = parse_space(history.provenance.space_source, history.provenance.space_text)
        yield (
            SearchRequest(arguments=arguments, space=space, history=history, notes=notes, command=command, begun=begun),
            folder,
        )
