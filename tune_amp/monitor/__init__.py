"""Observers of a search: terminal, Prometheus, trackers. None of them can stop it."""
