"""From labelled pictures to a fine-tuned model, its report and its export, in one call each."""

from typing import TYPE_CHECKING

from fastlora._core.lazy import shown_lazily

if TYPE_CHECKING:
    from fastlora.transfer.finetune.export import Agreement, export_run
    from fastlora.transfer.finetune.run import finetune
    from fastlora.transfer.finetune.saved import SavedRun, load_run
    from fastlora.transfer.finetune.settings import FinetuneSettings

__all__ = ["Agreement", "FinetuneSettings", "SavedRun", "export_run", "finetune", "load_run"]

if not TYPE_CHECKING:
    # the command line needs the settings alone, and the rest takes seconds to import
    __getattr__, __dir__ = shown_lazily(
        __name__,
        {
            "export": ("Agreement", "export_run"),
            "run": ("finetune",),
            "saved": ("SavedRun", "load_run"),
            "settings": ("FinetuneSettings",),
        },
    )
