"""Trains and evaluates one configuration, epoch by epoch. Only ``amp`` implements mixed precision.

Imports torch but neither Ray nor Optuna, so that a machine with only torch can train.
"""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.training.models import build_model as build_model
    from tune_amp.training.task import Task as Task

__getattr__ = open_door(__name__, models=("build_model",), task=("Task",))
