"""The same layer by others, launch by launch: the cost model is held to their published figures."""

from fastlora_kernels.choose.explain import frozen
from fastlora_kernels.predict.launches import LIBRARY_THIN, Launch, kernel_product, stream
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, Tile


def eager(shape: Shape, itemsize: int, target: Target, *, dropping: bool) -> list[Launch]:
    """PyTorch's own formula with adapters in the layer's dtype, forward and backward."""
    (m, n, k, r), b = (shape.m, shape.n, shape.k, shape.r), itemsize
    x, y = m * k * b, m * n * b

    def passes(name: str, moved: float) -> Launch:
        return stream(name, moved, target, from_library=True)

    def thin(name: str, moved: float, flops: float) -> Launch:
        return stream(name, moved, target, flops=flops, share=LIBRARY_THIN, from_library=True)

    base, back = frozen(shape, itemsize, target)
    mask = m * k
    forward = [
        base,
        *([passes("dropout(x)", 2 * x + mask)] if dropping else []),
        thin("x·Aᵀ", x + m * r * b, 2 * m * k * r),
        thin("S·Bᵀ", y + m * r * b, 2 * m * n * r),
        passes("× scaling", 2 * y),
        passes("y + update", 3 * y),
    ]
    backward = [
        back,
        passes("dY × scaling", 2 * y),
        thin("dB", y + m * r * b, 2 * m * n * r),
        thin("dS", y + m * r * b, 2 * m * n * r),
        thin("dA", x + m * r * b, 2 * m * k * r),
        thin("dS·A", x + m * r * b, 2 * m * k * r),
        *([passes("dropout's gradient", 2 * x + mask)] if dropping else []),
        passes("dX + update", 3 * x),
    ]
    return forward + backward


def lorafusion(shape: Shape, itemsize: int, target: Target, tile: Tile) -> list[Launch]:
    """LoRAFusion's ten launches with dropout (arXiv 2510.00206 and its code), with its own tile on Hopper."""
    (m, n, k, r), b = (shape.m, shape.n, shape.k, shape.r), itemsize
    x, y, s, mask = m * k * b, m * n * b, m * r * b, m * k

    def product(name: str, cols: int, depth: int, extra: float) -> Launch:
        return kernel_product(
            name, m, cols, depth, b, tile, target, group=8, low_rank=r, extra_bytes=s + r * cols * b + extra
        )

    return [
        stream("dropout", 2 * x + mask, target),
        stream("x·Aᵀ", x + s, target, flops=2 * m * k * r, share=LIBRARY_THIN, from_library=True),
        product("x·Wᵀ + S·Bᵀ", n, k, 0),
        # float32 sums by atomics, set to zero before and rounded to 16 bits after
        *(stream(f"zeros {name}", 0, target, cached=size * 4, from_library=True)
          for name, size in (("dS", m * r), ("dB", n * r))),
        stream("dS, dB", y + s, target, flops=4 * m * n * r, cached=2 * 4 * (m * r + n * r)),
        *(stream(f"round {name}", 0, target, cached=size * 6, from_library=True)
          for name, size in (("dS", m * r), ("dB", n * r))),
        stream("dA", x + s, target, flops=2 * m * k * r, share=LIBRARY_THIN, from_library=True),
        product("dY·W + mask ⊙ dS·A", k, n, mask),
    ]  # fmt: skip
