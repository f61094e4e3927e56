"""Gather of sampled tokens together with their position embedding."""
