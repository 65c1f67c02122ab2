"""Why a call takes the path it takes: what every path is predicted to cost, and what nothing can beat."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from fastlora_kernels.choose import adapter, paths, plan, quantised, shared
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.paths import Candidate, Pass, large_kernel
from fastlora_kernels.choose.quantised import Stored
from fastlora_kernels.choose.shared_forward import shared_forward_candidates
from fastlora_kernels.predict.launches import Launch, library_product, total_us
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Shape, Tile

Op = Literal["lora_linear", "dora_linear", "adapter"]
OPS: tuple[Op, ...] = get_args(Op)
_OTHER = "slower in forward and backward together"


@dataclass(frozen=True)
class Explanation:
    """A predicted call, forward and backward. Every number is a prediction.

    Attributes:
        forward: What the forward pass takes.
        backward: What the backward pass takes.
        tile: Tile of the large product forward, of dX where layers share their input; None where a library
            chooses.
        ceiling_us: Microseconds of what nothing can beat: the frozen layer alone, forward and dX; where
            several share their input, one with all outputs, or each by itself in a pass where that is
            faster; for an adapter, every large tensor moved once.
        rejected: The other paths of both passes: slower ones with their prediction, impossible ones with the
            reason.
        apart: How these layers run where each is computed by itself and autograd adds up dX; None for one
            layer.
    """

    forward: Candidate
    backward: Candidate
    tile: Tile | None
    ceiling_us: float
    rejected: dict[Pass, list[Candidate]]
    apart: "Explanation | None" = None

    @property
    def path(self) -> str:
        """Path of the forward pass, and of the backward pass where it is another."""
        names = dict.fromkeys((self.forward.path, self.backward.path))
        return ", then ".join(names)

    @property
    def launches(self) -> list[Launch]:
        """Launches of both passes."""
        return [*self.forward.launches, *self.backward.launches]

    @property
    def predicted_us(self) -> float:
        """Microseconds of forward and backward."""
        return self.forward.microseconds + self.backward.microseconds

    @property
    def overhead(self) -> float:
        """Predicted time over the ceiling."""
        return self.predicted_us / self.ceiling_us

    @property
    def bytes(self) -> float:
        """Bytes moved from and to memory."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> float:
        """Floating-point operations of all products."""
        return sum(launch.flops for launch in self.launches)


def explain(
    op: Op,
    shape: Shape,
    dtype: torch.dtype,
    target: Target,
    *,
    dropout: float = 0.0,
    weight: Stored | None = None,
) -> Explanation:
    """Predict a call of an op on a GPU that need not be here.

    Args:
        op: ``lora_linear``, ``dora_linear`` or ``adapter``.
        shape: Sizes of the call; an adapter has n = k = its hidden size and r = its bottleneck.
        dtype: The dtype of x: float32, float16 or bfloat16.
        target: The GPU.
        dropout: Probability in [0, 1); default 0.
        weight: How the frozen weight of ``lora_linear`` is stored: ``nf4``, ``int8``, ``fp8`` or
            ``fp8-rows``; None for a dense one in ``dtype``, which is the ceiling's in any case.

    Raises:
        ValueError: A size is below 1, or the op, dtype, dropout or weight is none that the kernels serve.

    Example:
        >>> from fastlora_kernels.targets import find_card
        >>> shape = Shape(8192, 4096, 4096, 16)
        >>> explain("lora_linear", shape, torch.bfloat16, find_card("H100"), dropout=0.1).path
        'split'
    """
    _check(op, shape, dtype, dropout, weight)
    if op == "adapter":
        both = _adapter_passes(shape, dtype, target, dropping=dropout > 0)
        ceiling = adapter.least(shape, dtype, target)
    else:
        call = Call(shape, dtype, target, dropout > 0, dora=op == "dora_linear")
        both = {part: quantised.of_weight(part, call, weight) for part in get_args(Pass)}
        ceiling = frozen(shape, dtype.itemsize, target)
    chosen = {part: paths.fastest(found) for part, found in both.items()}
    kernel = large_kernel("forward", chosen["forward"].path, weight) if op == "lora_linear" else None
    return Explanation(
        chosen["forward"],
        chosen["backward"],
        tile=None if kernel is None else plan.choose(kernel, shape, dtype, target).tile,
        # the passes are two streams of launches, as they are for the candidates
        ceiling_us=sum(total_us([launch]) for launch in ceiling),
        rejected={part: [each for each in found if each is not chosen[part]] for part, found in both.items()},
    )


def explain_shared(
    shapes: Sequence[Shape], dtype: torch.dtype, target: Target, *, dropout: float = 0.0
) -> Explanation:
    """Predict a call of ``shared_lora_linear``: LoRA layers with dense weights on one x.

    Args:
        shapes: Sizes of each layer's call, two at least, the same rows and inputs in all.
        dtype: The dtype of x: float32, float16 or bfloat16.
        target: The GPU.
        dropout: Probability in [0, 1), the same in all; default 0.

    Raises:
        ValueError: There are fewer than two layers, rows or inputs differ, a size is below 1, or the dtype or
            dropout is none that the kernels serve.

    Example:
        >>> from fastlora_kernels.targets import find_card
        >>> layers = [Shape(8192, outputs, 4096, 16) for outputs in (4096, 1024, 1024)]
        >>> explain_shared(layers, torch.bfloat16, find_card("H100"), dropout=0.1).path
        'shared'
    """
    if len(shapes) < 2 or len({(shape.m, shape.k) for shape in shapes}) > 1:
        raise ValueError(f"expected at least two layers of the same rows and inputs, got {[*shapes]}")
    for shape in shapes:
        _check("lora_linear", shape, dtype, dropout, None)
    calls = [Call(shape, dtype, target, dropout > 0) for shape in shapes]
    both: dict[Pass, list[Candidate]] = {
        "forward": shared_forward_candidates(calls),
        "backward": shared.shared_candidates(calls),
    }
    if not any(paths.has_kernels(shape, target) for shape in shapes):
        both["backward"].append(shared.summed_by_library(calls))
    chosen = {part: paths.fastest(found) for part, found in both.items()}
    alone = {part: next(each for each in found if each.path == "separate") for part, found in both.items()}
    apart = Explanation(
        alone["forward"],
        alone["backward"],
        tile=None,
        ceiling_us=_shared_ceiling_us(shapes, dtype.itemsize, target),
        rejected={},
    )
    return replace(
        apart,
        forward=chosen["forward"],
        backward=chosen["backward"],
        tile=shared.shared_plan(shapes, dtype, target).tile if chosen["backward"].path == "shared" else None,
        rejected={part: [each for each in found if each is not chosen[part]] for part, found in both.items()},
        apart=apart,
    )


def frozen(shape: Shape, itemsize: int, target: Target) -> list[Launch]:
    """The bare layer's y = x·Wᵀ and dX = dY·W: nothing that trains through it can be faster.

    Args:
        shape: Sizes of the call.
        itemsize: Bytes of an element.
        target: The GPU.
    """
    m, n, k = shape.m, shape.n, shape.k
    return [
        library_product("x·Wᵀ", m, n, k, itemsize, target),
        library_product("dY·W", m, k, n, itemsize, target),
    ]


def _shared_ceiling_us(shapes: Sequence[Shape], itemsize: int, target: Target) -> float:
    """Of each pass the shorter: one frozen layer with all outputs, or every layer's own."""
    together = frozen(shared.joined(shapes), itemsize, target)
    alone = zip(*(frozen(shape, itemsize, target) for shape in shapes), strict=True)
    return sum(min(total_us([one]), total_us(several)) for one, several in zip(together, alone, strict=True))


def _adapter_passes(
    shape: Shape, dtype: torch.dtype, target: Target, *, dropping: bool
) -> dict[Pass, list[Candidate]]:
    """Both passes, which take the same path."""
    path = paths.choose_adapter_path(shape, dtype, target, dropping=dropping)
    both: dict[Pass, list[Candidate]] = {}
    for part in get_args(Pass):
        found = paths.adapter_candidates(part, shape, dtype, target, dropping=dropping)
        both[part] = [
            each if each.path == path or each.refused else replace(each, refused=_OTHER) for each in found
        ]
    return both


def _check(op: str, shape: Shape, dtype: torch.dtype, dropout: float, weight: str | None) -> None:
    if op not in OPS:
        raise ValueError(f"expected an op out of {', '.join(OPS)}, got {op!r}")
    sizes = {"rows": shape.m, "outputs": shape.n, "inputs": shape.k, "rank": shape.r}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected at least 1 for {name}, got {size}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected float32, float16 or bfloat16, got {dtype}")
    if not 0 <= dropout < 1:
        raise ValueError(f"expected a dropout probability in [0, 1), got {dropout}")
    if weight is not None and weight not in get_args(Stored):
        raise ValueError(f"expected a weight out of {', '.join(get_args(Stored))}, got {weight!r}")
    if weight is not None and op != "lora_linear":
        raise ValueError(f"expected the op lora_linear beside weight {weight}, got {op!r}")
