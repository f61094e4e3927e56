"""Checkpoint files: reading them safely, loading MAE weights, converting one format into another."""
