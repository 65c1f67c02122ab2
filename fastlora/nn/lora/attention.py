"""LoRA for ``nn.MultiheadAttention``, whose projections are no modules that could be replaced one by one."""

from typing import Self, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastlora._core.option_checks import check_flag, check_probability
from fastlora.nn.lora.attend import attend, attention_mask, check_shapes
from fastlora.nn.lora.base import LoRAModule
from fastlora.nn.lora.checks import check_attention, check_packed
from fastlora.nn.lora.linear import LoRALinear, describe
from fastlora.nn.lora.quantised import share_linear
from fastlora.nn.settings import LoRAOptions, LoRASettings, lora_settings

Attention = TypeVar("Attention", bound=nn.MultiheadAttention)


class LoRAMultiheadAttention(LoRAModule, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with frozen weights and LoRA on query, key, value and output projection.

    ``nn.MultiheadAttention`` reads ``in_proj_weight`` and ``out_proj.weight`` itself and calls no layer, so
    replacing ``nn.Linear`` modules trains nothing in it. Here the packed projection of q, k and v carries one
    update (``lora_A`` ``[rank, E]``, ``lora_B`` ``[3E, rank]``, PEFT's layout), and ``out_proj`` is a
    :class:`LoRALinear` that is called. Same arguments and results; the original's state dict loads as it is.

    Args:
        embed_dim: E, the width of query, key and value.
        num_heads: Number of heads; divides ``embed_dim``.
        dropout: Dropout on the attention weights while training.
        bias: Whether the projections have (frozen) biases.
        add_bias_kv: Not supported.
        add_zero_attn: Not supported.
        kdim: Not supported unless equal to ``embed_dim``.
        vdim: Not supported unless equal to ``embed_dim``.
        batch_first: ``[N, L, E]`` instead of ``[L, N, E]``.
        device: Device of every parameter.
        dtype: Dtype of the frozen weights.
        rank: Inner size of both updates.
        alpha: Strength of the updates.
        lora_dropout: Dropout on the updates' input while training.
        rslora: Scale by alpha/√rank instead of alpha/rank.
        adapter_dtype: Dtype of A and B; None means float32 for 16-bit weights, else the weights' dtype.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: An unsupported option, or a setting out of range.

    Example:
        >>> attention = LoRAMultiheadAttention(8, 2, batch_first=True, rank=2)
        >>> x = torch.randn(3, 5, 8)
        >>> attention(x, x, x, need_weights=False)[0].shape
        torch.Size([3, 5, 8])
    """

    _weight_name = "in_proj_weight"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        lora_dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        settings = LoRASettings(rank, alpha, lora_dropout, rslora, adapter_dtype)
        check_probability("dropout", dropout)
        flags = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn}
        for name, flag in (flags | {"batch_first": batch_first}).items():
            check_flag(name, flag)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        check_packed(self)
        self._add_lora(settings)

    @classmethod
    def from_attention(cls, attention: nn.MultiheadAttention, **options: Unpack[LoRAOptions]) -> Self:
        """A LoRA layer around the parameters of ``attention``, which are shared and frozen, not copied.

        Args:
            attention: The module to adapt; device, attention dropout and train/eval mode are kept.
            **options: ``rank`` (16), ``alpha`` (32.0), ``dropout`` (0.0, of the updates' input, not of the
                attention weights), ``rslora`` (False) and ``adapter_dtype`` (None), see
                :class:`fastlora.nn.settings.LoRAOptions`.

        Raises:
            TypeError: Not a plain ``nn.MultiheadAttention`` with floating Parameters, or an unknown option.
            ValueError: An attention of another kind, a meta weight, a setting out of range, or ``dora=True``.

        Example:
            >>> attention = nn.MultiheadAttention(8, 2)
            >>> LoRAMultiheadAttention.from_attention(attention).in_proj_weight is attention.in_proj_weight
            True
        """
        settings = lora_settings(**options)
        check_attention(attention)
        layer = _share_attention(cls.__new__(cls), attention)
        layer._add_lora(settings)
        return layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``.

        Args:
            query: ``[L, N, E]``, ``[N, L, E]`` with ``batch_first``, or ``[L, E]``.
            key: ``[S, N, E]``, ``[N, S, E]`` with ``batch_first``, or ``[S, E]``.
            value: ``[S, N, E]``, ``[N, S, E]`` or ``[S, E]``, as many as there are keys.
            key_padding_mask: ``[N, S]`` or ``[S]``; True, or a float that is added, hides a key.
            need_weights: Return the attention weights too; without them the fused attention runs.
            attn_mask: ``[L, S]`` or ``[N·heads, L, S]``; True, or a float that is added, hides a pair.
            average_attn_weights: Average the weights over heads.
            is_causal: Hint that ``attn_mask`` is the causal mask.

        Returns:
            The output in query's layout, and the weights ``[N, L, S]`` (``[N, heads, L, S]`` if not averaged)
            or None.

        Raises:
            ValueError: Shapes that do not fit, or ``is_causal`` without ``attn_mask``.
        """
        check_shapes(query, key, value, embed_dim=self.embed_dim, batch_dim=0 if self.batch_first else 1)
        if is_causal and attn_mask is None:
            raise ValueError(
                "expected attn_mask with is_causal=True, got None; the hint needs the mask it is about"
            )
        q, k, v = (self._split_heads(tensor) for tensor in self._project_qkv(query, key, value))
        # as in the original: the hint replaces the mask only where nothing else has to be masked or returned
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else attention_mask(q, k, attn_mask, key_padding_mask)
        attention_dropout = self.dropout if self.training else 0.0
        if not need_weights:
            out = F.scaled_dot_product_attention(q, k, v, mask, attention_dropout, causal)
            return self.out_proj(self._join_heads(out, query)), None
        out, weights = attend(q, k, v, mask, attention_dropout)
        if average_attn_weights:
            weights = weights.mean(dim=1)
        if query.dim() == 2:
            weights = weights.squeeze(0)
        return self.out_proj(self._join_heads(out, query)), weights

    def merge(self, *, requantise: bool = False) -> None:
        """Fold both updates into the packed and the output projection; see :meth:`LoRAModule.merge`.

        Args:
            requantise: Quantise the output projection's merged weight again, where it was quantised.
        """
        super().merge(requantise=requantise)
        for inner in self._inner():
            inner.merge(requantise=requantise)

    def unmerge(self) -> None:
        """Put both original weights back, bit for bit."""
        super().unmerge()
        for inner in self._inner():
            inner.unmerge()

    def reset_lora_parameters(self) -> None:
        """Start both updates afresh; see :meth:`LoRAModule.reset_lora_parameters`."""
        super().reset_lora_parameters()
        for inner in self._inner():
            inner.reset_lora_parameters()

    def to_base(self) -> nn.MultiheadAttention:
        """A plain ``nn.MultiheadAttention`` sharing the weights, with the updates folded in if merged."""
        return _share_attention(nn.MultiheadAttention.__new__(nn.MultiheadAttention), self)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, {describe(self)}"

    def _inner(self) -> list[LoRALinear]:
        return [self.out_proj] if isinstance(self.out_proj, LoRALinear) else []

    def _add_lora(self, settings: LoRASettings) -> None:
        super()._add_lora(settings)
        self.register_module("out_proj", LoRALinear.from_linear(self.out_proj, **vars(settings)))

    def _project_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if key is value and query is key:
            return self._project_rows(query, 0, 3)
        if key is value:
            return self._project_rows(query, 0, 1) + self._project_rows(key, 1, 3)
        return tuple(self._project_rows(x, i, i + 1)[0] for i, x in enumerate((query, key, value)))

    def _project_rows(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        rows = slice(start * self.embed_dim, stop * self.embed_dim)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        if self.merged:
            out = F.linear(x, self.in_proj_weight[rows], bias)
        else:
            lora_A, lora_B = self._factors()
            out = self._lora_linear(x, self.in_proj_weight[rows], bias, lora_A, lora_B[rows])
        return out.chunk(stop - start, dim=-1)

    def _split_heads(self, x: Tensor) -> Tensor:
        # views only: [N, heads, L, head_dim] of whatever layout x has
        x = x.view(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, out: Tensor, query: Tensor) -> Tensor:
        if query.dim() == 2:
            return out.squeeze(0).transpose(0, 1).flatten(-2)
        return (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)


def _share_attention(target: Attention, source: nn.MultiheadAttention) -> Attention:
    nn.MultiheadAttention.__init__(
        target,
        source.embed_dim,
        source.num_heads,
        source.dropout,
        source.in_proj_bias is not None,
        batch_first=source.batch_first,
        device="meta",
    )
    target.in_proj_weight, target.in_proj_bias = source.in_proj_weight, source.in_proj_bias
    target.out_proj = share_linear(NonDynamicallyQuantizableLinear, source.out_proj)
    target.train(source.training)
    return target
