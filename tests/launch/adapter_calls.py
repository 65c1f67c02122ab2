"""What is launched of bottleneck adapters."""

from collections.abc import Iterator
from itertools import product
from typing import Literal

import torch

from tests.launch.calls import Case, adapter

FP16, FP32 = torch.float16, torch.float32


def adapters() -> Iterator[Case]:
    """Bottlenecks of one launch and of two."""
    for size, p in product((64, 256, 1, 8, 16, 17, 48, 65, 128, 200), (0.1, 0.0)):
        quick = size in (64, 256) and p > 0
        yield Case(f"adapter {size}, p = {p}", adapter(512, 768, size, p=p), quick)
        yield Case(
            f"adapter {size}, p = {p}, as planned", adapter(4096, 1024, size, p=p, backend="auto"), quick
        )
    for activation in ("relu", "silu"):
        yield Case(
            f"adapter with {activation}", adapter(512, 768, 64, activation=activation), activation == "relu"
        )
    others: tuple[Literal["tensor"] | None, ...] = ("tensor", None)
    for residual, size in product(others, (64, 128)):
        yield Case(
            f"adapter {size}, residual {residual}", adapter(512, 768, size, residual=residual), size == 64
        )
    for wanted in ("h", "d", "u", "hd", "du", "hu", ""):
        yield Case(
            f"adapter, gradients: {wanted or 'none'}", adapter(512, 768, 64, wanted=wanted), wanted in "hu"
        )
    for dtype, size in product((FP16, FP32), (64, 16, 256)):
        yield Case(
            f"adapter {size}, {dtype}",
            adapter(96, 256, size, dtype=dtype, p=0.1),
            quick=dtype == FP32 and size == 64,
        )
    same = adapter(512, 768, 64, parameter_dtype=None, p=0.1)
    yield Case("adapter with 16-bit parameters", same, quick=True)
    yield Case("adapter without biases", adapter(512, 768, 64, bias=False))
    for sizes in ((37, 70, 5), (1, 1, 1), (0, 768, 64)):
        yield Case(f"adapter, {sizes} rows, columns and bottleneck", adapter(*sizes), quick=sizes[0] == 37)
