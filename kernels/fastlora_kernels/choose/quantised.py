"""What a call over a quantised frozen weight launches: it becomes dense before each pass."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from fastlora_kernels.choose import paths
from fastlora_kernels.choose.lora import Call
from fastlora_kernels.choose.paths import Candidate, Pass
from fastlora_kernels.lora.kernels import LORA_DOWN
from fastlora_kernels.predict.launches import Launch, stream
from fastlora_kernels.quant.kernels import DEQUANTISE_4BIT, DEQUANTISE_8BIT, most_rows
from fastlora_kernels.tile import cdiv

# NF4 in blocks of 64 whose factors are quantised in groups of 256, as bitsandbytes has it by default; int8
# with a factor for every row; e4m3fn with one for 128 × 128 values
Stored = Literal["nf4", "int8", "fp8"]
_BLOCK, _GROUP, _SQUARE = 64, 256, 128
_AFTER_S = ("split", "epilogue")
_OF_NESTED = 256 * 4 + 4 + 16 * 4


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
    return n * k + 4 * (n if weight == "int8" else cdiv(n, _SQUARE) * cdiv(k, _SQUARE))


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
    return [
        _together(part, call, weight, list(zip(calls, same, strict=True)))
        for same in zip(*of_calls, strict=True)
    ]


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
