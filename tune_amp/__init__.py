"""tune_amp: finds the settings under which mixed-precision training works best.

Import from the modules: ``tune_amp.results.load_best`` reads a winner, ``tune_amp.search.run_search`` runs a search.
"""

__version__ = "0.1.0"
