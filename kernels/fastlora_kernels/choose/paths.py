"""Which path a call takes, by predicted time. Nothing is measured: the same answer on every rank."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch

from fastlora_kernels.adapter.kernels import WIDEST, WIDEST_ONE_LAUNCH, one_launch
from fastlora_kernels.choose import adapter, lora
from fastlora_kernels.choose.adapter import AdapterPath
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.lora import Path
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.lora import kernels
from fastlora_kernels.predict.launches import Launch, total_us
from fastlora_kernels.quant.kernels import DECODE, DECODING
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape

Pass = Literal["forward", "backward"]

PATHS: tuple[Path, ...] = get_args(Path)
ADAPTER_PATHS: tuple[AdapterPath, ...] = get_args(AdapterPath)
# over a dense weight
_LARGE_KERNELS: dict[tuple[Pass, str], Kernel] = {
    ("forward", "split"): kernels.LORA_FORWARD,
    ("forward", "single"): kernels.LORA_FORWARD_SINGLE,
    ("backward", "split"): kernels.LORA_GRAD_X_A,
}
# the paths with any kernel of ours, with a large product of ours, and those that can't scale for DoRA
_WITH_KERNELS: tuple[Path, ...] = ("split", "single", "epilogue")
_WITH_OUR_PRODUCT: tuple[Path, ...] = ("split", "single")
_WITHOUT_FACTOR: tuple[Path, ...] = ("single", "epilogue")
_ADAPTER_WITH_KERNELS: tuple[AdapterPath, ...] = ("single", "split")
_IEEE = "float32 products in IEEE precision have no matrix units"


@dataclass(frozen=True)
class Candidate:
    """One pass of a call on one path.

    Attributes:
        path: Name of the path.
        refused: Why it can't serve the call; empty where it can.
        launches: What it is predicted to launch.
    """

    path: str
    refused: str = ""
    launches: list[Launch] = field(default_factory=list)

    @property
    def microseconds(self) -> float:
        """Predicted time of all launches and the gaps between them."""
        return total_us(self.launches)


def large_kernel(part: Pass, path: str, weight: str | None = None) -> Kernel | None:
    """Whose large product a tile of ours computes, which a measured choice names; None where there is none.

    Args:
        part: Which pass.
        path: Name of the path.
        weight: How the frozen weight is stored; None for a dense one.
    """
    return DECODING.get(weight or "") if path == DECODE else _LARGE_KERNELS.get((part, path))


@functools.lru_cache(maxsize=8192)
def choose_path(
    part: Pass, shape: Shape, dtype: torch.dtype, target: Target, *, dropping: bool, dora: bool = False
) -> Path:
    """The path of a LoRA call's forward or backward pass with the lowest predicted time.

    Both passes keep the same things between them, whatever their paths, so each takes its own.

    Args:
        part: Which pass.
        shape: Sizes of the call.
        dtype: The dtype of x.
        target: The GPU.
        dropping: Whether dropout is active.
        dora: Whether every output is multiplied by a factor, which only some paths do.
    """
    call = Call(shape, dtype, target, dropping, dora)
    if 0 in (shape.m, shape.n, shape.k):
        return "split" if dropping else "library"
    return cast(Path, fastest(candidates(part, call)).path)


@functools.lru_cache(maxsize=8192)
def choose_adapter_path(shape: Shape, dtype: torch.dtype, target: Target, *, dropping: bool) -> AdapterPath:
    """The path of an adapter's call with the lowest predicted time, forward and backward together.

    Args:
        shape: h ``[m, k]``, n = k, and the bottleneck r.
        dtype: The dtype of h.
        target: The GPU.
        dropping: Whether dropout is active.
    """
    if 0 in (shape.m, shape.k):
        return "library"
    both = [adapter_candidates(part, shape, dtype, target, dropping=dropping) for part in get_args(Pass)]
    times = {
        forward.path: forward.microseconds + backward.microseconds
        for forward, backward in zip(*both, strict=True)
        if not forward.refused
    }
    return cast(AdapterPath, min(times, key=lambda path: times[path]))


def fastest(found: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest prediction; of equals, the first."""
    return min((each for each in found if not each.refused), key=lambda each: each.microseconds)


def candidates(part: Pass, call: Call) -> list[Candidate]:
    """Every path of one pass of a LoRA call, those that can't serve it with the reason."""
    launches = lora.forward if part == "forward" else lora.backward
    reasons = _refused(part, call)
    return [
        Candidate(path, reasons[path]) if path in reasons else Candidate(path, "", launches(path, call))
        for path in PATHS
    ]


def adapter_candidates(
    part: Pass, shape: Shape, dtype: torch.dtype, target: Target, *, dropping: bool
) -> list[Candidate]:
    """Every path of one pass of an adapter's call, those that can't serve it with the reason."""
    reasons = _adapter_refused(shape, dtype, target)

    def launches(path: AdapterPath) -> list[Launch]:
        if part == "forward":
            return adapter.forward(path, shape, dtype, target, dropping=dropping)
        return adapter.backward(path, shape, dtype, target)

    return [
        Candidate(path, reasons[path]) if path in reasons else Candidate(path, "", launches(path))
        for path in ADAPTER_PATHS
    ]


def has_adapter_kernels(shape: Shape, dtype: torch.dtype, target: Target) -> bool:
    """Whether the adapter's kernels are meant for calls like this at all, however many rows there are."""
    return not all(path in _adapter_refused(shape, dtype, target) for path in _ADAPTER_WITH_KERNELS)


def has_kernels(shape: Shape, target: Target) -> bool:
    """Whether the kernels are meant for calls like this at all, however many rows there are."""
    return not _no_kernels(shape, target)


def _refused(part: Pass, call: Call) -> Mapping[Path, str]:
    why = _no_kernels(call.shape, call.target)
    if why:
        return dict.fromkeys(_WITH_KERNELS, why)
    found: dict[Path, str] = {}
    if call.dropping:
        found["library"] = "its mask takes a byte an element and several passes"
        found["single"] = "dropout inside the main loop would stall it"
    elif call.shape.r > kernels.MOST_RANKS_IN_ONE_LAUNCH:
        found["single"] = f"its registers hold ranks up to {kernels.MOST_RANKS_IN_ONE_LAUNCH}"
    if part == "backward":
        found["single"] = "it is a forward pass"
    if call.dtype == torch.float32:
        found |= dict.fromkeys(_WITH_OUR_PRODUCT, _IEEE)
    if call.dora and part == "forward":
        found |= dict.fromkeys(_WITHOUT_FACTOR, "it has no factor for every output")
        # a float32 call with dropout would be left with nothing
        found.pop("split", None)
    return found


def _adapter_refused(shape: Shape, dtype: torch.dtype, target: Target) -> Mapping[AdapterPath, str]:
    why = _no_kernels(shape, target)
    if shape.r > WIDEST:
        why = why or f"the kernels hold bottlenecks up to {WIDEST}"
    if why or dtype == torch.float32:
        return dict.fromkeys(_ADAPTER_WITH_KERNELS, why or _IEEE)
    if one_launch(shape.r):
        return {"split": f"up to {WIDEST_ONE_LAUNCH}, one launch does it"}
    return {"single": f"its registers hold bottlenecks up to {WIDEST_ONE_LAUNCH}"}


def _no_kernels(shape: Shape, target: Target) -> str:
    if target.tiles == "default":
        return "no tiles are pinned for this GPU"
    if not shape.aligned:
        return "rows that are no multiple of 16 long can't be read in wide words"
    if shape.r > 16 and shape.r % 16:
        return "ranks above 16 that are no multiple of it can't be read in wide words"
    return ""
