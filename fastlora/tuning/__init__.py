"""Measured choices instead of predicted ones: ``fastlora tune`` makes them, every process uses the same."""

from fastlora.tuning.sharing import share

__all__ = ["share"]
