"""Layers of a module that are computed together: those that share their input, and MLPs."""
