"""LoRA's forward pass over a quantised weight that the ``triton`` backend decodes in its product's loop."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops import lora_triton
from fastlora.ops.decide import Decision, is_aligned
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import contiguous, in_dtype, row_major, rows_of
from fastlora.ops.weights.four_bit import FourBitWeight
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.scaled import ScaledWeight
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.launch import Ready
from fastlora_kernels.quant.forward import lora_forward_4bit, lora_forward_8bit
from fastlora_kernels.quant.kernels import LORA_FORWARD_4BIT, LORA_FORWARD_8BIT
from fastlora_kernels.tile import Shape, Tile


def forward(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    decision: Decision,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """y ``[..., N]``, S and the mask for x ``[..., K]``; None where rows aren't aligned in memory."""
    rows, paths = rows_of(x), decision.paths
    if not is_aligned(row_major(rows)) or weight.tensors[0].data_ptr() % 16:
        return None
    assert paths is not None
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    bias = None if bias is None else in_dtype(bias, x.dtype)
    tile, known = paths.forward.tile, decision.known
    if isinstance(weight, FourBitWeight):
        # a path without dropout
        assert seed is None
        s = x.new_empty(rows.shape[0], lora_A.shape[0])
        _four_bits(
            rows, lora_A, lora_B, *weight.for_kernels(), bias, s, rows_of(y),
            blocksize=weight.blocksize, scaling=scaling, tile=tile, known=known,
        )  # fmt: skip
        return y, s, None
    assert isinstance(weight, ScaledWeight)
    codes, is_float = weight.stored.view(torch.uint8), weight.stored.is_floating_point()
    s, mask = _eight_bits(
        rows, lora_A, lora_B, codes, weight.scale, bias, seed, rows_of(y), is_float=is_float,
        scaling=scaling, dropout=0.0 if seed is None else dropout, tile=tile, known=known,
    )  # fmt: skip
    return y, s, mask


@prepared(row_major, contiguous, contiguous)
def _four_bits(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_codes: Tensor | None,
    absmax_map: Tensor | None,
    offset: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    s: Tensor,
    y: Tensor,
    *,
    blocksize: int,
    scaling: float,
    tile: Tile | None,
) -> Callable[..., None]:
    """Fill S and y; see the launcher."""
    (m, k), (n, r) = x.shape, lora_B.shape
    plan = plans.choose(LORA_FORWARD_4BIT, Shape(m, n, k, r), x.dtype, targets.detect(x.device), tile=tile)
    ready = Ready(lora_forward_4bit, blocksize=blocksize, scale=scaling, plan=plan)

    def run(x: Tensor, a: Tensor, b: Tensor, *stored_bias_s_y: Tensor | None) -> None:
        *stored, bias, s, y = stored_bias_s_y
        ready(x, *stored, bias, a, b, s, y)

    return run


@prepared(row_major, contiguous, contiguous)
def _eight_bits(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    *,
    is_float: bool,
    scaling: float,
    dropout: float,
    tile: Tile | None,
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """S and, with a seed, the dropout mask; fill y, see the launcher."""
    (m, k), (n, r) = x.shape, lora_B.shape
    shape, target = Shape(m, n, k, r), targets.detect(x.device)
    s_and_mask = lora_triton.down(x, seed, shape, target, scaling=scaling, dropout=dropout)
    plan = plans.choose(LORA_FORWARD_8BIT, shape, x.dtype, target, tile=tile)
    fill = Ready(lora_forward_8bit, is_float=is_float, plan=plan)

    def run(
        x: Tensor, a: Tensor, b: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None,
        seed: Tensor | None, y: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        s, mask = s_and_mask(x, a, seed)
        fill(x, codes, scales, bias, s, b, y)
        return s, mask

    return run
