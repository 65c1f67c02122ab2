"""What every room uses and what knows none of them: the backend, checks, files, words."""
