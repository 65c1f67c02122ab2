"""Measured choices instead of predicted ones: ``fastlora tune`` makes them, every process uses the same."""

from fastlora.distributed.tuned import share

__all__ = ["share"]
