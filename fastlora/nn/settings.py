"""What a LoRA layer or an adapter is asked to be, and what a frozen layer must be to carry LoRA."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastlora._core.checks import FLOATING_DTYPES
from fastlora._core.option_checks import (
    check_count,
    check_finite,
    check_flag,
    check_one_of,
    check_probability,
)
from fastlora.reference import ACTIVATIONS, Activation

LayerNormPlace = Literal["pre", "post"]
Scale = float | Literal["learned"]

_DTYPE_NAMES = "float16, bfloat16, float32 or float64"
_ADAPTER_SIZE = 64


@dataclass(frozen=True)
class LoRASettings:
    """The checked hyperparameters of one LoRA layer.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: ``rank`` < 1, ``dropout`` outside [0, 1], ``alpha`` not finite.

    Example:
        >>> LoRASettings(rank=8).alpha
        32.0
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    adapter_dtype: torch.dtype | None = None
    dora: bool = False

    def __post_init__(self) -> None:
        """Check every value and turn numbers into plain ``int`` and ``float``."""
        rank = check_count("rank", self.rank, "use 8 or 16, say")
        alpha, dropout = (
            check_finite("alpha", self.alpha, "use 2 * rank, say"),
            check_probability("dropout", self.dropout),
        )
        check_dtype("adapter_dtype", self.adapter_dtype)
        check_flag("rslora", self.rslora)
        check_flag("dora", self.dora)
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "dropout", dropout)


@dataclass(frozen=True)
class AdapterSettings:
    """The checked hyperparameters of one bottleneck adapter, whatever the width of what it adapts.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A size < 1 or two of them, an unknown activation or place of the layer norm, ``scale``
            zero or not finite, ``dropout`` outside [0, 1].

    Example:
        >>> AdapterSettings(reduction_factor=16).size(768)
        48
    """

    adapter_size: int | None = None
    reduction_factor: int | None = None
    activation: Activation = "gelu"
    layer_norm: LayerNormPlace | None = None
    scale: Scale = 1.0
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        """Check every value and turn numbers into plain ``int`` and ``float``."""
        if self.adapter_size is not None and self.reduction_factor is not None:
            raise ValueError(
                f"expected adapter_size or reduction_factor, got both ({self.adapter_size!r} and "
                f"{self.reduction_factor!r}); leave one out"
            )
        for name, advice in (("adapter_size", "use 64, say"), ("reduction_factor", "use 16, say")):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(name, getattr(self, name), advice))
        check_one_of("activation", self.activation, ACTIVATIONS)
        check_one_of("layer_norm", self.layer_norm, (None, "pre", "post"))
        check_flag("bias", self.bias)
        object.__setattr__(self, "scale", _scale(self.scale))
        object.__setattr__(self, "dropout", check_probability("dropout", self.dropout))

    def size(self, hidden_size: int) -> int:
        """The bottleneck's width beside a layer of this width.

        Raises:
            ValueError: ``reduction_factor`` leaves nothing of it.
        """
        if self.reduction_factor is None:
            return self.adapter_size or _ADAPTER_SIZE
        size = hidden_size // self.reduction_factor
        if size < 1:
            raise ValueError(
                f"expected reduction_factor <= hidden_size, got {self.reduction_factor} for "
                f"{hidden_size}; the bottleneck needs at least one unit"
            )
        return size


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    """Refuse a dtype that parameters can't train in.

    Raises:
        TypeError: Not floating, or not a dtype at all.
    """
    if dtype is not None and dtype not in FLOATING_DTYPES:
        raise TypeError(f"expected {name} to be {_DTYPE_NAMES}, got {dtype!r}; None chooses")


def _scale(value: object) -> Scale:
    if isinstance(value, str):
        if value != "learned":
            raise ValueError(f"expected scale to be a number or 'learned', got {value!r}; 1.0 scales nothing")
        return "learned"
    scale = check_finite("scale", value, "1.0 scales nothing")
    if scale == 0.0:
        raise ValueError(f"expected scale to be finite and not zero, got {scale}; 1.0 scales nothing")
    return scale


def check_linear(linear: object) -> None:
    """Refuse anything but a plain ``nn.Linear`` whose weight can be shared and read.

    Raises:
        TypeError: Not an ``nn.Linear``, one that computes something else (quantised, already adapted), or
            one whose weight is no plain floating Parameter.
        ValueError: The weight is on the meta device.
    """
    _check_plain(linear, nn.Linear)


def check_conv(conv: object) -> None:
    """Refuse anything but a plain ``nn.Conv2d`` whose weight can be shared and read.

    Raises:
        TypeError: Not an ``nn.Conv2d``, one that computes something else (quantised, already adapted), or
            one whose weight is no plain floating Parameter.
        ValueError: The weight is on the meta device.
    """
    _check_plain(conv, nn.Conv2d)


def check_embedding(embedding: object) -> None:
    """Refuse anything but a plain ``nn.Embedding`` whose weight can be shared and stays as it is.

    Raises:
        TypeError: Not an ``nn.Embedding``, one that computes something else (scaled, already adapted), or
            one whose weight is no plain floating Parameter.
        ValueError: ``max_norm`` or ``sparse`` is set, or the weight is on the meta device.
    """
    _check_plain(embedding, nn.Embedding)
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


def _check_plain(layer: object, wanted: type[nn.Linear | nn.Conv2d | nn.Embedding]) -> None:
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
    if changed:
        raise TypeError(
            f"expected a plain nn.{name}, got {kind} with a forward of its own (quantised, hooked or already "
            f"adapted); convert it back to nn.{name} first"
        )
    check_parameter(f"{kind}.weight", layer._parameters.get("weight"))
    if getattr(layer, "bias", None) is not None:
        check_parameter(f"{kind}.bias", layer._parameters.get("bias"))


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
            f"expected {name} to be {_DTYPE_NAMES}, got {parameter.dtype}; dequantise or convert it first"
        )
    if parameter.is_meta:
        raise ValueError(
            f"expected {name} to hold values, got a meta tensor; load the model's weights before adding LoRA"
        )
