"""Which calls the kernels are for, their paths and tiles: what was measured on a GPU, else predicted."""

from typing import Any, cast

import torch

from fastlora._core import backend
from fastlora.ops import tuned_file
from fastlora_kernels import targets
from fastlora_kernels.choose import paths, quantised, tuned
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.quantised import Stored
from fastlora_kernels.choose.shared import choose_shared_path
from fastlora_kernels.choose.shared_forward import SharedForwardPath, choose_shared_forward_path
from fastlora_kernels.choose.tuned import Choice, Winners
from fastlora_kernels.quant.kernels import DECODE
from fastlora_kernels.tile import Shape


# constants to torch.compile, which can't trace a GPU's properties; nor does it take a shape as an argument
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_lora_kernels(n: int, k: int, r: int, aligned: bool, device: torch.device) -> bool:
    """Whether the kernels are meant for such a LoRA layer on its GPU, however many rows there are."""
    return paths.has_kernels(Shape(m=1, n=n, k=k, r=r, aligned=aligned), targets.detect(device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_adapter_kernels(
    hidden: int, size: int, aligned: bool, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the kernels are meant for such an adapter on its GPU, however many rows there are."""
    shape = Shape(m=1, n=hidden, k=hidden, r=size, aligned=aligned)
    return paths.has_adapter_kernels(shape, dtype, targets.detect(device))


def prefers_eager(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, dropping: bool, in_graph: bool = False
) -> bool:
    """Whether the eager formula was measured to be the fastest for this LoRA call."""
    won = _measured(shape, dtype, device, dropping=dropping, in_graph=in_graph)
    return won is not None and won.forward.path == tuned.REFERENCE


def prefers_library(shape: Shape, dtype: torch.dtype, device: torch.device, *, dropping: bool) -> bool:
    """Whether library products are predicted to be the fastest for this call of an adapter."""
    return paths.choose_adapter_path(shape, dtype, targets.detect(device), dropping=dropping) == "library"


def choose(
    part: Pass,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropping: bool,
    dora: bool = False,
    in_graph: bool = False,
    stored: str | None = None,
    decodable: bool = False,
) -> Choice:
    """Path and tile of one pass of a LoRA call.

    ``stored`` says how the weight is, None where it is dense, and ``decodable`` whether its bytes can be read
    in the forward pass's loop.

    Never the library's path where the kernels were asked for by name, or with dropout, whose mask the library
    would keep in another form. ``in_graph`` says that the host's time does not count, as where a compiled
    graph calls; a CUDA graph that is being made is noticed here.
    """
    measured: Any = {"dropping": dropping, "in_graph": in_graph, "stored": stored}
    won = None if dora else _measured(shape, dtype, device, **measured)
    choice = None if won is None else (won.forward if part == "forward" else won.backward)
    if won is not None and won.forward.path == DECODE and part == "forward" and not decodable:
        # blocks of another size were measured
        choice = won.forward_but(DECODE)
    if choice is None or choice.path == tuned.REFERENCE:
        target = targets.detect(device)
        if decodable and part == "forward":
            kind = cast(Stored, stored)
            if quantised.decodes(shape, dtype, target, kind, dropping=dropping):
                return Choice(DECODE)
        choice = Choice(paths.choose_path(part, shape, dtype, target, dropping=dropping, dora=dora))
    if choice.path == "library" and (dropping or not backend.is_automatic()):
        return Choice("split")
    return choice


def choose_shared(
    shapes: tuple[Shape, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropping: bool,
    in_graph: bool = False,
) -> Choice:
    """Path and tile of the backward pass of layers that share their input.

    The kernel's where kernels were asked for by name and none is meant for such calls or for this GPU.

    Args:
        shapes: Sizes of each layer's call, the same rows and inputs in all.
        dtype: The dtype of x.
        device: Where they are computed.
        dropping: Whether dropout is active, in each of them.
        in_graph: Whether to choose as for a CUDA graph; one that is being made is noticed here.
    """
    record = tuned.find_shared(tuned_file.gpu_of(device), shapes, dtype, dropping=dropping)
    if record is not None:
        return record.in_graph if in_graph or _is_capturing(device) else record.from_host
    target = targets.detect(device)
    if not (backend.is_automatic() or all(paths.has_kernels(shape, target) for shape in shapes)):
        return Choice("shared")
    return Choice(choose_shared_path(shapes, dtype, target, dropping=dropping))


def choose_shared_forward(
    shapes: tuple[Shape, ...], dtype: torch.dtype, device: torch.device, *, dropping: bool
) -> SharedForwardPath:
    """Path of the forward pass of layers that share their input.

    Each by itself where the winner was measured for every one of them: the shared launch is only predicted.
    The kernel's where kernels were asked for by name and none is meant for such calls or for this GPU.

    Args:
        shapes: Sizes of each layer's call, the same rows and inputs in all.
        dtype: The dtype of x.
        device: Where they are computed.
        dropping: Whether dropout is active, in each of them.
    """
    gpu = tuned_file.gpu_of(device)
    if all(tuned.find(gpu, shape, dtype, dropping=dropping) is not None for shape in shapes):
        return "separate"
    target = targets.detect(device)
    if not (backend.is_automatic() or all(paths.has_kernels(shape, target) for shape in shapes)):
        return "shared"
    return choose_shared_forward_path(shapes, dtype, target, dropping=dropping)


def _measured(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropping: bool,
    in_graph: bool = False,
    stored: str | None = None,
) -> Winners | None:
    record = tuned.find(tuned_file.gpu_of(device), shape, dtype, dropping=dropping, weight=stored)
    if record is None:
        return None
    if record.from_host is None or in_graph or _is_capturing(device):
        return record.in_graph
    return record.from_host


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
