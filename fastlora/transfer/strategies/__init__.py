"""What trains in a pretrained model: every strategy by name."""

from fastlora.transfer.strategies.registry import STRATEGIES, Strategy, find_strategy

__all__ = ["STRATEGIES", "Strategy", "find_strategy"]
