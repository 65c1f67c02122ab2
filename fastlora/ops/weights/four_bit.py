"""bitsandbytes' 4-bit weights: NF4 and FP4, with statistics that are quantised themselves or not."""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from fastlora.ops.weights.frozen import FrozenWeight, is_made_dense_by_kernels
from fastlora_kernels.quant.kernels import DECODED_COLUMNS

QUANT_TYPES = ("nf4", "fp4")
_BLOCK_SIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
# blocks that share a factor of their factors, in the kernel as in every weight that bitsandbytes makes
_NESTED_BLOCKSIZE = 256
_STORAGES = frozenset({torch.uint8, torch.bfloat16, torch.float16, torch.float32})


class Nested(NamedTuple):
    """Statistics of statistics: block i has code[absmax[i]] · nested.absmax[i // nested.blocksize] + offset.

    Attributes:
        absmax: Factor of every ``blocksize`` blocks, float32.
        code: What the 256 bytes stand for, float32.
        offset: Mean of all blocks' absmax, float32, without dimensions.
        blocksize: Blocks that share a factor.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int


class FourBitWeight(FrozenWeight):
    """Two values a byte, the first one in the high bits, in blocks that run over the ends of rows.

    Attributes:
        packed: uint8 ``[⌈N·K/2⌉]``, whatever dtype its library stores the bytes as.
        absmax: Factor of each block: float32, or uint8 where these are nested.
        nested: How a uint8 absmax is read; None beside a float32 one.
        blocksize: Values that share a factor.
        quant_type: nf4 or fp4.
    """

    def __init__(
        self,
        shape: torch.Size,
        packed: Tensor,
        absmax: Tensor,
        nested: Nested | None,
        blocksize: int,
        quant_type: str,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Of tensors that :func:`read_four_bit` has checked."""
        self.shape, self.device, self.compute_dtype = shape, packed.device, compute_dtype
        self.packed, self.absmax, self.nested = packed, absmax, nested
        self.blocksize, self.quant_type = blocksize, quant_type
        self.row_step = blocksize // math.gcd(shape[1], blocksize)
        self.tensors = (packed, absmax) if nested is None else (packed, absmax, *nested[:3])
        self.form = (quant_type, blocksize, nested and nested.blocksize, shape)

    @property
    def table(self) -> Tensor:
        """The 16 values, float32, in the order of their codes, on the weight's device."""
        if isinstance(self.packed, FakeTensor):
            with self.packed.fake_mode:
                return _new_table(self.quant_type, self.device)
        return _table(self.quant_type, self.device)

    @property
    def storage(self) -> str:
        """NF4's bytes and FP4's are alike."""
        return "nf4"

    @property
    def is_decodable(self) -> bool:
        """Whether a row is whole blocks long, each whole steps of the kernel's loop."""
        whole = self.shape[1] % self.blocksize == 0 and self.blocksize % DECODED_COLUMNS == 0
        return whole and self._has_known_groups()

    def for_kernels(self) -> tuple[Tensor | None, ...]:
        """What kernels read: packed codes, factors, what these are of where they are quantised, the table."""
        return self.packed, *self._factors(), self.table

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of W ``[rows, K]``: table[code] · absmax in float32, rounded once to ``dtype``."""
        start, stop = self._span(rows)
        k = self.shape[1]
        if self._has_known_groups() and is_made_dense_by_kernels(self.device, dtype, (stop - start) * k):
            # imported late: Triton is not installed everywhere
            from fastlora.ops.weights import dense_triton

            shape, settings = (stop - start, k), {"first": start * k, "blocksize": self.blocksize}
            return dense_triton.four_bit(
                self.packed, self._factors(), self.table, shape=shape, dtype=dtype, **settings
            )
        return _by_library(self, dtype, start, stop)

    def recipe(self) -> tuple[list[int], float]:
        """N, K, block size, blocks to a group, and the type."""
        groups = 0 if self.nested is None else self.nested.blocksize
        return [*self.shape, self.blocksize, groups, QUANT_TYPES.index(self.quant_type)], 1.0

    @classmethod
    def rebuilt(cls, tensors: Sequence[Tensor], numbers: Sequence[int], unit: float) -> FrozenWeight:
        """The weight of a recipe."""
        n, k, blocksize, groups, quant_type = numbers
        packed, absmax, *more = tensors
        nested = Nested(more[0], more[1], more[2], groups) if groups else None
        return cls(torch.Size((n, k)), packed, absmax, nested, blocksize, QUANT_TYPES[quant_type])

    def _has_known_groups(self) -> bool:
        return self.nested is None or self.nested.blocksize == _NESTED_BLOCKSIZE

    def _factors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What the kernel takes: float32 factors, and what they are of where blocks' own are quantised."""
        if self.nested is None:
            return self.absmax, None, None, None
        return self.nested.absmax, self.absmax, self.nested.code, self.nested.offset


def _by_library(weight: FourBitWeight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows start to stop with bitsandbytes' own op."""
    k = weight.shape[1]
    first, count = start * k, (stop - start) * k
    blocks = slice(first // weight.blocksize, -(-(first + count) // weight.blocksize))
    # its AVX-512 code takes every row for a beginning of blocks, and rows of odd length leave native code; so
    # it is given rows as long as whole blocks, or all as one with the nibble that fills the last byte
    whole = weight.row_step * k
    shape = [1, count + count % 2] if count % whole else [count // whole, whole]
    # it has no float64: the values are products in float32
    out_dtype = torch.float32 if dtype == torch.float64 else dtype
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed[first // 2 : (first + count + 1) // 2],
        _absmax(weight, blocks),
        weight.blocksize,
        weight.quant_type,
        shape,
        out_dtype,
    )
    return dense.view(-1)[:count].view(stop - start, k).to(dtype)


def _absmax(weight: FourBitWeight, blocks: slice) -> Tensor:
    """Factors of these blocks, float32."""
    nested = weight.nested
    if nested is None:
        return weight.absmax[blocks]
    # whole groups: those of a part need not begin at its first block
    group = blocks.start // nested.blocksize
    start = group * nested.blocksize
    of_groups: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        weight.absmax[start : blocks.stop],
        nested.absmax[group:],
        nested.code,
        nested.blocksize,
        torch.float32,
    )
    return of_groups[blocks.start - start :].add_(nested.offset)


@functools.cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    # it outlives whatever watches the call that first asks for it
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.inference_mode(False):
        return _new_table(quant_type, device)


def _new_table(quant_type: str, device: torch.device) -> Tensor:
    table: Tensor = sys.modules["bitsandbytes"].functional.get_4bit_type(quant_type, device=device)
    return table


def read_four_bit(layer: nn.Module) -> FrozenWeight | str:
    """The weight of a ``bitsandbytes.nn.Linear4bit``, or why it can't be read."""
    given: Any = layer
    weight = layer._parameters.get("weight")
    # FSDP makes plain parameters of the weights; the layer has their statistics, too
    state = getattr(weight, "quant_state", None) or given.quant_state
    if weight is None or state is None:
        return "Linear4bit that is not quantised yet"
    if not given.compute_type_is_set and given.compute_dtype is not None:
        return "Linear4bit whose compute_dtype its first call may change"
    # attributes of its parameter's class cost microseconds each
    with torch._C.DisableTorchFunctionSubclass():
        stored = weight.detach()
        if type(stored) is not Tensor:
            return f"Linear4bit with a weight of class {type(stored).__name__}"
        shape = torch.Size((given.out_features, given.in_features))
        storage = getattr(weight, "quant_storage", given.quant_storage)
        why = _unreadable(stored, state, shape)
        if stored.dtype != storage and stored.dtype in _STORAGES:
            # FSDP with a MixedPrecisionPolicy takes the bytes for floats
            why = f"with a weight cast from {storage} to {stored.dtype}, whose bytes are no floats"
        if why is not None:
            return f"Linear4bit {why}"
        packed = (stored if stored.dtype == torch.uint8 else stored.view(torch.uint8)).view(-1)
    nested = None
    if state.nested:
        second = state.state2
        nested = Nested(second.absmax, second.code, state.offset, second.blocksize)
    compute_dtype = given.compute_dtype
    settings = (state.blocksize, state.quant_type, compute_dtype)
    return FourBitWeight(shape, packed, state.absmax, nested, *settings)


def _unreadable(stored: Tensor, state: Any, shape: torch.Size) -> str | None:
    """What about these bytes and statistics is not as it is known to be."""
    if stored.is_meta:
        return "with a weight on the meta device"
    if vars(state).get("packing_format_for_cpu"):
        return "with weights repacked for inference"
    if state.quant_type not in QUANT_TYPES or state.blocksize not in _BLOCK_SIZES:
        return f"of type {state.quant_type} in blocks of {state.blocksize}"
    if state.shape != shape:
        return f"of shape {list(shape)} with a weight quantised as {list(state.shape)}"
    values = shape[0] * shape[1]
    if stored.dtype not in _STORAGES or not stored.is_contiguous():
        return f"with a weight stored as {stored.dtype} with strides {stored.stride()}"
    if not values or stored.numel() * stored.itemsize != (values + 1) // 2 or stored.shape[-1] != 1:
        return f"of shape {list(shape)} with a weight of {stored.dtype} {list(stored.shape)}"
    blocks = -(-values // state.blocksize)
    return _unreadable_statistics(state, blocks, stored.device)


def _unreadable_statistics(state: Any, blocks: int, device: torch.device) -> str | None:
    expected = [("absmax", state.absmax, torch.uint8 if state.nested else torch.float32, blocks)]
    if state.nested:
        second = state.state2
        if second.nested or second.dtype != torch.float32 or second.blocksize < 1:
            return "with nested statistics of an unknown form"
        groups = -(-blocks // second.blocksize)
        expected += [
            ("nested absmax", second.absmax, torch.float32, groups),
            ("nested code", second.code, torch.float32, 256),
            ("offset", state.offset, torch.float32, 1),
        ]
    for name, tensor, dtype, count in expected:
        if tensor.dtype != dtype or tensor.numel() != count or tensor.device != device:
            return (
                f"with {name} {tensor.dtype} {list(tensor.shape)} on {tensor.device}, not {count} of {dtype}"
            )
        if not tensor.is_contiguous():
            return f"with {name} of strides {tensor.stride()}"
    return None
