"""What the distribution engines need to know of our layers."""

from typing import TYPE_CHECKING

from fastlora._core.lazy import shown_lazily

if TYPE_CHECKING:
    from fastlora.distributed.tensor_parallel import LoRAColwiseParallel, LoRARowwiseParallel

__all__ = ["LoRAColwiseParallel", "LoRARowwiseParallel"]

if not TYPE_CHECKING:
    # the choices that processes share need no tensor parallelism, which takes a second to import
    __getattr__, __dir__ = shown_lazily(__name__, {"tensor_parallel": __all__})
