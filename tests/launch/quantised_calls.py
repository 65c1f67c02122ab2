"""What is launched over quantised frozen weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.weights import dense_triton
from fastlora.ops.weights.four_bit import FourBitWeight, Nested
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.scaled import ScaledWeight
from tests.launch.calls import Case, Work, lora

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def quantised() -> Iterator[Case]:
    """Frozen weights that become dense by a kernel, forward and backward, whole or in parts."""

    def layer(m: int, n: int, k: int, *, nested: bool = True, **more: Any) -> Work:
        return lora(m, n, k, p=0.1, weight=four_bit_weight(n, k, nested=nested), **more)

    for nested in (True, False):
        yield Case(f"NF4, nested: {nested}", layer(512, 768, 768, nested=nested), quick=True)
    # 112 MiB in 16 bits
    yield Case("NF4 in two parts", layer(4096, 14336, 4096), quick=True)
    yield Case("NF4, few rows", layer(1, 4096, 4096))
    for nested in (True, False):
        work = lora(4, 3456, 4096, weight=four_bit_weight(3456, 4096, nested=nested), bias=nested)
        yield Case(f"NF4, decoded, nested: {nested}", work, quick=nested)
    for codes in (torch.int8, torch.float8_e4m3fn):
        work = lora(16, 4096, 3456, p=0.1, weight=eight_bit_weight(4096, 3456, codes))
        yield Case(f"{codes}, decoded", work, quick=codes == torch.int8)
    yield Case("NF4, ragged", layer(64, 35, 33, backend="triton"), quick=True)
    for dtype in (FP16, FP32):
        yield Case(f"NF4, {dtype}", layer(64, 768, 768, dtype=dtype, backend="triton"), quick=dtype == FP32)
    int8, float8 = torch.int8, torch.float8_e4m3fn
    for codes, blocks, k in ((int8, (1, 768), 768), (float8, (128, 128), 768), (float8, (512, 70), 70)):
        for dtype in (BF16, FP32):
            work = eight_bit_rows(512, k, codes, blocks=blocks, dtype=dtype)
            yield Case(f"{codes}, blocks of {blocks}, {dtype}", work, quick=dtype == BF16)


def four_bit_weight(n: int, k: int, *, nested: bool = True, blocksize: int = 64) -> FrozenWeight:
    """A weight ``[n, k]`` of NF4's kind, without the library that makes them.

    Args:
        n: Features that come out.
        k: Features that go in.
        nested: Whether its statistics are quantised themselves.
        blocksize: Elements that share a factor.
    """
    blocks, table = -(-n * k // blocksize), torch.empty(16)
    packed = torch.empty((n * k + 1) // 2, dtype=torch.uint8)
    absmax, more = torch.empty(blocks), None
    if nested:
        more = Nested(torch.empty(-(-blocks // 256)), torch.empty(256), torch.empty(()), 256)
        absmax = torch.empty(blocks, dtype=torch.uint8)

    class Weight(FourBitWeight):
        """With a table of its own."""

        @property
        def table(self) -> Tensor:
            return table

    return Weight(torch.Size((n, k)), packed, absmax, more, blocksize, "nf4")


def eight_bit_weight(n: int, k: int, codes_dtype: torch.dtype) -> FrozenWeight:
    """A weight ``[n, k]`` of bytes with a scale for every row.

    Args:
        n: Features that come out.
        k: Features that go in.
        codes_dtype: int8 or float8_e4m3fn.
    """
    codes = torch.empty(n, k, dtype=torch.uint8).view(codes_dtype)
    return ScaledWeight(codes, torch.empty(n, 1), (1, k))


def eight_bit_rows(
    n: int, k: int, codes_dtype: torch.dtype, *, blocks: tuple[int, int], dtype: torch.dtype
) -> Work:
    """Half of an 8-bit weight's rows made dense.

    Args:
        n: Rows.
        k: Columns.
        codes_dtype: int8 or float8_e4m3fn.
        blocks: Rows and columns that share a factor.
        dtype: Of the dense rows.
    """
    codes = torch.empty(n, k, dtype=torch.uint8).view(codes_dtype)
    scales = torch.empty(-(-n // blocks[0]), -(-k // blocks[1]))

    def work() -> None:
        settings: dict[str, Any] = {"scale_rows": blocks[0], "scale_cols": blocks[1]}
        dense = dense_triton.eight_bit(codes, scales, rows=slice(n // 2, n), dtype=dtype, **settings)
        assert (dense.shape, dense.dtype) == ((n - n // 2, k), dtype)

    return work
