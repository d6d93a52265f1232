"""Measure tune_amp itself: ``python -m benchmarks --help`` lists the benchmarks. Not part of the installed package."""
