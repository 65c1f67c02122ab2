"""The launches of the bottleneck adapter, forward and backward, by our kernels and by library products."""

from typing import Literal

import torch

from fastlora_kernels.choose import plan_adapter as plans
from fastlora_kernels.choose.plan_adapter import AdapterKernel
from fastlora_kernels.predict.launches import LIBRARY_THIN, Launch, stream
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import cdiv

AdapterPath = Literal["single", "split", "library"]

# integer operations that drawing one element's uniform takes: a Philox call each
_DRAW = 80.0


def forward(
    path: AdapterPath, m: int, hidden: int, size: int, dtype: torch.dtype, target: Target, *, dropping: bool
) -> list[Launch]:
    """h ``[m, hidden]`` through a bottleneck of ``size``."""
    h, z, flops = m * hidden * dtype.itemsize, m * size * dtype.itemsize, 2.0 * m * hidden * size
    draw = m * size * _DRAW if dropping else 0.0
    if path == "library":
        launches = [_library("z", h + z, flops, target), _library("act(z)", 2 * z, 0, target)]
        launches += [_library("act(z)·W_u", h + z, flops, target), _library("+ h", 3 * h, 0, target)]
        return [*launches, *([_library("dropout", 3 * z, 0, target)] if dropping else [])]

    def own(kernel: AdapterKernel, moved: float, flops: float, integers: float = 0.0) -> Launch:
        tile = plans.choose(kernel, m, hidden, size, dtype, target).tile
        columns = cdiv(hidden, tile.cols) if kernel == "adapter_up" else 1
        programs = cdiv(m, tile.rows) * columns
        return stream(kernel, moved, target, flops=flops, integers=integers, programs=programs)

    if path == "single":
        # h is read a second time, as the residual
        return [own("adapter_forward", 3 * h + z, 2 * flops, draw)]
    return [own("adapter_down", h + 2 * z, flops, draw), own("adapter_up", 2 * h + z, flops)]


def backward(
    path: AdapterPath, m: int, hidden: int, size: int, dtype: torch.dtype, target: Target
) -> list[Launch]:
    """From dOut ``[m, hidden]`` to dh and the four parameters' gradients."""
    h, z, flops = m * hidden * dtype.itemsize, m * size * dtype.itemsize, 2.0 * m * hidden * size
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
    plan = plans.choose("adapter_grad_h_weights", m, hidden, size, dtype, target)
    partial = plan.splits * 2 * hidden * size * 4
    reads = cdiv(size, plan.tile.rank)
    return [
        stream("adapter_grad_z", h + 3 * z, target, flops=flops),
        stream(
            "adapter_grad_h_weights",
            (1 + 2 * reads) * h + 2 * z,
            target,
            flops=3 * flops,
            cached=partial,
            programs=cdiv(hidden, plan.tile.cols) * plan.splits,
        ),
        stream("sum", 2 * hidden * size * 4, target, cached=partial),
    ]


def least(m: int, hidden: int, dtype: torch.dtype, target: Target) -> list[Launch]:
    """Every large tensor moved once: nothing can be faster."""
    h = m * hidden * dtype.itemsize
    return [stream("h, out", 2 * h, target), stream("dOut, h, dh", 3 * h, target)]


def _library(name: str, moved: float, flops: float, target: Target) -> Launch:
    return stream(name, moved, target, flops=flops, share=LIBRARY_THIN, from_library=True)
