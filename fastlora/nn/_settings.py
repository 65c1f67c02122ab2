"""What a LoRA layer is asked to be, and what a frozen layer must be to carry one."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import nn

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPE_NAMES = "float16, bfloat16, float32 or float64"


@dataclass(frozen=True)
class LoRASettings:
    """The checked hyperparameters of one LoRA layer.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: ``rank`` < 1, ``dropout`` outside [0, 1), ``alpha`` not finite.

    Example:
        >>> LoRASettings(rank=8).alpha
        32.0
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check every value and turn numbers into plain ``int`` and ``float``."""
        if not isinstance(self.rank, Integral) or isinstance(self.rank, bool):
            raise TypeError(f"expected rank to be an integer, got {self.rank!r}; use 8 or 16, say")
        if self.rank < 1:
            raise ValueError(f"expected rank >= 1, got {self.rank}; use 8 or 16, say")
        alpha, dropout = _number("alpha", self.alpha), _number("dropout", self.dropout)
        if not math.isfinite(alpha):
            raise ValueError(f"expected alpha to be finite, got {alpha}; use 2 * rank, say")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"expected dropout in [0, 1), got {dropout}; use 0.0 for none")
        if self.adapter_dtype is not None and self.adapter_dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"expected adapter_dtype to be {_DTYPE_NAMES}, got {self.adapter_dtype!r}; None chooses"
            )
        object.__setattr__(self, "rank", int(self.rank))
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "dropout", dropout)


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be a number, got {value!r}; give a float")
    return float(value)


def check_linear(linear: object) -> None:
    """Refuse anything but a plain ``nn.Linear`` whose weight can be shared and read.

    Raises:
        TypeError: Not an ``nn.Linear``, one that computes something else (quantised, already adapted), or
            one whose weight is no plain floating Parameter.
        ValueError: The weight is on the meta device.
    """
    kind = type(linear).__name__
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected an nn.Linear, got {kind}; other layers cannot carry LoRA yet")
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise TypeError(
            f"expected a plain nn.Linear, got {kind} with a forward of its own (quantised, hooked or already "
            "adapted); convert it back to nn.Linear first"
        )
    check_parameter(f"{kind}.weight", linear._parameters.get("weight"))
    if linear.bias is not None:
        check_parameter(f"{kind}.bias", linear._parameters.get("bias"))


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
    if parameter.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"expected {name} to be {_DTYPE_NAMES}, got {parameter.dtype}; dequantise or convert it first"
        )
    if parameter.is_meta:
        raise ValueError(
            f"expected {name} to hold values, got a meta tensor; load the model's weights before adding LoRA"
        )
