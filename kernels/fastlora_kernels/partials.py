"""The second, deterministic step of every split reduction: sum fp32 partial results in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _sum_block(partial_ptr, offs, P, SIZE, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, P):
        acc += tl.load(partial_ptr + offs, mask=offs < SIZE, other=0.0)
        partial_ptr += SIZE
    return acc


@triton.jit
def _sum_partials_kernel(
    partial_ptr,  # (P, SIZE)
    out_ptr,  # (SIZE,)
    P,
    SIZE,
    BLOCK: tl.constexpr,
):
    """out = Σ_p partial[p], accumulated in fp32 in the order of p, rounded once to out's dtype."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = _sum_block(partial_ptr, offs, P, SIZE, BLOCK)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < SIZE)


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """Sum ``partial [P, *out.shape]`` (fp32) over its first dimension into ``out``; zeros where P is 0."""
    if out.numel() == 0:
        return
    _sum_partials_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        partial_ptr=partial,
        out_ptr=out,
        P=partial.shape[0],
        SIZE=out.numel(),
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _store_section(ptr, values, offs, start, end):
    inside = (offs >= start) & (offs < end)
    tl.store(ptr + (offs - start), values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_four_partials_kernel(
    partial_ptr,  # (P, SIZE_0 + SIZE_1 + SIZE_2 + SIZE_3)
    out_0_ptr,  # (SIZE_0,)
    out_1_ptr,  # (SIZE_1,)
    out_2_ptr,  # (SIZE_2,)
    out_3_ptr,  # (SIZE_3,)
    P,
    SIZE_0,
    SIZE_1,
    SIZE_2,
    SIZE_3,
    BLOCK: tl.constexpr,
):
    """out_0 … out_3 = Σ_p partial[p] cut into four, accumulated in fp32 in the order of p, rounded once."""
    start_2 = SIZE_0 + SIZE_1
    start_3 = start_2 + SIZE_2
    end = start_3 + SIZE_3
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = _sum_block(partial_ptr, offs, P, end, BLOCK)
    _store_section(out_0_ptr, acc, offs, 0, SIZE_0)
    _store_section(out_1_ptr, acc, offs, SIZE_0, start_2)
    _store_section(out_2_ptr, acc, offs, start_2, start_3)
    _store_section(out_3_ptr, acc, offs, start_3, end)


def sum_four_partials(partial: Tensor, outs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Sum ``partial [P, sizes of outs]`` (fp32) over its first dimension into the four, in one launch."""
    sizes = [out.numel() for out in outs]
    _sum_four_partials_kernel[(triton.cdiv(sum(sizes), _BLOCK),)](
        partial,
        *outs,
        P=partial.shape[0],
        **{f"SIZE_{i}": size for i, size in enumerate(sizes)},
        BLOCK=_BLOCK,
        num_warps=4,
    )
