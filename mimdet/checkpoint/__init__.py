"""Checkpoint files: reading them safely, loading MAE weights, turning one kind into another."""
