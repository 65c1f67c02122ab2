"""What there is to compile: every kernel with every tile that a plan can choose for a named GPU.

Argument types follow our naming rules: ``*_ptr`` has the layer's dtype, small trainable matrices have the
adapters', partial results are fp32, scalars are i32 except ``scale``.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from typing import Any

import torch

from fastlora_kernels.choose import plan
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.targets import TARGETS, Target
from fastlora_kernels.tile import Tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ACTIVATIONS = ("gelu", "relu", "silu")
_KERNELS = {kernel.name: kernel for kernel in plan.KERNELS}
# A and B, and an adapter's
PARAMETERS = (
    "lora_a_ptr", "lora_b_ptr", "lora_right_ptr", "down_weight_ptr", "down_bias_ptr", "up_weight_ptr",
    "up_bias_ptr",
)  # fmt: skip

# what a quantised weight is stored as, and factors and tables
_BYTES = ("packed_ptr", "codes_ptr", "absmax_codes_ptr")
_FLOAT32 = ("factor_ptr", "norm_ptr", "absmax_ptr", "absmax_map_ptr", "offset_ptr", "table_ptr", "scales_ptr")


@dataclass(frozen=True)
class Spec:
    """One kernel to compile.

    Attributes:
        kernel: Name of the kernel.
        target: The architecture, for instance ``sm_90``.
        dtype: ``bf16``, ``fp16`` or ``fp32``, of the layer.
        tile: Block sizes, warps and stages.
        dropout: Whether it draws or reads a dropout mask.
        aligned: Whether sizes and row strides are multiples of 16; without it none is taken for one, the rank
            included.
        activation: The bottleneck's: ``gelu``, ``relu`` or ``silu``; empty where there is none.
        one_chunk: Whether a tile holds the whole bottleneck.
        adapter_dtype: Dtype of A and B, or of an adapter's parameters: ``fp32`` or the layer's.
        absent: Flags of arguments that are left out of the call.
        rank_aligned: Whether 16 divides the rank (or bottleneck) too.
    """

    kernel: str
    target: str
    dtype: str
    tile: Tile
    dropout: bool
    aligned: bool
    activation: str = ""
    one_chunk: bool = True
    adapter_dtype: str = "fp32"
    absent: tuple[str, ...] = ()
    rank_aligned: bool = True

    @property
    def can_drop(self) -> bool:
        """Whether the kernel draws or reads a dropout mask in other calls."""
        return "HAS_DROPOUT" in _KERNELS[self.kernel].varies


def specs(target_name: str, dtypes: Sequence[str] = tuple(DTYPES)) -> list[Spec]:
    """Every kernel and tile that a plan for a GPU can choose, without repeats.

    Adapters are in float32, and every argument is there: the case that needs more registers. The others that
    can be launched are :func:`variants`.

    Args:
        target_name: The GPU's architecture, for instance ``sm_90``.
        dtypes: The layer's dtypes, out of ``bf16``, ``fp16`` and ``fp32``; default: all.

    Raises:
        ValueError: The target is unknown.
    """
    if target_name not in TARGETS:
        raise ValueError(f"expected a target out of {', '.join(TARGETS)}, got {target_name!r}")
    found = {
        spec
        for kernel in plan.KERNELS
        for dtype in dtypes
        for aligned in (True, False)
        for spec in _specs(kernel, TARGETS[target_name], dtype, aligned)
    }
    return sorted(found, key=repr)


def variants(spec: Spec) -> list[Spec]:
    """The same kernel and tile with adapters in the layer's dtype, with every argument and with some absent.

    In float32 absent arguments are none of these: they take away from a kernel's end alone, as they do here.
    """
    kernel = _KERNELS[spec.kernel]
    given = replace(spec, adapter_dtype=spec.dtype)
    groups = [
        chosen for count in range(len(kernel.optional) + 1) for chosen in combinations(kernel.optional, count)
    ]
    found = [replace(given, absent=tuple(sorted(chain(*chosen)))) for chosen in groups]
    # without parameters there is no other dtype
    return found if kernel.has_parameters else [replace(each, adapter_dtype="fp32") for each in found[1:]]


def jit_function(spec: Spec) -> Any:
    """The ``@triton.jit`` function that a spec is of."""
    kernel = _KERNELS[spec.kernel]
    where = kernel.persistent if spec.tile.persistent else kernel.function
    assert where is not None
    module, name = where
    return getattr(importlib.import_module(f"fastlora_kernels.{module}"), name)


def signature(function: Any, spec: Spec) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]]]:
    """Argument types by our naming rules, and which arguments are multiples of 16.

    Args:
        function: The ``@triton.jit`` function.
        spec: What is compiled.
    """
    types: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(function.params):
        name, plain = parameter.name, plain_name(parameter.name)
        if parameter.is_constexpr:
            types[name] = "constexpr"
            continue
        if name.endswith("_desc"):
            types[name] = _descriptor_type(name, spec)
            continue
        types[name] = _argument_type(name, spec)
        specialised = not parameter.do_not_specialize and plain not in ("scale", "drop_threshold", "da_tiles")
        divided = spec.rank_aligned if plain in ("R", "D") else spec.aligned
        if name.endswith("_ptr") or (specialised and divided):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return types, aligned


def plain_name(argument: str) -> str:
    """An argument's name without the number of the layer that it is of, where there are several.

    Args:
        argument: For instance ``lora_a_0_ptr``.

    Example:
        >>> plain_name("lora_a_0_ptr"), plain_name("R_2"), plain_name("dx_ptr")
        ('lora_a_ptr', 'R', 'dx_ptr')
    """
    return re.sub(r"_\d(?=_ptr$|$)", "", argument)


def constants(function: Any, spec: Spec) -> dict[str, Any]:
    """The values of a kernel's constexpr parameters.

    Args:
        function: The ``@triton.jit`` function.
        spec: What is compiled.
    """
    kernel = _KERNELS[spec.kernel]
    given: dict[str, Any] = {
        **kernel.blocks(spec.tile),
        **dict.fromkeys((*kernel.absent, *spec.absent), False),
        "HAS_DROPOUT": spec.dropout,
        "ACTIVATION": spec.activation,
        "ONE_CHUNK": spec.one_chunk,
        # y += S·Bᵀ has no mask; dX += mask ⊙ (dS·A) may have one
        "TRANSPOSED": not spec.dropout,
    }
    # everything else that may be absent is there: the case that needs more registers
    names = [parameter.name for parameter in function.params if parameter.is_constexpr]
    return {name: given.get(name, True) for name in names}


def compiler_options(spec: Spec) -> dict[str, int]:
    """What the compiler is asked for beside the kernel's constants.

    Args:
        spec: What is compiled.
    """
    return _KERNELS[spec.kernel].options(spec.tile)


def _specs(kernel: Kernel, target: Target, dtype: str, aligned: bool) -> set[Spec]:
    found = set()
    droppings = (False, True) if "HAS_DROPOUT" in kernel.varies else (False,)
    for rank, dropout in product(kernel.ranks, droppings):
        rank_aligned = aligned and ("rank" not in kernel.axes or rank % 16 == 0)
        every = aligned and not dropout and dtype != "fp32"
        for tile in plan.tiles(kernel, rank, DTYPES[dtype], target, aligned=aligned):
            one_chunk = "ONE_CHUNK" not in kernel.varies or tile.rank >= rank
            settled = (kernel.name, target.name, dtype, tile, dropout, aligned)
            found |= {
                Spec(*settled, activation, one_chunk, rank_aligned=rank_aligned)
                for activation in _activations(kernel, every=every)
            }
    return found


def _activations(kernel: Kernel, *, every: bool) -> tuple[str, ...]:
    """All three for the usual tiles, elsewhere the one that takes most."""
    if "ACTIVATION" not in kernel.varies:
        return ("",)
    return ACTIVATIONS if every else ("gelu",)


def _descriptor_type(name: str, spec: Spec) -> str:
    descriptors = _KERNELS[spec.kernel].descriptors
    assert descriptors is not None
    rows, cols = descriptors(spec.tile)[name]
    return f"tensordesc<{spec.dtype}[{rows}, {cols}]>"


def _argument_type(argument: str, spec: Spec) -> str:
    name = plain_name(argument)
    if not name.endswith("_ptr"):
        return "fp32" if name == "scale" else "i32"
    special = {"mask_ptr": "i32", "seed_ptr": "i64", **dict.fromkeys(_FLOAT32, "fp32")}
    special |= dict.fromkeys(_BYTES, "u8")
    special |= dict.fromkeys(PARAMETERS, spec.adapter_dtype)
    return "*" + ("fp32" if name.endswith("_partial_ptr") else special.get(name, spec.dtype))
