"""out += mask ⊙ (L·R) in place: the low-rank product added to what a library product has left in memory."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.launch import Launch, launch
from fastlora_kernels.lora.kernels import LORA_ADD
from fastlora_kernels.primitives import (
    MASK_WORD_BITS,
    block_range,
    grouped_tile,
    load_keep_words,
    load_tile,
    store_tile,
    unpack_keep,
)
from fastlora_kernels.tile import Plan, cdiv

_WORD_BITS = tl.constexpr(MASK_WORD_BITS)


@triton.jit
def _lora_add_kernel(
    left_ptr,  # (M, R)
    lora_right_ptr,  # (R, C), with TRANSPOSED (C, R)
    mask_ptr,  # (M, C / 32)
    out_ptr,  # (M, C)
    M,
    C,
    R,
    stride_om,
    HAS_DROPOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out += mask ⊙ (left·right), summed in fp32 and rounded once. Without HAS_DROPOUT mask_ptr is absent.

    out is read and written once. Ranks are taken BLOCK_R at a time, so that any rank fits.
    """
    pid_m, pid_c = grouped_tile(M, C, BLOCK_M, BLOCK_C, GROUP)
    offs_m = block_range(pid_m, BLOCK_M)
    offs_c = block_range(pid_c, BLOCK_C)

    out_tile = load_tile(out_ptr, offs_m, offs_c, stride_om, M, C)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        left_tile = load_tile(left_ptr, offs_m, offs_r, R, M, R)
        if TRANSPOSED:
            right_tile = tl.trans(load_tile(lora_right_ptr, offs_c, offs_r, R, C, R).to(left_tile.dtype))
        else:
            right_tile = load_tile(lora_right_ptr, offs_r, offs_c, C, R, C).to(left_tile.dtype)
        acc = tl.dot(left_tile, right_tile, acc, input_precision="ieee")
    if HAS_DROPOUT:
        words = block_range(pid_c, BLOCK_C // _WORD_BITS)
        packed = load_keep_words(mask_ptr, offs_m, words, tl.cdiv(C, _WORD_BITS), M)
        acc = tl.where(unpack_keep(packed, BLOCK_M, BLOCK_C), acc, 0.0)
    store_tile(out_ptr, acc + out_tile.to(tl.float32), offs_m, offs_c, stride_om, M, C)


def lora_add(
    left: Tensor, right: Tensor, mask: Tensor | None, out: Tensor, *, transposed: bool, plan: Plan
) -> Launch | None:
    """Add mask ⊙ (left·right) to ``out [M, C]`` in place, for left ``[M, R]``.

    ``right`` is ``[R, C]``, as A for dX += mask ⊙ (dS·A), or with ``transposed`` ``[C, R]``, as B for
    y += S·Bᵀ. The packed mask is ``[M, ⌈C/32⌉]`` (int32), None without dropout. ``out`` may be columns of a
    wider matrix.
    """
    (m, c), r = out.shape, left.shape[1]
    tile = plan.tile
    programs = cdiv(m, tile.rows) * cdiv(c, tile.cols)
    return launch(_lora_add_kernel, LORA_ADD, tile, (programs,))(
        left_ptr=left, lora_right_ptr=right, mask_ptr=mask, out_ptr=out,
        M=m, C=c, R=r, stride_om=out.stride(0), HAS_DROPOUT=mask is not None, TRANSPOSED=transposed,
    )  # fmt: skip
