"""Softmax attention within each sequence of a packed batch."""
