"""What a frozen layer must be to carry LoRA."""

import torch
from torch import nn

from fastlora._core.checks import FLOATING_DTYPES
from fastlora.nn.lora.stored import is_dense
from fastlora.nn.settings import DTYPE_NAMES
from fastlora.ops.weights.read import frozen_weight, is_compressed


def check_carrier(layer: object) -> None:
    """Refuse a layer that can't be replaced by a LoRA layer of its kind.

    Raises:
        TypeError: None of a kind that can carry LoRA, one that computes something else, or one whose weights
            are no plain floating Parameters.
        ValueError: A setting that its LoRA layer has not, or a weight on the meta device.
    """
    if isinstance(layer, nn.MultiheadAttention):
        check_attention(layer)
    else:
        check_wrappable(layer)


def check_wrappable(layer: object) -> None:
    """Refuse a layer that no ``LoRALayer`` can go around.

    Raises:
        TypeError: None of a kind with one weight, one that computes something else, or one whose weight is no
            plain floating Parameter.
        ValueError: A setting that its LoRA layer has not, or a weight on the meta device.
    """
    if isinstance(layer, nn.Embedding):
        check_embedding(layer)
    else:
        check_plain(layer, nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear)


def check_plain(layer: object, wanted: type[nn.Linear | nn.Conv2d | nn.Embedding]) -> None:
    """Refuse anything but a plain layer of this kind whose weight can be shared and read, or a quantised one.

    Raises:
        TypeError: Another kind, one that computes something else (already adapted), or one whose weight is no
            plain floating Parameter, nor quantised in a way that is known.
        ValueError: The weight is on the meta device.
    """
    kind, name = type(layer).__name__, wanted.__name__
    if not isinstance(layer, wanted):
        raise TypeError(
            f"expected an nn.{name}, got {kind}; LoRA is for nn.Linear, nn.Conv2d, nn.Embedding and "
            "nn.MultiheadAttention, other layers cannot carry it yet"
        )
    changed = [
        method
        for method in ("forward", "_conv_forward")
        if getattr(type(layer), method, None) is not getattr(wanted, method, None) or method in vars(layer)
    ]
    quantised = isinstance(layer, nn.Linear) and _quantised(layer)
    if changed and quantised is not True:
        found = quantised or f"{kind} with a forward of its own (hooked or already adapted)"
        raise TypeError(
            f"expected a plain nn.{name}, or a quantised nn.Linear that can be read, got {found}; convert it "
            f"back to nn.{name} first"
        )
    if quantised is not True:
        check_parameter(f"{kind}.weight", layer._parameters.get("weight"))
    if getattr(layer, "bias", None) is not None:
        check_parameter(f"{kind}.bias", layer._parameters.get("bias"))


def _quantised(layer: nn.Linear) -> bool | str:
    """Whether a linear layer is a quantised one that can be read, or why it can't be."""
    weight = layer._parameters.get("weight")
    if is_dense(layer) or weight is None:
        return False
    check_values(f"{type(layer).__name__}.weight", weight)
    found = frozen_weight(layer)
    if isinstance(found, str):
        return found
    own = "forward" in vars(layer) and not is_compressed(layer)
    return f"{type(layer).__name__} with a forward of its own" if own else True


def check_embedding(embedding: object) -> None:
    """Refuse anything but a plain ``nn.Embedding`` whose weight can be shared and stays as it is.

    Raises:
        TypeError: Not an ``nn.Embedding``, one that computes something else (scaled, already adapted), or
            one whose weight is no plain floating Parameter.
        ValueError: ``max_norm`` or ``sparse`` is set, or the weight is on the meta device.
    """
    check_plain(embedding, nn.Embedding)
    assert isinstance(embedding, nn.Embedding)
    if embedding.max_norm is not None:
        raise ValueError(
            f"expected an nn.Embedding without max_norm, got max_norm={embedding.max_norm}, which rewrites "
            "the frozen weight in every forward; renormalise the weight once and set max_norm = None"
        )
    if embedding.sparse:
        raise ValueError(
            "expected an nn.Embedding with sparse=False, got sparse=True; the gradient of a LoRA update is "
            "dense and small, so set embedding.sparse = False"
        )


def check_attention(attention: object) -> None:
    """Refuse anything but a plain ``nn.MultiheadAttention`` that packs q, k and v into one weight.

    Raises:
        TypeError: Not an ``nn.MultiheadAttention``, one with a forward of its own, or with weights that are
            no plain floating Parameters.
        ValueError: ``kdim``/``vdim`` other than ``embed_dim``, ``add_bias_kv``, ``add_zero_attn``, or meta.
    """
    kind = type(attention).__name__
    if not isinstance(attention, nn.MultiheadAttention):
        raise TypeError(
            f"expected an nn.MultiheadAttention, got {kind}; other attention cannot carry LoRA whole"
        )
    if type(attention).forward is not nn.MultiheadAttention.forward or "forward" in vars(attention):
        raise TypeError(
            f"expected a plain nn.MultiheadAttention, got {kind} with a forward of its own (quantised, "
            "hooked or already adapted); convert it back first"
        )
    check_packed(attention)
    check_parameter(f"{kind}.in_proj_weight", attention._parameters.get("in_proj_weight"))
    if attention.in_proj_bias is not None:
        check_parameter(f"{kind}.in_proj_bias", attention._parameters.get("in_proj_bias"))
    check_plain(attention.out_proj, nn.Linear)


def check_packed(attention: nn.MultiheadAttention) -> None:
    """Refuse an ``nn.MultiheadAttention`` that does not pack q, k and v into one weight, or adds keys.

    Raises:
        ValueError: ``kdim``/``vdim`` other than ``embed_dim``, ``add_bias_kv`` or ``add_zero_attn``.
    """
    given = {
        "kdim or vdim unlike embed_dim": not attention._qkv_same_embed_dim,
        "add_bias_kv": attention.bias_k is not None or attention.bias_v is not None,
        "add_zero_attn": attention.add_zero_attn,
    }
    unsupported = [name for name, present in given.items() if present]
    if unsupported:
        raise ValueError(
            f"expected nn.MultiheadAttention with one packed q, k, v weight and no extra keys, got "
            f"{', '.join(unsupported)}; leave this layer out"
        )


def check_parameter(name: str, parameter: object) -> None:
    """Refuse a weight that is not a plain, materialised floating Parameter.

    Raises:
        TypeError: A tensor subclass (quantised, sharded), a computed weight, or a non-floating dtype.
        ValueError: On the meta device.
    """
    if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
        raise TypeError(
            f"expected {name} to be a plain Parameter, got {type(parameter).__name__}; add LoRA before "
            "sharding, and take quantisation, parametrisation or weight norm off first"
        )
    if parameter.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"expected {name} to be {DTYPE_NAMES}, got {parameter.dtype}; dequantise or convert it first"
        )
    check_values(name, parameter)


def check_values(name: str, parameter: nn.Parameter) -> None:
    """Refuse a weight without values.

    Raises:
        ValueError: It is on the meta device.
    """
    if parameter.is_meta:
        raise ValueError(
            f"expected {name} to hold values, got a meta tensor; load the model's weights before adding LoRA"
        )
