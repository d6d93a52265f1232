"""Trains the winners of a search again on fresh seeds, beside the default configuration."""
