"""LoRA for ``nn.Linear``: a drop-in layer."""

from typing import Self, Unpack

import torch
from torch import Tensor, nn

from fastlora._core import backend
from fastlora._core.option_checks import check_flag
from fastlora.nn.lora.base import LoRAModule
from fastlora.nn.lora.checks import check_plain
from fastlora.nn.lora.quantised import lora_around, new_linear, share_linear
from fastlora.nn.lora.start import START_A, START_B, has_start
from fastlora.nn.lora.stored import stored_weight
from fastlora.nn.settings import LoRAOptions, LoRASettings, lora_settings
from fastlora.ops.runtime import autocast_dtype
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.ops.weights.read import is_compressed
from fastlora.ops.weights.repacking import keep_as_stored
from fastlora.together import siblings
from fastlora.together.parts import Adapter, LayerOfParts, Parts, is_plain_input


class LoRALinear(LoRAModule, LayerOfParts, nn.Linear):
    """``nn.Linear`` with a frozen weight and a trainable low-rank update (https://arxiv.org/abs/2106.09685).

    y = x·Wᵀ + bias + scaling · dropout(x)·Aᵀ·Bᵀ, with scaling = alpha/rank. B starts at zero, so the first
    output equals the frozen layer's: bit for bit with library products (on a CPU), to rounding with the
    kernels, whose sums run in another order. A plain ``nn.Linear`` state dict loads as it is.

    Args:
        in_features: Size of the last dimension of x ``[..., in_features]``.
        out_features: Size of the last dimension of y.
        bias: Whether there is a (frozen) bias.
        rank: Inner size of the update, at least 1.
        alpha: Strength of the update.
        dropout: Probability in [0, 1] of zeroing an element of the update's input while training.
        rslora: Scale by alpha/√rank instead (https://arxiv.org/abs/2312.03732).
        dora: Keep a trained norm for every output feature (https://arxiv.org/abs/2402.09353).
        device: Device of every parameter.
        dtype: Dtype of weight and bias.
        adapter_dtype: Dtype of A and B; None means float32 for a 16-bit weight, else the weight's dtype.

    Raises:
        TypeError: ``rank`` is no integer, ``alpha`` or ``dropout`` no number, a dtype not floating.
        ValueError: ``rank`` < 1, ``dropout`` outside [0, 1], ``alpha`` not finite.

    Example:
        >>> layer = LoRALinear(8, 4, rank=2)
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_A', 'lora_B']
        >>> x = torch.randn(3, 8)
        >>> torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        True
    """

    # the class of layers that a quantised weight is read as
    _read_as: type[nn.Linear] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        settings = LoRASettings(rank, alpha, dropout, rslora, adapter_dtype, dora)
        check_flag("bias", bias)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_lora(settings)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Unpack[LoRAOptions]) -> Self:
        """A LoRA layer around the weight and bias of ``linear``, which are shared and frozen, not copied.

        Hooks are not carried over. A layer that ``nn.TransformerEncoderLayer`` reads through its fused
        inference path must be put in by :func:`fastlora.apply_lora`, which switches that path off.

        Args:
            linear: The layer to adapt, with weight ``[out, in]``; device and train/eval mode are kept. A
                quantised one that :func:`fastlora.ops.weights.read.frozen_weight` reads keeps its bytes, and
                gives a layer that is an instance of its class, too.
            **options: ``rank`` (16), ``alpha`` (32.0), ``dropout`` (0.0), ``rslora`` (False),
                ``dora`` (False) and ``adapter_dtype`` (None), see :class:`fastlora.nn.settings.LoRAOptions`.

        Raises:
            TypeError: Not a plain ``nn.Linear`` with a floating Parameter as weight, no quantised one that
                can be read, or an unknown option.
            ValueError: The weight is on the meta device, a setting is out of range, or ``dora=True`` beside a
                quantised weight.

        Example:
            >>> linear = nn.Linear(8, 4)
            >>> LoRALinear.from_linear(linear, rank=2).weight is linear.weight
            True
        """
        settings = lora_settings(**options)
        check_plain(linear, nn.Linear)
        quantised = type(linear).forward is not nn.Linear.forward or is_compressed(linear)
        layer: Self = lora_around(cls, linear) if quantised else new_linear(cls, linear)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._add_lora(settings)
        keep_as_stored(linear)
        return layer.train(linear.training)

    @property
    def dropout(self) -> float:
        """Probability of zeroing an element of the update's input (:attr:`lora_dropout`)."""
        return self.lora_dropout

    def forward(self, input: Tensor) -> Tensor:
        """x·Wᵀ + bias + scaling · dropout(x)·Aᵀ·Bᵀ, ``[..., in_features]`` to ``[..., out_features]``."""
        # most layers have none, and pay nothing for it
        if torch.compiler.is_compiling() or self._siblings is None or backend.is_watched():
            return self._linear(input, self.bias)
        parts = self._parts_of(input)
        return self._linear(input, self.bias) if parts is None else siblings.compute(self, input, parts)

    def reset_parameters(self) -> None:
        """Draw the weight and bias as ``nn.Linear`` does, and start a fresh update."""
        self.unmerge()
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def to_base(self) -> nn.Linear:
        """A plain ``nn.Linear`` sharing this layer's weight (folded in if merged) and bias."""
        return share_linear(nn.Linear, self, cast=self._copied)

    def _stored(self) -> Tensor | FrozenWeight:
        return stored_weight(self, self._read_as)

    def _draws_masks(self) -> bool:
        return self.training and self.lora_dropout > 0

    def _parts_of(self, x: Tensor) -> Parts | None:
        # DoRA's product is another, and what is parametrized is another tensor in each call
        if self.merged or self.dora or "parametrizations" in self._modules or not _computes_as_written(self):
            return None
        dropout, starts = self.lora_dropout if self._draws_masks() else 0.0, has_start(self)
        weight, bias, (lora_A, lora_B) = self._stored(), self.bias, self._pair()
        if not (is_plain_input(x) and backend.are_plain(weight, bias, lora_A, lora_B)):
            return None
        # of adapters each has a mask of its own, but a start has that of the update
        if (starts and dropout) or not _fits(x, weight, bias):
            return None
        adapters = [Adapter(lora_A, lora_B, None, self.scaling, dropout, None)]
        if starts:
            start = self.get_buffer(START_A), self.get_buffer(START_B)
            adapters.append(Adapter(*start, None, -self.scaling, dropout, None))
        return Parts(weight, bias, adapters)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"{super().extra_repr()}, {describe(self)}"


# as they are written here
_FORWARD, _LORA_LINEAR = LoRALinear.forward, LoRALinear._lora_linear


def _computes_as_written(layer: LoRALinear) -> bool:
    """Whether no subclass and no patch computes anything else, or wants to see the call."""
    kind = type(layer)
    unpatched = kind.forward is _FORWARD and kind._lora_linear is _LORA_LINEAR
    return unpatched and "_lora_linear" not in layer.__dict__


def describe(layer: LoRAModule) -> str:
    """The LoRA part of a layer's ``extra_repr``."""
    text = f"rank={layer.rank}, alpha={layer.alpha:g}, lora_dropout={layer.lora_dropout:g}"
    flags = [name for name in ("rslora", "dora", "merged") if getattr(layer, name)]
    return text + "".join(f", {name}=True" for name in flags)


def _fits(x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None) -> bool:
    """Whether neither x nor the bias is cast before the op."""
    autocast = autocast_dtype(x)
    if not isinstance(weight, FrozenWeight):
        return autocast is not None or weight.dtype is x.dtype
    dtype = weight.compute_dtype or x.dtype
    return dtype in (x.dtype, autocast) and (bias is None or bias.dtype is dtype)
