"""AdapterLayer: its formula with every option, its gradients, its start, what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora import AdapterLayer
from tests.adapter_models import randomize_bottlenecks
from tests.lora_models import same_bits

ACTIVATIONS: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "no-bias": {"bias": False},
    "pre": {"layer_norm": "pre"},
    "post": {"layer_norm": "post"},
    "scaled": {"scale": -2.5},
    "learned": {"scale": "learned"},
    "pre-scaled": {"layer_norm": "pre", "scale": 0.25},
    "post-learned": {"layer_norm": "post", "scale": "learned", "bias": False},
}
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def formula(layer: AdapterLayer, h: Tensor, residual: Tensor | None = None) -> Tensor:
    """What the docstring says, in the module's own dtype."""
    x = layer.norm(h) if layer.norm is not None and layer.layer_norm == "pre" else h
    update: Tensor = layer.up_proj(ACTIVATIONS[layer.activation](layer.down_proj(x)))
    if layer.norm is not None and layer.layer_norm == "post":
        update = layer.norm(update)
    return (h if residual is None else residual) + layer.scale * update


@EVERY
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_it_computes_the_formula(options: dict[str, Any], parallel: bool) -> None:
    layer = randomize_bottlenecks(AdapterLayer(12, 5, dtype=torch.float64, **options))
    h = torch.randn(2, 3, 12, dtype=torch.float64)
    residual = torch.randn(2, 3, 12, dtype=torch.float64) if parallel else None
    torch.testing.assert_close(layer(h, residual), formula(layer, h, residual), rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_the_first_output_is_the_input(options: dict[str, Any], dtype: torch.dtype, parallel: bool) -> None:
    layer = AdapterLayer(12, 5, dropout=0.5, **options)
    h, residual = torch.randn(2, 4, 3, 12).to(dtype).unbind()
    out = layer(h, residual) if parallel else layer(h)
    assert same_bits(out, residual if parallel else h)


@EVERY
def test_gradients_are_right(options: dict[str, Any]) -> None:
    layer = randomize_bottlenecks(AdapterLayer(5, 3, dtype=torch.float64, **options))
    h, residual = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    names = layer.adapter_params()

    def run(h: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        out: Tensor = torch.func.functional_call(layer, values, (h, residual))
        return out

    parameters = [layer.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, (h, residual, *parameters))
    assert torch.autograd.gradcheck(layer, (h,))


@EVERY
def test_half_precision_input_keeps_its_dtype_and_parameters_theirs(options: dict[str, Any]) -> None:
    layer = randomize_bottlenecks(AdapterLayer(12, 5, **options))
    h = torch.randn(7, 12, dtype=torch.bfloat16, requires_grad=True)
    out = layer(h)
    expected = formula(layer, h.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=5e-2, atol=2e-1)
    torch.autograd.backward(out.float().square().sum())
    assert h.grad is not None
    assert h.grad.dtype == torch.bfloat16
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_a_scale_is_not_rounded_to_the_parameters_dtype() -> None:
    scale = 1 + 2**-12
    layer = randomize_bottlenecks(AdapterLayer(12, 5, scale=scale, dtype=torch.bfloat16))
    h = torch.randn(7, 12)
    wide = AdapterLayer(12, 5, scale=scale)
    wide.load_state_dict(layer.state_dict())
    assert torch.equal(layer(h), wide(h))
    assert not torch.equal(AdapterLayer(12, 5).requires_grad_(False)._scaled(h), wide._scaled(h))


def test_dropout_acts_after_the_activation_while_training() -> None:
    layer = randomize_bottlenecks(AdapterLayer(12, 4096, dropout=0.5, bias=False))
    with torch.no_grad():
        layer.up_proj.weight.fill_(1.0)
        layer.down_proj.weight.fill_(1.0)
    h = torch.full((3, 12), 1.0)
    # every unit is gelu(12) = 12; those kept count twice
    kept = ((layer(h) - h) / 24)[:, 0]
    assert torch.equal(kept, kept.round())
    assert (kept / 4096 - 0.5).abs().max() < 0.05
    assert kept.unique().numel() > 1
    assert torch.equal(layer.eval()(h), formula(layer, h))


def test_parameters_and_their_start() -> None:
    torch.manual_seed(0)
    layer = AdapterLayer(64, reduction_factor=4, layer_norm="pre", scale="learned")
    assert layer.adapter_size == 16
    assert dict(layer.named_parameters()).keys() == set(layer.adapter_params())
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "scale": (1,),
        "down_proj.weight": (16, 64),
        "down_proj.bias": (16,),
        "up_proj.weight": (64, 16),
        "up_proj.bias": (64,),
        "norm.weight": (64,),
        "norm.bias": (64,),
    }
    bound = 1 / math.sqrt(64)
    weight = layer.down_proj.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not any(p.any() for p in (layer.down_proj.bias, layer.up_proj.weight, layer.up_proj.bias))
    randomize_bottlenecks(layer).reset_adapter_parameters()
    h = torch.randn(3, 64)
    assert same_bits(layer(h), h)
    assert torch.equal(torch.as_tensor(layer.scale), torch.ones(1))
    assert AdapterLayer(64).adapter_size == 64
    assert isinstance(AdapterLayer(8, 2, device="meta").down_proj.weight, nn.Parameter)


def test_what_it_prints() -> None:
    layer = AdapterLayer(8, 2, layer_norm="post", scale="learned", activation="silu")
    assert "8, adapter_size=2, activation=silu, layer_norm=post, scale=learned, dropout=0" in repr(layer)
    assert "scale=0.5, dropout=0.25" in repr(AdapterLayer(8, 2, scale=0.5, dropout=0.25))


@EVERY
def test_it_compiles_whole(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    layer = randomize_bottlenecks(AdapterLayer(12, 5, **options))
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    h = torch.randn(4, 12)
    torch.testing.assert_close(compiled(h), layer(h))


BAD_SETTINGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden-zero": ({"hidden_size": 0}, ValueError, "expected hidden_size >= 1, got 0"),
    "hidden-float": ({"hidden_size": 8.0}, TypeError, "expected hidden_size to be an integer, got 8.0"),
    "size-zero": ({"adapter_size": 0}, ValueError, "expected adapter_size >= 1, got 0"),
    "size-bool": ({"adapter_size": True}, TypeError, "expected adapter_size to be an integer, got True"),
    "size-float": ({"adapter_size": 4.0}, TypeError, "expected adapter_size to be an integer, got 4.0"),
    "two-sizes": (
        {"adapter_size": 4, "reduction_factor": 2},
        ValueError,
        "expected adapter_size or reduction_factor, got both",
    ),
    "factor-zero": ({"reduction_factor": 0}, ValueError, "expected reduction_factor >= 1, got 0"),
    "factor-large": ({"reduction_factor": 9}, ValueError, "reduction_factor <= hidden_size, got 9 for 8"),
    "activation": ({"activation": "tanh"}, ValueError, "to be 'gelu', 'relu', 'silu', got 'tanh'"),
    "activation-list": ({"activation": ["gelu"]}, ValueError, "to be 'gelu', 'relu', 'silu', got"),
    "activation-none": ({"activation": None}, ValueError, "to be 'gelu', 'relu', 'silu', got None"),
    "norm": ({"layer_norm": "both"}, ValueError, "layer_norm to be None, 'pre', 'post', got 'both'"),
    "norm-bool": ({"layer_norm": True}, ValueError, "layer_norm to be None, 'pre', 'post', got True"),
    "scale-word": ({"scale": "learn"}, ValueError, "a number or 'learned', got 'learn'"),
    "scale-bool": ({"scale": True}, TypeError, "expected scale to be a number, got True"),
    "scale-none": ({"scale": None}, TypeError, "expected scale to be a number, got None"),
    "scale-zero": ({"scale": 0}, ValueError, "finite and not zero, got 0.0"),
    "scale-inf": ({"scale": math.inf}, ValueError, "expected scale to be finite, got inf"),
    "dropout": ({"dropout": 1.5}, ValueError, r"expected dropout in \[0, 1\], got 1.5"),
    "dropout-nan": ({"dropout": math.nan}, ValueError, r"expected dropout in \[0, 1\], got nan"),
    "bias": ({"bias": 1}, TypeError, "expected bias to be True or False, got 1"),
    "dtype": ({"dtype": torch.int8}, TypeError, "expected dtype to be float16, bfloat16"),
}


@pytest.mark.parametrize(("settings", "error", "match"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_refuses_bad_settings(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=match):
        AdapterLayer(**{"hidden_size": 8, **settings})
    assert torch.equal(torch.get_rng_state(), state)


def test_refuses_bad_calls() -> None:
    layer = AdapterLayer(8, 2)
    with pytest.raises(ValueError, match=r"expected h \[\.\.\., 8\], got \(3, 7\)"):
        layer(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"expected h \[\.\.\., 8\], got \(\)"):
        layer(torch.zeros(()))
    with pytest.raises(ValueError, match=r"residual of h's shape \(3, 8\), got \(2, 8\)"):
        layer(torch.zeros(3, 8), torch.zeros(2, 8))
