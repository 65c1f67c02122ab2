"""Ops: check the arguments, choose the path, run it inside an autograd Function."""

from typing import TYPE_CHECKING

from fastlora._core.lazy import shown_lazily

if not TYPE_CHECKING:
    __getattr__, __dir__ = shown_lazily(__name__)
