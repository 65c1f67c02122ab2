"""Adapters as files: what is in them, whether it fits a model, PEFT's format and our own."""
