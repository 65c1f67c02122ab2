"""Kernels that a CUDA graph will launch, loaded before it is made: while it is, nothing can be loaded.

``fastlora tune`` may have found other winners for CUDA graphs than for calls from Python, which are all that
runs before a graph is made.
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlora.ops.decide import Decision
from fastlora.ops.keep_mask import empty_keep_mask
from fastlora.ops.lora_passes import lora_linear_backward, lora_linear_forward
from fastlora.ops.prepared import Memory, layouts
from fastlora.ops.runtime import in_dtype
from fastlora.ops.weights import in_parts
from fastlora.ops.weights.frozen import FrozenWeight

if TYPE_CHECKING:
    from fastlora_kernels.targets import Target
    from fastlora_kernels.tile import Shape

# by pass, and all that says which kernels it launches
_loaded = Memory[bool]()


def load(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    dtype: torch.dtype,
    scaling: float,
    dropout: float,
    now: Decision,
    in_graph: Decision,
) -> None:
    """Run those passes of a LoRA call that a graph would compute otherwise, unless it was done before.

    Only its kernels count: the results are dropped. Where the memory is too small, nothing is loaded.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``, or None.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        dtype: What products compute in.
        scaling: Factor of the low-rank path.
        dropout: Probability; 0 where it is not active.
        now: What was decided for the call.
        in_graph: What was decided for a graph of it.
    """
    paths, here = in_graph.paths, now.paths
    if paths is None:
        return
    wanted = tuple(torch.is_grad_enabled() and each.requires_grad for each in (x, lora_A, lora_B))
    forward = here is None or paths.forward != here.forward
    backward = any(wanted) and (here is None or paths.backward != here.backward)
    if not (forward or backward):
        return
    kernels = kernels_of(x, weight, bias, lora_A, lora_B, dtype, dropout, in_graph)
    settings = (scaling, dropout)
    if forward:
        given: tuple[Any, ...] = (x, dtype, weight, bias, lora_A, lora_B, *settings, in_graph)
        once(("forward", paths.forward, kernels), _run_forward, *given)
    if backward:
        given = (x, dtype, weight, lora_A, lora_B, *settings, *wanted, in_graph)
        once(("backward", paths.backward, wanted, kernels), _run_backward, *given)


def once(key: Hashable, run: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
    """Run what a graph would, for its kernels' sake, unless it was done before or takes too much memory.

    Args:
        key: All that says which kernels it launches.
        run: What launches them.
        *arguments: What it is called with.
        **settings: What it is called with by name.
    """
    if key in _loaded:
        return
    try:
        with torch.no_grad():
            run(*arguments, **settings)
    except torch.OutOfMemoryError:
        # the call itself may fit; one of fewer rows tries again
        return
    _loaded[key] = True


def _run_forward(
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    decision: Decision,
) -> None:
    run: Any = in_parts.forward if isinstance(weight, FrozenWeight) else lora_linear_forward
    # not drawn: torch's generator stays as it is
    seed = torch.zeros(1, dtype=torch.int64, device=x.device) if dropout else None
    run(in_dtype(x, dtype), weight, bias, lora_A, lora_B, seed, scaling, dropout, decision)


def _run_backward(
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor | FrozenWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    *wanted_and_decision: Any,
) -> None:
    """The pass on tensors without values: what it computes is nobody's."""
    run: Any = in_parts.backward if isinstance(weight, FrozenWeight) else lora_linear_backward
    x, rows = in_dtype(x, dtype), x.shape[:-1].numel()
    dy, s = x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, lora_A.shape[0])
    mask = empty_keep_mask("triton", rows, x) if dropout else None
    run(dy, x, weight, lora_A, lora_B, s, mask, scaling, dropout, *wanted_and_decision)


def kernels_of(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dtype: torch.dtype,
    dropout: float,
    decision: Decision,
) -> Hashable:
    """All that says which kernels a path launches; of the rows what they change, which is little.

    Batches have many lengths, and loading costs a pass: it would be paid for each of them.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``, or None.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        dtype: What products compute in.
        dropout: Probability; 0 where it is not active.
        decision: What was decided for the call, with paths.
    """
    # imported late: most calls have no kernels to choose from
    from fastlora_kernels import targets

    assert decision.paths is not None
    tiles = tiles_of(decision.paths.shape, dtype, targets.detect(x.device))
    form = weight.form if isinstance(weight, FrozenWeight) else None
    outline = weight.outline(dtype) if isinstance(weight, FrozenWeight) else weight
    alike = compiled_apart_by(x)
    return tiles, alike, dtype, form, layouts(outline, bias, lora_A, lora_B), dropout > 0


def tiles_of(shape: "Shape", dtype: torch.dtype, target: "Target") -> Hashable:
    """Every kernel's tile for a call, and whether its sums are split.

    Args:
        shape: Sizes of the call.
        dtype: What products compute in.
        target: The GPU.
    """
    # imported late: most calls have no kernels to choose from
    from fastlora_kernels.choose import plan as plans
    from fastlora_kernels.lora.kernels import KERNELS
    from fastlora_kernels.quant.kernels import DECODING

    chosen = [plans.choose(kernel, shape, dtype, target) for kernel in (*KERNELS, *DECODING.values())]
    return tuple([(plan.tile, plan.splits > 1) for plan in chosen])


def compiled_apart_by(rows: Tensor) -> Hashable:
    """What Triton compiles a kernel anew for, of a tensor whose number of rows changes from call to call.

    Args:
        rows: ``[..., features]``.
    """
    m = rows.shape[:-1].numel()
    return m == 1, m % 16 == 0, rows.data_ptr() % 16, *(stride % 16 for stride in rows.stride())
