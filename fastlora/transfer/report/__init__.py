"""How reports look: one palette, one kind of figure, one page."""
