"""Train a model by a strategy: deterministic, resumable to the bit, alone or in several processes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora.transfer.training.records import EpochRecord, TrainResult
    from fastlora.transfer.training.settings import TrainSettings
    from fastlora.transfer.training.trainer import Trainer

__all__ = ["EpochRecord", "TrainResult", "TrainSettings", "Trainer"]

_PLACES = {
    "EpochRecord": "records",
    "TrainResult": "records",
    "TrainSettings": "settings",
    "Trainer": "trainer",
}


def __getattr__(name: str) -> Any:
    # the command line needs the settings alone, and the rest takes seconds to import
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
