"""Train a model by a strategy: deterministic, resumable to the bit, alone or in several processes."""

from typing import TYPE_CHECKING

from fastlora._core.lazy import shown_lazily

if TYPE_CHECKING:
    from fastlora.transfer.training.records import EpochRecord, TrainResult
    from fastlora.transfer.training.settings import TrainSettings
    from fastlora.transfer.training.trainer import Trainer

__all__ = ["EpochRecord", "TrainResult", "TrainSettings", "Trainer"]

if not TYPE_CHECKING:
    # the command line needs the settings alone, and the rest takes seconds to import
    __getattr__, __dir__ = shown_lazily(
        __name__,
        {
            "records": ("EpochRecord", "TrainResult"),
            "settings": ("TrainSettings",),
            "trainer": ("Trainer",),
        },
    )
