"""Weights of one byte a value times factors: int8 and FP8, a factor for all, each row or each block."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.weights.frozen import FrozenWeight, is_made_dense_by_kernels

_PRODUCTS = (None, torch.float32, torch.bfloat16, torch.float16)
CODES = frozenset({torch.int8, torch.float8_e4m3fn, torch.float8_e5m2})


class ScaledWeight(FrozenWeight):
    """W[i, j] = codes[i, j] · factors[i // block[0], j // block[1]], rounded once.

    Attributes:
        stored: int8 or float8 ``[N, K]``, row-major.
        factors: ``[1, 1]``, ``[N, 1]`` or a block's each: ``[⌈N/block[0]⌉, ⌈K/block[1]⌉]``.
        block: Rows and columns that share a factor.
        zero_point: Subtracted from the codes, int8 in the shape of the factors; None: nothing is.
        unit: Multiplies the factors.
        multiplied: The factors times their unit, float32, where they are remembered; else None.
        product: In which dtype its library multiplies, before it rounds to the wanted one; None: in that one,
            or float32 if that is narrower.
    """

    def __init__(
        self,
        stored: Tensor,
        factors: Tensor,
        block: tuple[int, int],
        *,
        zero_point: Tensor | None = None,
        unit: float = 1.0,
        multiplied: Tensor | None = None,
        product: torch.dtype | None = None,
    ) -> None:
        """Of tensors that :func:`unreadable` has checked."""
        self.shape, self.device = stored.shape, stored.device
        self.stored, self.factors, self.block, self.zero_point = stored, factors, block, zero_point
        self.unit, self.multiplied, self.product = unit, multiplied, product
        self.row_step = block[0] if factors.shape[0] > 1 else 1
        self.tensors = (stored, factors) if zero_point is None else (stored, factors, zero_point)
        self.form = (block, unit, product)

    @property
    def storage(self) -> str:
        """By the kind of its codes; of floats, whether a row has one factor."""
        if not self.stored.is_floating_point():
            return "int8"
        return "fp8-rows" if self._has_factors_of_rows() else "fp8"

    @property
    def is_decodable(self) -> bool:
        """Whether the sums of a row have one factor, with which W is not rounded on the way."""
        return self._has_factors_of_rows() and self._fits_the_kernel()

    @property
    def scale(self) -> Tensor | None:
        """The factors, in float32, of a weight that is decodable."""
        return self._multiplied().view(-1) if self.is_decodable else None

    def _codes(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Rows of the codes ``[rows, K]`` less their zero point, exact in every dtype."""
        codes = self.stored[start:stop].to(dtype)
        if self.zero_point is not None:
            self._each(codes, self._of_rows(self.zero_point, start, stop), torch.Tensor.sub_)
        return codes

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of W ``[rows, K]``."""
        start, stop = self._span(rows)
        elements = (stop - start) * self.shape[1]
        if self._fits_the_kernel() and is_made_dense_by_kernels(self.device, dtype, elements):
            # imported late: Triton is not installed everywhere
            from fastlora.ops.weights import dense_triton

            height, width = self._block_of_all()
            factors, of = self._multiplied(), slice(start, stop)
            block: Any = {"scale_rows": height, "scale_cols": width}
            return dense_triton.eight_bit(self.stored, factors, rows=of, dtype=dtype, **block)
        # multiplied in place by wider factors, 16-bit codes become products that are rounded once
        in_place = self.product is None or (self.product == torch.float32 and dtype.itemsize < 4)
        dense = self._codes(dtype if in_place else self.product or dtype, start, stop)
        factors = self._of_rows(self._multiplied(), start, stop)
        self._each(dense, factors, torch.Tensor.mul_)
        return dense.to(dtype)

    def recipe(self) -> tuple[list[int], float]:
        """N, K, the block and the products' dtype; the unit."""
        return [*self.shape, *self.block, _PRODUCTS.index(self.product)], self.unit

    @classmethod
    def rebuilt(cls, tensors: Sequence[Tensor], numbers: Sequence[int], unit: float) -> FrozenWeight:
        """The weight of a recipe."""
        stored, factors, *more = tensors
        settings: Any = {"zero_point": more[0] if more else None, "unit": unit}
        return cls(stored, factors, (numbers[2], numbers[3]), product=_PRODUCTS[numbers[4]], **settings)

    def _has_factors_of_rows(self) -> bool:
        rows, columns = self.factors.shape
        return columns == 1 and rows in (1, self.shape[0])

    def _fits_the_kernel(self) -> bool:
        if self.stored.dtype not in (torch.int8, torch.float8_e4m3fn) or self.zero_point is not None:
            return False
        width = self._block_of_all()[1]
        return self.product in (None, torch.float32) and (width % 128 == 0 or width == self.shape[1])

    def _block_of_all(self) -> tuple[int, int]:
        """Rows and columns that share a factor, all of them where there is one factor for all."""
        rows, columns = self.factors.shape
        return self.block[0] if rows > 1 else self.shape[0], self.block[1] if columns > 1 else self.shape[1]

    def _of_rows(self, of_blocks: Tensor, start: int, stop: int) -> Tensor:
        """What belongs to these rows: ``[rows or 1, blocks of columns]``."""
        if of_blocks.shape[0] == 1:
            return of_blocks
        height = self.block[0]
        of_blocks = of_blocks[start // height : -(-stop // height)]
        return of_blocks.repeat_interleave(height, 0)[: stop - start] if height > 1 else of_blocks

    def _multiplied(self) -> Tensor:
        if self.multiplied is not None:
            return self.multiplied
        factors = self.factors.to(self.product or torch.float32)
        return factors if self.unit == 1 else factors.mul(self.unit)

    def _each(self, dense: Tensor, of_blocks: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Change every block of columns in place by its number, without a tensor of them as large as W."""
        width, columns = self.block[1], of_blocks.shape[1]
        if columns == 1:
            change(dense, of_blocks)
            return
        whole = dense.shape[1] // width
        change(dense[:, : whole * width].unflatten(1, (whole, width)), of_blocks[:, :whole, None])
        if whole < columns:
            change(dense[:, whole * width :], of_blocks[:, whole:])


def unreadable(stored: Tensor, factors: Tensor, block: tuple[int, int], *more: Tensor) -> str | None:
    """What about these codes and factors is not as it is known to be.

    Args:
        stored: The codes.
        factors: One for each block, in two dimensions.
        block: Rows and columns that share a factor.
        more: What else there is for each block: a zero point.
    """
    if stored.is_meta:
        return "with a weight on the meta device"
    if stored.dtype not in CODES or stored.ndim != 2 or not stored.is_contiguous() or not stored.numel():
        return f"with a weight {stored.dtype} {list(stored.shape)} of strides {stored.stride()}"
    blocks = tuple(-(-size // step) for size, step in zip(stored.shape, block, strict=True))
    for tensor in (factors, *more):
        if tensor.shape != blocks or tensor.device != stored.device:
            return (
                f"with factors {list(tensor.shape)} on {tensor.device}, not {list(blocks)} on {stored.device}"
            )
        if not tensor.is_contiguous():
            return f"with factors of strides {tensor.stride()}"
    if not factors.dtype.is_floating_point:
        return f"with factors in {factors.dtype}"
    return None
