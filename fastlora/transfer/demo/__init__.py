"""``fastlora demo``: a language model by PEFT and accelerated, and ways to fine-tune on pictures."""

from fastlora.transfer.demo.language.run import run_language_demo
from fastlora.transfer.demo.run import run_demo

__all__ = ["run_demo", "run_language_demo"]
