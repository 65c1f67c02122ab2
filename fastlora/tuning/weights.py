"""Random quantised weights, drawn without the libraries that make them."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora.ops.weights.four_bit import FourBitWeight, Nested
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.scaled import ScaledWeight
from fastlora_kernels.choose.quantised import Stored
from fastlora_kernels.tile import cdiv

_GROUP = 256


class DrawnWeight(FourBitWeight):
    """A random 4-bit weight ``[n, k]`` of a usual scale, drawn without the library that makes them."""

    def __init__(self, n: int, k: int, blocksize: int, nested: bool, device: torch.device) -> None:
        """See the class.

        Args:
            n: Outputs.
            k: Inputs.
            blocksize: Values that share a factor.
            nested: Whether the factors are quantised themselves.
            device: Where it lies.
        """
        blocks = cdiv(n * k, blocksize)
        packed = torch.randint(0, 256, (cdiv(n * k, 2),), dtype=torch.uint8, device=device)
        factors = (torch.rand(blocks, device=device) + 1) * k**-0.5
        more = None
        if nested:
            offset, groups = factors.mean(), torch.rand(cdiv(blocks, _GROUP), device=device) * k**-0.5 / 2
            more = Nested(groups, torch.linspace(-1, 1, 256, device=device) ** 3, offset, _GROUP)
            factors = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
        super().__init__(torch.Size((n, k)), packed, factors, more, blocksize, "nf4")
        self._values = torch.linspace(-1, 1, 16, device=device)

    @property
    def table(self) -> Tensor:
        """Any 16 values do."""
        return self._values

    def by_definition(self, dtype: torch.dtype) -> Tensor:
        """All rows, in float32 and rounded once, an operation of torch at a time."""
        factors = self.absmax
        if self.nested is not None:
            groups = self.nested.absmax.repeat_interleave(_GROUP)[: factors.numel()]
            factors = self.nested.code[factors.int()] * groups
            factors = factors + self.nested.offset
        count = self.shape.numel()
        codes = torch.stack((self.packed >> 4, self.packed & 15), 1).flatten()[:count]
        values = self.table[codes.int()] * factors.repeat_interleave(self.blocksize)[:count]
        return values.to(dtype).view(self.shape)


def draw_weight(stored: Stored, n: int, k: int, device: torch.device) -> FrozenWeight:
    """A random weight ``[n, k]`` of a usual scale, as predictions have it stored.

    Args:
        stored: How: ``nf4``, ``int8``, ``fp8`` or ``fp8-rows``.
        n: Outputs.
        k: Inputs.
        device: Where it lies.
    """
    return _DRAWN[stored](n, k, device)


def _nf4(n: int, k: int, device: torch.device) -> FrozenWeight:
    return DrawnWeight(n, k, 64, True, device)


def _int8(n: int, k: int, device: torch.device) -> FrozenWeight:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return ScaledWeight(codes, (torch.rand(n, 1, device=device) + 1) * k**-0.5 / 127, (1, k))


def _fp8(n: int, k: int, device: torch.device) -> FrozenWeight:
    codes = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(cdiv(n, 128), cdiv(k, 128), device=device) + 1
    return ScaledWeight(codes, scales * k**-0.5, (128, 128))


def _fp8_rows(n: int, k: int, device: torch.device) -> FrozenWeight:
    codes = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    return ScaledWeight(codes, (torch.rand(n, 1, device=device) + 1) * k**-0.5, (1, k))


_DRAWN: dict[Stored, Callable[[int, int, torch.device], FrozenWeight]] = {
    "nf4": _nf4,
    "int8": _int8,
    "fp8": _fp8,
    "fp8-rows": _fp8_rows,
}
