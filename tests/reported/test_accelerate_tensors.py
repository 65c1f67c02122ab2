"""Tensors of other kinds, as input or as weight of an accelerated model: what PEFT does, or its own error."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchvision.tv_tensors import Image

import fastlora
from tests.peft_twins import (
    IN,
    assert_equal_runs,
    inputs,
    is_fused,
    layer_of,
    peft_model,
    run,
    twins,
    with_adapters,
)

QUANTISATIONS = {
    "int8": Int8WeightOnlyConfig(version=2),
    "float8": Float8WeightOnlyConfig(),
    "int8 both": Int8DynamicActivationInt8WeightConfig(version=2),
    "int of any width": IntxWeightOnlyConfig(),
}


class Packed(nn.Parameter):
    """A weight that holds something else than its values, as bitsandbytes' do."""


def quantised(model: nn.Module, quantisation: str) -> None:
    def is_frozen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "lora_" not in name

    quantize_(model, QUANTISATIONS[quantisation], filter_fn=is_frozen)


@pytest.mark.parametrize("quantisation", ["int8", "float8", "int8 both"])
def test_weights_that_torchao_quantises_after_accelerate(quantisation: str) -> None:
    """They run fused: what a dense layer of these values computes, whatever torchao does to inputs."""
    plain, accelerated = twins(peft_model(), change=lambda model: quantised(model, quantisation))
    assert type(layer_of(accelerated).base_layer) is nn.Linear
    assert is_fused(accelerated, inputs())
    base = layer_of(plain).base_layer
    base.weight = nn.Parameter(base.weight.dequantize(), requires_grad=False)
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


def test_other_weights_of_torchao_are_peft_s(caplog: pytest.LogCaptureFixture) -> None:
    plain, accelerated = twins(peft_model(), change=lambda model: quantised(model, "int of any width"))
    assert not is_fused(accelerated, inputs())
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()), exactly=True)
    kind = type(layer_of(plain).base_layer.weight).__name__
    fastlora.accelerate(plain)
    assert caplog.messages == [
        f"0 of 1 LoRA layers run fused; left to PEFT: 1 lora.Linear with {kind} in base_layer"
    ]
    assert type(layer_of(plain)).__name__ == "Linear"


def test_packed_weights_are_peft_s() -> None:
    def pack(model: Any) -> None:
        base = layer_of(model).base_layer
        base.weight = Packed(base.weight.detach(), requires_grad=False)

    plain, accelerated = twins(peft_model(), change=pack)
    assert not is_fused(accelerated, inputs())
    assert torch.equal(accelerated(inputs()), plain(inputs()))


def nested(layout: torch.layout) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(count, IN, generator=generator) for count in (3, 5)]
    return torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)


def total(y: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in y.unbind()]).square().sum()


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_inputs(layout: torch.layout) -> None:
    found = []
    for model in twins(peft_model()):
        x = nested(layout)
        total(model(x)).backward()
        assert x.grad is not None
        trained = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*(t.detach() for t in model(x).unbind()), *x.grad.unbind(), *trained])
    assert len(found[0]) == 6
    assert all(map(torch.equal, *found))


def masked() -> Any:
    whole: Any = torch.masked
    return whole.masked_tensor(inputs()[0], inputs()[0] > 0)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: inputs()[0].to_sparse(),
    "a picture": lambda: Image(inputs()),
    "a parameter": lambda: nn.Parameter(inputs()),
    "no rows": lambda: torch.zeros(0, 4, IN),
    "one row": lambda: inputs()[0, 0],
    "negative view": lambda: torch.imag(torch.conj(torch.complex(inputs(), inputs()))),
    "a stride of zero": lambda: torch.ones(3, 1).expand(3, IN),
}
REFUSED: dict[str, Callable[[], Tensor]] = {
    "integers": lambda: torch.ones(3, IN, dtype=torch.int64),
    "complex": lambda: inputs().to(torch.complex64),
    "another float": lambda: inputs().double(),
    "no dimension": lambda: torch.tensor(1.0),
    "another width": lambda: torch.zeros(3, IN + 1),
    "another device": lambda: torch.zeros(3, IN, device="meta"),
    "masked": masked,
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_every_kind_of_input_gives_what_peft_gives(kind: str, settings: dict[str, Any]) -> None:
    plain, accelerated = twins(peft_model(**settings))
    expected = plain(INPUTS[kind]())
    found = accelerated(INPUTS[kind]())
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_what_peft_refuses_is_refused(kind: str, settings: dict[str, Any]) -> None:
    for model in twins(peft_model(**settings)):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            model(REFUSED[kind]())


def test_a_model_without_values_gives_shapes() -> None:
    for device in twins(peft_model().to("meta")):
        assert device(torch.zeros(3, IN, device="meta")).shape == (3, 12)
    model = fastlora.accelerate(peft_model())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(inputs())).shape == (3, 5, 12)


@pytest.mark.parametrize("casting", [True, False])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_switching_peft_s_casts_off(casting: bool, adapters: torch.dtype) -> None:
    model = peft_model(dtype=torch.bfloat16, autocast_adapters=adapters is torch.float32)
    plain, accelerated = twins(
        model, change=lambda m: setattr(layer_of(m), "cast_input_dtype_enabled", casting)
    )
    x = inputs(torch.bfloat16)
    if not casting and adapters is torch.float32:
        for each in (plain, accelerated):
            with pytest.raises(RuntimeError, match="dtype"):
                each(x)
        return
    assert is_fused(accelerated, x)
    torch.testing.assert_close(accelerated(x), plain(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_takes_what_it_takes_in_peft(weight: torch.dtype, x: torch.dtype) -> None:
    plain, accelerated = twins(peft_model(dtype=weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            expected = plain(inputs(x))
        except RuntimeError:
            with pytest.raises((RuntimeError, ValueError)):
                accelerated(inputs(x))
        else:
            found = accelerated(inputs(x))
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_adapters_of_two_dtypes_are_summed() -> None:
    def mix(model: Any) -> None:
        for matrices in (layer_of(model).lora_A, layer_of(model).lora_B):
            matrices["b"].to(torch.bfloat16)

    plain, accelerated = twins(with_adapters(peft_model(), "b"), change=mix)
    assert is_fused(accelerated, inputs())
    found, expected = run(accelerated, inputs()), run(plain, inputs())
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    torch.testing.assert_close(found["output"], expected["output"], rtol=0.05, atol=0.05)


def test_traced_and_transformed_models_compute_the_same() -> None:
    plain, accelerated = twins(peft_model())
    x = inputs()
    expected = plain(x)
    script = torch.jit.trace(accelerated, (x,))
    torch.jit.save(script, io.BytesIO())
    torch.testing.assert_close(script(x), expected)
    parameters = dict(accelerated.named_parameters())
    called = torch.func.functional_call(accelerated, copy.deepcopy(parameters), (x,))
    torch.testing.assert_close(called, expected)
    torch.testing.assert_close(torch.func.vmap(accelerated)(x), expected)
    with forward_ad.dual_level():
        y = accelerated(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(plain, (x,), (torch.ones_like(x),))[1])
