"""Pretrained models: by name, with their weights, a new head and what is frozen."""
