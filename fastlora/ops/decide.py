"""How a call is computed: asked once, before anything runs, and handed down to both passes.

The answer depends on the sizes, dtypes and layout of the call alone, and on what ``fastlora tune`` measured.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from fastlora._core import backend as _backend
from fastlora._core.backend import Backend
from fastlora._core.checks import check_adapter_size

if TYPE_CHECKING:
    from fastlora_kernels.choose.tuned import Choice
    from fastlora_kernels.tile import Shape

# multiplications up to which eager was faster on a CPU (AMD's Zen 4): of LoRA's frozen product, by 2 to 15 %,
# and of an adapter's down-projection, by 1 to 29 %
_SMALL_LORA = 2**22
_SMALL_ADAPTER = 2**24


class Paths(NamedTuple):
    """The kernels' paths of a LoRA call.

    Attributes:
        shape: The call that they are for.
        forward: Path and tile of the forward pass.
        backward: Path and tile of the backward pass.
        in_graph: Whether they are a CUDA graph's, so that the host's time did not count.
    """

    shape: "Shape"
    forward: "Choice"
    backward: "Choice"
    in_graph: bool = False


@dataclass(eq=False)
class Decision:
    """How a call is computed.

    Attributes:
        backend: The implementation.
        paths: The kernels' paths. None where there is but one, and where they stay open until the op runs: in
            a compiled graph, which serves any number of rows, and where torch's dispatcher calls the op.
        known: What the forward pass prepares, of a decision for one signature alone; None where it serves
            others, or calls that something watches.
        in_graph: How a CUDA graph computes the call, where that is otherwise.
    """

    backend: Backend
    paths: Paths | None = None
    known: dict[Any, Any] | None = None
    in_graph: "Decision | None" = None

    def of_one_signature(self) -> "Decision":
        """The same, for calls of one signature alone: it keeps what the kernels' forward pass prepares."""
        return Decision(self.backend, self.paths, {}) if self.backend == "triton" else self

    def differs(self, other: "Decision") -> bool:
        """Whether it launches other kernels than another decision.

        Args:
            other: What was decided for the same call, for instance as in a CUDA graph.
        """
        mine, others = (
            (each.paths.forward, each.paths.backward) if each.paths else None for each in (self, other)
        )
        return self.backend != other.backend or mine != others


# for any number of layouts
WITHOUT_PATHS: dict[Backend, Decision] = {name: Decision(name) for name in get_args(Backend)}


def decide_lora(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    dtype: torch.dtype,
    *,
    dropping: bool,
    dora: bool = False,
    training: bool = True,
    stored: str | None = None,
    decodable: bool = False,
    in_graph: bool = False,
) -> Decision:
    """How a call of LoRA's or DoRA's linear op is computed.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        lora_A: ``[rank, in_features]``.
        dtype: What products compute in.
        dropping: Whether dropout is active.
        dora: Whether every output is multiplied by a factor.
        training: Whether the layer trains.
        stored: How the weight is stored, None for a dense one. The eager formula would keep one that becomes
            dense for this call alone.
        decodable: Whether the forward pass can read the quantised weight as it is.
        in_graph: Whether to decide as for a CUDA graph, while none is made.

    Raises:
        ValueError: The backend that was asked for can't serve the call.
    """
    backend, automatic = _backend.resolve(x.device, dtype, x, weight), _backend.is_automatic()
    if (
        backend == "torch"
        and automatic
        and not (dropping or dora or stored)
        and _is_small(x, weight, lora_A, dtype, training)
    ):
        return WITHOUT_PATHS["reference"]
    if backend != "triton":
        return WITHOUT_PATHS[backend]
    # imported late: most calls have no kernels to choose from
    from fastlora.ops import kernel_paths
    from fastlora_kernels.tile import Shape

    (n, k), r, aligned = weight.shape, lora_A.shape[0], in_wide_words(*weight.shape)
    # a weight that the kernels would have to copy is left to the library
    if automatic and not kernel_paths.has_lora_kernels(n, k, r, aligned and weight.stride(-1) == 1, x.device):
        return WITHOUT_PATHS["torch"]
    # a compiled graph has to serve any number of rows
    if torch.compiler.is_compiling():
        return WITHOUT_PATHS["triton"]
    shape = Shape(m=x.shape[:-1].numel(), n=n, k=k, r=r, aligned=aligned)
    eager = automatic and not (dora or stored)
    call: Any = {"dropping": dropping, "in_graph": in_graph}
    if eager and kernel_paths.prefers_eager(shape, dtype, x.device, **call):
        return WITHOUT_PATHS["reference"]
    call["stored"] = stored
    forward = kernel_paths.choose("forward", shape, dtype, x.device, dora=dora, decodable=decodable, **call)
    # by then the factor is taken off the gradient
    backward = kernel_paths.choose("backward", shape, dtype, x.device, **call)
    return Decision("triton", Paths(shape, forward, backward, in_graph))


def decide_adapter(
    h: Tensor, down_weight: Tensor, dtype: torch.dtype, *, dropping: bool, training: bool = True
) -> Decision:
    """How a call of the adapter op is computed; its kernels have one path.

    Args:
        h: ``[..., hidden_size]``.
        down_weight: ``[adapter_size, hidden_size]``.
        dtype: What products compute in.
        dropping: Whether dropout is active.
        training: Whether the layer trains.

    Raises:
        ValueError: The backend that was asked for can't serve the call.
    """
    backend, automatic = _backend.resolve(h.device, dtype, h), _backend.is_automatic()
    size, hidden = down_weight.shape
    compiling = torch.compiler.is_compiling()
    if backend == "torch" and automatic and not (dropping or compiling):
        small = h.numel() * size <= _SMALL_ADAPTER and _needs_no_packing(
            h, dtype, hidden, size, training=training
        )
        return WITHOUT_PATHS["reference" if small else "torch"]
    if backend != "triton":
        return WITHOUT_PATHS[backend]
    # imported late: most calls have no kernels to choose from
    from fastlora.ops import kernel_paths
    from fastlora_kernels.adapter.kernels import WIDEST
    from fastlora_kernels.tile import Shape

    if not automatic:
        check_adapter_size(size, WIDEST)
        return WITHOUT_PATHS["triton"]
    aligned = in_wide_words(hidden)
    if not kernel_paths.has_adapter_kernels(hidden, size, aligned, dtype, h.device):
        return WITHOUT_PATHS["torch"]
    # a compiled graph has to serve any number of rows
    if compiling:
        return WITHOUT_PATHS["triton"]
    shape = Shape(m=h.shape[:-1].numel(), n=hidden, k=hidden, r=size, aligned=aligned)
    library = kernel_paths.prefers_library(shape, dtype, h.device, dropping=dropping)
    return WITHOUT_PATHS["torch" if library else "triton"]


def is_aligned(*matrices: Tensor) -> bool:
    """Whether kernels can read the rows in wide words where they lie, by tensor descriptors too."""
    return all(in_wide_words(t.shape[1], t.stride(0), t.data_ptr()) and not _too_long(t) for t in matrices)


def _too_long(matrix: Tensor) -> bool:
    """Whether rows of a wider matrix reach so far that Triton 3.7 and 3.8 count the bytes wrong, in 32 bits.

    The plan knows sizes alone, and keeps large tensors without margins out of descriptors by itself.
    """
    stride = matrix.stride(0)
    return stride > matrix.shape[1] and matrix.shape[0] * stride * matrix.element_size() >= 2**31


def in_wide_words(*numbers: int) -> bool:
    """Whether lengths, strides or addresses let rows be read in wide words: all are multiples of 16."""
    return all(number % 16 == 0 for number in numbers)


def _is_small(x: Tensor, weight: Tensor, lora_A: Tensor, dtype: torch.dtype, training: bool) -> bool:
    """Whether a CPU call costs more by its launches than by its passes, so that eager's fewer ones win.

    Not with dropout, whose mask has to be the same in a compiled graph, which serves any number of rows; nor
    in float32, where the fused backward is as fast at any size. While a layer trains it doesn't count whether
    gradients are recorded: a checkpoint computes the same call first without, then with them, and has to find
    the same bits.
    """
    if torch.compiler.is_compiling() or dtype == torch.float32:
        return False
    small = x.numel() * weight.shape[0] <= _SMALL_LORA
    return small and _needs_no_packing(x, dtype, *weight.shape, lora_A.shape[0], training=training)


def _needs_no_packing(x: Tensor, dtype: torch.dtype, *sizes: int, training: bool) -> bool:
    """Whether the eager formula, which packs nothing, can't have an operand for ``runtime.packed`` to copy.

    Args:
        x: ``[..., columns]``.
        dtype: What products compute in.
        sizes: Every other length of a line: columns, outputs, rank.
        training: Whether the layer trains.
    """
    if dtype.itemsize != 2:
        return True
    # rows are a line's length in a gradient that comes transposed
    rows_even = x.shape[:-1].numel() % 2 == 0 or not (training or torch.is_grad_enabled())
    return rows_even and x.stride(-1) == 1 and all(size % 2 == 0 for size in sizes)
