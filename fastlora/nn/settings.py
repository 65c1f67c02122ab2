"""What a LoRA layer, a bottleneck adapter or learned prompts are asked to be."""

import math
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, get_args

import torch

from fastlora._core.checks import FLOATING_DTYPES
from fastlora._core.option_checks import (
    check_count,
    check_finite,
    check_flag,
    check_one_of,
    check_probability,
)
from fastlora._core.words import did_you_mean
from fastlora.reference import ACTIVATIONS, Activation

LayerNormPlace = Literal["pre", "post"]
Scale = float | Literal["learned"]
PromptInit = Literal["auto", "uniform", "vocabulary"]

DTYPE_NAMES = "float16, bfloat16, float32 or float64"
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
        alpha = check_finite("alpha", self.alpha, "use 2 * rank, say")
        dropout = check_probability("dropout", self.dropout)
        check_dtype("adapter_dtype", self.adapter_dtype)
        check_flag("rslora", self.rslora)
        check_flag("dora", self.dora)
        for name, value in (("rank", rank), ("alpha", alpha), ("dropout", dropout)):
            object.__setattr__(self, name, value)

    @property
    def scaling(self) -> float:
        """Factor of the update: alpha/rank, or alpha/√rank with ``rslora``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRAOptions(TypedDict, total=False):
    """The options of a LoRA layer, each with a default.

    Attributes:
        rank: Inner size of the update, at least 1; 16.
        alpha: Strength of the update, a finite number; 32.0.
        dropout: Probability in [0, 1] of zeroing an element of the update's input while training; 0.0. An
            embedding has none.
        rslora: Scale by alpha/√rank (https://arxiv.org/abs/2312.03732) instead of alpha/rank; False.
        dora: Keep a trained norm for every output feature (https://arxiv.org/abs/2402.09353); False. Not for
            attention and convolutions with groups.
        adapter_dtype: Dtype of A and B; None, the default, means float32 for 16-bit weights, else the
            weights' dtype.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    adapter_dtype: torch.dtype | None


def lora_settings(**options: Unpack[LoRAOptions]) -> LoRASettings:
    """The options, checked.

    Raises:
        TypeError: An option of another name (near ones are suggested), or a value of a wrong type.
        ValueError: ``rank`` < 1, ``dropout`` outside [0, 1], ``alpha`` not finite.
    """
    for name in options:
        if name not in LoRAOptions.__annotations__:
            known = ", ".join(LoRAOptions.__annotations__)
            advice = did_you_mean(name, LoRAOptions.__annotations__) or "leave it out"
            raise TypeError(f"expected options out of {known}, got {name!r}; {advice.rstrip()}")
    return LoRASettings(**options)


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


@dataclass(frozen=True)
class PromptSettings:
    """The checked hyperparameters of prompts; ``apply_prompts(model, **vars(settings))`` makes such prompts.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: ``num_tokens`` < 1, ``dropout`` outside [0, 1], ``init`` unknown.

    Example:
        >>> PromptSettings(num_tokens=50, deep=True).dropout
        0.0
    """

    num_tokens: int = 10
    deep: bool = False
    dropout: float = 0.0
    init: PromptInit = "auto"

    def __post_init__(self) -> None:
        """Check every value and turn numbers into plain ``int`` and ``float``."""
        num_tokens = check_count("num_tokens", self.num_tokens, "use 10, say")
        check_flag("deep", self.deep, "True prompts every block")
        dropout = check_probability("dropout", self.dropout)
        check_one_of("init", self.init, get_args(PromptInit), "'auto' does what the papers do")
        object.__setattr__(self, "num_tokens", num_tokens)
        object.__setattr__(self, "dropout", dropout)


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    """Refuse a dtype that parameters can't train in.

    Raises:
        TypeError: Not floating, or not a dtype at all.
    """
    if dtype is not None and dtype not in FLOATING_DTYPES:
        raise TypeError(f"expected {name} to be {DTYPE_NAMES}, got {dtype!r}; None chooses")


def _scale(value: object) -> Scale:
    if isinstance(value, str):
        if value != "learned":
            raise ValueError(f"expected scale to be a number or 'learned', got {value!r}; 1.0 scales nothing")
        return "learned"
    scale = check_finite("scale", value, "1.0 scales nothing")
    if scale == 0.0:
        raise ValueError(f"expected scale to be finite and not zero, got {scale}; 1.0 scales nothing")
    return scale
