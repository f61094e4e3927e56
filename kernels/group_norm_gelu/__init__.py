"""GroupNorm with one group, and exact GELU."""
