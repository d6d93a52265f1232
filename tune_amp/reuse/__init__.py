"""Uses of a winner: train it for use, replay its trial, compare precisions on it, describe it in a card."""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.reuse.card import describe_card as describe_card
    from tune_amp.reuse.final import FinalTraining as FinalTraining
    from tune_amp.reuse.final import replay_trial as replay_trial

__getattr__ = open_door(__name__, final=("FinalTraining", "replay_trial"), card=("describe_card",))
