"""A search: Optuna suggests, Ray Tune schedules, the recorder keeps every report, and an interrupted search resumes."""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.search.options import SearchOptions as SearchOptions
    from tune_amp.search.plan import plan_search as plan_search
    from tune_amp.search.run import SearchResult as SearchResult
    from tune_amp.search.run import run_search as run_search

__getattr__ = open_door(__name__, run=("run_search", "SearchResult"), plan=("plan_search",), options=("SearchOptions",))
