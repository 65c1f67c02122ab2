"""What one launch is predicted to cost on a GPU that need not be here."""
