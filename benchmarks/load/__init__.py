"""Measures the driver: many trials, many at a time, and a run that is killed and resumed."""
