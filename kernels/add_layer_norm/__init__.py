"""Residual addition with per-sample scale, and LayerNorm of the sum."""
