"""Measures training: the loop beside the machine's floor, one GPU, telemetry, and the tutorial's extensions."""
