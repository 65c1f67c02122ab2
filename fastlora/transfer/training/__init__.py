"""Train a model by a strategy: deterministic, resumable to the bit, alone or in several processes."""

from fastlora.transfer.training.records import EpochRecord, TrainResult
from fastlora.transfer.training.settings import TrainSettings
from fastlora.transfer.training.trainer import Trainer

__all__ = ["EpochRecord", "TrainResult", "TrainSettings", "Trainer"]
