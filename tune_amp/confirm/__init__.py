"""Trains the winners of a search again on fresh seeds, beside the default configuration."""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.confirm.plan import confirm as confirm
    from tune_amp.confirm.plan import plan_confirmation as plan_confirmation
    from tune_amp.confirm.slots import ConfirmSlots as ConfirmSlots

__getattr__ = open_door(__name__, plan=("confirm", "plan_confirmation"), slots=("ConfirmSlots",))
