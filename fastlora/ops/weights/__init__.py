"""Frozen weights that are stored in another form than their values: quantised ones."""
