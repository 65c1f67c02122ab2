"""What a layer call is predicted to cost on a GPU that need not be here. ``explain`` is the way in."""
