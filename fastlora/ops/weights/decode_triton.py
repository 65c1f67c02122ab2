"""LoRA's forward pass over a 4-bit weight by the ``triton`` backend, in one launch that decodes it."""

from collections.abc import Callable

from torch import Tensor

from fastlora.ops.decide import Decision, is_aligned
from fastlora.ops.prepared import prepared
from fastlora.ops.runtime import contiguous, in_dtype, row_major, rows_of
from fastlora.ops.weights.four_bit import FourBitWeight
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.launch import Ready
from fastlora_kernels.quant.forward import lora_forward_4bit
from fastlora_kernels.quant.kernels import LORA_FORWARD_4BIT
from fastlora_kernels.tile import Shape, Tile


def forward(
    x: Tensor,
    weight: FourBitWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    decision: Decision,
) -> tuple[Tensor, Tensor] | None:
    """y ``[..., N]`` and S for x ``[..., K]``, without dropout; None where rows aren't aligned in memory."""
    rows = rows_of(x)
    packed, *factors, table = weight.for_kernels()
    assert packed is not None
    if not is_aligned(row_major(rows)) or packed.data_ptr() % 16:
        return None
    paths = decision.paths
    assert paths is not None
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    s = x.new_empty(rows.shape[0], lora_A.shape[0])
    bias = None if bias is None else in_dtype(bias, x.dtype)
    _forward(
        rows, lora_A, lora_B, packed, *factors, table, bias, s, rows_of(y),
        blocksize=weight.blocksize, scaling=scaling, tile=paths.forward.tile, known=decision.known,
    )  # fmt: skip
    return y, s


@prepared(row_major, contiguous, contiguous)
def _forward(
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
