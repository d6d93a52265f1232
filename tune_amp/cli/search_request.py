"""The request of a search, from the arguments of a command or of `tune_amp.tune`: a new run, or one to resume."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_amp.cli.console import find_run, find_run_folder
from tune_amp.search.options import SearchOptions, build_options, check_trackers, make_run_name, name_flag, run_folder
from tune_amp.trial.config import InputError, TrialConfig, checked_field, is_function_name
from tune_amp.trial.consent import OWN_CODE_FLAGS, consent_to
from tune_amp.trial.text import shown

if TYPE_CHECKING:
    from tune_amp.search.history import RunHistory
    from tune_amp.search.warm_start import Donor
    from tune_amp.space.space import SearchSpace


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """The request of a command line, checked."""

    arguments: argparse.Namespace
    space: "SearchSpace"
    folder: Path
    """The run folder."""
    donor: "Donor | None" = None
    history: "RunHistory | None" = None
    """The run to resume; None for a new run."""
    notes: Sequence[str] = ()
    """Changes since the resumed run began."""
    command: Sequence[str]
    """The program and its arguments, for the record."""
    begun: float
    """``time.monotonic()`` when the command began."""

    @property
    def options(self) -> SearchOptions:
        """The options of the search."""
        return build_options(vars(self.arguments))


@contextlib.contextmanager
def open_request(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    arguments: argparse.Namespace,
    load: "Callable[[], tuple[SearchSpace, str]]",
    command: Sequence[str],
    begun: float,
) -> Iterator[SearchRequest]:
    """Check the arguments of a search, and hold its run folder for the ``with`` block.

    Args:
        parser: of the command.
        words: the command's arguments.
        arguments: the same, parsed; with ``resume``, a run is resumed, else a new folder is claimed.
        load: returns the space of a new run, and what the run's default name begins with.
        command: the program and its arguments, for the record.
        begun: ``time.monotonic()`` when the command began.

    Raises:
        InputError: an argument or the space is not valid, or the folder cannot be made; or there is no run to resume,
            another process has it, or an argument would change what its trials share.
    """
    parts: dict[str, Any]
    with contextlib.ExitStack() as stack:
        if arguments.resume is None:
            adopt_own_code(arguments)
            space, name = load()
            parts = {"donor": _check_search(arguments, space), "space": space}
            numbered = arguments.name is None
            run = make_run_name(name) if numbered else arguments.name
            folder = stack.enter_context(run_folder(arguments.results_dir, run, numbered=numbered))
        else:
            from tune_amp.cli.resume import describe_changes, restore_arguments
            from tune_amp.search.history import open_history
            from tune_amp.space.space import parse_space

            folder = find_run_folder(arguments.resume, arguments.results_dir, "--resume")
            history = stack.enter_context(open_history(folder))
            arguments = restore_arguments(parser, words, history)
            arguments.tracker = check_trackers(arguments.tracker)
            space = parse_space(history.provenance.space_source, history.provenance.space_text)
            parts = {"history": history, "notes": describe_changes(history, folder), "space": space}
        yield SearchRequest(arguments=arguments, folder=folder, command=command, begun=begun, **parts)


def _check_search(arguments: argparse.Namespace, space: "SearchSpace") -> "Donor | None":
    """Check the arguments of a new run against each other and its space. Return the run that it starts from."""
    from tune_amp.search.samplers import build_sampler
    from tune_amp.search.warm_start import load_donor

    options = build_options(vars(arguments))
    checked_field("--imbalance", arguments.imbalance, TrialConfig, "imbalance")
    arguments.tracker = check_trackers(arguments.tracker)
    # Built only to refuse bad options early: before Ray starts, and before data are loaded and perhaps downloaded.
    build_sampler(options.sampler, space, seed=0, num_samples=options.num_samples)
    if arguments.warm_start is None:
        return None
    place = find_run(arguments.warm_start, arguments.results_dir)
    return load_donor(place, objectives=options.objectives, top_k=options.top_k)


def adopt_own_code(arguments: argparse.Namespace) -> None:
    """Set the model, the data set and the objective that the user's own loop or task determines, and take consent.

    Raises:
        InputError: a flag has no meaning beside ``--train``, or the task cannot be loaded.
    """
    consent_to(*(getattr(arguments, flag) for flag in OWN_CODE_FLAGS), arguments.sampler)
    if arguments.train is not None:
        for field, default in (("model", SearchOptions.model), ("dataset", "auto"), ("data_dir", None)):
            value = getattr(arguments, field)
            if value not in (default, arguments.train):
                rule = "must be left out beside --train, whose loop has its own model and data"
                raise InputError(f"{name_flag(field)}: {rule}, got {shown(str(value))}")
        arguments.model = arguments.dataset = arguments.train
    elif arguments.task is not None and is_function_name(arguments.task):
        from tune_amp.training.task import Task, load_task

        task = type(load_task(arguments.task))
        if arguments.model == SearchOptions.model and task.model is not Task.model:
            arguments.model = arguments.task
        if arguments.dataset == "auto" and task.data is not Task.data:
            arguments.dataset = arguments.task
        name, mode = task.metric
        if arguments.objective == SearchOptions.objective and name != "accuracy":
            arguments.objective = f"val_{name}:{mode}"
