"""torchao's quantised tensors as weights of plain linear layers: Int8Tensor, Float8Tensor, NF4Tensor."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.scaled import ScaledWeight, unreadable

# where torchao quantised symmetrically, it keeps zeros
_known_shifts: Any = WeakIdKeyDictionary()


def read_int8(weight: Any) -> FrozenWeight | str:
    """An ``Int8Tensor``, whatever its layer does to inputs, or why it can't be read."""
    if weight.act_pre_scale is not None:
        return "Int8Tensor for inputs that are scaled"
    zero_point, block = weight.zero_point, tuple(weight.block_size)
    more = () if zero_point is None else (zero_point,)
    if weight.qdata.dtype != torch.int8 or len(block) != 2:
        return f"Int8Tensor of {weight.qdata.dtype} in blocks {block}"
    why = unreadable(weight.qdata, weight.scale, block, *more)
    if why is not None:
        return f"Int8Tensor {why}"
    shift = zero_point if zero_point is not None and _shifts(zero_point) else None
    return ScaledWeight(weight.qdata, weight.scale, block, zero_point=shift)


def _shifts(zero_point: Tensor) -> bool:
    """Whether any is not zero, for which a GPU is waited for: once for each tensor."""
    if torch.compiler.is_compiling():
        # zeros are subtracted there, too
        return True
    version = None if zero_point.is_inference() else zero_point._version
    known = _known_shifts.get(zero_point)
    if known is None or known[0] != version:
        known = _known_shifts[zero_point] = (version, bool(zero_point.any()))
    return bool(known[1])


def read_float8(weight: Any) -> FrozenWeight | str:
    """A ``Float8Tensor``, whatever its layer does to inputs, or why it can't be read."""
    stored, factors = weight.qdata, weight.scale
    if factors.numel() == 1:
        factors = factors.reshape(1, 1)
    if stored.ndim != 2 or factors.ndim != 2 or not factors.numel():
        return f"Float8Tensor {list(stored.shape)} with factors {list(factors.shape)}"
    if any(size % count for size, count in zip(stored.shape, factors.shape, strict=True)):
        return f"Float8Tensor {list(stored.shape)} with factors {list(factors.shape)}"
    block = (stored.shape[0] // factors.shape[0], stored.shape[1] // factors.shape[1])
    why = unreadable(stored, factors, block)
    return f"Float8Tensor {why}" if why else ScaledWeight(stored, factors, block, product=torch.float32)


class NF4Weight(FrozenWeight):
    """Two values a byte, the first one in the high bits; table and factors are in the dtype W had.

    Attributes:
        packed: uint8 ``[N·K/2]``.
        table: The 16 values.
        scalers: One for each block, int8.
        factor: Divides the scalers of ``scaler_block_size`` blocks.
        mean: Added to all of these.
        block_size: Values that share a scaler.
        scaler_block_size: Blocks that share a factor.
    """

    def __init__(self, shape: torch.Size, tensors: Sequence[Tensor], block_size: int, groups: int) -> None:
        """Of tensors that :func:`read_nf4` has checked."""
        self.packed, self.table, self.scalers, self.factor, self.mean = tensors
        self.shape, self.device, self.tensors = shape, self.packed.device, tuple(tensors)
        self.block_size, self.scaler_block_size = block_size, groups
        self.row_step = block_size // math.gcd(shape[1], block_size)
        self.form = (shape, block_size, groups)

    def recipe(self) -> tuple[list[int], float]:
        """N, K, block size and blocks to a group."""
        return [*self.shape, self.block_size, self.scaler_block_size], 1.0

    @classmethod
    def rebuilt(cls, tensors: Sequence[Tensor], numbers: Sequence[int], unit: float) -> FrozenWeight:
        """The weight of a recipe."""
        return cls(torch.Size(numbers[:2]), tensors, *numbers[2:])

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of W ``[rows, K]``: as torchao computes them, in W's dtype, then in ``dtype``."""
        start, stop = self._span(rows)
        count, first = (stop - start) * self.shape[1], start * self.shape[1]
        # whole blocks: the last one may go on beyond these rows
        blocks = slice(first // self.block_size, -(-(first + count) // self.block_size))
        packed = self.packed[first // 2 : blocks.stop * self.block_size // 2]
        values: Tensor = self.table[torch.stack([packed >> 4, packed & 15], 1).view(-1).int()]
        factors = self.factor.repeat_interleave(self.scaler_block_size)[blocks]
        scalers = (self.scalers[blocks] / factors).to(self.table.dtype) + self.mean
        values.view(-1, self.block_size).mul_(scalers[:, None])
        return values[:count].view(stop - start, self.shape[1]).to(dtype)


def read_nf4(weight: Any) -> FrozenWeight | str:
    """An ``NF4Tensor``, or why it can't be read."""
    packed, shape = weight.quantized_data, weight.shape
    if packed.is_meta:
        return "NF4Tensor on the meta device"
    if len(shape) != 2 or weight.block_size % 2 or not weight.is_contiguous():
        return f"NF4Tensor {list(shape)} in blocks of {weight.block_size}"
    dtype, blocks = weight.dtype, shape.numel() // weight.block_size
    expected = (
        ("bytes", packed, torch.uint8, shape.numel() // 2),
        ("table", weight.nf4, dtype, 16),
        ("scalers", weight.quantized_scalers, torch.int8, blocks),
        ("factors", weight.quantization_factor, dtype, blocks // weight.scaler_block_size),
        ("mean", weight.scaler_mean, dtype, 1),
    )
    for name, tensor, wanted, count in expected:
        if tensor.dtype != wanted or tensor.numel() != count or not tensor.is_contiguous():
            return f"NF4Tensor with {name} {tensor.dtype} {list(tensor.shape)}, not {count} of {wanted}"
    tensors = [tensor for _, tensor, _, _ in expected]
    return NF4Weight(shape, tensors, weight.block_size, weight.scaler_block_size)
