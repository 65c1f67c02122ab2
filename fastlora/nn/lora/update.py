"""The update of a frozen weight: its two matrices, and folding them into the weight and out again."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.functional import dora_linear, lora_linear
from fastlora.nn.lora.folding import fold
from fastlora.nn.lora.layout import Layout, adapter_dtype, check_fit, layout_of, lora_parts
from fastlora.nn.lora.norm_cache import NormCache
from fastlora.nn.lora.start import take_start, with_start
from fastlora.nn.lora.stored import can_requantise, fresh_statistics, merged_dtype, requantised
from fastlora.nn.settings import LoRASettings
from fastlora.nn.tuner import TunerModule
from fastlora.ops.runtime import in_dtype
from fastlora.ops.weights.frozen import FrozenWeight


class LoRAUpdate(TunerModule):
    """A frozen weight W and its trainable update (alpha/rank)·B·A: settings, parameters, folding.

    :class:`LoRAModule` is this with state dicts that plain layers write and read; it documents the
    attributes.
    """

    rank: int
    alpha: float
    lora_dropout: float
    rslora: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter
    dora: bool = False
    _layout: Layout

    # the name of the frozen weight in its owner, and the untouched weight while another one stands there.
    # a tuple hides the Parameter from nn.Module, which would list it beside the merged one
    _weight_name: ClassVar[str] = "weight"
    _unmerged: tuple[nn.Parameter] | None = None
    # whether a dense copy of a quantised weight stands there
    _copied: bool = False
    # attributes of the owner that a weight quantised again took over, as they were
    _statistics: dict[str, Any] | None = None
    requantisation_error: float | None = None

    @property
    def scaling(self) -> float:
        """Factor of the update: alpha/rank, or alpha/√rank with ``rslora``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the weight."""
        return self._unmerged is not None

    def adapter_params(self) -> list[str]:
        """Names of this layer's own trainable parameters."""
        return list(lora_parts(self._weight_owner(), self.rank, dora=self.dora))

    def reset_lora_parameters(self) -> None:
        """Start a fresh update: A random, B zero, so that the layer computes exactly the frozen one.

        The paper draws A from a Gaussian. Like its published code, PEFT and ``nn.Linear``, we draw it
        uniformly from ±1/√in (``kaiming_uniform_`` with a = √5), from torch's default generator.
        A merged layer is unmerged first.
        """
        self.unmerge()
        self._reset_own()

    @torch.no_grad()
    def merge(self, *, requantise: bool = False) -> None:
        """Fold the update into the weight: one matrix product per forward, as without LoRA.

        W + scaling·B·A, with DoRA scaled to the trained norms, is computed in float64, some rows at a time,
        and rounded once into a new tensor that takes the weight's place. The original is kept aside for
        :meth:`unmerge` and untouched, so a module that shares it keeps its values. A merged layer gives A and
        B no gradient. Merging twice changes nothing.

        A quantised weight is merged into a dense copy, in the dtype that it was quantised from as far as its
        library keeps that, else in the bias's or the layer's for products, else in bfloat16.

        Args:
            requantise: Quantise the merged weight again, as bitsandbytes' is that it stands for; what that
                costs is :attr:`requantisation_error`. False keeps a dense copy.

        Raises:
            ValueError: The weight can't hold the update (:class:`LoRAConv2d` with groups), or is no weight of
                bitsandbytes' with ``requantise``.
        """
        if self.merged:
            return
        self.check_mergeable(requantise=requantise)
        original, stored = self._weight(), self._stored()
        if not isinstance(stored, FrozenWeight):
            self._set_weight(nn.Parameter(self._fold(original), requires_grad=False))
        else:
            values = self._fold(stored.dense(torch.float32))
            if requantise:
                self._requantise(original, values)
            else:
                copied = values.to(merged_dtype(self._weight_owner(), stored))
                self._set_weight(nn.Parameter(copied, requires_grad=False))
                self._copied = True
        self._unmerged = (original,)

    def check_mergeable(self, *, requantise: bool = False) -> None:
        """Refuse to merge an update that the weight can't hold; most can.

        Args:
            requantise: Whether a quantised weight is to be quantised again.

        Raises:
            ValueError: It can't, or can't be quantised again.
        """
        if requantise and isinstance(self._stored(), FrozenWeight) and not can_requantise(self._weight()):
            raise ValueError(
                f"expected a weight of bitsandbytes to quantise again, got {type(self._weight()).__name__}; "
                "merge with requantise=False, into a dense copy"
            )

    def unmerge(self) -> None:
        """Put the original weight back: the same object, hence the same bits. Without a merge, nothing."""
        if self._unmerged is not None:
            self._set_weight(self._unmerged[0])
            vars(self._weight_owner()).update(self._statistics or {})
            self._unmerged = self._statistics = self.requantisation_error = None
            self._copied = False

    def to_base(self) -> nn.Module:
        """The plain layer, sharing this one's weight as it is now (folded in if merged), still frozen."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; DoRA's norms are computed anew."""
        if self.dora:
            self._norms.clear()
        return super().train(mode)

    def _add_lora(self, settings: LoRASettings) -> None:
        check_fit(self._weight_owner(), settings)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._new_update(settings)

    def _settings(self) -> LoRASettings:
        dtype = self._pair()[0].dtype
        return LoRASettings(self.rank, self.alpha, self.lora_dropout, self.rslora, dtype, self.dora)

    def _apply_settings(self, settings: LoRASettings) -> None:
        self.rank, self.alpha = settings.rank, settings.alpha
        self.lora_dropout, self.rslora = settings.dropout, settings.rslora
        self.dora, self._norms = settings.dora, NormCache()
        # kept: every call asks for it
        self._layout = layout_of(self._weight_owner())

    def _new_update(self, settings: LoRASettings) -> None:
        self._apply_settings(settings)
        weight = self._weight()
        dtype = settings.adapter_dtype or adapter_dtype(weight.dtype)
        parts = lora_parts(self._weight_owner(), self.rank, dora=self.dora)
        for name, shape in parts.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)))
        self._reset_own()

    def _reset_own(self) -> None:
        take_start(self)
        self._layout.draw(*self._pair())
        self._reset_magnitude()

    def _pair(self) -> tuple[Tensor, Tensor]:
        """A and B, whatever they are called here."""
        # not get_parameter: torch.func puts plain tensors in their place
        lora_A, lora_B = (getattr(self, name) for name in self._layout.names)
        return lora_A, lora_B

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B that the layer computes with: with a start to subtract, of twice the rank."""
        return with_start(self, *self._pair())

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What a linear layer with this update computes, in the dtype that its quantiser's layer casts to."""
        weight, given = self._stored(), x.dtype
        dtype = None
        if isinstance(weight, FrozenWeight):
            dtype = weight.compute_dtype or given
        elif self._copied:
            dtype = weight.dtype
        if dtype is not None:
            x, bias = in_dtype(x, dtype), None if bias is None else in_dtype(bias, dtype)
        if not self.merged:
            y = self._lora_linear(x, weight, bias, *self._factors())
        else:
            y = F.linear(x, weight.dense(x.dtype) if isinstance(weight, FrozenWeight) else weight, bias)
        return y if dtype is None else in_dtype(y, given)

    def _lora_linear(
        self,
        x: Tensor,
        weight: Tensor | FrozenWeight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> Tensor:
        """The op of a linear layer with these settings; with DoRA, the one that scales to the norms."""
        if self.dora:
            if isinstance(weight, FrozenWeight):
                raise TypeError(
                    "expected a dense weight for DoRA, whose norms it takes, got one that was quantised "
                    "later; use dora=False beside quantised weights"
                )
            return dora_linear(
                x,
                weight,
                bias,
                lora_A,
                lora_B,
                self.lora_magnitude_vector.view(-1),
                scaling=self.scaling,
                dropout=self.lora_dropout,
                training=self.training,
                weight_norm=self._weight_norm(),
            )
        return lora_linear(
            x,
            weight,
            bias,
            lora_A,
            lora_B,
            scaling=self.scaling,
            dropout=self.lora_dropout,
            training=self.training,
        )

    def _stored(self) -> Tensor | FrozenWeight:
        """The weight to compute with: its values, or as its quantiser stores them."""
        return self._weight()

    def _requantise(self, original: nn.Parameter, values: Tensor) -> None:
        """Put these values in the original's place, quantised as it is, and say what that costs."""
        weight, owner = requantised(original, values), self._weight_owner()
        fresh = fresh_statistics(owner, weight)
        # others may share the layer's
        self._statistics = {name: vars(owner)[name] for name in fresh}
        vars(owner).update(fresh)
        self._set_weight(weight)
        stored: Any = self._stored()
        self.requantisation_error = float((stored.dense(torch.float32) - values).norm() / values.norm())

    def _fold(self, weight: Tensor) -> Tensor:
        """A weight in this one's place with the update in it."""
        left, right = self._layout.factors(*self._factors())
        magnitude = self.lora_magnitude_vector if self.dora else None
        columns = self._layout.columns
        return fold(weight, left, right, self.scaling, magnitude=magnitude, columns=columns)

    def _output_factor(self) -> Tensor:
        """DoRA's m/‖W + s·B·A‖ ``[out]``."""
        norm = self._weight_norm()
        return self.lora_magnitude_vector.view(-1).to(norm.dtype) / norm

    def _weight_norm(self) -> Tensor:
        sources = (self._weight(), *self._pair())
        weight, lora_A, lora_B = (tensor.flatten(1) for tensor in sources)
        # a row for every output feature
        rows = (weight.T if self._layout.columns else weight, lora_A, lora_B)
        return self._norms.norm(sources, rows, self.scaling, training=self.training)

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        if self.dora:
            self.lora_magnitude_vector.copy_(self._weight_norm().view_as(self.lora_magnitude_vector))

    def _weight_owner(self) -> nn.Module:
        return self

    def _weight(self) -> nn.Parameter:
        # torch.func may put a plain tensor in its place
        weight: nn.Parameter = getattr(self._weight_owner(), self._weight_name)
        return weight

    def _set_weight(self, weight: nn.Parameter) -> None:
        setattr(self._weight_owner(), self._weight_name, weight)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        listed = self._weight_owner()._parameters
        # both move as the Parameters they are: a quantised one keeps its class and its statistics, and the
        # original stays shared with whoever else holds it
        if self._unmerged is not None:
            listed["unmerged"] = self._unmerged[0]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            original = listed.pop("unmerged", None)
            if original is not None:
                self._unmerged = (original,)
        return self
