"""LoRA beside convolutions: the formula, its gradients, merging, files."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora import LoRAConv2d, LoRALayer
from fastlora.nn.lora import conv as conv_module
from tests.exactness import assert_as_exact
from tests.lora_models import randomize_adapters

SHAPES: dict[str, dict[str, Any]] = {
    "3x3": {"in_channels": 3, "out_channels": 5, "kernel_size": 3, "padding": 1},
    "ragged": {"in_channels": 7, "out_channels": 3, "kernel_size": (3, 2), "stride": (2, 1), "bias": False},
    "pointwise": {"in_channels": 6, "out_channels": 4, "kernel_size": 1},
    "strided pointwise": {"in_channels": 6, "out_channels": 4, "kernel_size": 1, "stride": 2},
    "same": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "same", "dilation": 2},
    "grouped": {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "groups": 2},
    "reflect": {
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 1,
        "padding_mode": "reflect",
    },
    "circular": {
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 2,
        "padding_mode": "circular",
    },
}


def make(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LoRAConv2d:
    torch.manual_seed(0)
    layer = LoRAConv2d(**SHAPES[name], rank=4, alpha=6, dropout=dropout, dtype=dtype)
    return randomize_adapters(layer)


def picture(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, SHAPES[name]["in_channels"], 9, 8, generator=generator).to(dtype)


def formula(layer: LoRAConv2d, x: Tensor) -> Tensor:
    """What PEFT computes: two convolutions beside the frozen one, the first with its geometry."""
    first = nn.Conv2d(
        layer.in_channels,
        layer.rank,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        bias=False,
        padding_mode=layer.padding_mode,
    )
    first.weight = nn.Parameter(layer.lora_A.to(x.dtype))
    update = F.conv2d(first(x), layer.lora_B.to(x.dtype), groups=layer.groups)
    out: Tensor = nn.Conv2d.forward(layer, x) + layer.alpha / layer.rank * update
    return out.detach()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_it_errs_no_more_than_twice_the_eager_formula(name: str, dtype: torch.dtype, layout: str) -> None:
    layer, x = make(name, dtype=dtype), picture(name, dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=3)[..., ::2]
    assert_as_exact(
        ["y"], [layer(x)], lambda operands: [formula(copy.deepcopy(layer).to(operands[0]), *operands)], [x]
    )


@pytest.mark.parametrize("name", SHAPES)
def test_gradients(name: str) -> None:
    layer = make(name, dtype=torch.float64)

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,))
        return out

    x = picture(name, torch.float64)[:, :, :5, :5].requires_grad_()
    matrices = [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B)]
    assert torch.autograd.gradcheck(run, (x, *matrices), fast_mode=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_output_is_the_frozen_layers(name: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(**SHAPES[name])
    layer = LoRAConv2d.from_conv(conv, rank=4, dropout=0.5)
    assert layer.weight is conv.weight
    assert torch.equal(layer(picture(name)), conv(picture(name)))
    assert torch.equal(layer(picture(name)[0]), conv(picture(name)[0]))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "grouped"])
def test_merging_gives_the_same_and_is_undone_to_the_bit(name: str) -> None:
    layer, x = make(name, dtype=torch.float64).eval(), picture(name, torch.float64)
    before, weight = layer(x), layer.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.to_base()(x), before)
    # saved as the plain layer that it computes as
    assert torch.equal(layer.state_dict()["weight"], layer.to_base().weight)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


def test_groups_can_not_be_merged() -> None:
    layer = make("grouped")
    with pytest.raises(ValueError, match=r"without groups to merge, got groups=2.*keep it unmerged"):
        layer.merge()
    model = nn.Sequential(make("3x3"), layer)
    with pytest.raises(ValueError, match="1: expected a convolution without groups"):
        fastlora.merge_adapters(model)
    assert not model[0].merged
    wrapped = LoRALayer(nn.Conv2d(4, 4, 3, groups=2), rank=4)
    with pytest.raises(ValueError, match="without groups to merge"):
        wrapped.merge()


def test_dropout_strikes_the_updates_input_while_training() -> None:
    layer = make("3x3", dropout=0.5)
    x = picture("3x3")
    assert torch.equal(layer.eval()(x), make("3x3").eval()(x))
    layer.train()
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    kept = F.dropout(x, 0.5)
    base = F.conv2d(x, layer.weight, layer.bias, padding=1)
    update = F.conv2d(F.conv2d(kept, layer.lora_A, padding=1), layer.lora_B)
    torch.testing.assert_close(out, base + 1.5 * update)
    assert not torch.equal(out, layer(x))


@pytest.mark.parametrize("wrapper", [False, True])
def test_pointwise_pictures_can_go_through_the_linear_op(
    monkeypatch: pytest.MonkeyPatch, wrapper: bool
) -> None:
    layer = make("pointwise", dtype=torch.float64)
    if wrapper:
        around = LoRALayer(layer.to_base(), rank=4, alpha=6)
        around.load_state_dict(layer.state_dict())
    x = picture("pointwise", torch.float64).to(memory_format=torch.channels_last)
    expected = layer(x)
    monkeypatch.setattr(conv_module, "_pixels_are_rows", lambda x: x.dim() == 4)
    with fastlora.use_backend("reference"):
        out = (around if wrapper else layer)(x)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_layer_kept_whole_computes_the_same() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    kept, drop_in = LoRALayer(conv, rank=4, alpha=6), LoRAConv2d.from_conv(conv, rank=4, alpha=6)
    assert kept.original_layer is conv
    kept.load_state_dict(randomize_adapters(drop_in).state_dict())
    x = picture("3x3")
    assert torch.equal(kept(x), drop_in(x))
    kept.merge()
    drop_in.merge()
    assert torch.equal(kept(x), drop_in(x))


def test_copies_and_plain_state_dicts() -> None:
    layer, conv = make("3x3"), nn.Conv2d(3, 5, 3, padding=1)
    assert torch.equal(copy.deepcopy(layer)(picture("3x3")), layer(picture("3x3")))
    layer.load_state_dict(conv.state_dict())
    assert torch.equal(layer.weight, conv.weight)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]


@pytest.mark.parametrize(
    ("make_layer", "kind", "told"),
    [
        (lambda: LoRAConv2d(4, 4, 3, groups=4, rank=2), ValueError, "groups=4 divide, as in PEFT, got 2"),
        (lambda: LoRALayer(nn.Conv2d(4, 4, 3, groups=4), rank=2), ValueError, "groups=4 divide"),
        (lambda: LoRAConv2d(4, 4, 3, rank=0), ValueError, "rank"),
        (lambda: LoRAConv2d(4, 4, 3, dropout=1.5), ValueError, "dropout"),
        (lambda: LoRAConv2d.from_conv(nn.Linear(4, 4)), TypeError, "expected an nn.Conv2d, got Linear"),  # type: ignore[arg-type]
        (lambda: LoRAConv2d.from_conv(nn.ConvTranspose2d(4, 4, 3)), TypeError, "got ConvTranspose2d"),  # type: ignore[arg-type]
        (lambda: LoRAConv2d.from_conv(nn.Conv2d(4, 4, 3, device="meta")), ValueError, "meta"),
    ],
)
def test_bad_input(make_layer: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        make_layer()
