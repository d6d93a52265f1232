"""Measures tune_amp itself. ``scripts/benchmark.py`` runs these; no other part of the package imports them."""
