"""What each way to fine-tune a model trains, and what that costs in memory and time."""

from fastlora.transfer.costs.counting import Measured, StrategyCost, compare
from fastlora.transfer.costs.rows import CostSettings

__all__ = ["CostSettings", "Measured", "StrategyCost", "compare"]
