"""tune_amp: finds the settings under which mixed-precision training works best.

``tune_amp.tune`` searches, ``tune_amp.load_best`` reads a winner. A training loop of your own takes a
``tune_amp.Trial``, a task of your own is a subclass of ``tune_amp.Task``. Wrong input raises ``tune_amp.InputError``.
"""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.cli.notebook import TuneResult as TuneResult
    from tune_amp.cli.notebook import tune as tune
    from tune_amp.results.records import load_best as load_best
    from tune_amp.training.own_trial import Trial as Trial
    from tune_amp.training.task import Task as Task
    from tune_amp.trial.config import InputError as InputError
    from tune_amp.trial.config import TrialConfig as TrialConfig

__version__ = "0.1.0"

__getattr__ = open_door(
    __name__,
    **{
        "cli.notebook": ("tune", "TuneResult"),
        "results.records": ("load_best",),
        "training.own_trial": ("Trial",),
        "training.task": ("Task",),
        "trial.config": ("InputError", "TrialConfig"),
    },
)
