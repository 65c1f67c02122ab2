"""Domain adaptation: methods, how far two domains are apart, which kind of shift it is, what to select by."""

from typing import TYPE_CHECKING

from fastlora._core.lazy import shown_lazily

if not TYPE_CHECKING:
    __getattr__, __dir__ = shown_lazily(__name__)
