"""Kernels of the LoRA linear layer, DoRA among them."""
