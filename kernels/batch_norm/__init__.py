"""Batch norm over valid cells, with ReLU inside."""
