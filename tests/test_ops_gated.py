"""LoRA's linear op on an activation, gated or not: the same bits as on its value, which is not kept."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import reference
from fastlora.functional import gated_lora_linear, lora_linear
from fastlora.ops.lora_linear import decided
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.reference import GATES
from fastlora_kernels.quant import kernels
from tests.exactness import assert_as_exact
from tests.quantised import four_bit, read

ROWS, K, N, R = 10, 48, 32, 4
NAMES = ("output", "gate", "up", "lora_A", "lora_B")
# backward computes them in fewer steps
FORMULAS = ("gelu_new", "quick_gelu")


def make(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Any, ...]:
    """gate, up, weight, bias, lora_A and lora_B; all but the frozen layer train, the last two in float32."""
    torch.manual_seed(0)
    shapes = ((2, ROWS // 2, K), (2, ROWS // 2, K), (N, K), (N,), (R, K), (N, R))
    tensors = [torch.randn(shape).to(device) for shape in shapes]
    tensors[:4] = [tensor.to(dtype) for tensor in tensors[:4]]
    for index in (0, 1, 4, 5):
        tensors[index].requires_grad_()
    return tuple(tensors)


Form = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def gated(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same."""
    return tensors


def ungated(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same without up."""
    return (tensors[0], None, *tensors[2:])


def both_passes(op: Any, tensors: tuple[Any, ...], **options: Any) -> tuple[Tensor, ...]:
    """The output and the gradients of gate, up if there is one, lora_A and lora_B."""
    torch.manual_seed(1)
    y = op(*tensors, scaling=0.5, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return y.detach(), *torch.autograd.grad(
        y, [tensors[i] for i in (0, 1, 4, 5) if tensors[i] is not None], dy
    )


def on_product(
    gate: Tensor, up: Tensor | None, *layer: Any, activation: str = "silu", **options: Any
) -> Tensor:
    """The same by autograd and the op on a product that is there."""
    x = GATES[activation](gate)
    return lora_linear(x if up is None else x * up, *layer, **options)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [gated, ungated])
def test_bits_are_those_of_the_op_on_the_product(
    form: Form, dtype: torch.dtype, activation: Any, dropout: float, autocast: bool
) -> None:
    options = {"activation": activation, "dropout": dropout}
    with fastlora.use_backend("torch"), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = both_passes(gated_lora_linear, form(make(dtype)), **options)
        expected = both_passes(on_product, form(make(dtype)), **options)
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if activation not in FORMULAS or number == 0:
            assert torch.equal(mine, theirs), number


@pytest.mark.parametrize("form", [gated, ungated])
@pytest.mark.parametrize("parts", [1, 4])
def test_bits_over_a_quantised_weight_are_those_on_the_product(
    parts: int, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", N // parts * K * 4)
    gate, up, _, *layer = form(make(torch.float32))
    weight = read(four_bit(N, K))
    with fastlora.use_backend("torch"):
        got = both_passes(gated_lora_linear, (gate, up, weight, *layer), dropout=0.3)
        expected = both_passes(on_product, (gate, up, weight, *layer), dropout=0.3)
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(mine, theirs), number


def test_a_quantised_weight_becomes_dense_only_where_gate_or_up_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, up, _, *layer = make(torch.float32)
    weight, made = read(four_bit(N, K)), list[torch.dtype]()
    dense = type(weight).dense

    def spy(weight: FrozenWeight, dtype: torch.dtype, *rows: slice) -> Tensor:
        made.append(dtype)
        return dense(weight, dtype, *rows)

    monkeypatch.setattr(type(weight), "dense", spy)
    given: Any = (gate.detach(), up.detach(), weight, *layer)
    with fastlora.use_backend("torch"):
        gated_lora_linear(*given, scaling=0.5).sum().backward()
    assert len(made) == 1


@pytest.mark.parametrize(
    ("form", "activation"), [*((gated, name) for name in GATES), (ungated, "gelu"), (ungated, "gelu_new")]
)
def test_kernels_are_as_exact_as_eager(form: Form, activation: Any, kernel_device: torch.device) -> None:
    with fastlora.use_backend("triton"):
        _assert_as_exact(form, activation, make(torch.float32, kernel_device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("form", [gated, ungated])
def test_gradients_of_formulas_are_as_exact_as_eager(form: Form, activation: Any, dtype: torch.dtype) -> None:
    with fastlora.use_backend("torch"):
        _assert_as_exact(form, activation, make(dtype))


def _assert_as_exact(form: Form, activation: Any, tensors: tuple[Any, ...]) -> None:
    def compute(op: Any, operands: Sequence[Tensor]) -> list[Tensor]:
        given = [t.detach().requires_grad_(i in (0, 1, 4, 5)) for i, t in enumerate(operands)]
        return list(both_passes(op, form(tuple(given)), activation=activation))

    names = NAMES if form is gated else [name for name in NAMES if name != "up"]
    got = compute(gated_lora_linear, tensors)
    assert_as_exact(names, got, partial(compute, reference.gated_lora_linear), tensors)


@pytest.mark.parametrize("form", [gated, ungated])
def test_gradients_by_differences(form: Form) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (3, 5), (4, 5), (4,), (2, 5), (4, 2))
    tensors = form(tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes))
    for index in (0, 1, 4, 5):
        if tensors[index] is not None:
            tensors[index].requires_grad_()
    for activation in GATES:
        assert torch.autograd.gradcheck(
            lambda *given, a=activation: gated_lora_linear(*given, activation=a, scaling=0.5), tensors
        )


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("form", [gated, ungated])
def test_gate_and_up_are_all_that_is_kept_of_their_size(form: Form, activation: Any) -> None:
    gate, up, *layer = form(make(torch.float32))
    kept = dict[int, Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with fastlora.use_backend("torch"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_lora_linear(gate, up, *layer, activation=activation, scaling=0.5)
    large = {place for place, tensor in kept.items() if tensor.numel() == gate.numel()}
    assert large == {each.data_ptr() for each in (gate, up) if each is not None}


def test_halves_of_one_tensor_are_read_where_they_are() -> None:
    gate, up, *layer = make(torch.float32)
    joined = torch.cat([gate, up], dim=-1).detach().requires_grad_()
    dy = torch.randn(2, ROWS // 2, N)
    with fastlora.use_backend("torch"):
        apart = torch.autograd.grad(gated_lora_linear(gate, up, *layer, scaling=0.5), (gate, up), dy)
        y = gated_lora_linear(*joined.chunk(2, dim=-1), *layer, scaling=0.5)
    (got,) = torch.autograd.grad(y, joined, dy)
    # of rows apart torch computes an exponential in another way
    torch.testing.assert_close(got, torch.cat(apart, dim=-1))


def test_what_a_layer_on_halves_prepared_is_not_taken_for_their_product(kernel_device: torch.device) -> None:
    gate, up, *layer = make(torch.float32, kernel_device)
    left, _ = torch.cat([gate, up], dim=-1).detach().chunk(2, dim=-1)
    settings = (0.5, 0.0, True)
    with fastlora.use_backend("triton"):
        of_rows_apart = decided(left, *layer, *settings)
        of_their_product = decided(left, *layer, *settings, of="gated_lora_linear")
        assert decided(left, *layer, *settings).decision is of_rows_apart.decision
    assert of_their_product.decision.known is not of_rows_apart.decision.known


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        *((gated, wanted) for wanted in [(0,), (1,), (4,), (5,), (0, 5), ()]),
        *((ungated, wanted) for wanted in [(0,), (4,), (5,), (0, 5), ()]),
    ],
)
def test_gradients_that_are_not_wanted_are_none(form: Form, wanted: tuple[int, ...]) -> None:
    everything = both_passes(gated_lora_linear, form(make(torch.float32)))[1:]
    tensors = form(make(torch.float32))
    trainable = [index for index in (0, 1, 4, 5) if tensors[index] is not None]
    for index in trainable:
        tensors[index].requires_grad_(index in wanted)
    y = gated_lora_linear(*tensors, scaling=0.5)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    for index, expected in zip(trainable, everything, strict=True):
        grad = tensors[index].grad
        assert (grad is None) == (index not in wanted)
        assert grad is None or torch.equal(grad, expected)


def test_frozen_weights_that_train_get_their_gradients() -> None:
    tensors = make(torch.float32)
    twins = make(torch.float32)
    for weight in (*tensors[2:4], *twins[2:4]):
        weight.requires_grad_()
    dy = torch.randn(2, ROWS // 2, N)
    with fastlora.use_backend("torch"):
        got = torch.autograd.grad(gated_lora_linear(*tensors, scaling=0.5), tensors[2:4], dy)
        expected = torch.autograd.grad(on_product(*twins, scaling=0.5), twins[2:4], dy)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_second_derivative_is_refused() -> None:
    tensors = make(torch.float32)
    with fastlora.use_backend("torch"):
        y = gated_lora_linear(*tensors, scaling=0.5)
    (dgate,) = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="gated_lora_linear has no second derivative"):
        dgate.sum().backward()


def test_autocast_computes_in_its_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), fastlora.use_backend("torch"):
        got = both_passes(gated_lora_linear, make(torch.float32))
    assert got[0].dtype == torch.bfloat16
    assert {gradient.dtype for gradient in got[1:]} == {torch.float32}


@pytest.mark.parametrize(
    ("form", "activation", "dropout"),
    [(gated, "silu", 0.0), (gated, "silu", 0.3), (ungated, "gelu", 0.3), (ungated, "gelu_new", 0.0)],
)
def test_compiles_without_graph_breaks(form: Form, activation: Any, dropout: float) -> None:
    options = {"activation": activation, "dropout": dropout}
    with fastlora.use_backend("torch"):
        compiled = torch.compile(gated_lora_linear, fullgraph=True, backend="aot_eager")
        got = both_passes(compiled, form(make(torch.float32)), **options)
        expected = both_passes(gated_lora_linear, form(make(torch.float32)), **options)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(3, K)}, "expected gate and up of one shape and dtype"),
        ({"up": torch.zeros(2, 5, K, dtype=torch.bfloat16)}, "expected gate and up of one shape and dtype"),
        ({"activation": "relu"}, "expected an activation out of silu, gelu, gelu_tanh, .*, got 'relu'"),
        ({"gate": torch.zeros(2, 5, 3), "up": torch.zeros(2, 5, 3)}, "expected x with last dimension 48"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    names = ("gate", "up", "weight", "bias", "lora_A", "lora_B")
    given = dict(zip(names, make(torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        gated_lora_linear(**given, scaling=0.5)
