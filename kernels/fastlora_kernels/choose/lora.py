"""The launches of lora_linear, forward and backward, on each path that can serve it."""

from collections.abc import Callable
from typing import Literal

from fastlora_kernels.choose.call import Call
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora import kernels
from fastlora_kernels.predict.launches import (
    LIBRARY_THIN,
    Launch,
    extra_tile_us,
    kernel_product,
    library_product,
    stream,
)
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import TILES_PER_GROUP, Plan, cdiv

Path = Literal["split", "single", "epilogue", "library"]

# integer instructions for every element, as counted in the machine code for sm_80 and sm_90, a wide product
# as two: drawing its bit by Philox, and zeroing it by its bit of a packed word
_DRAW, _UNPACK = 4.5, 2.0
# bytes for every element that the library path reads and writes to draw its mask, a byte an element, on a GPU
_LIBRARY_DRAW, _LIBRARY_DRAW_LAUNCHES = 71, 20


def forward(path: Path, call: Call) -> list[Launch]:
    """The launches of a call's forward pass on a path."""
    return _FORWARD[path](call)


def backward(path: Path, call: Call) -> list[Launch]:
    """The launches of a call's backward pass on a path."""
    return _BACKWARD[path](call)


def down(call: Call) -> list[Launch]:
    """The launches that compute S and, with dropout, the mask."""
    plan = call.plan(kernels.LORA_DOWN)
    # a higher rank reads x once for every chunk of it
    return down_by(kernels.LORA_DOWN, call, plan, reads=cdiv(call.shape.r, plan.tile.rank))


def down_by(kernel: Kernel, call: Call, plan: Plan, *, reads: int, masks: int = 1) -> list[Launch]:
    """The launches that compute S by a kernel.

    Args:
        kernel: Record of the kernel.
        call: The call; where layers share x, of the sum of their ranks.
        plan: The kernel's.
        reads: How often it reads x.
        masks: Masks that it draws with dropout.
    """
    m, k, r = call.shape.m, call.shape.k, call.shape.r
    partial = plan.splits * m * r * 4 if plan.splits > 1 else 0
    launch = stream(
        kernel.name,
        reads * call.x_bytes + masks * call.mask_bytes + (0 if partial else call.s_bytes),
        call.target,
        flops=2.0 * m * k * r,
        integers=call.elements(_DRAW + _UNPACK) * masks * reads,
        cached=partial,
        programs=cdiv(m, plan.tile.rows) * plan.splits * reads,
    )
    return [launch, *([_sum("S", partial, call.s_bytes, call.target)] if partial else [])]


def _split_forward(call: Call) -> list[Launch]:
    if not call.dora:
        return [*down(call), own_product(call, kernels.LORA_FORWARD)]
    # what the factor multiplies is kept for backward
    product = own_product(call, kernels.DORA_FORWARD, extra_bytes=call.y_bytes)
    return [_weight_norm(call), *down(call), product]


def _single_forward(call: Call) -> list[Launch]:
    # every tile of columns computes S = x·Aᵀ again, from one A
    m, k, r = call.shape.m, call.shape.k, call.shape.r
    a_bytes, flops = r * k * 4, 2.0 * m * r * k
    single = kernels.LORA_FORWARD_SINGLE
    return [own_product(call, single, beside=r, extra_bytes=a_bytes, extra_flops=flops)]


def _epilogue_forward(call: Call) -> list[Launch]:
    m, n, k = call.shape.m, call.shape.n, call.shape.k
    base = library_product("x·Wᵀ", m, n, k, call.itemsize, call.target)
    return [*down(call), base, _add(call, call.y_bytes, 0)]


def _library_forward(call: Call) -> list[Launch]:
    (m, n, k), b = (call.shape.m, call.shape.n, call.shape.k), call.itemsize
    base = library_product("x·Wᵀ", m, n, k, b, call.target)
    launches = [_thin(call, "S", call.x_bytes), base, _thin(call, "y + S·Bᵀ", 2 * call.y_bytes, passes=2)]
    if call.dora:
        moved = 2 * call.y_bytes + 8 * m * n
        scaled = stream("× factor + bias", moved, call.target, from_library=True, count=3)
        launches = [_weight_norm(call), *launches, scaled]
    if not call.dropping:
        return launches
    moved, count = m * k * _LIBRARY_DRAW, _LIBRARY_DRAW_LAUNCHES
    mask = stream("mask", moved, call.target, from_library=True, count=count)
    return [mask, *_masked(call), *launches]


def _weight_norm(call: Call) -> Launch:
    n, k = call.shape.n, call.shape.k
    moved, flops = n * k * call.itemsize, 2.0 * n * k * call.shape.r
    return stream(kernels.DORA_WEIGHT_NORM.name, moved, call.target, flops=flops)


def _grad_product(call: Call) -> list[Launch]:
    """DoRA's factor in backward, on every path."""
    name = kernels.DORA_GRAD_PRODUCT.name
    return [stream(name, 3 * call.y_bytes, call.target)] if call.dora else []


def _grad_s_b(call: Call) -> list[Launch]:
    m, n, r = call.shape.m, call.shape.n, call.shape.r
    if r > kernels.MOST_RANKS_PER_READ:
        return [_thin(call, "dS", call.y_bytes), _thin(call, "dB", call.y_bytes)]
    plan = call.plan(kernels.LORA_GRAD_S_B)
    tiles, reads = cdiv(n, plan.tile.cols), cdiv(r, plan.tile.rank)
    ds, db = tiles * m * r * 4, plan.splits * n * r * 4
    launch = stream(
        kernels.LORA_GRAD_S_B.name,
        reads * call.y_bytes + call.s_bytes,
        call.target,
        flops=4.0 * m * n * r,
        cached=ds + db,
        programs=tiles * plan.splits * reads,
    )
    return [launch, _sum("dS", ds, call.s_bytes, call.target)]


def _split_backward(call: Call) -> list[Launch]:
    (m, k, r), plan = (call.shape.m, call.shape.k, call.shape.r), call.plan(kernels.LORA_GRAD_X_A)
    part = kernels.grad_a_part(plan.tile)
    # a higher rank reads x once for every chunk of it
    reads = cdiv(r, part.rank)
    programs = cdiv(k, part.cols) * plan.splits * reads
    read = reads * (call.x_bytes + call.mask_bytes)
    product = own_product(
        call, kernels.LORA_GRAD_X_A, extra_bytes=call.mask_bytes + read, extra_flops=2.0 * m * r * k,
        extra_tiles=(extra_tile_us(read / max(programs, 1), call.target),) * programs,
    )  # fmt: skip
    return [*_grad_product(call), *_grad_s_b(call), product, _sum_gradients(call, plan)]


def _epilogue_backward(call: Call) -> list[Launch]:
    (m, n, k, r), b = (call.shape.m, call.shape.n, call.shape.k, call.shape.r), call.itemsize
    plan = call.plan(kernels.LORA_GRAD_A)
    reads = cdiv(r, plan.tile.rank)
    grad_a = stream(
        kernels.LORA_GRAD_A.name,
        reads * (call.x_bytes + call.mask_bytes) + call.s_bytes,
        call.target,
        flops=2.0 * m * k * r,
        integers=call.elements(_UNPACK) * reads,
        cached=plan.splits * r * k * 4,
        programs=cdiv(k, plan.tile.cols) * plan.splits * reads,
    )
    base = library_product("dY·W", m, k, n, b, call.target)
    add = _add(call, call.x_bytes, call.mask_bytes)
    return [*_grad_product(call), *_grad_s_b(call), base, add, grad_a, _sum_gradients(call, plan)]


def _library_backward(call: Call) -> list[Launch]:
    m, n, k, x = call.shape.m, call.shape.n, call.shape.k, call.x_bytes
    thin = [_thin(call, "dB", call.y_bytes), _thin(call, "dS", call.y_bytes), _thin(call, "dA", x)]
    base = library_product("dY·W", m, k, n, call.itemsize, call.target)
    thin = [*_grad_product(call), *thin]
    if not call.dropping:
        return [*thin, base, _thin(call, "dX + dS·A", 2 * x, passes=2)]
    product = [
        _thin(call, "dS·A", x),
        *_masked(call),
        stream("dX + masked", 3 * x, call.target, from_library=True),
    ]
    return [*_masked(call), *thin, base, *product]


def own_product(
    call: Call, kernel: Kernel, *, beside: int = 0, extra_bytes: float = 0.0, extra_flops: float = 0.0,
    extra_tiles: tuple[float, ...] = (),
) -> Launch:  # fmt: skip
    """A call's large product by a kernel of ours, with what one launch does beside it.

    Args:
        call: The call.
        kernel: Record of the kernel that computes it.
        beside: Ranks of a product over the same sum that every tile computes.
        extra_bytes: Moved beside the operands, S and B.
        extra_flops: Floating-point operations of other products.
        extra_tiles: Microseconds of each program that follows the product's tiles.
    """
    plan, r = call.plan(kernel), call.shape.r
    cols, depth = kernel.size(call.shape, "cols"), kernel.size(call.shape, "depth")
    return kernel_product(
        kernel.name,
        call.shape.m,
        cols,
        depth,
        call.itemsize,
        plan.tile,
        call.target,
        group=TILES_PER_GROUP,
        at_once=call.at_once(kernel, plan),
        low_rank=r,
        beside=beside,
        extra_bytes=extra_bytes + call.s_bytes + r * cols * 4,
        extra_flops=extra_flops,
        extra_tiles=extra_tiles,
        decoding=kernel.decoding(plan.tile, call.target),
    )


def _add(call: Call, out_bytes: float, mask_bytes: float) -> Launch:
    return stream(
        kernels.LORA_ADD.name,
        2 * out_bytes + call.s_bytes + mask_bytes,
        call.target,
        flops=2.0 * out_bytes / call.itemsize * call.shape.r,
        integers=call.elements(_UNPACK) if mask_bytes else 0.0,
    )


def _sum_gradients(call: Call, plan: Plan) -> Launch:
    n, k, r = call.shape.n, call.shape.k, call.shape.r
    splits = call.plan(kernels.LORA_GRAD_S_B).splits if r <= kernels.MOST_RANKS_PER_READ else 0
    return _sum("dA, dB", (plan.splits * k + splits * n) * r * 4, (n + k) * r * 4, call.target)


def _sum(name: str, partial_bytes: float, out_bytes: float, target: Target) -> Launch:
    return stream(f"sum {name}", out_bytes, target, cached=partial_bytes)


def _thin(call: Call, name: str, moved: float, *, passes: int = 1) -> Launch:
    """A library product with a side as short as the rank; its large tensor is moved ``passes`` times."""
    flops = moved / passes / call.itemsize * 2 * call.shape.r
    return stream(name, moved + call.s_bytes, call.target, flops=flops, share=LIBRARY_THIN, from_library=True)


def _masked(call: Call) -> list[Launch]:
    """The library's way to zero dropped elements: a mask of bytes, widened to bits to AND with."""
    elements = call.shape.m * call.shape.k
    return [
        stream("mask as bits", elements * (1 + call.itemsize), call.target, from_library=True),
        stream("masked", 3 * elements * call.itemsize, call.target, from_library=True),
    ]


_FORWARD: dict[Path, Callable[[Call], list[Launch]]] = {
    "split": _split_forward,
    "single": _single_forward,
    "epilogue": _epilogue_forward,
    "library": _library_forward,
}
_BACKWARD: dict[Path, Callable[[Call], list[Launch]]] = {
    "split": _split_backward,
    "epilogue": _epilogue_backward,
    "library": _library_backward,
}
