"""lora_linear's registration with ``torch.library``: schema, implementation and fake, so that it compiles."""

import math
from typing import Protocol

import torch
from torch import Tensor

from fastlora.ops import lora_torch
from fastlora.ops._autocast import unrecorded
from fastlora.ops.runtime import in_dtype, register, rows_of, runs_directly, without_none

_FORWARD_SCHEMA = (
    "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, "
    "float scaling, float dropout, str backend, Tensor? scalars=None) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor lora_B, Tensor? s, "
    "Tensor? mask, float scaling, float dropout, bool need_x, bool need_A, bool need_B, str backend, "
    "Tensor? scalars=None) -> (Tensor, Tensor, Tensor)"
)


class Implementation(Protocol):
    """What a backend's module offers. Tensors are 2-D with x ``[M, K]``, weight ``[N, K]``, S ``[M, R]``.

    S carries the factor scaling / (1 - p), applied in float32, and so does dS: nothing else has to scale.
    """

    def keep_mask_shape(self, rows: int, in_features: int) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and dtype in which the dropout mask is kept for backward."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        *,
        scaling: float,
        dropout: float,
        y: Tensor,
        factor: Tensor | None = None,
        product: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Fill y ``[M, N]``; S and, with a seed, the dropout mask.

        With a factor ``[N]`` it multiplies y before the bias joins; a product ``[M, N]`` is then filled with
        what was multiplied.
        """

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor,
        s: Tensor | None,
        mask: Tensor | None,
        *,
        scaling: float,
        dropout: float,
        need_x: bool,
        need_A: bool,
        need_B: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dX, dA and dB, those that are needed, each in its tensor's dtype."""

    def weight_norm(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """‖W + s·B·A‖ of every row ``[N]``, in float32 at least."""

    def grad_product(
        self, dy: Tensor, product: Tensor | None, factor: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """dY ``[M, N]`` times the factor, and the factor's gradient if the product is given."""


def implementation(backend: str) -> Implementation:
    """The module behind a backend's name."""
    if backend == "torch":
        return lora_torch
    # imported late: Triton is not installed everywhere
    from fastlora.ops import lora_triton

    return lora_triton


def scalar_values(scalars: Tensor | None, scaling: float, dropout: float) -> tuple[float, float]:
    """The two numbers, out of ``scalars`` (float64 ``[2]`` on the CPU) where these are given instead."""
    if scalars is None:
        return scaling, dropout
    scaling, dropout = scalars.tolist()
    return scaling, dropout


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    backend: str,
    scalars: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y ``[..., N]``, S ``[M, R]`` and the dropout mask (empty or None without seed), for x ``[..., K]``."""
    run = _forward if runs_directly(backend, x, seed) else torch.ops.fastlora.lora_linear_forward
    result: tuple[Tensor, Tensor, Tensor | None] = run(
        x, weight, bias, lora_A, lora_B, seed, scaling, dropout, backend, scalars
    )
    return result


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
    backend: str,
    scalars: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX ``[..., K]``, dA and dB; an empty tensor or None for each that is not needed."""
    run = _backward if runs_directly(backend, dy) else torch.ops.fastlora.lora_linear_backward
    result: tuple[Tensor | None, Tensor | None, Tensor | None] = run(
        dy, x, weight, lora_A, lora_B, s, mask, scaling, dropout, need_x, need_A, need_B, backend, scalars
    )
    return result


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    backend: str,
    scalars: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    scaling, dropout = scalar_values(scalars, scaling, dropout)
    # allocated in its final shape: autograd refuses in-place changes of a Function's output that is a view
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    with unrecorded(x):
        s, mask = implementation(backend).forward(
            rows_of(x),
            in_dtype(weight, x.dtype),
            None if bias is None else in_dtype(bias, x.dtype),
            lora_A,
            lora_B,
            seed,
            scaling=scaling,
            dropout=dropout if seed is not None else 0.0,
            y=rows_of(y),
        )
    return y, s, mask


def _backward(
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
    backend: str,
    scalars: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mask = mask if mask is not None and mask.dim() == 2 else None
    scaling, dropout = scalar_values(scalars, scaling, dropout)
    with unrecorded(dy):
        dx, da, db = implementation(backend).backward(
            rows_of(dy),
            None if x is None else rows_of(x),
            None if weight is None else in_dtype(weight, dy.dtype),
            lora_A,
            lora_B,
            s,
            mask,
            scaling=scaling,
            dropout=dropout if mask is not None else 0.0,
            need_x=need_x,
            need_A=need_A,
            need_B=need_B,
        )
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, da, db


def fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    backend: str,
    scalars: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of what :func:`lora_linear_forward` returns."""
    rows = math.prod(x.shape[:-1])
    mask = x.new_empty(0)
    if seed is not None:
        shape, dtype = implementation(backend).keep_mask_shape(rows, x.shape[-1])
        mask = x.new_empty(shape, dtype=dtype)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, lora_A.shape[0]), mask


def _fake_backward(
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
    backend: str,
    scalars: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need_x and weight is not None else dy.new_empty(0),
        torch.empty_like(lora_A, memory_format=torch.contiguous_format)
        if need_A and lora_A is not None
        else dy.new_empty(0),
        torch.empty_like(lora_B, memory_format=torch.contiguous_format) if need_B else dy.new_empty(0),
    )


register(_FORWARD_SCHEMA, without_none(_forward), fake_forward)
register(_BACKWARD_SCHEMA, without_none(_backward), _fake_backward)
