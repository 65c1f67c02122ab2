"""What stands beside a slice must not reach a result: 16-bit products on AMX read one number of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.functional import adapter, dora_linear, lora_linear
from fastlora.ops.runtime import packed

M, N, K, R = 37, 31, 69, 5
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.linear)


def padded(*shape: int, dtype: torch.dtype, margin: float = float("nan")) -> Tensor:
    """Random numbers whose rows have a margin between them."""
    wide = torch.full((*shape[:-1], shape[-1] + 7), margin, dtype=dtype)
    wide[..., : shape[-1]] = torch.randn(
        *shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])
    )
    return wide[..., : shape[-1]]


def lora(x: Tensor, dropout: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    parts = [padded(*shape, dtype=x.dtype).requires_grad_() for shape in ((N, K), (R, K), (N, R))]
    weight, a, b = parts
    y = lora_linear(x, weight, None, a, b, scaling=0.5, dropout=dropout, generator=generator)
    return y, parts


def dora(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    parts = [padded(*shape, dtype=x.dtype).requires_grad_() for shape in ((N, K), (R, K), (N, R))]
    magnitude = torch.ones(N, requires_grad=True)
    return dora_linear(x, parts[0], None, parts[1], parts[2], magnitude, scaling=0.5), [*parts, magnitude]


def bottleneck(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    parts = [padded(*shape, dtype=x.dtype).requires_grad_() for shape in ((R, K), (K, R))]
    down, up = parts
    return adapter(x, down, None, up, None), parts


CALLS: dict[str, Callable[[Tensor], tuple[Tensor, list[Tensor]]]] = {
    "lora": lora,
    "lora-dropout": lambda x: lora(x, dropout=0.3),
    "dora": dora,
    "adapter": bottleneck,
}


class Operands(TorchDispatchMode):
    """Notes the operands of library products that a product on AMX would read past."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.unpacked = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.seen += 1
            matrices = [t for t in args if isinstance(t, Tensor) and t.dim() == 2]
            self.unpacked += [f"{func} {t.shape} {t.stride()}" for t in matrices if packed(t) is not t]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CALLS)
# under auto eager takes small calls, but not these
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_library_products_get_packed_operands(backend: str, name: str, dtype: torch.dtype) -> None:
    x = padded(M, K, dtype=dtype).requires_grad_()
    with fastlora.use_backend(backend), Operands() as operands:
        y, parts = CALLS[name](x)
        dy = padded(*y.shape, dtype=dtype)
        gradients = torch.autograd.grad(y, [x, *parts], dy)
    assert operands.seen >= 4
    assert operands.unpacked == []
    assert all(value.isfinite().all() for value in (y, *gradients))


@pytest.mark.parametrize("name", CALLS)
def test_a_margin_changes_nothing(name: str) -> None:
    x = padded(M, K, dtype=torch.bfloat16)
    with fastlora.use_backend("torch"):
        assert torch.equal(CALLS[name](x)[0], CALLS[name](x.clone())[0])


def test_only_what_could_be_read_past_is_copied() -> None:
    wide = torch.full((M, K + 7), float("nan"), dtype=torch.bfloat16)
    copied = [wide[:, :K], wide[3:4, :K], wide.t()[:K], wide[:1, :K].expand(3, K)]
    for matrix in copied:
        copy = packed(matrix)
        assert copy.stride() == (matrix.shape[1], 1)
        assert torch.equal(copy.nan_to_num(), matrix.nan_to_num())
    kept = [wide[:, : K - 1], wide[:, :K].clone(), wide[:, :K].clone().t(), wide[:, :K].float(), wide[:, ::2]]
    kept += [wide.double()[:, :K], wide.float()[:, :K]]
    assert all(packed(matrix) is matrix for matrix in kept)
