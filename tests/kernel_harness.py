"""What the kernel tests share: inputs between NaN, outputs between canaries, and the float64 comparison."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.exactness import assert_as_exact
from tests.lora_yardstick import unpack_mask

CANARY = 12345.0


class Harness:
    """Tensors inside margins that give away whoever reads or writes outside."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.canaries: list[tuple[Tensor, Tensor]] = []

    def input(self, values: Tensor, *, row_stride: int | None = None) -> Tensor:
        """The values in NaN margins; with a row stride, NaN between the rows too."""
        rows, cols = values.shape
        stride = row_stride or cols
        margin = float("nan") if values.dtype.is_floating_point else CANARY
        buffer = torch.full(((rows + 2) * stride + 64,), margin, device=self.device).to(values.dtype)
        view = buffer.as_strided((rows, cols), (stride, 1), 32)
        view.copy_(values)
        return view

    def random(
        self, rows: int, cols: int, *, padded: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        values = torch.randn(rows, cols).to(self.device, dtype or self.dtype)
        return self.input(values, row_stride=cols + 7 if padded else None)

    def output(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Unwritten elements read NaN (or a canary integer); the margins hold canaries."""
        dtype = dtype or self.dtype
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 128,), CANARY, device=self.device).to(dtype)
        inside = buffer[64 : 64 + size]
        if dtype.is_floating_point:
            inside.fill_(float("nan"))
        self.canaries.append((buffer[:64], buffer[64 + size :]))
        return inside.view(shape)

    def mask(self, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """A random packed mask, and the same as bools."""
        words = torch.randint(-(2**31), 2**31, (rows, -(-cols // 32)), dtype=torch.int64)
        packed = self.input(words.to(torch.int32))
        return packed, unpack_mask(packed, cols)

    def assert_margins_untouched(self) -> None:
        for margins in self.canaries:
            for margin in margins:
                assert torch.equal(margin, torch.full_like(margin, CANARY))


def shared_dx(keeps: Sequence[Tensor]) -> Callable[..., Tensor]:
    """What makes dX of layers with one input out of dY, W, dS and A of one after the other.

    Args:
        keeps: Of each layer, which elements of its low-rank part are kept, as bools.
    """

    def compute(*operands: Tensor) -> Tensor:
        of_layers = zip(operands[::4], operands[1::4], operands[2::4], operands[3::4], keeps, strict=True)
        return torch.stack([dy @ w + (ds @ a) * keep for dy, w, ds, a, keep in of_layers]).sum(0)

    return compute


def assert_exact(value: Tensor, compute: Callable[..., Tensor], *operands: Tensor) -> None:
    """Error against float64 within FACTOR of the same product's in torch at the result's dtype.

    Partial results are fp32 whatever the operands are, and held to an fp32 product of them.
    """
    assert_as_exact(["result"], [value], lambda tensors: [compute(*tensors)], operands, dtype=value.dtype)
