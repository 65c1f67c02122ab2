"""Kernels that a CUDA graph will launch of layers that share their input, loaded before it is made.

``fastlora tune`` may have found the eager formula to be the fastest for one of the layers in CUDA graphs and
not for calls from Python, or the other way around: then the layers are computed together in the one and apart
in the other.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import before_graphs, shared_passes
from fastlora.ops.decide import WITHOUT_PATHS
from fastlora.ops.lora_linear import Call, needed_of
from fastlora.ops.prepared import Memory
from fastlora.ops.runtime import in_dtype

# weight, bias, lora_A, lora_B and more of a call
_Layer = Sequence[Any]
# by each layer's decision, which is for one signature alone where a graph computes otherwise
_seen = Memory[bool]()


def load(x: Tensor, layers: Sequence[_Layer], calls: Sequence[Call]) -> None:
    """Run what a graph of these layers would compute otherwise than the call, unless it was done before.

    Args:
        x: ``[..., in_features]``.
        layers: Weight, bias, lora_A and lora_B of each, first of all that it has.
        calls: What is known of each layer by itself, for calls from Python.
    """
    _seen.of(tuple([call.decision for call in calls]), _load, x, layers, calls)


def _load(x: Tensor, layers: Sequence[_Layer], calls: Sequence[Call]) -> bool:
    there = [call._replace(decision=call.decision.in_graph or call.decision) for call in calls]
    if shared_passes.are_together(call.decision for call in there):
        wanted = [_wanted(x, layer) for layer in layers]
        before_graphs.once(_kernels(x, layers, there, wanted), _run, x, layers, there, wanted)
    elif shared_passes.are_together(call.decision for call in calls):
        for layer, (dtype, scaling, dropout, in_graph) in zip(layers, there, strict=True):
            # none of them runs by itself before the graph is made
            settings: Any = {"dtype": dtype, "scaling": scaling, "dropout": dropout, "in_graph": in_graph}
            before_graphs.load(x, *layer[:4], **settings, now=WITHOUT_PATHS["reference"])
    return True


def _run(
    x: Tensor, layers: Sequence[_Layer], calls: Sequence[Call], wanted: Sequence[tuple[bool, ...]]
) -> None:
    """Both passes; the gradients of the ys have no values: what is computed is nobody's."""
    x = in_dtype(x, calls[0].dtype)
    # not drawn: torch's generator stays as it is
    seeds = [torch.zeros(1, dtype=torch.int64, device=x.device) if call.dropout else None for call in calls]
    made = [*shared_passes.forward(x, calls, seeds, [layer[:4] for layer in layers])]
    if not any(map(any, wanted)):
        return
    given = []
    for call, needed, layer, (y, s, mask) in zip(calls, wanted, layers, made, strict=True):
        weight, _, lora_A, lora_B, *_ = layer
        saved = needed_of(needed, x, weight, lora_A, lora_B, s, mask)
        given.append(shared_passes.Layer(call, needed, torch.empty_like(y), saved))
    # what won for it in graphs is loaded there, too
    shared_passes.backward(given)


def _wanted(x: Tensor, layer: _Layer) -> tuple[bool, ...]:
    """Which gradients kernels compute, of x, weight, bias, lora_A and lora_B."""
    _, _, lora_A, lora_B, *_ = layer
    need_x, *need = (torch.is_grad_enabled() and each.requires_grad for each in (x, lora_A, lora_B))
    return need_x, False, False, *need


def _kernels(
    x: Tensor, layers: Sequence[_Layer], calls: Sequence[Call], wanted: Sequence[tuple[bool, ...]]
) -> Hashable:
    """All that says which kernels both passes launch."""
    # imported late: most calls have no kernels to choose from
    from fastlora.ops import kernel_paths
    from fastlora_kernels import targets
    from fastlora_kernels.choose.shared import joined

    paths = [call.decision.paths for call in calls]
    first, shapes = calls[0], tuple([each.shape for each in paths if each is not None])
    alike: Any = {"dropping": first.dropout > 0}
    given: Any = (shapes, first.dtype, x.device)
    of_layers: Any = [
        (x, *layer[:4], call.dtype, call.dropout, call.decision)
        for layer, call in zip(layers, calls, strict=True)
    ]
    return (
        "together",
        *wanted,
        *[(each.forward, each.backward) for each in paths if each is not None],
        kernel_paths.choose_shared_forward(*given, **alike),
        *[kernel_paths.choose_shared(*given, **alike, in_graph=in_graph) for in_graph in (False, True)],
        before_graphs.tiles_of(joined(shapes), first.dtype, targets.detect(x.device)),
        *[before_graphs.kernels_of(*each) for each in of_layers],
    )
