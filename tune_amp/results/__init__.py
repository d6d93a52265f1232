"""The run folder (records, Parquet files, journal) and the results computed from it: ranks, gain, importance.

Imports neither torch nor Ray: a run can be read wherever pyarrow is installed.
"""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.results.records import load_best as load_best
    from tune_amp.results.records import load_best_rows as load_best_rows
    from tune_amp.results.records import load_provenance as load_provenance
    from tune_amp.results.records import load_trials as load_trials

__getattr__ = open_door(__name__, records=("load_best", "load_best_rows", "load_trials", "load_provenance"))
