"""Transfer learning on pretrained models: weights, data, training and reports."""

from typing import TYPE_CHECKING

from fastlora._core.lazy import shown_lazily

if not TYPE_CHECKING:
    __getattr__, __dir__ = shown_lazily(__name__)
