"""A trial in plain values: its configuration, its reports, how it ends, and text that is safe to show.

The lowest package: it imports only the standard library.
"""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.trial.consent import consent_to as consent_to

__getattr__ = open_door(__name__, consent=("consent_to",))
