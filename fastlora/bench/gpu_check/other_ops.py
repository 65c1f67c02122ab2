"""DoRA's kernels and the bottleneck adapter's against float64."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core.backend import use_backend
from fastlora.bench.gpu_check.comparing import eager_and_exact, outcome, outputs_and_gradients
from fastlora.bench.gpu_check.items import Found, Item
from fastlora.ops.adapter import AdapterFunction
from fastlora.ops.decide import decide_adapter, decide_lora
from fastlora.ops.dora_linear import DoRALinearFunction, dora_weight_norm
from fastlora.ops.keep_mask import keep_probability
from fastlora.tuning.candidates import SCALING, unpacked
from fastlora_kernels.primitives import DROPPED

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# rows, inputs, outputs, rank, dtype, dropout
DORA = (
    *((1029, 768, 1024, 16, dtype, p) for dtype in (BF16, FP16, FP32) for p in (0.0, 0.1)),
    (37, 70, 50, 5, BF16, 0.25),
    (1, 1024, 768, 16, BF16, 0.0),
    (512, 1024, 1024, 64, BF16, 0.1),
)
# rows, hidden size, bottleneck, dtype, dropout, activation, residual
ADAPTERS: tuple[tuple[int, int, int, torch.dtype, float, reference.Activation, str | None], ...] = (
    *(
        (1029, 768, size, dtype, p, "gelu", "input")
        for size in (64, 256)
        for dtype in (BF16, FP16, FP32)
        for p in (0.0, 0.1)
    ),
    *((512, 768, 64, BF16, 0.1, activation, "input") for activation in ("relu", "silu")),
    *((512, 768, size, BF16, 0.0, "gelu", residual) for size in (64, 256) for residual in ("tensor", None)),
    *((200, 512, size, BF16, 0.1, "gelu", "input") for size in (1, 16, 17, 128, 200)),
    (37, 70, 5, BF16, 0.25, "gelu", "input"),
    (4096, 1024, 64, BF16, 0.1, "gelu", "input"),
)


def dora_items(device: torch.device) -> list[Item]:
    """An item for each of :data:`DORA`."""
    found = []
    for m, k, n, r, dtype, p in DORA:
        name = f"DoRA: {m} × {k} × {n}, rank {r}, {_plain(dtype)}, p = {p:g}"
        found.append(Item(name, partial(dora, name, device, m, k, n, r, dtype, p)))
    return found


def adapter_items(device: torch.device) -> list[Item]:
    """An item for each of :data:`ADAPTERS`."""
    found = []
    for m, hidden, size, dtype, p, activation, residual in ADAPTERS:
        name = (
            f"adapter: {m} × {hidden}, bottleneck {size}, {_plain(dtype)}, p = {p:g}, {activation}, "
            f"residual {residual}"
        )
        work = partial(adapter, name, device, m, hidden, size, dtype, p, activation, residual)
        found.append(Item(name, work))
    return found


def dora(
    case: str, device: torch.device, m: int, k: int, n: int, r: int, dtype: torch.dtype, p: float
) -> Iterator[Found]:
    """DoRA's output, gradients and norm; the arguments after the device are those of :data:`DORA`."""

    def normal(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(of)

    x, weight, bias, dy = normal(m, k), normal(n, k, scale=k**-0.5), normal(n), normal(m, n)
    # smaller than the weight, as in training: where both cancel, every rounding is amplified
    a, b = normal(r, k, scale=k**-0.5, of=FP32), normal(n, r, scale=0.2 * r**-0.5, of=FP32)
    factor = torch.rand(n, device=device) + 0.5
    seed = torch.tensor([5], device=device) if p else None
    kept: list[Tensor] = []

    def fused(x: Tensor, a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
        decision = decide_lora(x, weight, a, dtype, dropping=p > 0, dora=True)
        y: Tensor
        y, _, mask, _ = DoRALinearFunction.apply(x, weight, bias, a, b, factor, seed, SCALING, p, decision)
        kept.append(torch.ones(m, k, dtype=torch.bool, device=device) if mask is None else unpacked(mask, k))
        return y

    def formula(x: Tensor, a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
        return reference.dora_linear_with_mask(
            x, weight.to(x.dtype), bias.to(x.dtype), a, b, factor, kept[0], scaling=SCALING,
            keep_probability=keep_probability(p), weight_norm=torch.ones_like(factor),
        )  # fmt: skip

    with use_backend("triton"):
        got = outputs_and_gradients(fused, (x, a, b, factor), dy)
        norm = dora_weight_norm(weight, a, b, SCALING)
    both = eager_and_exact(formula, (x, a, b, factor), dy)
    yield outcome(case, "y, dX, dA, dB and the factor's gradient", got, *both, max(m, n, k))
    norms = [
        torch.linalg.vector_norm(w + (SCALING * (up @ down)).to(w.dtype), dim=1, dtype=wide)
        for w, down, up, wide in ((weight, a, b, FP32), (weight.double(), a.double(), b.double(), None))
    ]
    yield outcome(case, "the weight's norm", [norm], [norms[0]], [norms[1]], k)


def adapter(
    case: str,
    device: torch.device,
    m: int,
    hidden: int,
    size: int,
    dtype: torch.dtype,
    p: float,
    activation: reference.Activation,
    residual: str | None,
) -> Iterator[Found]:
    """An adapter's output and gradients; the arguments after the device are those of :data:`ADAPTERS`."""
    inputs = _adapter_inputs(device, m, hidden, size, dtype, separate=residual == "tensor")
    dout = torch.randn(m, hidden, device=device).to(dtype)
    seed = torch.tensor([5], device=device) if p else None
    kept: list[Tensor] = []

    def fused(h: Tensor, down: Tensor, *rest: Tensor) -> Tensor:
        *layer, added = rest if residual == "tensor" else (*rest, None)
        decision = decide_adapter(h, down, dtype, dropping=p > 0)
        settings = (added, seed, residual == "input", activation, p, decision)
        out: Tensor
        out, z = AdapterFunction.apply(h, down, *layer, *settings)
        # no sum of usual numbers comes near it
        kept.append(z > DROPPED / 2)
        return out

    def formula(h: Tensor, *rest: Tensor) -> Tensor:
        call: Any = (h, *rest[:4], kept[0])
        separate = rest[4] if residual == "tensor" else None
        options: dict[str, Any] = {"activation": activation, "keep_probability": keep_probability(p)}
        options["residual"] = "input" if residual == "input" else separate
        return reference.adapter_with_mask(*call, **options)

    with use_backend("triton"):
        got = outputs_and_gradients(fused, inputs, dout)
    both = eager_and_exact(formula, inputs, dout)
    yield outcome(case, "output and every gradient", got, *both, max(m, hidden))


def _adapter_inputs(
    device: torch.device, m: int, hidden: int, size: int, dtype: torch.dtype, *, separate: bool
) -> tuple[Tensor, ...]:
    """h, both weights and biases in float32, as by default, and a residual where it is separate."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device) * scale

    down, up = normal(size, hidden, scale=hidden**-0.5), normal(hidden, size, scale=size**-0.5)
    tensors = (normal(m, hidden).to(dtype), down, normal(size), up, normal(hidden))
    return (*tensors, normal(m, hidden).to(dtype)) if separate else tensors


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
