"""Quantised weights as bytes and factors, and what they stand for, computed in torch by definition."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# of NF4's kind: any 16 values do
TABLE = torch.linspace(-1, 1, 16) ** 3
FLOAT8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_GROUP = 256


@dataclass(frozen=True)
class FourBits:
    """A 4-bit weight.

    Attributes:
        shape: Of the dense weight.
        tensors: Packed codes, absmax, and where that is quantised itself its codes, their map and the offset,
            else None; the table of 16.
        blocksize: Elements that share a factor.
    """

    shape: Sequence[int]
    tensors: Sequence[Tensor | None]
    blocksize: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """table[code] · absmax in float32, rounded once to a dtype."""
        packed, absmax, absmax_codes, absmax_map, offset, table = self.tensors
        assert packed is not None
        assert absmax is not None
        assert table is not None
        if absmax_codes is not None:
            assert absmax_map is not None
            assert offset is not None
            factors = absmax.repeat_interleave(_GROUP)[: absmax_codes.numel()]
            absmax = absmax_map[absmax_codes.int()] * factors
            absmax = absmax + offset
        codes = torch.stack((packed >> 4, packed & 15), 1).view(-1)
        count = self.shape[0] * self.shape[1]
        values = table[codes.int()[:count]] * absmax.repeat_interleave(self.blocksize)[:count]
        return values.to(dtype).view(*self.shape)


def four_bits(n: int, k: int, blocksize: int, *, nested: bool) -> FourBits:
    """Random codes and factors of a weight ``[n, k]``.

    Args:
        n: Rows.
        k: Columns.
        blocksize: Elements that share a factor.
        nested: Whether the factors are quantised themselves.
    """
    count = n * k
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    blocks = -(-count // blocksize)
    if not nested:
        return FourBits((n, k), [packed, torch.rand(blocks) + 0.1, None, None, None, TABLE], blocksize)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    absmax, absmax_map = torch.rand(-(-blocks // _GROUP)) + 0.1, torch.linspace(-1, 1, 256) ** 3
    return FourBits((n, k), [packed, absmax, codes, absmax_map, torch.rand(1) + 1, TABLE], blocksize)


def eight_bits(n: int, k: int, *, is_float: bool, of_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random bytes ``[n, k]`` without NaN, factors ``[n]`` or ``[1]``, and what the bytes stand for.

    Args:
        n: Rows.
        k: Columns.
        is_float: Whether the bytes are e4m3fn numbers; else int8 ones.
        of_rows: Whether each row has a factor; else there is one for all.
    """
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    codes = codes.where(codes & 0x7F != 0x7F, 0)
    values = FLOAT8_VALUES[codes.int()] if is_float else codes.view(torch.int8).float()
    return codes, (torch.rand(n if of_rows else 1) + 0.1) / 64, values


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit, signs of zeros included."""
    bits = {2: torch.int16, 4: torch.int32}[one.dtype.itemsize]
    one, other = one.cpu(), other.cpu()
    return one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))
