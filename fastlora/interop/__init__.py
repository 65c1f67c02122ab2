"""Other libraries' models on our kernels: only glue."""
