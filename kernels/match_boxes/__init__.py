"""Assignment of candidates to ground-truth boxes by their overlap."""
