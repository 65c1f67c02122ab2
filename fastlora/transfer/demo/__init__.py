"""``fastlora demo``: the ways to fine-tune, side by side."""

from fastlora.transfer.demo.run import run_demo

__all__ = ["run_demo"]
