"""A launch of every kernel that reads quantised weights: dense ones are the bits of their definition."""

from fastlora_kernels.quant.dequantise import dequantise_4bit, dequantise_8bit
from fastlora_kernels.quant.forward import lora_forward_4bit, lora_forward_8bit
from fastlora_kernels.quant.kernels import (
    DEQUANTISE_4BIT,
    DEQUANTISE_8BIT,
    LORA_FORWARD_4BIT,
    LORA_FORWARD_8BIT,
    SPAN,
)
from tests.kernel_harness import assert_exact
from tests.ptx.trial import Trial
from tests.stored_weights import eight_bits, four_bits, same_bits

_BLOCK = 64


def _four_bits(t: Trial) -> None:
    """Part of a weight that begins within a span, and within a byte where rows are not aligned."""
    first = 0 if not t.ragged else SPAN // 2 if t.spec.aligned else 7
    end = t.size["SPANS"] * SPAN - (0 if t.spec.aligned else 5)
    stored = four_bits(1, end, 2 * SPAN, nested=t.has("HAS_NESTED"))
    given = [None if each is None else t.harness.input(each.view(1, -1))[0] for each in stored.tensors]
    dense = t.out(1, end - first)
    packed, absmax, codes, absmax_map, offset, table = given
    assert packed is not None
    assert absmax is not None
    assert table is not None
    dequantise_4bit(
        packed, absmax, codes, absmax_map, offset, table, dense,
        first=first, blocksize=stored.blocksize, plan=t.plan,
    )  # fmt: skip
    assert same_bits(dense, stored.dense(t.dtype)[:, first:])


def _eight_bits(t: Trial) -> None:
    """A factor for every row."""
    (n, k), is_float = (t.size["N"], t.size["K"]), t.has("IS_FLOAT")
    codes, scales, values = eight_bits(n, k, is_float=is_float, of_rows=True)
    dense = t.out("N", "K")
    dequantise_8bit(
        t.harness.input(codes), t.harness.input(scales[:, None]), dense,
        first_row=0, scale_rows=1, scale_cols=k, is_float=is_float, plan=t.plan,
    )  # fmt: skip
    assert same_bits(dense, (values * scales[:, None]).to(t.dtype))


def _forward_four_bits(t: Trial) -> None:
    """Rows of whole blocks, as everywhere; all else ends within a tile."""
    n, steps = t.size["N"], t.spec.tile.stages + 2
    blocksize = _BLOCK if t.ragged else 2 * _BLOCK
    t.size["K"] = k = steps * 2 * _BLOCK
    stored = four_bits(n, k, blocksize, nested=t.has("HAS_NESTED"))
    packed, absmax, codes, absmax_map, offset, table = (
        None if each is None else t.harness.input(each.view(1, -1))[0] for each in stored.tensors
    )
    assert packed is not None
    assert absmax is not None
    assert table is not None
    x, bias = t.layer("M", "K"), t.bias("N")
    a, b, s, y = t.trainable("R", "K"), t.trainable("N", "R"), t.out("M", "R"), t.out("M", "N")
    lora_forward_4bit(
        x, packed, absmax, codes, absmax_map, offset, table, bias, a, b, s, y,
        blocksize=blocksize, scale=0.5, plan=t.plan,
    )  # fmt: skip
    assert_exact(s, lambda x, a: 0.5 * (x @ a.t()), x, t.low(a))
    w, o = stored.dense(t.dtype), t.or_zeros(bias, "N")
    assert_exact(y, lambda x, w, s, b, o: x @ w.t() + s @ b.t() + o, x, w, s, t.low(b), o)


def _forward_eight_bits(t: Trial) -> None:
    """Ragged, a scale for every row; else one for all."""
    is_float = t.has("IS_FLOAT")
    codes, scales, values = eight_bits(t.size["N"], t.size["K"], is_float=is_float, of_rows=t.ragged)
    x, bias, s, b = t.layer("M", "K"), t.bias("N"), t.layer("M", "R", padded=False), t.trainable("N", "R")
    y, given = t.out("M", "N"), t.harness.input(scales[None])[0]
    lora_forward_8bit(x, t.harness.input(codes), given, bias, s, b, y, is_float=is_float, plan=t.plan)
    assert_exact(
        y,
        lambda x, w, f, s, b, o: x @ (w * f[:, None]).to(x.dtype).t() + s @ b.t() + o,
        *(x, values.to(t.dtype), scales, s, t.low(b), t.or_zeros(bias, "N")),
    )


QUANT_TRIALS = {
    DEQUANTISE_4BIT.name: _four_bits,
    DEQUANTISE_8BIT.name: _eight_bits,
    LORA_FORWARD_4BIT.name: _forward_four_bits,
    LORA_FORWARD_8BIT.name: _forward_eight_bits,
}
