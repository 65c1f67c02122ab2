"""Kernels of several layers that share their input."""
