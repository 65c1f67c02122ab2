"""The two ops of torch beneath :mod:`fastlora.ops.lora_linear`, so that it compiles.

:mod:`fastlora.ops.lora_torch` and :mod:`fastlora.ops.lora_triton` compute them, backward
:mod:`fastlora.ops.lora_triton_backward`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import lora_torch
from fastlora.ops.decide import Decision
from fastlora.ops.keep_mask import empty_keep_mask
from fastlora.ops.runtime import in_dtype, registered, rows_of, unrecorded


def fake_forward(
    x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, lora_B: Any, seed: Tensor | None, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those of :func:`lora_linear_forward`; the last argument is the backend's name."""
    rows, mask = math.prod(x.shape[:-1]), x.new_empty(0)
    if seed is not None:
        mask = empty_keep_mask(more[-1], rows, x)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, lora_A.shape[0]), mask


@registered(fake_forward)
def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    decision: Decision,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y ``[..., N]``, S ``[M, R]`` and the dropout mask (None without a seed), for x ``[..., K]``."""
    # allocated in its final shape: autograd refuses in-place changes of a Function's output that is a view
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    settings: dict[str, Any] = {"scaling": scaling, "dropout": dropout if seed is not None else 0.0}
    bias = None if bias is None else in_dtype(bias, x.dtype)
    layer = (rows_of(x), in_dtype(weight, x.dtype), bias, lora_A, lora_B, seed, rows_of(y))
    if decision.backend == "torch":
        with unrecorded(x):
            return y, *lora_torch.forward(*layer, **settings)
    # imported late: Triton is not installed everywhere
    from fastlora.ops import lora_triton

    return y, *lora_triton.forward(*layer, **settings, paths=decision.paths, known=decision.known)


def _fake_backward(
    dy: Tensor, x: Any, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_A, need_B, _ = more[-4:]

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return dy.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need_x and weight is not None else dy.new_empty(0)
    return dx, like(lora_A, need_A), like(lora_B, need_B)


@registered(_fake_backward)
def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor,
    s: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    decision: Decision,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX ``[..., K]``, dA and dB, those that are needed."""
    # a graph has an empty tensor where there is no mask
    mask = mask if mask is not None and mask.dim() == 2 else None
    settings: dict[str, Any] = {"scaling": scaling, "dropout": dropout if mask is not None else 0.0}
    settings |= {"need_x": need_x, "need_A": need_A, "need_B": need_B}
    x = None if x is None else rows_of(x)
    weight = None if weight is None else in_dtype(weight, dy.dtype)
    kept = (rows_of(dy), x, weight, lora_A, lora_B, s, mask)
    if decision.backend == "torch":
        with unrecorded(dy):
            dx, da, db = lora_torch.backward(*kept, **settings)
    else:
        from fastlora.ops import lora_triton_backward

        dx, da, db = lora_triton_backward.backward(*kept, **settings, paths=decision.paths)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, da, db
