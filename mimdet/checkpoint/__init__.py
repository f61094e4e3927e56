"""Checkpoint files: reading them safely, loading MAE weights, turning one form into another."""
