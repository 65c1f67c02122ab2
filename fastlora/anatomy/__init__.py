"""Reads a model and changes nothing: its modules by name, its blocks, its head, what it ties."""
