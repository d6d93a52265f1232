"""Starts the run of a configuration, with our training loop or the user's own, on the data of a worker."""

from collections.abc import Sequence
from pathlib import Path

from tune_amp.training.data import Dataset, build_no_data, load_dataset
from tune_amp.training.own_code import import_function
from tune_amp.training.own_loop import OwnRun
from tune_amp.training.run import TrainingRun
from tune_amp.training.task import load_task_dataset
from tune_amp.training.training_data import TrainingData
from tune_amp.trial.config import TrialConfig

Run = TrainingRun | OwnRun


def load_data(name: str, data_dir: Path | None, *, task: str | None = None, train: str | None = None) -> Dataset:
    """Return the data of a search: of a data set, or of the user's own ``task`` of that name, or none for an own loop.

    Args:
        name: name of the data set; that of the task if the task has its own data.
        data_dir: see ``load_dataset``, which also says what is raised.
        task: the user's own task, ``module:Class``, if there is one.
        train: the user's own loop, ``module:function``, if there is one.
    """
    if train is not None:
        return build_no_data(train)
    return load_task_dataset(name) if name == task else load_dataset(name, data_dir)


def start_run(
    config: TrialConfig, data: TrainingData, *, objectives: Sequence[str] = (), confirming: bool = False
) -> Run:
    """Return the run of a configuration, before its first epoch.

    Args:
        config: the configuration; its field ``train`` names the user's own loop.
        data: data of the worker; empty for an own loop, which has its own.
        objectives: metrics that an own loop must yield.
        confirming: whether an own loop yields metrics of the test set.

    Raises:
        InputError: the user's own code cannot be loaded or does not fit.
    """
    if config.train is not None:
        function = import_function(config.train)
        return OwnRun(config, function, data.device, objectives=objectives, confirming=confirming)
    return TrainingRun(config, data)
