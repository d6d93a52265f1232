"""Trains and evaluates one configuration, epoch by epoch. Only ``amp`` implements mixed precision.

Imports torch but neither Ray nor Optuna, so that a machine with only torch can train.
"""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.training.data import Dataset as Dataset
    from tune_amp.training.data import load_dataset as load_dataset
    from tune_amp.training.models import build_model as build_model
    from tune_amp.training.run import TrainingRun as TrainingRun
    from tune_amp.training.task import Task as Task
    from tune_amp.training.training_data import TrainingData as TrainingData

__getattr__ = open_door(
    __name__,
    run=("TrainingRun",),
    training_data=("TrainingData",),
    data=("Dataset", "load_dataset"),
    models=("build_model",),
    task=("Task",),
)
