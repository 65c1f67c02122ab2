"""LoRA for ``nn.Conv2d``: a drop-in layer in PEFT's layout."""

from typing import Literal, Self, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora._core.option_checks import check_flag
from fastlora.nn.lora.base import LoRAModule
from fastlora.nn.lora.checks import check_plain
from fastlora.nn.lora.linear import describe
from fastlora.nn.settings import LoRAOptions, LoRASettings, lora_settings

Conv = TypeVar("Conv", bound=nn.Conv2d)
Size = int | tuple[int, int]


class LoRAConv2d(LoRAModule, nn.Conv2d):
    """``nn.Conv2d`` with a frozen weight and a trainable low-rank update (https://arxiv.org/abs/2106.09685).

    y = conv(x) + scaling · B(A(dropout(x))), with scaling = alpha/rank. A is a convolution to ``rank``
    channels with the frozen one's kernel size, stride, padding, dilation and padding mode; B is a 1×1
    convolution and starts at zero, so the first output equals the frozen layer's: bit for bit on a CPU, to
    rounding where a 1×1 convolution runs in the kernels of :func:`fastlora.functional.lora_linear`. A plain
    ``nn.Conv2d`` state dict loads as it is.

    With groups, A still sees every input channel and only B is grouped, as in PEFT. Such an update does not
    fit into the frozen weight: these layers can't be merged.

    Args:
        in_channels: Channels of x ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.
        out_channels: Channels of y.
        kernel_size: Height and width of the kernel, in pixels.
        stride: Step of the kernel over the image, in pixels.
        padding: Pixels on each side, ``"same"`` or ``"valid"``.
        dilation: Distance of the kernel's elements, in pixels.
        groups: Blocks of channels that are convolved apart; they must divide ``rank``.
        bias: Whether there is a (frozen) bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: Channels between A and B, at least 1.
        alpha: Strength of the update.
        dropout: Probability in [0, 1] of zeroing an element of the update's input while training.
        rslora: Scale by alpha/√rank instead (https://arxiv.org/abs/2312.03732).
        dora: Keep a trained norm for every output feature (https://arxiv.org/abs/2402.09353).
        device: Device of every parameter.
        dtype: Dtype of weight and bias.
        adapter_dtype: Dtype of A and B; None means float32 for a 16-bit weight, else the weight's dtype.

    Attributes:
        lora_A: ``[rank, in_channels, *kernel_size]``, trainable.
        lora_B: ``[out_channels, rank / groups, 1, 1]``, trainable, zero at the start.

    Raises:
        TypeError: ``rank`` is no integer, ``alpha`` or ``dropout`` no number, a dtype not floating.
        ValueError: ``rank`` < 1 or not a multiple of ``groups``, ``dropout`` outside [0, 1], ``alpha`` not
            finite.

    Example:
        >>> layer = LoRAConv2d(3, 8, 3, padding=1, rank=2)
        >>> [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
        [(2, 3, 3, 3), (8, 2, 1, 1)]
        >>> layer(torch.randn(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
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
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self._add_lora(settings)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Unpack[LoRAOptions]) -> Self:
        """A LoRA layer around the weight and bias of ``conv``, which are shared and frozen, not copied.

        Hooks are not carried over.

        Args:
            conv: The layer to adapt, with weight ``[out, in / groups, kh, kw]``; device and train/eval mode
                are kept.
            **options: ``rank`` (16), ``alpha`` (32.0), ``dropout`` (0.0), ``rslora`` (False),
                ``dora`` (False) and ``adapter_dtype`` (None), see :class:`fastlora.nn.settings.LoRAOptions`.

        Raises:
            TypeError: Not a plain ``nn.Conv2d`` with a floating Parameter as weight, or an unknown option.
            ValueError: The weight is on the meta device, the groups do not divide ``rank``, or a setting is
                out of range.

        Example:
            >>> conv = nn.Conv2d(3, 8, 3)
            >>> LoRAConv2d.from_conv(conv, rank=2).weight is conv.weight
            True
        """
        settings = lora_settings(**options)
        check_plain(conv, nn.Conv2d)
        layer = _share_conv(cls.__new__(cls), conv)
        layer._add_lora(settings)
        return layer.train(conv.training)

    @property
    def dropout(self) -> float:
        """Probability of zeroing an element of the update's input (:attr:`lora_dropout`)."""
        return self.lora_dropout

    def forward(self, input: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``, also without N."""
        return convolve(self, self, input)

    def check_mergeable(self, *, requantise: bool = False) -> None:
        """Refuse to merge with groups: A mixes channels of all groups, the frozen weight has none for that.

        Args:
            requantise: Has no effect: no convolution is quantised.

        Raises:
            ValueError: There are groups.
        """
        check_groups(self)

    def reset_parameters(self) -> None:
        """Draw the weight and bias as ``nn.Conv2d`` does, and start a fresh update."""
        self.unmerge()
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def to_base(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` sharing this layer's weight (folded in if merged) and bias."""
        return _share_conv(nn.Conv2d.__new__(nn.Conv2d), self)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"{super().extra_repr()}, {describe(self)}"  # type: ignore[no-untyped-call]


def convolve(layer: LoRAModule, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of ``conv`` with the update of ``layer``, which is it or stands around it.

    Args:
        layer: Holds the update.
        conv: Holds weight, bias and geometry.
        x: ``[N, in_channels, H, W]``, also without N.
    """
    if layer.merged:
        return nn.Conv2d.forward(conv, x)
    if _is_pointwise(conv) and _pixels_are_rows(x):
        weights = (conv.weight.flatten(1), conv.bias, layer.lora_A.flatten(1), layer.lora_B.flatten(1))
        return layer._lora_linear(x.permute(0, 2, 3, 1), *weights).permute(0, 3, 1, 2)
    # with DoRA the bias joins at the end
    out = conv._conv_forward(x, conv.weight, None if layer.dora else conv.bias)
    x, padding = F.dropout(x, layer.lora_dropout, layer.training), conv.padding
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode), (0, 0)
    # as in the linear op, A and B are rounded to x's dtype
    lora_A, lora_B = layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype)
    update = F.conv2d(x, lora_A, None, conv.stride, padding, conv.dilation)
    update = F.conv2d(update, lora_B, groups=conv.groups)
    out = torch.add(out, update, alpha=layer.scaling)
    if not layer.dora:
        return out
    out = (out * layer._output_factor()[:, None, None]).to(out.dtype)
    return out if conv.bias is None else out + conv.bias.to(out.dtype)[:, None, None]


def check_groups(conv: nn.Conv2d) -> None:
    """Refuse to merge with groups: A mixes channels of all groups, the frozen weight has none for that.

    Raises:
        ValueError: There are groups.
    """
    if conv.groups > 1:
        raise ValueError(
            f"expected a convolution without groups to merge, got groups={conv.groups}: in PEFT's layout "
            "its update mixes channels of all groups, which the frozen weight can't hold; keep it unmerged"
        )


def _is_pointwise(conv: nn.Conv2d) -> bool:
    # a 1×1 kernel pads nothing under "same" and "valid"
    unpadded = isinstance(conv.padding, str) or set(conv.padding) == {0}
    return set(conv.kernel_size) == set(conv.stride) == {1} and unpadded and conv.groups == 1


def _pixels_are_rows(x: Tensor) -> bool:
    """Whether the linear op is to take this image as a view, one row a pixel.

    Only channels_last images are such a view: a contiguous one would be copied on its way in, and come out in
    another memory format than the frozen layer's. On a CPU the op has no kernels but library products, other
    ones than a convolution's: nothing is gained there, and the first output would agree to rounding only.
    """
    return x.dim() == 4 and not x.is_cpu and x.is_contiguous(memory_format=torch.channels_last)


def _share_conv(target: Conv, source: nn.Conv2d) -> Conv:
    nn.Conv2d.__init__(
        target,
        source.in_channels,
        source.out_channels,
        source.kernel_size,  # type: ignore[arg-type]
        source.stride,  # type: ignore[arg-type]
        source.padding,  # type: ignore[arg-type]
        source.dilation,  # type: ignore[arg-type]
        source.groups,
        source.bias is not None,
        source.padding_mode,
        device="meta",
    )
    target.weight, target.bias = source.weight, source.bias
    return target.train(source.training)
