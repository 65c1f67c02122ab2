"""The bottleneck adapter: a small trainable network inside a frozen one."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora._core.option_checks import check_count
from fastlora.functional import adapter
from fastlora.nn.settings import AdapterSettings, LayerNormPlace, Scale, check_dtype
from fastlora.nn.tuner import TunerModule
from fastlora.reference import Activation


class AdapterLayer(TunerModule):
    """h + scale · W_up(dropout(act(W_down h))), a bottleneck adapter (https://arxiv.org/abs/1902.00751).

    W_up and its bias start at zero, so the first output equals the input bit for bit, whatever the options.
    :func:`fastlora.apply_adapters` puts these into a frozen model.

    Args:
        hidden_size: Size of the last dimension of h ``[..., hidden_size]``.
        adapter_size: Width of the bottleneck; None means 64, or what ``reduction_factor`` says.
        reduction_factor: Makes the bottleneck ``hidden_size // reduction_factor`` wide instead.
        activation: ``"gelu"`` (exact), ``"relu"`` or ``"silu"``.
        layer_norm: ``"pre"`` normalises what enters W_down, ``"post"`` what leaves W_up; the residual is
            never normalised. None does neither.
        scale: Factor of the adapter's part; ``"learned"`` makes it a parameter that starts at 1
            (https://arxiv.org/abs/2110.04366). It multiplies the small weights, never the activations.
        dropout: Probability in [0, 1] of zeroing an element after the activation while training.
        bias: Whether both projections have a bias.
        device: Device of every parameter.
        dtype: Dtype of every parameter, rounded to h's where they differ; None means torch's default.

    Attributes:
        down_proj: W_down, ``[adapter_size, hidden_size]``. Read, not called: hooks on it do not run.
        up_proj: W_up, ``[hidden_size, adapter_size]``. Read, not called: hooks on it do not run.
        norm: The layer norm, or None.
        scale: A float, or with ``"learned"`` a Parameter ``[1]``.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting out of range, or both ``adapter_size`` and ``reduction_factor``.

    Example:
        >>> layer = AdapterLayer(8, adapter_size=2)
        >>> h = torch.randn(3, 8)
        >>> torch.equal(layer(h), h)
        True
        >>> layer.adapter_params()
        ['down_proj.weight', 'down_proj.bias', 'up_proj.weight', 'up_proj.bias']
    """

    scale: float | nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        adapter_size: int | None = None,
        *,
        reduction_factor: int | None = None,
        activation: Activation = "gelu",
        layer_norm: LayerNormPlace | None = None,
        scale: Scale = 1.0,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        settings = AdapterSettings(
            adapter_size, reduction_factor, activation, layer_norm, scale, dropout, bias
        )
        check_dtype("dtype", dtype)
        super().__init__()
        self.hidden_size = check_count("hidden_size", hidden_size, "give the width of what is adapted")
        self.adapter_size = settings.size(self.hidden_size)
        self.activation, self.layer_norm = settings.activation, settings.layer_norm
        self.dropout = settings.dropout
        self.down_proj = nn.Linear(self.hidden_size, self.adapter_size, bias, device, dtype)
        self.up_proj = nn.Linear(self.adapter_size, self.hidden_size, bias, device, dtype)
        self.norm = nn.LayerNorm(hidden_size, device=device, dtype=dtype) if layer_norm else None
        if isinstance(settings.scale, float):
            self.scale = settings.scale
        else:
            # one dimension: FSDP2 can't shard scalars
            self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_adapter_parameters()

    def adapter_params(self) -> list[str]:
        """Names of this layer's own trainable parameters."""
        return [name for name, _ in self.named_parameters()]

    @torch.no_grad()
    def reset_adapter_parameters(self) -> None:
        """Start afresh: W_down random, W_up and the biases zero, the norm neutral, a learned scale 1.

        The paper draws both projections from a Gaussian of σ = 0.01. Like He et al.'s published code
        (https://arxiv.org/abs/2110.04366) and our LoRA layers, we draw W_down uniformly from ±1/√hidden_size
        (``kaiming_uniform_`` with a = √5, which suits any width), from torch's default generator.
        """
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up_proj.weight)
        for linear in (self.down_proj, self.up_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.norm is not None:
            self.norm.reset_parameters()
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)

    def forward(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[..., hidden_size]`` to the same.

        Args:
            h: What the adapter reads.
            residual: What its output is added to, of h's shape; None means h. The output of the layer that
                the adapter runs beside, in the parallel form.

        Raises:
            ValueError: Another last dimension, or a residual of another shape.
        """
        self._check(h, residual)
        base = h if residual is None else residual
        if self.norm is not None and self.layer_norm == "post":
            return base + self._normalise(self._bottleneck(h, None, scaled=False), self.norm, scaled=True)
        if self.norm is not None:
            return self._bottleneck(self._normalise(h, self.norm, scaled=False), base, scaled=True)
        return self._bottleneck(h, "input" if residual is None else residual, scaled=True)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        scale = "learned" if isinstance(self.scale, nn.Parameter) else f"{self.scale:g}"
        text = f"{self.hidden_size}, adapter_size={self.adapter_size}, activation={self.activation}"
        text += f", layer_norm={self.layer_norm}" if self.layer_norm else ""
        return text + f", scale={scale}, dropout={self.dropout:g}"

    def _bottleneck(self, h: Tensor, residual: Tensor | Literal["input"] | None, scaled: bool) -> Tensor:
        up_weight, up_bias = self.up_proj.weight, self.up_proj.bias
        return adapter(
            h,
            self.down_proj.weight,
            self.down_proj.bias,
            self._scaled(up_weight) if scaled else up_weight,
            self._scaled(up_bias) if scaled and up_bias is not None else up_bias,
            residual=residual,
            activation=self.activation,
            dropout=self.dropout,
            training=self.training,
        )

    def _normalise(self, x: Tensor, norm: nn.LayerNorm, scaled: bool) -> Tensor:
        weight, bias = (self._scaled(p) if scaled else p for p in (norm.weight, norm.bias))
        out = F.layer_norm(x, norm.normalized_shape, weight.to(x.dtype), bias.to(x.dtype), norm.eps)
        # autocast runs it in float32
        return out.to(x.dtype)

    def _scaled(self, parameter: Tensor) -> Tensor:
        if isinstance(self.scale, float) and self.scale == 1.0:
            return parameter
        # 16-bit parameters would round the product once more than they need to
        wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        return wide * self.scale

    def _check(self, h: Tensor, residual: Tensor | None) -> None:
        # not shape: nested tensors of the strided layout have none
        if h.dim() == 0 or h.size(-1) != self.hidden_size:
            raise ValueError(
                f"expected h [..., {self.hidden_size}], got {tuple(h.shape)}; hidden_size must be the width "
                "of what is adapted"
            )
        if residual is not None and residual.shape != h.shape:
            raise ValueError(
                f"expected a residual of h's shape {tuple(h.shape)}, got {tuple(residual.shape)}; the "
                "parallel form needs a layer whose output is as wide as its input"
            )
