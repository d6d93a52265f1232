"""Measures how good the found settings are, by replaying searches over recorded learning curves."""
