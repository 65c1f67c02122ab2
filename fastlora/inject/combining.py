"""A new adapter out of several: weighted sums of their updates, exact, of a lower rank, or sparse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastlora._core.extras import require
from fastlora._core.option_checks import check_count, check_finite
from fastlora.anatomy.names import Model
from fastlora.inject.named import all_layers, check_known, put_in
from fastlora.nn import LoRAModule
from fastlora.nn.lora.shelf import Shelf
from fastlora.nn.settings import LoRASettings

CombinationType = Literal[
    "cat", "svd",
    "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True)
class Recipe:
    """How updates become one: see :func:`add_weighted_adapter`."""

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: CombinationType
    rank: int
    density: float | None
    majority_sign_method: MajoritySign


def add_weighted_adapter(
    model: Model,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: CombinationType = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
) -> Model:
    """Make a new adapter out of several, as PEFT's method of this name; the active one stays active.

    ``"cat"`` is the exact weighted sum of the updates, with the sum of their ranks. ``"svd"`` is the best
    approximation of that sum at a rank; W-sized matrices are never formed for it. ``"linear"`` sums A and B
    apart, a rough approximation. ``"ties"`` (https://arxiv.org/abs/2306.01708), ``"dare_linear"``,
    ``"dare_ties"`` (https://arxiv.org/abs/2311.03099) and ``"magnitude_prune"`` make A and B sparse first,
    and with ``_svd`` the whole updates; these are PEFT's own functions.

    Args:
        model: A model with the adapters.
        adapters: Names of those to combine.
        weights: A factor for each, negative ones too.
        adapter_name: Name of the new adapter; its scaling is 1 and it has no dropout.
        combination_type: How they are combined, by PEFT's names.
        svd_rank: Rank of the new adapter for ``"svd"`` and ``…_svd``; None means the highest of theirs.
        density: Share of the values to keep, in (0, 1]; for the sparse ones alone.
        majority_sign_method: For ``"ties"`` and ``"dare_ties"``: how the sign of a value is elected.

    Returns:
        The same model.

    Raises:
        ImportError: One of PEFT's functions is needed and PEFT is not installed.
        TypeError: A wrong argument type.
        ValueError: Names, weights or settings that do not fit, DoRA adapters, or convolutions with groups.

    Example:
        >>> from fastlora import adapter_names, add_adapter, apply_lora
        >>> model = add_adapter(apply_lora(nn.Sequential(nn.Linear(4, 2)), rank=1), "b")
        >>> adapter_names(add_weighted_adapter(model, ["default", "b"], [0.7, 0.3], "both", "cat"))
        ['default', 'b', 'both']
    """
    layers = all_layers(model)
    if isinstance(adapters, str):
        raise TypeError(f"expected adapters to be a list of names, got the string {adapters!r}")
    weights = [check_finite("a weight", weight, "1.0 takes an adapter as it is") for weight in weights]
    for name in adapters:
        check_known(model, name)
    settings = [Shelf(layer).settings(name) for layer in layers for name in adapters]
    _check(adapters, weights, combination_type, density, majority_sign_method, settings)
    _check_layers(layers)
    recipes = {
        layer: Recipe(
            adapters,
            weights,
            combination_type,
            _rank([Shelf(layer).factors(name)[0].shape[0] for name in adapters], combination_type, svd_rank),
            density,
            majority_sign_method,
        )
        for layer in layers
    }
    # computed before anything is added: all that can fail has then succeeded
    combined = {layer: _combine(layer, recipe) for layer, recipe in recipes.items()}
    put_in(model, adapter_name, lambda layer: _new_settings(layer, recipes[layer].rank))
    with torch.no_grad():
        for layer, parts in combined.items():
            for parameter, values in zip(Shelf(layer).parts(adapter_name), parts, strict=True):
                parameter.copy_(values.view_as(parameter))
    return model


def _check(
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
    settings: list[LoRASettings],
) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"expected a weight for every adapter, got {len(adapters)} adapters and {len(weights)} weights"
        )
    if combination_type not in get_args(CombinationType):
        known = ", ".join(get_args(CombinationType))
        raise ValueError(f"expected combination_type out of {known}, got {combination_type!r}")
    sparse = combination_type not in ("cat", "svd", "linear")
    if density is not None:
        check_finite("density", density, "0.5 keeps half of the values")
    if sparse != (density is not None) or (density is not None and not 0 < density <= 1):
        wanted = "density in (0, 1]" if sparse else "no density"
        raise ValueError(f"expected {wanted} for {combination_type!r}, got {density!r}")
    if majority_sign_method not in get_args(MajoritySign):
        known = ", ".join(get_args(MajoritySign))
        raise ValueError(f"expected majority_sign_method out of {known}, got {majority_sign_method!r}")
    if any(entry.dora for entry in settings):
        raise ValueError("expected LoRA adapters, got DoRA, whose updates do not add up; merge them instead")


def _check_layers(layers: list[LoRAModule]) -> None:
    for layer in layers:
        conv = layer._weight_owner()
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            raise ValueError(
                f"expected convolutions without groups, got groups={conv.groups}, where A and B are no "
                "two factors of one matrix"
            )


def _rank(ranks: list[int], combination_type: str, svd_rank: int | None) -> int:
    if combination_type.endswith("svd"):
        return max(ranks) if svd_rank is None else check_count("svd_rank", svd_rank, "None takes the highest")
    if svd_rank is not None:
        raise ValueError(f"expected svd_rank for 'svd' and '…_svd' alone, got it for {combination_type!r}")
    if combination_type == "cat":
        return sum(ranks)
    if len(set(ranks)) > 1:
        raise ValueError(
            f"expected adapters of one rank for {combination_type!r}, got {ranks}; use 'cat' or 'svd'"
        )
    return ranks[0]


def _new_settings(layer: LoRAModule, rank: int) -> LoRASettings:
    dtype = layer._settings().adapter_dtype
    return LoRASettings(rank=rank, alpha=float(rank), adapter_dtype=dtype)


def _combine(layer: LoRAModule, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """A and B of the new adapter as matrices ``[rank, …]`` and ``[out, rank]``."""
    pairs = [_matrices(layer, name) for name in recipe.adapters]
    scalings = [Shelf(layer).settings(name).scaling for name in recipe.adapters]
    scales = [weight * scaling for weight, scaling in zip(recipe.weights, scalings, strict=True)]
    kind = recipe.combination_type
    if kind in ("cat", "svd"):
        lora_A = torch.cat([a * scale for (a, _), scale in zip(pairs, scales, strict=True)])
        lora_B = torch.cat([b for _, b in pairs], dim=1)
        return (lora_A, lora_B) if kind == "cat" else _truncated(lora_A, lora_B, recipe.rank)
    if kind.endswith("_svd"):
        updates = [b @ a * scaling for (a, b), scaling in zip(pairs, scalings, strict=True)]
        merge = _peft(recipe, kind.removesuffix("_svd"))
        delta = merge(updates, torch.tensor(recipe.weights).to(updates[0]))
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        return _padded(right[: recipe.rank], left[:, : recipe.rank] * values[: recipe.rank], recipe.rank)
    merge = _weighted_sum if kind == "linear" else _peft(recipe, kind)
    roots = torch.tensor(scales).abs().sqrt()
    # the sign of a weight on one side alone, where two would cancel
    signed = roots * torch.tensor(scales).sign()
    lora_As, lora_Bs = ([pair[side] for pair in pairs] for side in (0, 1))
    return merge(lora_As, signed.to(lora_As[0])), merge(lora_Bs, roots.to(lora_Bs[0]))


def _matrices(layer: LoRAModule, name: str) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = Shelf(layer).factors(name)
    return lora_A.detach().flatten(1).float(), lora_B.detach().flatten(1).float()


def _truncated(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B·A at this rank, from a singular value decomposition of R × R numbers."""
    rows, upper_B = torch.linalg.qr(lora_B)
    cols, upper_A = torch.linalg.qr(lora_A.t())
    left, values, right = torch.linalg.svd(upper_B @ upper_A.t(), full_matrices=False)
    new_B = rows @ (left[:, :rank] * values[:rank])
    return _padded(right[:rank] @ cols.t(), new_B, rank)


def _padded(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """With zeros up to the rank that was asked for, where the update has a lower one."""
    missing = rank - lora_A.shape[0]
    return nn.functional.pad(lora_A, (0, 0, 0, missing)), nn.functional.pad(lora_B, (0, missing))


def _weighted_sum(tensors: list[Tensor], weights: Tensor) -> Tensor:
    return (torch.stack(tensors) * weights[:, None, None]).sum(dim=0)


def _peft(recipe: Recipe, kind: str) -> Callable[[list[Tensor], Tensor], Tensor]:
    """PEFT's function for this kind."""
    module: Any = require(
        "peft.utils.merge_utils", distribution="peft", purpose=f"combining by {kind!r}", extra="peft"
    )
    signs = {"majority_sign_method": recipe.majority_sign_method} if "ties" in kind else {}
    function = getattr(module, kind)
    return lambda tensors, weights: function(tensors, weights, recipe.density, **signs)
