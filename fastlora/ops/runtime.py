"""How every op is registered with ``torch.library``."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("fastlora", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``torch.ops.fastlora.<name of the schema>``, for every device and for tracing."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_LIBRARY)


def without_none(implementation: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """The implementation with an empty tensor for each None it returns, as its schema has tensors alone."""

    @functools.wraps(implementation)
    def wrapped(first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(first.new_empty(0) if t is None else t for t in implementation(first, *rest))

    return wrapped


def runs_directly(backend: str, x: Tensor, seed: Tensor | None = None) -> bool:
    """Whether an implementation may be called without the dispatcher, which costs 40 µs and serves tracing.

    Not the kernels, which only take real tensors. Where a mask is drawn the seed's value is read, so nothing
    may be watching the call, and both tensors must be real.
    """
    if backend != "torch" or torch.compiler.is_compiling():
        return False
    return seed is None or (
        type(seed) is Tensor
        and type(x) in (Tensor, Parameter)
        and not seed.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_tracing()
    )


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype. ``Tensor.to`` costs a microsecond also where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor ``[..., K]`` as a matrix ``[M, K]``."""
    if tensor.dim() == 2:
        return tensor
    # flatten keeps zero-sized dimensions apart, where reshape(-1, …) can't infer the row count
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
