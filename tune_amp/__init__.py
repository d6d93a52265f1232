"""tune_amp: finds the settings under which mixed-precision training works best.

Its rooms import each other downwards only: cli, search, then confirm, reuse, report and monitor, then cluster and
results, then training and space, then trial. ``tune_amp.results.load_best`` reads a winner,
``tune_amp.search.run_search`` runs a search.
"""

__version__ = "0.1.0"
