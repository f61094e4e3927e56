"""Helpers for those who check a port of the model or a kernel of their own; nothing here runs in training."""

from .budget import assert_within_budget, error_and_budget

__all__ = ["assert_within_budget", "error_and_budget"]
