"""Frozen weights that are stored quantised, made dense."""
