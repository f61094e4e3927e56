"""Non-maximum suppression of independent problems of one size."""
