"""What a kernel is launched with: tensors with ragged edges or of whole tiles, for a plan's spec.

They lie between NaN and canaries, and are exactly as large as the executor lets a kernel touch. The kernels'
records say which specs there are, and how long each axis is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora_kernels.adapter.kernels import ADAPTER_FORWARD
from fastlora_kernels.choose.plan import KERNELS
from fastlora_kernels.compile.specs import DTYPES, Spec, specs
from fastlora_kernels.lora.kernels import LORA_FORWARD_SINGLE
from fastlora_kernels.quant.kernels import LORA_FORWARD_4BIT
from fastlora_kernels.tile import Plan, cdiv
from tests.kernel_harness import Harness
from tests.philox import SEED, THRESHOLD, mask_uniforms

# several parts of whatever a kernel splits
SPLITS = 2
# ranks and bottlenecks that most people take
_USUAL_RANK = {"lora": 16, "adapter": 64, "quant": 1, "shared": 16}
_HOLD_THE_RANK = (LORA_FORWARD_SINGLE.name, ADAPTER_FORWARD.name, LORA_FORWARD_4BIT.name)
_RECORDS = {kernel.name: kernel for kernel in KERNELS}


def chosen_specs(target: str, dtype: str, *, narrow: bool = False) -> list[Spec]:
    """The largest tile for a usual rank, for each kernel and each of its variants.

    Args:
        target: The architecture.
        dtype: The layer's.
        narrow: For a rank that 16 does not divide, in rows that it does.
    """
    found: dict[tuple[object, ...], Spec] = {}
    for spec in specs(target, [dtype]):
        if (spec.aligned and not spec.rank_aligned) != narrow:
            continue
        key = (spec.kernel, spec.dropout, spec.aligned, spec.tile.persistent, spec.activation, spec.one_chunk)
        if key not in found or _preference(spec) > _preference(found[key]):
            found[key] = spec
    return list(found.values())


def _preference(spec: Spec) -> tuple[int, int]:
    room = _RECORDS[spec.kernel].function[0].partition(".")[0]
    return -abs(spec.tile.rank - _USUAL_RANK[room]), spec.tile.rows * spec.tile.cols


class Trial:
    """The tensors of one launch.

    Args:
        spec: What is launched.
        ragged: Whether every axis ends within a tile; else tiles are whole, so that every iteration of a loop
            is alike.

    Attributes:
        spec: What is launched.
        dtype: The layer's.
        plan: Its tile, in as many parts as there may be.
        size: Length of each axis, by its name in the kernels.
        harness: Holds the margins.
    """

    def __init__(self, spec: Spec, *, ragged: bool = True) -> None:
        torch.manual_seed(0)
        self.spec, self.ragged, self.dtype = spec, ragged, DTYPES[spec.dtype]
        self.plan = Plan(spec.tile, 1 if _RECORDS[spec.kernel].split is None else SPLITS)
        self.size = dict(self._sizes())
        self.harness = Harness(self.dtype, torch.device("cpu"))

    def _sizes(self) -> Iterator[tuple[str, int]]:
        kernel, tile = _RECORDS[self.spec.kernel], self.spec.tile
        over = 0 if not self.ragged else 48 if self.spec.aligned else 5
        # every buffer of the pipeline is used again
        steps = tile.stages + 2
        depth = steps * max(tile.depth, 32)
        sides = {
            "rows": tile.rows + over,
            "cols": tile.cols + over,
            "depth": depth + over,
            "rank": self._rank(),
        }
        if kernel.split is not None:
            at_a_time = max(getattr(tile, kernel.split), 32)
            sides[kernel.split] = SPLITS * steps * at_a_time + over
        for side, axis in kernel.axes.items():
            yield axis, sides[side]

    def _rank(self) -> int:
        """In two chunks, of which the second is no whole one, unless the tile has to hold all."""
        spec, most = self.spec, self.spec.tile.rank
        if spec.aligned and not spec.rank_aligned:
            return 8
        step = 16 if spec.aligned else 5
        holds_all = spec.kernel in _HOLD_THE_RANK or (
            "ONE_CHUNK" in _RECORDS[spec.kernel].varies and spec.one_chunk
        )
        if not self.ragged or (spec.aligned and most == 16):
            return most
        return most - (step if most > step else 0) if holds_all else most + step

    # ---- tensors ----
    def layer(self, rows: str, cols: str, *, padded: bool = True) -> Tensor:
        """A matrix of the layer, with NaN between its rows.

        Args:
            rows: Name of an axis.
            cols: Name of an axis.
            padded: Whether the rows are at a distance.
        """
        return self._random(rows, cols, self.dtype, padded=padded)

    def trainable(self, rows: str, cols: str) -> Tensor:
        """A matrix of the adapter's dtype."""
        return self._random(rows, cols, DTYPES[self.spec.adapter_dtype], padded=False)

    def bias(self, axis: str) -> Tensor | None:
        """The layer's bias, if the call has one."""
        return self._vector(axis, self.dtype) if self.has("HAS_BIAS") else None

    def trainable_bias(self, axis: str, flag: str) -> Tensor | None:
        """A bias of the adapter's dtype, if the call has it.

        Args:
            axis: Name of an axis.
            flag: The kernel's, which says whether it is there.
        """
        return self._vector(axis, DTYPES[self.spec.adapter_dtype]) if self.has(flag) else None

    def factor(self, axis: str) -> Tensor:
        """A vector in float32."""
        return self._vector(axis, torch.float32)

    def has(self, flag: str) -> bool:
        """Whether the call has what a flag of the kernel stands for."""
        return flag not in self.spec.absent

    def or_zeros(self, tensor: Tensor | None, *axes: str) -> Tensor:
        """What is added by an argument, which may be absent.

        Args:
            tensor: The argument.
            axes: Names of its axes.
        """
        return torch.zeros([self.size[axis] for axis in axes]).to(self.dtype) if tensor is None else tensor

    def out(self, *axes: str | int, dtype: torch.dtype | None = None) -> Tensor:
        """A result, of the layer's dtype by default.

        Args:
            axes: Names of axes, or lengths.
            dtype: Another one.
        """
        shape = [self.size[axis] if isinstance(axis, str) else axis for axis in axes]
        return self.harness.output(*shape, dtype=dtype)

    def partial(self, *axes: str | int) -> Tensor:
        """Partial results, in float32."""
        return self.out(*axes, dtype=torch.float32)

    def packed_mask(self, rows: str, cols: str) -> tuple[Tensor | None, Tensor]:
        """A packed mask, and the same as bools; without dropout None, and everything is kept."""
        m, n = self.size[rows], self.size[cols]
        if not self.spec.dropout:
            return None, torch.ones(m, n, dtype=torch.bool)
        return self.harness.mask(m, n)

    def seed(self, layer: int = 0) -> Tensor | None:
        """That of a layer's dropout, if there is any."""
        return torch.tensor([SEED + layer]) if self.spec.dropout else None

    def drawn_mask(self, rows: str, cols: str, layer: int = 0) -> tuple[Tensor | None, Tensor]:
        """Room for a layer's packed mask, and what NumPy draws for it."""
        m, n = self.size[rows], self.size[cols]
        if not self.spec.dropout:
            return None, torch.ones(m, n, dtype=torch.bool)
        keep = torch.from_numpy(mask_uniforms(SEED + layer, m, n) >= THRESHOLD)
        return self.out(rows, cdiv(n, 32), dtype=torch.int32), keep

    def low(self, tensor: Tensor) -> Tensor:
        """As the kernel multiplies it: in the layer's dtype."""
        return tensor.to(self.dtype)

    def _vector(self, axis: str, dtype: torch.dtype) -> Tensor:
        return self.harness.input(torch.randn(1, self.size[axis]).to(dtype))[0]

    def _random(self, rows: str, cols: str, dtype: torch.dtype, *, padded: bool) -> Tensor:
        n = self.size[cols]
        values = torch.randn(self.size[rows], n).to(dtype)
        # descriptors want rows at multiples of 16 bytes
        stride = n + (16 if self.spec.aligned else 7) if padded and self.ragged else None
        return self.harness.input(values, row_stride=stride)
