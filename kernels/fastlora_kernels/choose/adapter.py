"""The launches of the bottleneck adapter, forward and backward, by our kernels and by library products."""

from dataclasses import replace
from typing import Literal

import torch

from fastlora_kernels.adapter import kernels
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.predict.launches import LIBRARY_THIN, Launch, stream
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, cdiv

AdapterPath = Literal["single", "split", "library"]

# integer operations that drawing one element's uniform takes: a Philox call each
_DRAW = 80.0


def forward(
    path: AdapterPath, shape: Shape, dtype: torch.dtype, target: Target, *, dropping: bool
) -> list[Launch]:
    """The launches of a forward pass.

    Args:
        path: Which way.
        shape: Sizes of the call: h ``[m, k]``, n = k, and the bottleneck r.
        dtype: The dtype of h.
        target: The GPU.
        dropping: Whether dropout is active.
    """
    h, z, flops = _amounts(shape, dtype)
    draw = shape.m * shape.r * _DRAW if dropping else 0.0
    if path == "library":
        launches = [_library("z", h + z, flops, target), _library("act(z)", 2 * z, 0, target)]
        launches += [_library("act(z)·W_u", h + z, flops, target), _library("+ h", 3 * h, 0, target)]
        return [*launches, *([_library("dropout", 3 * z, 0, target)] if dropping else [])]

    def own(kernel: Kernel, moved: float, flops: float, integers: float = 0.0) -> Launch:
        tile = plans.choose(kernel, replace(shape, aligned=True), dtype, target).tile
        columns = cdiv(shape.k, tile.cols) if "cols" in kernel.axes else 1
        programs = cdiv(shape.m, tile.rows) * columns
        return stream(kernel.name, moved, target, flops=flops, integers=integers, programs=programs)

    if path == "single":
        # h is read a second time, as the residual
        return [own(kernels.ADAPTER_FORWARD, 3 * h + z, 2 * flops, draw)]
    return [own(kernels.ADAPTER_DOWN, h + 2 * z, flops, draw), own(kernels.ADAPTER_UP, 2 * h + z, flops)]


def backward(path: AdapterPath, shape: Shape, dtype: torch.dtype, target: Target) -> list[Launch]:
    """The launches of a backward pass, from dOut to dh and the four parameters' gradients.

    Args:
        path: Which way.
        shape: Sizes of the call: h ``[m, k]``, n = k, and the bottleneck r.
        dtype: The dtype of h.
        target: The GPU.
    """
    h, z, flops = _amounts(shape, dtype)
    if path == "library":
        return [
            _library("dz", h + z, flops, target),
            _library("act'(z)", 4 * z, 0, target),
            _library("dW_u", h + z, flops, target),
            _library("dW_d", h + z, flops, target),
            _library("dh", h + z, flops, target),
            _library("+ dOut", 3 * h, 0, target),
            _library("db_u", h, 0, target),
            _library("db_d", z, 0, target),
        ]
    plan = plans.choose(kernels.ADAPTER_GRAD_H_WEIGHTS, replace(shape, aligned=True), dtype, target)
    weights = 2 * shape.k * shape.r * 4
    partial, reads = plan.splits * weights, cdiv(shape.r, plan.tile.rank)
    return [
        stream(kernels.ADAPTER_GRAD_Z.name, h + 3 * z, target, flops=flops),
        stream(
            kernels.ADAPTER_GRAD_H_WEIGHTS.name,
            (1 + 2 * reads) * h + 2 * z,
            target,
            flops=3 * flops,
            cached=partial,
            programs=cdiv(shape.k, plan.tile.cols) * plan.splits,
        ),
        stream("sum", weights, target, cached=partial),
    ]


def least(shape: Shape, dtype: torch.dtype, target: Target) -> list[Launch]:
    """Every large tensor moved once: nothing can be faster.

    Args:
        shape: Sizes of the call: h ``[m, k]``.
        dtype: The dtype of h.
        target: The GPU.
    """
    h, _, _ = _amounts(shape, dtype)
    return [stream("h, out", 2 * h, target), stream("dOut, h, dh", 3 * h, target)]


def _amounts(shape: Shape, dtype: torch.dtype) -> tuple[int, int, float]:
    """Bytes of h and of z, and the operations of one product."""
    h, z = shape.m * shape.k * dtype.itemsize, shape.m * shape.r * dtype.itemsize
    return h, z, 2.0 * shape.m * shape.k * shape.r


def _library(name: str, moved: float, flops: float, target: Target) -> Launch:
    return stream(name, moved, target, flops=flops, share=LIBRARY_THIN, from_library=True)
