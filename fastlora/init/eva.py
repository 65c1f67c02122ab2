"""EVA: begin with A out of what the layers read."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.option_checks import check_finite
from fastlora.anatomy.names import Model
from fastlora.init._layers import check_unmerged, linear_layers
from fastlora.nn import LoRAModule


@dataclass
class _Directions:
    """The leading right singular vectors of all rows seen so far.

    Attributes:
        most: How many are kept, more than are wanted, so that these lose little between batches.
        vectors: The directions, ``[found, in]``, orthonormal.
        values: Singular values of the directions, ``[found]``.
        energy: Sum of squares of every element seen.
    """

    most: int
    vectors: Tensor | None = None
    values: Tensor | None = None
    energy: float = 0.0

    def add(self, rows: Tensor) -> None:
        """Update by a batch of rows ``[n, in]`` (https://arxiv.org/abs/2410.07170, section 3)."""
        self.energy += float(rows.double().square().sum())
        if self.vectors is not None and self.values is not None:
            rows = torch.cat([self.values[:, None] * self.vectors, rows])
        if rows.shape[0] > rows.shape[1]:
            # the same right singular vectors out of fewer numbers
            rows = torch.linalg.qr(rows, mode="r").R
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        self.values, self.vectors = values[: self.most], vectors[: self.most]


def eva_(model: Model, batches: Iterable[Any], *, rho: float = 1.0) -> Model:
    """Begin with the directions that the layers' inputs vary in most (https://arxiv.org/abs/2410.07170).

    A becomes the leading right singular vectors of the inputs of each layer, B stays zero: the output is the
    frozen model's at first. The model is run on the batches in eval mode, without gradients. With ``rho`` > 1
    the ranks are redistributed: layers whose inputs are spread over more directions get up to rho times the
    rank, others less, the sum stays; scalings stay too. To be called before an optimiser is made;
    convolutions and embeddings keep their start.

    Args:
        model: An adapted model, changed in place.
        batches: What the model is called with: tensors, tuples of arguments, or mappings of keyword
            arguments; a few hundred rows for every layer suffice. Each is used once.
        rho: Bound of a layer's rank as a multiple of its own, at least 1.

    Returns:
        The same model.

    Raises:
        ValueError: No LoRA on linear layers, ``rho`` < 1, a merged layer, no batches, or a layer that saw
            fewer rows than its rank.

    Example:
        >>> from fastlora import apply_lora
        >>> model = apply_lora(nn.Sequential(nn.Linear(8, 4)), rank=2)
        >>> eva_(model, [torch.randn(16, 8)])[0].lora_A.norm(dim=1).round(decimals=3).tolist()
        [1.0, 1.0]
    """
    if not check_finite("rho", rho, "the paper uses 2") >= 1:
        raise ValueError(f"expected rho >= 1, got {rho!r}; 1 keeps every rank, the paper uses 2")
    layers = linear_layers(model)
    for name, layer in layers.items():
        check_unmerged(name, layer)
    found = _directions(model, layers, batches, rho)
    for name, layer in layers.items():
        _check(name, layer, found[name])
    ranks = {name: layer.rank for name, layer in layers.items()}
    if rho > 1:
        ranks = _redistributed(layers, found, rho)
    for name, layer in layers.items():
        _start(layer, ranks[name], found[name])
    return model


@torch.no_grad()
def _directions(
    model: nn.Module, layers: dict[str, LoRAModule], batches: Iterable[Any], rho: float
) -> dict[str, _Directions]:
    found = {name: _Directions(_kept(layer.rank * rho)) for name, layer in layers.items()}
    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(_collector(found[name])) for name, layer in layers.items()]
    model.eval()
    try:
        for batch in batches:
            _call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return found


def _kept(rank: float) -> int:
    return int(rank) + max(int(rank), 8)


def _collector(directions: _Directions) -> Any:
    def collect(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        directions.add(inputs[0].flatten(0, -2).float())

    return collect


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _check(name: str, layer: LoRAModule, directions: _Directions) -> None:
    rows = 0 if directions.vectors is None else directions.vectors.shape[0]
    if rows < layer.rank:
        raise ValueError(
            f"{name or type(layer).__name__}: expected inputs in at least {layer.rank} directions, its rank, "
            f"got {rows}; give more batches, and only layers that the model calls can begin so"
        )


def _redistributed(
    layers: dict[str, LoRAModule], found: dict[str, _Directions], rho: float
) -> dict[str, int]:
    """Ranks of the same sum, by explained variance; every layer keeps at least one."""
    shares: list[tuple[float, str]] = []
    for name, directions in found.items():
        assert directions.values is not None
        most = int(layers[name].rank * rho)
        ratios = (directions.values[:most].double().square() / max(directions.energy, 1e-300)).tolist()
        shares += [(ratio, name) for ratio in ratios[1:]]
    budget = sum(layer.rank for layer in layers.values()) - len(layers)
    ranks = dict.fromkeys(layers, 1)
    for _, name in sorted(shares, reverse=True)[:budget]:
        ranks[name] += 1
    return ranks


@torch.no_grad()
def _start(layer: LoRAModule, rank: int, directions: _Directions) -> None:
    if rank == layer.rank:
        layer._reset_own()
    else:
        active = layer._settings()
        ratio = (rank / active.rank) ** (0.5 if active.rslora else 1)
        layer._new_update(replace(active, rank=rank, alpha=active.alpha * ratio))
    assert directions.vectors is not None
    layer.lora_A.copy_(directions.vectors[:rank])
