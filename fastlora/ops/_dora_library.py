"""What DoRA adds to lora_linear's ops: a factor for every output, registered with ``torch.library``."""

import torch
from torch import Tensor

from fastlora.ops._autocast import unrecorded
from fastlora.ops._lora_library import fake_forward, implementation
from fastlora.ops.runtime import register, rows_of, runs_directly

_FORWARD_SCHEMA = (
    "dora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor factor, "
    "Tensor? seed, float scaling, float dropout, bool keep_product, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_NORM_SCHEMA = (
    "dora_weight_norm(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str backend) -> Tensor"
)
_GRAD_SCHEMA = "dora_grad_product(Tensor dy, Tensor? product, Tensor factor, str backend) -> (Tensor, Tensor)"


def dora_weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """‖W + s·B·A‖ of every row ``[N]``, in float32 at least."""
    # the reference has no way of its own to a norm
    backend = "torch" if backend == "reference" else backend
    run = _weight_norm if runs_directly(backend, weight) else torch.ops.fastlora.dora_weight_norm
    result: Tensor = run(weight, lora_A, lora_B, scaling, backend)
    return result


def dora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    factor: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    keep_product: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y ``[..., N]``, S ``[M, R]``, the dropout mask and the product ``[M, N]``, empty where not kept."""
    run = _forward if runs_directly(backend, x, seed) else torch.ops.fastlora.dora_linear_forward
    result: tuple[Tensor, Tensor, Tensor, Tensor] = run(
        x, weight, bias, lora_A, lora_B, factor, seed, scaling, dropout, keep_product, backend
    )
    return result


def dora_grad_product(
    dy: Tensor, product: Tensor | None, factor: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """dU = factor ⊙ dY ``[..., N]`` and dfactor ``[N]``, empty without a product."""
    run = _grad_product if runs_directly(backend, dy) else torch.ops.fastlora.dora_grad_product
    result: tuple[Tensor, Tensor] = run(dy, product, factor, backend)
    return result


def _weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    with unrecorded(weight):
        return implementation(backend).weight_norm(weight, lora_A, lora_B, scaling)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    factor: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    keep_product: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    product = torch.empty_like(rows_of(y)) if keep_product else None
    with unrecorded(x):
        s, mask = implementation(backend).forward(
            rows_of(x),
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            lora_A,
            lora_B,
            seed,
            scaling=scaling,
            dropout=dropout,
            y=rows_of(y),
            factor=factor,
            product=product,
        )
    empty = x.new_empty(0)
    return y, s, empty if mask is None else mask, x.new_empty(0) if product is None else product


def _grad_product(dy: Tensor, product: Tensor | None, factor: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with unrecorded(dy):
        dproduct, dfactor = implementation(backend).grad_product(rows_of(dy), product, factor)
    return dproduct.view(dy.shape), factor.new_empty(0) if dfactor is None else dfactor


def _fake_weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    factor: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    keep_product: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mask = fake_forward(x, weight, bias, lora_A, lora_B, seed, scaling, dropout, backend)
    return y, s, mask, x.new_empty(s.shape[0], weight.shape[0]) if keep_product else x.new_empty(0)


def _fake_grad_product(
    dy: Tensor, product: Tensor | None, factor: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), factor.new_empty(0 if product is None else factor.shape)


register(_NORM_SCHEMA, _weight_norm, _fake_weight_norm)
register(_FORWARD_SCHEMA, _forward, _fake_forward)
register(_GRAD_SCHEMA, _grad_product, _fake_grad_product)
