"""What there is to compile: every kernel with every tile that a plan can choose for a named GPU.

Argument types follow our naming rules: ``*_ptr`` has the layer's dtype, partial results and small trainable
matrices are fp32, scalars are i32 except ``scale``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlora_kernels.choose import plan, plan_adapter
from fastlora_kernels.choose.plan import Kernel
from fastlora_kernels.choose.plan_adapter import AdapterKernel
from fastlora_kernels.targets import TARGETS, Target
from fastlora_kernels.tile import Tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# one rank for every chunk of ranks that a plan can choose
RANKS = (16, 32, 64)
# one bottleneck for every block of it
BOTTLENECKS = (16, 32, 64, 128, 256)
ACTIVATIONS = ("gelu", "relu", "silu")
_TRAINABLE = (
    "lora_a_ptr", "lora_b_ptr", "lora_right_ptr", "down_weight_ptr", "down_bias_ptr", "up_weight_ptr",
    "up_bias_ptr",
)  # fmt: skip
AnyKernel = Kernel | AdapterKernel
_WITH_DROPOUT: tuple[AnyKernel, ...] = (
    "lora_down", "lora_add", "lora_grad_x", "lora_grad_a", "lora_grad_x_a", "adapter_forward", "adapter_down",
)  # fmt: skip
_WITH_ACTIVATION: tuple[AnyKernel, ...] = ("adapter_forward", "adapter_down", "adapter_grad_z")


@dataclass(frozen=True)
class Spec:
    """One kernel to compile.

    Attributes:
        dropout: Whether it draws or reads a dropout mask.
        aligned: Whether sizes and row strides are multiples of 16.
        activation: Of a bottleneck; empty where there is none.
        one_chunk: Whether a tile holds the whole bottleneck.
    """

    kernel: AnyKernel
    target: str
    dtype: str
    tile: Tile
    dropout: bool
    aligned: bool
    activation: str = ""
    one_chunk: bool = True


def specs(target_name: str, dtypes: Sequence[str] = tuple(DTYPES)) -> list[Spec]:
    """Every kernel and tile that a plan for this target can choose, without repeats.

    Raises:
        ValueError: The target is unknown.
    """
    target = _known_target(target_name)
    found = {
        Spec(kernel, target_name, dtype, tile, dropout, aligned, activation, one_chunk)
        for dtype in dtypes
        for aligned in (True, False)
        for kernel, tile, one_chunk in _kernel_tiles(target, DTYPES[dtype], aligned)
        for dropout in ((False, True) if kernel in _WITH_DROPOUT else (False,))
        for activation in _activations(kernel, every=aligned and not dropout and dtype != "fp32")
    }
    return sorted(found, key=repr)


def jit_function(kernel: AnyKernel, *, persistent: bool = False) -> Any:
    """The ``@triton.jit`` function behind a kernel's name."""
    from fastlora_kernels.adapter import backward, forward
    from fastlora_kernels.lora import backward as lora_backward
    from fastlora_kernels.lora import dora, down, epilogue, grad_x_a, single
    from fastlora_kernels.lora import forward as lora_forward
    from fastlora_kernels.lora import persistent as lora_persistent

    modules = (
        down, lora_forward, single, epilogue, lora_backward, grad_x_a, lora_persistent, dora,
        forward, backward,
    )  # fmt: skip
    # DoRA's forward is the same function with a factor
    name = ("lora_forward" if kernel == "dora_forward" else kernel) + ("_persistent" if persistent else "")
    for module in modules:
        function = getattr(module, f"_{name}_kernel", None)
        if function is not None:
            return function
    raise ValueError(f"no kernel is called {kernel!r}")


def signature(kernel: Any, spec: Spec) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]]]:
    """Argument types by our naming rules, and which arguments are multiples of 16."""
    types: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            types[name] = "constexpr"
            continue
        if name.endswith("_desc"):
            types[name] = _descriptor_type(name, spec)
            continue
        types[name] = _argument_type(name, spec.dtype)
        # ranks that are no multiple of 16 run 16 at a time: see the plan
        narrow = name in ("R", "D") and spec.tile.rank <= 16
        wide = spec.aligned and name not in ("scale", "drop_threshold", "da_tiles") and not narrow
        if name.endswith("_ptr") or wide:
            aligned[(index,)] = [["tt.divisibility", 16]]
    return types, aligned


def constants(spec: Spec) -> dict[str, Any]:
    """The values of a kernel's constexpr parameters."""
    from fastlora_kernels.primitives import TILES_PER_GROUP

    tile, group = spec.tile, {"GROUP": TILES_PER_GROUP}
    if spec.kernel.startswith("adapter"):
        values = _adapter_constants(spec) | (group if spec.kernel == "adapter_up" else {})
    else:
        values = _LORA_BLOCKS[spec.kernel](tile)
        values |= {"BLOCK_R": tile.rank} if spec.kernel != "dora_grad_product" else {}
        values |= group if spec.kernel in plan.LARGE or spec.kernel == "lora_add" else {}
        # y += S·Bᵀ has no mask; dX += mask ⊙ (dS·A) may have one
        values |= {"TRANSPOSED": not spec.dropout} if spec.kernel == "lora_add" else {}
    return values | ({"HAS_DROPOUT": spec.dropout} if spec.kernel in _WITH_DROPOUT else {})


def _forward_constants(tile: Tile, *, dora: bool) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_K": tile.depth}
    factor = {} if tile.persistent else {"HAS_FACTOR": dora, "KEEP_PRODUCT": dora}
    return blocks | {"HAS_BIAS": True} | factor


def _grad_x_a_constants(tile: Tile) -> dict[str, Any]:
    part = plan.grad_a_part(tile)
    blocks = {"BLOCK_M": tile.rows, "BLOCK_K": tile.cols, "BLOCK_N": tile.depth}
    return blocks | {"BLOCK_M_A": part.rows, "BLOCK_K_A": part.cols}


# everything that may be absent is there: the case that needs more registers
_LORA_BLOCKS: dict[str, Callable[[Tile], dict[str, Any]]] = {
    "lora_down": lambda tile: {"BLOCK_M": tile.rows, "BLOCK_K": tile.depth},
    "lora_forward": lambda tile: _forward_constants(tile, dora=False),
    "lora_forward_single": lambda tile: {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_K": tile.depth, "HAS_BIAS": True
    },
    "lora_add": lambda tile: {"BLOCK_M": tile.rows, "BLOCK_C": tile.cols},
    "dora_forward": lambda tile: _forward_constants(tile, dora=True),
    "lora_grad_s_b": lambda tile: {"BLOCK_M": tile.rows, "BLOCK_N": tile.cols},
    "lora_grad_x": lambda tile: {"BLOCK_M": tile.rows, "BLOCK_K": tile.cols, "BLOCK_N": tile.depth},
    "lora_grad_a": lambda tile: {"BLOCK_M": tile.rows, "BLOCK_K": tile.cols},
    "lora_grad_x_a": _grad_x_a_constants,
    "dora_weight_norm": lambda tile: {"BLOCK_N": tile.rows, "BLOCK_K": tile.cols},
    "dora_grad_product": lambda tile: {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "HAS_PRODUCT": True
    },
}  # fmt: skip


def _adapter_constants(spec: Spec) -> dict[str, Any]:
    tile, kernel = spec.tile, spec.kernel
    by_columns = kernel in ("adapter_up", "adapter_grad_h_weights")
    values: dict[str, Any] = {
        "BLOCK_M": tile.rows,
        "BLOCK_H": tile.cols if by_columns else tile.depth,
        "BLOCK_D": tile.rank,
    }
    if kernel in ("adapter_forward", "adapter_down"):
        values["HAS_DOWN_BIAS"] = True
    if kernel in ("adapter_forward", "adapter_up"):
        values |= {"HAS_UP_BIAS": True, "HAS_RESIDUAL": True}
    if kernel == "adapter_grad_h_weights":
        values |= {"HAS_DH": True, "ADD_INPUT": True, "ONE_CHUNK": spec.one_chunk}
    return values | ({"ACTIVATION": spec.activation} if spec.activation else {})


def _known_target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"expected a target out of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def _kernel_tiles(
    target: Target, dtype: torch.dtype, aligned: bool
) -> Iterator[tuple[AnyKernel, Tile, bool]]:
    """Kernel, tile and whether a tile holds the whole bottleneck."""
    for kernel in plan.KERNELS:
        for rank in RANKS:
            for tile in plan.tiles(kernel, rank, dtype, target, aligned=aligned):
                yield kernel, tile, True
    for adapter_kernel in plan_adapter.KERNELS:
        for size in BOTTLENECKS:
            for tile in plan_adapter.tiles(adapter_kernel, size, dtype, target, aligned=aligned):
                chunked = adapter_kernel == "adapter_grad_h_weights" and tile.rank < size
                yield adapter_kernel, tile, not chunked


def _activations(kernel: AnyKernel, *, every: bool) -> tuple[str, ...]:
    """All three for the usual tiles, elsewhere the one that takes most."""
    if kernel not in _WITH_ACTIVATION:
        return ("",)
    return ACTIVATIONS if every else ("gelu",)


def _descriptor_type(name: str, spec: Spec) -> str:
    from fastlora_kernels.lora.persistent import forward_blocks, grad_x_blocks

    blocks = (forward_blocks if spec.kernel == "lora_forward" else grad_x_blocks)(spec.tile)
    rows, cols = blocks[name]
    return f"tensordesc<{spec.dtype}[{rows}, {cols}]>"


def _argument_type(name: str, dtype: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "scale" else "i32"
    # trainable matrices stay in fp32 beside a 16-bit layer by default, the case that needs more registers
    special = {"mask_ptr": "i32", "seed_ptr": "i64", "factor_ptr": "fp32", "norm_ptr": "fp32"}
    special |= dict.fromkeys(_TRAINABLE, "fp32")
    return "*" + ("fp32" if name.endswith("_partial_ptr") else special.get(name, dtype))
