"""Measurements of speed and memory, each beside its baselines and its limit."""
