"""What a call over a quantised frozen weight launches: it becomes dense first, or is decoded on the way."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from fastlora_kernels.choose import paths
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.lora import down, own_product
from fastlora_kernels.choose.paths import Candidate, Pass
from fastlora_kernels.lora.kernels import LORA_DOWN
from fastlora_kernels.predict.launches import Launch, stream
from fastlora_kernels.quant.kernels import (
    DECODE,
    DECODED_COLUMNS,
    DECODING,
    DEQUANTISE_4BIT,
    DEQUANTISE_8BIT,
    most_rows,
)
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, cdiv

# NF4 in blocks of 64 whose factors are quantised in groups of 256, as bitsandbytes has it by default; int8
# with a factor for every row; e4m3fn with one for 128 × 128 values, or for every row
Stored = Literal["nf4", "int8", "fp8", "fp8-rows"]
_BLOCK, _GROUP, _SQUARE = 64, 256, 128
_AFTER_S = ("split", "epilogue")
_OF_NESTED = 256 * 4 + 4 + 16 * 4
# rows up to which bitsandbytes' own kernels over 4 bits were measured to pay, by its authors: with memory of
# high bandwidth a dense copy costs less, and most with AMD's
_MOST_ROWS, _MOST_ROWS_HBM, _MOST_ROWS_AMD = 256, 64, 4
_HBM = ("sm_80", "sm_90", "sm_100", "sm_103")


def stored_bytes(weight: Stored, n: int, k: int) -> int:
    """Bytes of a weight ``[n, k]`` as it is stored, its factors and tables included.

    Args:
        weight: How it is stored.
        n: Outputs.
        k: Inputs.

    Example:
        >>> stored_bytes("nf4", 4096, 4096) / (4096 * 4096)
        0.5159...
    """
    if weight == "nf4":
        blocks = cdiv(n * k, _BLOCK)
        return cdiv(n * k, 2) + blocks + cdiv(blocks, _GROUP) * 4 + _OF_NESTED
    return n * k + 4 * (cdiv(n, _SQUARE) * cdiv(k, _SQUARE) if weight == "fp8" else n)


def of_weight(part: Pass, call: Call, weight: Stored | None) -> list[Candidate]:
    """Every path of one pass over a weight of any kind; None for a dense one.

    Args:
        part: Which pass.
        call: The call as it is over a dense weight.
        weight: How the weight is stored.
    """
    return paths.candidates(part, call) if weight is None else candidates(part, call, weight)


def candidates(part: Pass, call: Call, weight: Stored) -> list[Candidate]:
    """Every path of one pass over a quantised weight, those that can't serve it with the reason.

    Args:
        part: Which pass.
        call: The call as it is over a dense weight.
        weight: How the weight is stored.
    """
    calls = list(_parts(call))
    of_calls = [paths.candidates(part, each) for each in calls]
    if part == "forward" and len(calls) > 1:
        of_calls = [_with_s_apart(each) for each in of_calls]
    found = [
        _together(part, call, weight, list(zip(calls, same, strict=True)))
        for same in zip(*of_calls, strict=True)
    ]
    return [*found, _decoded(part, call, weight)]


@functools.lru_cache(maxsize=8192)
def decodes(shape: Shape, dtype: torch.dtype, target: Target, weight: Stored, *, dropping: bool) -> bool:
    """Whether decoding a quantised weight in the forward pass's loop is predicted to be the fastest.

    As where the host launches every kernel: a CUDA graph decodes what eager calls do.

    Args:
        shape: Sizes of the call.
        dtype: The dtype of x.
        target: The GPU.
        weight: How the weight is stored.
        dropping: Whether dropout is active.
    """
    if 0 in (shape.m, shape.n, shape.k):
        return False
    found = candidates("forward", Call(shape, dtype, target, dropping), weight)
    return paths.fastest(found).path == DECODE


def _decoded(part: Pass, call: Call, weight: Stored) -> Candidate:
    """The whole weight, decoded once for every tile of rows: from 4 bits together with S, else after it."""
    with_s = weight == "nf4"
    # what hinders that launch over a dense weight
    like = "single" if with_s else "split"
    (alike,) = (each for each in paths.candidates(part, call) if each.path == like)
    if why := alike.refused or _undecoded(part, call, weight):
        return Candidate(DECODE, why)
    return Candidate(DECODE, "", [*([] if with_s else down(call)), _decoding_product(call, weight)])


def _undecoded(part: Pass, call: Call, weight: Stored) -> str:
    """What about the weight hinders that it is decoded in the loop."""
    if part == "backward":
        return "it is a forward pass"
    if weight == "fp8":
        return f"scales of {_SQUARE} × {_SQUARE} values multiply no whole sums"
    if weight == "nf4" and call.shape.k % DECODED_COLUMNS:
        return f"rows that are no multiple of {DECODED_COLUMNS} long end within a block"
    if weight == "nf4" and call.shape.m > (most := _most_rows_decoded(call.target)):
        return f"above {most} rows it decodes the weight too often"
    return ""


def _decoding_product(call: Call, weight: Stored) -> Launch:
    m, n, k, r = call.shape.m, call.shape.n, call.shape.k, call.shape.r
    moved = stored_bytes(weight, n, k) - n * k * call.itemsize
    if weight != "nf4":
        return own_product(call, DECODING[weight], extra_bytes=moved)
    moved, flops = moved + r * k * 4, 2.0 * m * r * k
    return own_product(call, DECODING[weight], beside=r, extra_bytes=moved, extra_flops=flops)


def _most_rows_decoded(target: Target) -> int:
    if target.is_amd:
        return _MOST_ROWS_AMD
    return _MOST_ROWS_HBM if target.name in _HBM else _MOST_ROWS


def _parts(call: Call) -> Iterator[Call]:
    """The call cut along its outputs into parts whose dense weight fits the workspace."""
    n = call.shape.n
    step = most_rows(call.shape.k, call.itemsize)
    for start in range(0, n, step):
        yield replace(call, shape=replace(call.shape, n=min(step, n - start)))


def _together(part: Pass, call: Call, weight: Stored, parts: list[tuple[Call, Candidate]]) -> Candidate:
    """One path over all parts."""
    call_of_first, first = parts[0]
    if first.refused:
        return first
    launches = list[Launch]()
    for each, path in parts:
        # S is there after the first
        rest = path.launches if part == "backward" or each is call_of_first else _without_s(path.launches)
        launches += [_dense(each, weight), *rest]
    if len(parts) > 1 and part == "backward":
        launches.append(_added(call, len(parts)))
    return Candidate(first.path, "", launches)


def _with_s_apart(found: list[Candidate]) -> list[Candidate]:
    """The paths of a part that take S from a launch before it, if there are kernels at all."""
    if all(each.refused for each in found if each.path in _AFTER_S):
        return found
    why = "S is computed once for all parts of a large weight"
    return [each if each.refused or each.path in _AFTER_S else Candidate(each.path, why) for each in found]


def _without_s(launches: list[Launch]) -> list[Launch]:
    return [launch for launch in launches if launch.name not in (LORA_DOWN.name, "sum S")]


def _dense(call: Call, weight: Stored) -> Launch:
    n, k = call.shape.n, call.shape.k
    kernel = DEQUANTISE_4BIT if weight == "nf4" else DEQUANTISE_8BIT
    moved = stored_bytes(weight, n, k) + n * k * call.itemsize
    (tile,) = kernel.tiles(1, call.dtype, call.target, call.shape.aligned)
    return stream(kernel.name, moved, call.target, programs=n * k / (tile.rows * tile.cols))


def _added(call: Call, parts: int) -> Launch:
    """The sum of parts of dX, in its own dtype: as many as usual weights have."""
    moved = 3 * call.shape.m * call.shape.k * call.itemsize * (parts - 1)
    return stream("parts of dX", moved, call.target, from_library=True, count=parts - 1)
