"""PiSSA and OLoRA: begin with A and B out of a decomposition of the frozen weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlora._core.option_checks import check_count, check_flag
from fastlora.anatomy.names import Model
from fastlora.init._layers import check_unmerged, linear_layers
from fastlora.nn import LoRAModule
from fastlora.nn.lora.start import set_start
from fastlora.ops.weights.frozen import FrozenWeight


def pissa_(model: Model, *, niter: int | None = None, progress: bool = False) -> Model:
    """Begin with the principal singular values and vectors of every weight (https://arxiv.org/abs/2404.02948).

    With W = U·diag(σ)·Vᵀ, A = √(σ/s)·Vᵀ and B = U·√(σ/s) of the first ``rank``. What the paper subtracts from
    the weight is subtracted beside it here, as a frozen update: the output is the frozen model's at first,
    the weights stay untouched and shared, and what :func:`fastlora.save_adapter` writes is a plain LoRA of
    twice the rank, for the weights that everybody has. A step computes with that rank too. To be called
    before the first step; convolutions and embeddings keep their start.

    Args:
        model: An adapted model, changed in place.
        niter: Steps of subspace iteration (``torch.svd_lowrank``), 16 say, much faster than the whole
            decomposition and nearly as exact; None decomposes whole.
        progress: Show a bar.

    Returns:
        The same model.

    Raises:
        ValueError: No LoRA on linear layers, DoRA, a merged layer, or a rank above a weight's sizes.

    Example:
        >>> from torch import nn
        >>> from fastlora import apply_lora
        >>> model = pissa_(apply_lora(nn.Sequential(nn.Linear(8, 4)), rank=2))
        >>> bool(model[0].lora_B.any())
        True
    """

    if niter is not None:
        check_count("niter", niter, "16 is nearly exact")

    def decompose(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        if niter is None:
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
        else:
            # a few more than wanted make the wanted ones exact (https://arxiv.org/abs/0909.4061)
            wider = min(rank + 8, *weight.shape)
            left, values, columns = torch.svd_lowrank(weight, q=wider, niter=niter)
            right = columns.t()
        roots = values[:rank].sqrt()
        return roots[:, None] * right[:rank], left[:, :rank] * roots

    return _start_from(model, decompose, progress=progress)


def olora_(model: Model, *, progress: bool = False) -> Model:
    """Begin with an orthonormal B out of the QR decomposition of every weight (https://arxiv.org/abs/2406.01775).

    With W = Q·R, B is the first ``rank`` columns of Q and A the first rows of R, both over √s. As in
    :func:`pissa_`, B·A is subtracted beside the weight, which stays what it is.

    Args:
        model: An adapted model, changed in place.
        progress: Show a bar.

    Returns:
        The same model.

    Raises:
        ValueError: No LoRA on linear layers, DoRA, a merged layer, or a rank above a weight's sizes.

    Example:
        >>> from torch import nn
        >>> from fastlora import apply_lora
        >>> model = olora_(apply_lora(nn.Sequential(nn.Linear(8, 4)), rank=2, alpha=2))
        >>> torch.allclose(model[0].lora_B.T @ model[0].lora_B, torch.eye(2), atol=1e-5)
        True
    """

    def decompose(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        orthonormal, upper = torch.linalg.qr(weight)
        return upper[:rank], orthonormal[:, :rank]

    return _start_from(model, decompose, progress=progress)


def _start_from(
    model: Model, decompose: Callable[[Tensor, int], tuple[Tensor, Tensor]], *, progress: bool
) -> Model:
    check_flag("progress", progress)
    # imported late: a bar is rarely wanted
    from rich.progress import track

    layers = linear_layers(model)
    for name, layer in layers.items():
        _check(name, layer)
    for layer in track(layers.values(), description="decomposing", disable=not progress, transient=True):
        stored = layer._stored()
        with torch.no_grad(), torch.autocast(stored.device.type, enabled=False):
            wide = _values(stored)
            lora_A, lora_B = decompose(wide, layer.rank)
            root = layer.scaling**0.5
            set_start(layer, lora_A / root, lora_B / root)
    return model


def _values(weight: Tensor | FrozenWeight) -> Tensor:
    """In float32 at least."""
    if isinstance(weight, FrozenWeight):
        return weight.dense(torch.float32)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _check(name: str, layer: LoRAModule) -> None:
    check_unmerged(name, layer)
    problem = None
    smallest = min(layer._stored().shape)
    if layer.dora:
        problem = "a layer without DoRA, got dora=True; use LoRA for it"
    elif layer.scaling <= 0:
        problem = f"alpha > 0, got {layer.alpha}; the start divides by it"
    elif layer.rank > smallest:
        problem = f"a rank up to {smallest}, got {layer.rank}; leave the layer out or use a lower rank"
    if problem is not None:
        raise ValueError(f"{name or type(layer).__name__}: expected {problem}")
