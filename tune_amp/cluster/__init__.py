"""Ray: a private or joined session, a trial's share of the machine, its worker, and the cause of a worker's death."""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.cluster.resources import TrialResources as TrialResources
    from tune_amp.cluster.session import ray_session as ray_session
    from tune_amp.cluster.trainable import AmpTrainable as AmpTrainable

__getattr__ = open_door(__name__, session=("ray_session",), resources=("TrialResources",), trainable=("AmpTrainable",))
