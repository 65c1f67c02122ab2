"""Which path and tile a call takes."""
