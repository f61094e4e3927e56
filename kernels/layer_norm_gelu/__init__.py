"""LayerNorm over the channels of each position, and exact GELU."""
