"""What every LoRA layer shares: its two matrices, folding them in and out, and its state dict."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.functional import dora_linear, lora_linear
from fastlora.nn.lora.folding import fold
from fastlora.nn.lora.norm_cache import NormCache
from fastlora.nn.lora.parts import adapter_dtype, draw_update, lora_parts
from fastlora.nn.lora.plain import after_load, before_load, write_plain
from fastlora.nn.lora.start import factors, take_start
from fastlora.nn.settings import LoRASettings
from fastlora.nn.tuner import TunerModule
from fastlora.ops._scalars import Scalars
from fastlora.ops.lora_linear import lora_linear_by_scalars

_SCALAR_SETTINGS = ("rank", "alpha", "rslora", "lora_dropout")


class LoRAModule(TunerModule):
    """Mixin for a layer with a frozen weight W and a trainable update (alpha/rank)·B·A.

    The shapes below are those beside a W ``[out, in]``; convolutions and embeddings say their own.

    LoRA: Hu et al., https://arxiv.org/abs/2106.09685; rank-stabilised scaling: Kalajdzievski,
    https://arxiv.org/abs/2312.03732; DoRA: Liu et al., https://arxiv.org/abs/2402.09353.

    Attributes:
        lora_A: ``[rank, in]``, trainable.
        lora_B: ``[out, rank]``, trainable, zero at the start.
        rank: Inner size of the update.
        alpha: Numerator of :attr:`scaling`.
        lora_dropout: Probability of zeroing an element of the update's input while training.
        rslora: Whether :attr:`scaling` is alpha/√rank instead of alpha/rank.
        dora: Whether the updated weight keeps a trained norm for every output feature.
        lora_magnitude_vector: These norms ``[out]``, trainable; with ``dora`` alone.
    """

    rank: int
    alpha: float
    lora_dropout: float
    rslora: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter
    dora: bool = False
    _scalars: Scalars
    # how a tensor-parallel layer calls its projection on the parts of it that are here
    _parallel: Callable[..., Tensor] | None = None

    # the name of the frozen weight in its owner, and the untouched weight while another one stands there.
    # a tuple hides the Parameter from nn.Module, which would list it beside the merged one
    _weight_name: ClassVar[str] = "weight"
    _unmerged: tuple[nn.Parameter] | None = None

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
    def merge(self) -> None:
        """Fold the update into the weight: one matrix product per forward, as without LoRA.

        W + scaling·B·A, with DoRA scaled to the trained norms, is computed in float64, some rows at a time,
        and rounded once into a new tensor that takes the weight's place. The original is kept aside for
        :meth:`unmerge` and untouched, so a module that shares it keeps its values. A merged layer gives A and
        B no gradient. Merging twice changes nothing.

        Raises:
            ValueError: The weight can't hold the update (:class:`LoRAConv2d` with groups).
        """
        if self.merged:
            return
        self.check_mergeable()
        original = self._weight()
        self._set_weight(nn.Parameter(fold(self, original), requires_grad=False))
        self._unmerged = (original,)

    def check_mergeable(self) -> None:
        """Refuse to merge an update that the weight can't hold; most can.

        Raises:
            ValueError: It can't.
        """
        if self._parallel is not None:
            raise ValueError(
                "expected whole weights to merge, got a tensor-parallel layer; merge before "
                "parallelize_module, or save the adapter and merge it into a model of one process"
            )

    def unmerge(self) -> None:
        """Put the original weight back: the same object, hence the same bits. Without a merge, nothing."""
        if self._unmerged is not None:
            self._set_weight(self._unmerged[0])
            self._unmerged = None

    def to_base(self) -> nn.Module:
        """The plain layer, sharing this one's weight as it is now (folded in if merged), still frozen."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        """As ``nn.Module``'s; what compiled graphs read follows the settings."""
        super().__setattr__(name, value)
        if name in _SCALAR_SETTINGS and all(setting in vars(self) for setting in _SCALAR_SETTINGS):
            self.__dict__["_scalars"] = Scalars(self.scaling, self.lora_dropout)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; DoRA's norms are computed anew."""
        if self.dora:
            self._norms.clear()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The usual state dict; while merged, the plain layer's, with the update in its weight."""
        state = super().state_dict(*args, **kwargs)
        write_plain(self, state, kwargs.get("prefix", args[1] if len(args) > 1 else ""))
        return state

    def _add_lora(self, settings: LoRASettings) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._new_update(settings)

    def _apply_settings(self, settings: LoRASettings) -> None:
        self.rank, self.alpha = settings.rank, settings.alpha
        self.lora_dropout, self.rslora = settings.dropout, settings.rslora
        self.dora, self._norms = settings.dora, NormCache()

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
        draw_update(*self._pair(), embedding=self._is_embedding)
        self._reset_magnitude()

    def _pair(self) -> tuple[Tensor, Tensor]:
        """A and B, whatever they are called here."""
        # not get_parameter: torch.func puts plain tensors in their place
        lora_A, lora_B = (getattr(self, name) for name in self.adapter_params()[:2])
        return lora_A, lora_B

    @property
    def _is_embedding(self) -> bool:
        return isinstance(self._weight_owner(), nn.Embedding)

    def _project(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
    ) -> Tensor:
        if self._parallel is not None:
            return self._parallel(self._project_local, x, weight, bias, lora_A, lora_B)
        return self._project_local(x, weight, bias, lora_A, lora_B)

    def _project_local(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
    ) -> Tensor:
        if self.merged:
            return F.linear(x, weight, bias)
        if self.dora:
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
        if torch.compiler.is_compiling() and x.is_cpu:
            return lora_linear_by_scalars(
                x, weight, bias, lora_A, lora_B, scalars=self._scalars, training=self.training
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

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is the update of the weight, seen as ``[rows, everything else]``."""
        if self._is_embedding:
            lora_A, lora_B = self._pair()
            return lora_A.T, lora_B.T
        lora_A, lora_B = factors(self)
        return lora_B.flatten(1), lora_A.flatten(1)

    def _output_factor(self) -> Tensor:
        """DoRA's m/‖W + s·B·A‖ ``[out]``."""
        norm = self._weight_norm()
        return self.lora_magnitude_vector.view(-1).to(norm.dtype) / norm

    def _weight_norm(self) -> Tensor:
        sources = (self._weight(), *self._pair())
        weight, lora_A, lora_B = (tensor.flatten(1) for tensor in sources)
        # a row for every output feature
        rows = (weight.T if self._is_embedding else weight, lora_A, lora_B)
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

    @contextlib.contextmanager
    def _original_in_place(self) -> Iterator[None]:
        if self._unmerged is None:
            yield
            return
        merged = self._weight()
        self._set_weight(self._unmerged[0])
        try:
            yield
        finally:
            self._unmerged = (self._weight(),)
            self._set_weight(merged)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # the original moves as the Parameter it is, so that it stays shared with whoever else holds it
        with self._original_in_place():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.merged:
            self._set_weight(nn.Parameter(fn(self._weight().data), requires_grad=False))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before_load(self, state_dict, prefix, local_metadata, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        after_load(self, state_dict, prefix, missing_keys)
