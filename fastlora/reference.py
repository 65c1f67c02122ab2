"""The eager definition of every op in plain PyTorch, for any floating dtype and device: the specification."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["gelu", "relu", "silu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def _gelu_new(x: Tensor) -> Tensor:
    """gelu_tanh, rounded after each of its steps, as GPT-2 and Phi compute it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702·x), CLIP's."""
    return x * torch.sigmoid(1.702 * x)


# of MLPs, gated or not: Llama's, Qwen's, Mistral's is silu, BERT's and ViT's gelu, Gemma's gelu_tanh
Gate = Literal["silu", "gelu", "gelu_tanh", "gelu_new", "quick_gelu"]
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": _gelu_new,
    "quick_gelu": _quick_gelu,
}


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = x·Wᵀ + bias + scaling · dropout(x)·Aᵀ·Bᵀ (Hu et al., https://arxiv.org/abs/2106.09685).

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, the frozen layer.
        bias: ``[out_features]`` or None.
        lora_A: ``[rank, in_features]``, in any floating dtype; rounded to x's.
        lora_B: ``[out_features, rank]``, in any floating dtype; rounded to x's.
        scaling: Factor of the low-rank path, usually alpha / rank.
        dropout: Probability of zeroing an element of the low-rank path's input.
        training: Without it dropout does nothing.
        generator: Source of the dropout mask; torch's default generator without it.

    Returns:
        ``[..., out_features]``.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.eye(3)
        >>> lora_linear(x, weight, None, torch.ones(1, 3), torch.ones(3, 1), scaling=0.5)
        tensor([[2.5000, 2.5000, 2.5000],
                [2.5000, 2.5000, 2.5000]])
    """
    dropped = _dropout(x, dropout, generator) if training and dropout > 0 else x
    return _base_plus_low_rank(x, dropped, weight, bias, lora_A, lora_B, scaling)


def gated_lora_linear(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    activation: Gate = "silu",
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`lora_linear` of act(gate)·up (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        gate: ``[..., in_features]``, what the activation is applied to.
        up: ``[..., in_features]``, what it is multiplied with; without it x = act(gate).
        activation: silu, gelu (the exact one), gelu_tanh, gelu_new or quick_gelu.

    The other arguments are those of :func:`lora_linear`.
    """
    layer = (weight, bias, lora_A, lora_B)
    options: dict[str, Any] = {"dropout": dropout, "training": training, "generator": generator}
    x = GATES[activation](gate)
    return lora_linear(x if up is None else x * up, *layer, scaling=scaling, **options)


def lora_linear_with_mask(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    keep_mask: Tensor,
    *,
    scaling: float,
    keep_probability: float,
) -> Tensor:
    """:func:`lora_linear` with the dropout mask given, so that implementations can be compared exactly.

    Args:
        keep_mask: bool, x's shape; True keeps an element and divides it by ``keep_probability``.
        keep_probability: Probability with which the mask was drawn.
    """
    dropped = x * keep_mask / keep_probability
    return _base_plus_low_rank(x, dropped, weight, bias, lora_A, lora_B, scaling)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
    weight_norm: Tensor | None = None,
) -> Tensor:
    """y = m/‖W + s·B·A‖ ⊙ (x·Wᵀ + s·dropout(x)·Aᵀ·Bᵀ) + bias (Liu et al., https://arxiv.org/abs/2402.09353).

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, the frozen layer.
        bias: ``[out_features]`` or None.
        lora_A: ``[rank, in_features]``, in any floating dtype; rounded to x's.
        lora_B: ``[out_features, rank]``, in any floating dtype; rounded to x's.
        magnitude: m ``[out_features]``, in any floating dtype.
        scaling: Factor of the low-rank path, usually alpha / rank.
        dropout: Probability of zeroing an element of the low-rank path's input.
        training: Without it dropout does nothing.
        generator: Source of the dropout mask; torch's default generator without it.
        weight_norm: ‖W + s·B·A‖ ``[out_features]``, where it is given; a constant to autograd in any case.

    Returns:
        ``[..., out_features]``.

    Example:
        >>> x, weight, a, b = torch.ones(1, 2), torch.eye(2), torch.zeros(1, 2), torch.zeros(2, 1)
        >>> dora_linear(x, weight, None, a, b, torch.tensor([1.0, 3.0]), scaling=1.0)
        tensor([[1., 3.]])
    """
    dropped = _dropout(x, dropout, generator) if training and dropout > 0 else x
    return _magnitude_times(x, dropped, weight, bias, lora_A, lora_B, magnitude, scaling, weight_norm)


def dora_linear_with_mask(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    keep_mask: Tensor,
    *,
    scaling: float,
    keep_probability: float,
    weight_norm: Tensor | None = None,
) -> Tensor:
    """:func:`dora_linear` with the dropout mask given, so that implementations can be compared exactly.

    Args:
        keep_mask: bool, x's shape; True keeps an element and divides it by ``keep_probability``.
        keep_probability: Probability with which the mask was drawn.
    """
    dropped = x * keep_mask / keep_probability
    return _magnitude_times(x, dropped, weight, bias, lora_A, lora_B, magnitude, scaling, weight_norm)


def adapter(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    residual: Tensor | Literal["input"] | None = "input",
    activation: Activation = "gelu",
    dropout: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """residual + dropout(act(h·W_dᵀ + b_d))·W_uᵀ + b_u (Houlsby et al., https://arxiv.org/abs/1902.00751).

    Args:
        h: ``[..., hidden_size]``.
        down_weight: ``[adapter_size, hidden_size]``, in any floating dtype; rounded to h's.
        down_bias: ``[adapter_size]`` in any floating dtype, or None; rounded to h's.
        up_weight: ``[hidden_size, adapter_size]``, in any floating dtype; rounded to h's.
        up_bias: ``[hidden_size]`` in any floating dtype, or None; rounded to h's.
        residual: What the bottleneck's output is added to: ``"input"`` means h; a tensor of h's shape, the
            output of the layer that the adapter runs beside, say; None adds it to nothing.
        activation: ``"gelu"`` (the exact one, by erf), ``"relu"`` or ``"silu"``.
        dropout: Probability of zeroing an element after the activation.
        training: Without it dropout does nothing.
        generator: Source of the dropout mask; torch's default generator without it.

    Returns:
        ``[..., hidden_size]``.

    Example:
        >>> down, up = torch.ones(1, 2), torch.ones(2, 1)
        >>> adapter(torch.tensor([1.0, 2.0]), down, None, up, None, activation="relu")
        tensor([4., 5.])
    """
    bottleneck = _linear(h, down_weight, down_bias)
    active = ACTIVATIONS[activation](bottleneck)
    if training and dropout > 0:
        active = _dropout(active, dropout, generator)
    return _add(residual, h, _linear(active, up_weight, up_bias))


def adapter_with_mask(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    keep_mask: Tensor,
    *,
    residual: Tensor | Literal["input"] | None = "input",
    activation: Activation = "gelu",
    keep_probability: float,
) -> Tensor:
    """:func:`adapter` with the dropout mask given, so that implementations can be compared exactly.

    Args:
        keep_mask: bool ``[..., adapter_size]``; True keeps an element and divides it by ``keep_probability``.
        keep_probability: Probability with which the mask was drawn.
    """
    active = ACTIVATIONS[activation](_linear(h, down_weight, down_bias))
    return _add(residual, h, _linear(active * keep_mask / keep_probability, up_weight, up_bias))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _add(residual: Tensor | Literal["input"] | None, h: Tensor, update: Tensor) -> Tensor:
    if residual is None:
        return update
    return (h if isinstance(residual, str) else residual) + update


def _base_plus_low_rank(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    low_rank = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * low_rank


def _magnitude_times(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    weight_norm: Tensor | None,
) -> Tensor:
    if weight_norm is None:
        with torch.no_grad():
            whole = weight + scaling * (lora_B @ lora_A).to(weight.dtype)
            # the sum of squares in float32 at least, as everywhere in torch
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight_norm = torch.linalg.vector_norm(whole, dim=1, dtype=wide)
    product = _base_plus_low_rank(x, dropped, weight, None, lora_A, lora_B, scaling)
    y = (product * (magnitude / weight_norm)).to(product.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _dropout(x: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    # where everything is dropped, nothing is drawn
    if generator is None or probability == 1:
        return F.dropout(x, probability)
    keep = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
    return x * keep / (1 - probability)
