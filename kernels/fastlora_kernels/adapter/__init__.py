"""Kernels of the bottleneck adapter."""
