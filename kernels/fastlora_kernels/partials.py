"""The second, deterministic step of every split reduction: sum fp32 partial results in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


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
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, P):
        acc += tl.load(partial_ptr + offs, mask=offs < SIZE, other=0.0)
        partial_ptr += SIZE
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
