"""The fused bottleneck adapter op (being built; the reference formula for now)."""

from fastlora.reference import adapter

__all__ = ["adapter"]
