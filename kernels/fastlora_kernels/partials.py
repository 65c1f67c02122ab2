"""The second, deterministic step of every split reduction: sum fp32 partial results in a fixed order."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, start
from fastlora_kernels.tile import cdiv

_BLOCK = 1024


@triton.jit
def _sum_block(partial_ptr, offs, P, SIZE, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, P):
        acc += tl.load(partial_ptr + offs, mask=offs < SIZE, other=0.0)
        partial_ptr += SIZE
    return acc


@triton.jit
def _sum_and_store(partial_ptr, out_ptr, block, P, SIZE, BLOCK: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = _sum_block(partial_ptr, offs, P, SIZE, BLOCK)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < SIZE)


# how many parts there are changes with the rows, and nothing else in the code
@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partial_ptr,  # (P, SIZE)
    out_ptr,  # (SIZE,)
    P,
    SIZE,
    BLOCK: tl.constexpr,
):
    """out = Σ_p partial[p], accumulated in fp32 in the order of p, rounded once to out's dtype."""
    _sum_and_store(partial_ptr, out_ptr, tl.program_id(0), P, SIZE, BLOCK)


def sum_partials(partial: Tensor, out: Tensor) -> Launch | None:
    """Sum ``partial [P, *out.shape]`` (fp32) over its first dimension into ``out``; zeros where P is 0."""
    size = out.numel()
    return _start(_sum_partials_kernel, size)(partial_ptr=partial, out_ptr=out, P=partial.shape[0], SIZE=size)


@triton.jit(do_not_specialize=["P_0", "P_1"])
def _sum_two_partials_kernel(
    partial_0_ptr,  # (P_0, SIZE_0)
    out_0_ptr,  # (SIZE_0,)
    partial_1_ptr,  # (P_1, SIZE_1)
    out_1_ptr,  # (SIZE_1,)
    P_0,
    P_1,
    SIZE_0,
    SIZE_1,
    BLOCK: tl.constexpr,
):
    """out_i = Σ_p partial_i[p], accumulated in fp32 in the order of p, rounded once; lengths may differ."""
    pid = tl.program_id(0)
    blocks_0 = tl.cdiv(SIZE_0, BLOCK)
    if pid < blocks_0:
        _sum_and_store(partial_0_ptr, out_0_ptr, pid, P_0, SIZE_0, BLOCK)
    else:
        _sum_and_store(partial_1_ptr, out_1_ptr, pid - blocks_0, P_1, SIZE_1, BLOCK)


def sum_two_partials(partial_0: Tensor, out_0: Tensor, partial_1: Tensor, out_1: Tensor) -> Launch | None:
    """Sum two partial results in one launch: fp32 ``[P, *out.shape]`` over the first dimension into out."""
    return _start(_sum_two_partials_kernel, out_0.numel(), out_1.numel())(
        partial_0_ptr=partial_0, out_0_ptr=out_0, partial_1_ptr=partial_1, out_1_ptr=out_1,
        P_0=partial_0.shape[0], P_1=partial_1.shape[0], SIZE_0=out_0.numel(), SIZE_1=out_1.numel(),
    )  # fmt: skip


@triton.jit
def _store_section(ptr, values, offs, start, end):
    inside = (offs >= start) & (offs < end)
    tl.store(ptr + (offs - start), values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P"])
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


def sum_four_partials(partial: Tensor, *outs: Tensor) -> Launch | None:
    """Sum ``partial [P, sizes of outs]`` (fp32) over its first dimension into four outs, in one launch."""
    sizes = [out.numel() for out in outs]
    return _start(_sum_four_partials_kernel, sum(sizes))(
        partial_ptr=partial, **{f"out_{i}_ptr": out for i, out in enumerate(outs)},
        P=partial.shape[0], **{f"SIZE_{i}": size for i, size in enumerate(sizes)},
    )  # fmt: skip


def _start(function: Any, *sizes: int) -> Callable[..., Launch | None]:
    """One program for every block of outputs of these sizes."""
    return start(function, (sum(cdiv(size, _BLOCK) for size in sizes),), BLOCK=_BLOCK, num_warps=4)
