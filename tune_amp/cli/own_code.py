"""The user's own code on a command line: what an own training loop or task determines."""

import argparse

from tune_amp.search.options import SearchOptions
from tune_amp.trial.config import InputError, is_function_name, shown
from tune_amp.trial.consent import OWN_CODE_FLAGS, consent_to


def adopt_own_code(arguments: argparse.Namespace) -> None:
    """Set the model, the data set and the objective that the user's own loop or task determines, and take consent.

    Raises:
        InputError: a flag has no meaning beside ``--train``, or the task cannot be loaded.
    """
    consent_to(*(getattr(arguments, flag) for flag in OWN_CODE_FLAGS), arguments.sampler)
    if arguments.train is not None:
        for flag, default in (("model", SearchOptions.model), ("dataset", "auto"), ("data_dir", None)):
            if getattr(arguments, flag) not in (default, arguments.train):
                rule = "must be left out beside --train, whose loop has its own model and data"
                raise InputError(f"--{flag.replace('_', '-')}: {rule}, got {shown(str(getattr(arguments, flag)))}")
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
