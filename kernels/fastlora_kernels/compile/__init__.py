"""The kernels compiled without a GPU, and what came out."""
