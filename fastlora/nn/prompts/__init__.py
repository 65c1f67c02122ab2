"""Learned prompts, and the parts of models that take them."""
