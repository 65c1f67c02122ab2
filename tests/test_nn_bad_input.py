"""Layers, settings and calls that are refused before anything changes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora import LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear, LoRAMultiheadAttention
from fastlora.nn import LoRAModule
from tests.lora_models import Snapshot

EMBED, BATCH, LENGTH = 12, 2, 5
Inputs = tuple[Tensor, Tensor, Tensor]
Make = Callable[..., LoRAModule]
KINDS = pytest.mark.parametrize("make", [LoRALinear.from_linear, LoRALayer], ids=["LoRALinear", "LoRALayer"])


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight * 2, self.bias)


def integer_linear() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


def float8_linear() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def quantised_linear() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(
        torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8), requires_grad=False
    )
    return linear


BAD_LAYERS = {
    "not-a-module": (lambda: torch.zeros(4, 4), TypeError, "expected an nn.Linear, got Tensor"),
    "convolution": (lambda: nn.Conv1d(3, 4, 1), TypeError, "expected an nn.Linear, got Conv1d"),
    "own-forward": (lambda: OwnForward(4, 4), TypeError, "OwnForward with a forward of its own"),
    "already-lora": (lambda: LoRALinear(4, 4), TypeError, "LoRALinear with a forward of its own"),
    "weight-norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        TypeError,
        "plain Parameter, got NoneType",
    ),
    "lazy": (lambda: nn.LazyLinear(4), TypeError, "plain Parameter, got UninitializedParameter"),
    "meta": (
        lambda: nn.Linear(4, 4, device="meta"),
        ValueError,
        "got a meta tensor; load the model's weights",
    ),
    "int8": (integer_linear, TypeError, "got torch.int8; dequantise"),
    "quantised": (quantised_linear, TypeError, "got torch.qint8; dequantise"),
    "float8": (float8_linear, TypeError, "got torch.float8_e4m3fn; dequantise"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
}


@KINDS
@pytest.mark.parametrize(("layer", "error", "match"), BAD_LAYERS.values(), ids=BAD_LAYERS.keys())
def test_refuses_layers_it_cannot_serve(
    make: Make, layer: Callable[[], Any], error: type[Exception], match: str
) -> None:
    given = layer()
    trainable = isinstance(given, nn.Module) and [p.requires_grad for p in given.parameters()]
    with pytest.raises(error, match=match):
        make(given)
    assert trainable == (isinstance(given, nn.Module) and [p.requires_grad for p in given.parameters()])


BAD_SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank-zero": ({"rank": 0}, ValueError, "expected rank >= 1, got 0"),
    "rank-negative": ({"rank": -4}, ValueError, "expected rank >= 1, got -4"),
    "rank-float": ({"rank": 4.0}, TypeError, "expected rank to be an integer, got 4.0"),
    "rank-bool": ({"rank": True}, TypeError, "expected rank to be an integer, got True"),
    "dropout": ({"dropout": 1.5}, ValueError, r"expected dropout in \[0, 1\], got 1.5"),
    "dropout-negative": ({"dropout": -0.1}, ValueError, r"expected dropout in \[0, 1\], got -0.1"),
    "dropout-nan": ({"dropout": math.nan}, ValueError, r"expected dropout in \[0, 1\], got nan"),
    "dropout-string": ({"dropout": "0.1"}, TypeError, "expected dropout to be a number, got '0.1'"),
    "alpha-inf": ({"alpha": math.inf}, ValueError, "expected alpha to be finite, got inf"),
    "alpha-none": ({"alpha": None}, TypeError, "expected alpha to be a number, got None"),
    "dtype-int": ({"adapter_dtype": torch.int8}, TypeError, "expected adapter_dtype to be float16"),
}


@KINDS
@pytest.mark.parametrize(("settings", "error", "match"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_refuses_bad_settings(
    make: Make, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    linear = nn.Linear(4, 4)
    before = Snapshot(linear)
    with pytest.raises(error, match=match):
        make(linear, **settings)
    before.assert_unchanged()
    with pytest.raises(error, match=match):
        LoRALinear(4, 4, **settings)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


BAD_ATTENTION: dict[str, tuple[Any, type[Exception], str]] = {
    "linear": (lambda: nn.Linear(4, 4), TypeError, "expected an nn.MultiheadAttention, got Linear"),
    "own-forward": (lambda: OwnAttention(8, 2), TypeError, "OwnAttention with a forward of its own"),
    "already": (lambda: LoRAMultiheadAttention(8, 2), TypeError, "with a forward of its own"),
    "kdim": (lambda: nn.MultiheadAttention(8, 2, kdim=4), ValueError, "kdim or vdim unlike embed_dim"),
    "bias-kv": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), ValueError, "got add_bias_kv"),
    "zero": (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), ValueError, "got add_zero_attn"),
    "meta": (lambda: nn.MultiheadAttention(8, 2, device="meta"), ValueError, "got a meta tensor"),
}


BAD_OPTIONS: dict[str, tuple[Callable[..., LoRAModule], nn.Module, dict[str, Any], type[Exception], str]] = {
    "misspelled": (
        LoRALinear.from_linear,
        nn.Linear(4, 4),
        {"rnak": 2},
        TypeError,
        r"options out of rank, alpha, .* got 'rnak'; did you mean 'rank'\?",
    ),
    "unknown": (LoRAConv2d.from_conv, nn.Conv2d(3, 4, 1), {"bias": 1}, TypeError, "got 'bias'; leave it out"),
    "dropout of an embedding": (
        LoRAEmbedding.from_embedding,
        nn.Embedding(4, 4),
        {"dropout": 0.1},
        ValueError,
        "expected no dropout for an nn.Embedding, got 0.1",
    ),
    "DoRA of attention": (
        LoRAMultiheadAttention.from_attention,
        nn.MultiheadAttention(4, 2),
        {"dora": True},
        ValueError,
        "layer that can carry DoRA, got nn.MultiheadAttention",
    ),
}


@pytest.mark.parametrize(
    ("make", "layer", "options", "error", "match"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys()
)
def test_refuses_options_that_a_layer_does_not_have(
    make: Callable[..., LoRAModule],
    layer: nn.Module,
    options: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    before = Snapshot(layer)
    with pytest.raises(error, match=match):
        make(layer, **options)
    before.assert_unchanged()


@pytest.mark.parametrize(("make", "error", "match"), BAD_ATTENTION.values(), ids=BAD_ATTENTION.keys())
def test_refuses_attention_it_cannot_serve(make: Any, error: type[Exception], match: str) -> None:
    given = make()
    trainable = [p.requires_grad for p in given.parameters()]
    with pytest.raises(error, match=match):
        LoRAMultiheadAttention.from_attention(given)
    assert trainable == [p.requires_grad for p in given.parameters()]


def test_attention_refuses_bad_settings() -> None:
    plain = nn.MultiheadAttention(8, 2)
    before = Snapshot(plain)
    with pytest.raises(ValueError, match="expected rank >= 1, got 0"):
        LoRAMultiheadAttention.from_attention(plain, rank=0)
    before.assert_unchanged()
    with pytest.raises(ValueError, match="kdim or vdim unlike embed_dim"):
        LoRAMultiheadAttention(8, 2, vdim=4)
    with pytest.raises(ValueError, match=r"expected dropout in \[0, 1\], got 1.5"):
        LoRAMultiheadAttention(8, 2, lora_dropout=1.5)


X = torch.zeros(BATCH, LENGTH, EMBED)
BAD_CALLS: dict[str, tuple[Inputs, dict[str, Any], type[Exception], str]] = {
    "width": ((X[..., :-1],) * 3, {}, ValueError, r"expected query and key \[..., 12\]"),
    "dimensions": ((X[None],) * 3, {}, ValueError, "expected query and key of 3 dimensions"),
    "mixed-dimensions": ((X, X[0], X[0]), {}, ValueError, "expected query and key of 3 dimensions"),
    "key-unlike-value": ((X, X, X[:, 1:]), {}, ValueError, "expected key and value of one shape"),
    "batch": ((X, X[:1], X[:1]), {}, ValueError, "expected query and key of one batch size, got 2 and 1"),
    "mask-shape": (
        (X, X, X),
        {"attn_mask": torch.zeros(4, 5)},
        ValueError,
        r"attn_mask of shape \(5, 5\) or",
    ),
    "padding-shape": (
        (X, X, X),
        {"key_padding_mask": torch.zeros(5)},
        ValueError,
        r"key_padding_mask of shape \(2, 5\), got",
    ),
    "mask-dtype": (
        (X, X, X),
        {"attn_mask": torch.zeros(5, 5, dtype=torch.long)},
        TypeError,
        "attn_mask to be bool or floating",
    ),
    "causal": ((X, X, X), {"is_causal": True}, ValueError, "expected attn_mask with is_causal=True"),
}


@pytest.mark.parametrize(("given", "arguments", "error", "match"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_refuses_bad_calls(
    given: Inputs, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        LoRAMultiheadAttention(EMBED, 3, batch_first=True, rank=2)(*given, **arguments)
