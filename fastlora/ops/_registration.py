"""How every op is registered with ``torch.library``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fastlora", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``torch.ops.fastlora.<name of the schema>``, for every device and for tracing."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_LIBRARY)


def runs_directly(backend: str, seed: Tensor | None = None) -> bool:
    """Whether an implementation may be called without the dispatcher, which costs 40 µs and serves tracing.

    Not the kernels, which only take real tensors, nor where a mask is drawn, which reads the seed's value.
    """
    return backend == "torch" and seed is None and not torch.compiler.is_compiling()


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor ``[..., K]`` as a matrix ``[M, K]``."""
    if tensor.dim() == 2:
        return tensor
    # flatten keeps zero-sized dimensions apart, where reshape(-1, …) can't infer the row count
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
