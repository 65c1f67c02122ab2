"""From labelled pictures to a fine-tuned model, its report and its export, in one call each."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora.transfer.finetune.export import Agreement, export_run
    from fastlora.transfer.finetune.run import finetune
    from fastlora.transfer.finetune.saved import SavedRun, load_run
    from fastlora.transfer.finetune.settings import FinetuneSettings

__all__ = ["Agreement", "FinetuneSettings", "SavedRun", "export_run", "finetune", "load_run"]

_PLACES = {
    "Agreement": "export",
    "FinetuneSettings": "settings",
    "SavedRun": "saved",
    "export_run": "export",
    "finetune": "run",
    "load_run": "saved",
}


def __getattr__(name: str) -> Any:
    # the command line needs the settings alone, and the rest takes seconds to import
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
