"""LoRA's linear op on layers that share x: the bits of separate calls, one backward pass."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.functional import Projection, lora_linear, shared_lora_linear
from fastlora.ops import shared_passes
from fastlora.ops.lora_passes import lora_linear_forward
from fastlora_kernels.quant import kernels
from tests.quantised import four_bit, read

ROWS, K = 10, 48
# outputs, rank, factor, whether there is a bias
SHAPES = ((32, 4, 0.5, True), (16, 3, 2.0, False), (16, 8, 1.0, True))
DROPOUTS = {"none": (0.0, 0.0, 0.0), "some": (0.0, 0.3, 0.0), "all": (0.3, 0.1, 0.5)}
BOTH = [torch.float32, torch.bfloat16]


def make_x(dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    x = torch.randn(2, ROWS // 2, K, generator=torch.Generator().manual_seed(0))
    return x.to(device, dtype).requires_grad_()


def make_layers(
    dtype: torch.dtype = torch.float32, dropouts: Sequence[float] = DROPOUTS["none"], device: Any = "cpu"
) -> list[Projection]:
    """Layers whose A and B train, in float32."""
    generator = torch.Generator().manual_seed(1)
    layers = []
    for (outputs, rank, scaling, has_bias), dropout in zip(SHAPES, dropouts, strict=True):
        shapes = ((outputs, K), (outputs,), (rank, K), (outputs, rank))
        weight, bias, a, b = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
        weight, bias = weight.to(dtype), bias.to(dtype)
        trained = (a.requires_grad_(), b.requires_grad_())
        layers.append(Projection(weight, bias if has_bias else None, *trained, scaling, dropout))
    return layers


def apart(x: Tensor, layers: Sequence[Projection], **options: Any) -> tuple[Tensor, ...]:
    """The same by separate calls."""
    return tuple(
        lora_linear(x, *layer[:4], scaling=layer.scaling, dropout=layer.dropout, **options)
        for layer in layers
    )


def tensors_of(x: Tensor, layers: Sequence[Projection]) -> list[Tensor]:
    """All that train."""
    given = [x, *(t for layer in layers for t in layer[:4] if isinstance(t, Tensor))]
    return [t for t in given if t.requires_grad]


def both_passes(
    op: Any, x: Tensor, layers: Sequence[Projection], used: Sequence[int] = (0, 1, 2), **options: Any
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients through those that are used."""
    torch.manual_seed(2)
    ys = op(x, layers, **options)
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(y.shape, generator=generator).to(y) for y in ys]
    wanted = tensors_of(x, layers)
    chosen, of_chosen = [ys[i] for i in used], [dys[i] for i in used]
    return list(ys), list(torch.autograd.grad(chosen, wanted, of_chosen, allow_unused=True))


def assert_same_gradients(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """To the rounding of one sum."""
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.dtype == theirs.dtype
            size = float(theirs.abs().amax()) if theirs.numel() else 0.0
            rounding = torch.finfo(theirs.dtype).eps * (8 if theirs.dtype == torch.float32 else 2)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=size * rounding)


@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("dtype", BOTH)
def test_it_gives_what_separate_calls_give(dtype: torch.dtype, dropouts: tuple[float, ...]) -> None:
    with fastlora.use_backend("torch"):
        ys, gradients = both_passes(shared_lora_linear, make_x(dtype), make_layers(dtype, dropouts))
        expected_ys, expected = both_passes(apart, make_x(dtype), make_layers(dtype, dropouts))
    for y, expected_y in zip(ys, expected_ys, strict=True):
        assert torch.equal(y, expected_y)
    if dtype == torch.float32:
        assert_same_gradients(gradients, expected)
    else:
        # of x one sum rounds less often than three and two more; all others see the same dY
        assert_same_gradients(gradients[1:], expected[1:])


def test_what_nothing_keeps_goes_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """S and masks of all would be a second x, where no gradient is wanted."""
    made, alive = list[weakref.ref[Tensor]](), list[int]()

    def forward(*call: Any) -> Any:
        alive.append(sum(each() is not None for each in made))
        y, s, mask = lora_linear_forward(*call)
        assert mask is not None
        made.extend(map(weakref.ref, (s, mask)))
        return y, s, mask

    monkeypatch.setattr(shared_passes, "lora_linear_forward", forward)
    x, layers = make_x().requires_grad_(False), make_layers(dropouts=DROPOUTS["all"])
    _freeze_all_but_x(x, layers)
    with fastlora.use_backend("torch"):
        shared_lora_linear(x, layers)
    # the last layer's
    assert alive == [0, 2, 2]


@pytest.mark.parametrize("dropouts", [DROPOUTS["none"], DROPOUTS["some"]], ids=["none", "some"])
def test_it_is_as_exact_in_16_bits_as_separate_calls(dropouts: tuple[float, ...]) -> None:
    x, layers = make_x(torch.bfloat16), make_layers(torch.bfloat16, dropouts)
    with fastlora.use_backend("torch"):
        wide = [layer._replace(weight=widened(layer.weight), bias=widened(layer.bias)) for layer in layers]
        exact: Any = both_passes(apart, widened(x), wide)[1][0]
        gradients: list[Any] = [both_passes(op, x, layers)[1][0] for op in (shared_lora_linear, apart)]
    got, expected = (float((each.float() - exact).square().mean()) for each in gradients)
    assert got <= expected


def widened(tensor: Any) -> Any:
    """In float32, of the same values."""
    return None if tensor is None else tensor.detach().float().requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
def test_outputs_without_a_gradient_add_nothing(used: tuple[int, ...], dropouts: tuple[float, ...]) -> None:
    with fastlora.use_backend("torch"):
        got = both_passes(shared_lora_linear, make_x(), make_layers(dropouts=dropouts), used)[1]
        expected = both_passes(apart, make_x(), make_layers(dropouts=dropouts), used)[1]
    assert_same_gradients(got, expected)


def _freeze(*which: tuple[int, str]) -> Callable[[Tensor, list[Projection]], None]:
    def change(x: Tensor, layers: list[Projection]) -> None:
        for index, name in which:
            getattr(layers[index], name).requires_grad_(False)

    return change


def _freeze_x(x: Tensor, layers: list[Projection]) -> None:
    x.requires_grad_(False)


def _freeze_all_but_x(x: Tensor, layers: list[Projection]) -> None:
    for layer in layers:
        layer.lora_A.requires_grad_(False)
        layer.lora_B.requires_grad_(False)


def _train_the_frozen(x: Tensor, layers: list[Projection]) -> None:
    for layer in layers:
        assert isinstance(layer.weight, Tensor)
        layer.weight.requires_grad_()
        if layer.bias is not None:
            layer.bias.requires_grad_()


@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize(
    "change",
    [
        _freeze_x,
        _freeze((0, "lora_A"), (1, "lora_B")),
        _freeze((1, "lora_A"), (1, "lora_B")),
        _freeze_all_but_x,
        _train_the_frozen,
    ],
    ids=["not x", "some of A and B", "a layer", "only x", "the frozen, too"],
)
def test_only_wanted_gradients_are_computed(
    change: Callable[[Tensor, list[Projection]], None], dropouts: tuple[float, ...]
) -> None:
    found = []
    for op in (shared_lora_linear, apart):
        x, layers = make_x(), make_layers(dropouts=dropouts)
        change(x, layers)
        with fastlora.use_backend("torch"):
            found.append(both_passes(op, x, layers)[1])
    assert_same_gradients(*found)


def test_nothing_is_kept_where_nothing_trains() -> None:
    x, layers = make_x(), make_layers()
    with torch.no_grad():
        ys = shared_lora_linear(x, layers)
    assert not any(y.requires_grad for y in ys)


@pytest.mark.parametrize("parts", [1, 2, 16])
@pytest.mark.parametrize("dropouts", [DROPOUTS["none"], DROPOUTS["some"]], ids=["none", "some"])
def test_quantised_weights(parts: int, dropouts: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, columns = 64, 64
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", outputs // parts * columns * 4)
    x = torch.randn(ROWS, columns, requires_grad=True)
    weights: list[Any] = [
        read(four_bit(outputs, columns)),
        torch.randn(outputs, columns),
        read(four_bit(outputs, columns)),
    ]
    layers = [
        Projection(
            weight,
            None,
            torch.randn(4, columns, requires_grad=True),
            torch.randn(outputs, 4, requires_grad=True),
            0.5,
            dropout,
        )
        for weight, dropout in zip(weights, dropouts, strict=True)
    ]
    with fastlora.use_backend("torch"):
        ys, got = both_passes(shared_lora_linear, x, layers)
        expected_ys, expected = both_passes(apart, x, layers)
    assert all(map(torch.equal, ys, expected_ys))
    assert_same_gradients(got, expected)


def test_a_quantised_weight_that_changes_is_refused() -> None:
    stored = four_bit(32, 64)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    x = torch.randn(3, 64, requires_grad=True)
    weight = read(stored)
    y, _ = shared_lora_linear(x, [Projection(weight, None, a, b, 0.5)] * 2)
    weight.tensors[0].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_x_is_kept_once() -> None:
    x, layers = make_x(torch.bfloat16), make_layers(torch.float32)
    kept = list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        fastlora.use_backend("torch"),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        shared_lora_linear(x.float(), layers)
    large = [t for t in kept if t.numel() == x.numel()]
    assert [t.dtype for t in large] == [torch.bfloat16]


@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
def test_kernels_give_what_separate_calls_give(
    dropouts: tuple[float, ...], kernel_device: torch.device
) -> None:
    with fastlora.use_backend("triton"):
        ys, got = both_passes(
            shared_lora_linear,
            make_x(device=kernel_device),
            make_layers(dropouts=dropouts, device=kernel_device),
        )
        expected_ys, expected = both_passes(
            apart, make_x(device=kernel_device), make_layers(dropouts=dropouts, device=kernel_device)
        )
    assert all(map(torch.equal, ys, expected_ys))
    assert_same_gradients(got, expected)


def test_gradients_by_differences() -> None:
    x, layers = make_x(), make_layers()
    tensors = [t.detach().double().requires_grad_() for t in tensors_of(x, layers)]

    def op(x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        wide = []
        for index, layer in enumerate(layers):
            assert isinstance(layer.weight, Tensor)
            bias = None if layer.bias is None else layer.bias.double()
            a, b = trained[2 * index : 2 * index + 2]
            wide.append(layer._replace(weight=layer.weight.double(), bias=bias, lora_A=a, lora_B=b))
        return shared_lora_linear(x, wide)

    assert torch.autograd.gradcheck(op, tensors)


def test_a_second_derivative_is_refused_by_every_source() -> None:
    x, layers = make_x(), make_layers()
    dys = [torch.randn(2, ROWS // 2, layer.lora_B.shape[0], requires_grad=True) for layer in layers]
    ys = shared_lora_linear(x, layers)
    (dx,) = torch.autograd.grad(ys, x, dys, create_graph=True)
    for source in (dys[0], dys[2], layers[1].lora_A):
        with pytest.raises(RuntimeError, match="shared_lora_linear has no second derivative"):
            torch.autograd.grad(dx.sum(), source, retain_graph=True)


def test_a_second_backward_pass_needs_the_graph() -> None:
    x, layers = make_x(), make_layers()
    first, second, _ = shared_lora_linear(x, layers)
    first.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        second.sum().backward()
    x.grad = None
    first, second, _ = shared_lora_linear(x, layers)
    first.sum().backward(retain_graph=True)
    second.sum().backward()
    (expected,) = torch.autograd.grad([y.sum() for y in apart(x, layers)[:2]], x)
    assert_same_gradients([x.grad], [expected])


def test_outputs_may_be_changed_in_place() -> None:
    found = []
    for op in (shared_lora_linear, apart):
        x, layers = make_x(), make_layers()
        ys = op(x, layers)
        ys[1].mul_(3)
        ys[0].relu_()
        found.append(torch.autograd.grad([y.sum() for y in ys], tensors_of(x, layers)))
    assert_same_gradients(*found)


def test_small_calls_in_16_bits_are_eagers() -> None:
    ys, gradients = both_passes(shared_lora_linear, make_x(torch.bfloat16), make_layers(torch.bfloat16))
    expected_ys, expected = both_passes(apart, make_x(torch.bfloat16), make_layers(torch.bfloat16))
    assert all(map(torch.equal, ys, expected_ys))
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [(), (0,), (3,), (2, 1, 3)])
def test_any_number_of_rows(rows: tuple[int, ...]) -> None:
    found = []
    for op in (shared_lora_linear, apart):
        x = torch.ones(*rows, K, requires_grad=True)
        layers = make_layers()
        ys = op(x, layers)
        found.append(torch.autograd.grad([y.sum() for y in ys], tensors_of(x, layers)))
    assert_same_gradients(*found)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_graph_breaks(dropout: float) -> None:
    def call(x: Tensor, *flat: Any) -> Any:
        (a, b, c, d), (e, f, g, h) = flat[:4], flat[4:]
        return shared_lora_linear(x, [Projection(a, b, c, d, 0.5, dropout), Projection(e, f, g, h, 2.0)])

    layers = make_layers()
    flat = [t for layer in layers[1:] for t in layer[:4]]
    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    got = compiled(make_x(), *flat)
    torch.manual_seed(0)
    expected = call(make_x(), *flat)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_examples_have_gradients_of_their_own() -> None:
    x, layers = make_x().detach(), [layer._replace(lora_A=layer.lora_A.detach()) for layer in make_layers()]

    def loss(a: Tensor, row: Tensor) -> Tensor:
        ys = shared_lora_linear(row[None], [layers[0]._replace(lora_A=a), *layers[1:]])
        return sum((y.square().sum() for y in ys), torch.zeros(()))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layers[0].lora_A, x[0])
    for row, gradient in zip(x[0], each, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(layers[0].lora_A, row))


def test_bad_input_is_refused() -> None:
    x, layers = make_x(), make_layers()
    with pytest.raises(ValueError, match="at least one layer in shared_lora_linear, got none"):
        shared_lora_linear(x, [])
    with pytest.raises(ValueError, match="expected x with last dimension 7"):
        shared_lora_linear(x, [layers[0], layers[1]._replace(weight=torch.zeros(16, 7))])
    with pytest.raises(ValueError, match="dropout"):
        shared_lora_linear(x, [layers[0]._replace(dropout=2.0)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    x, (first, second, third) = make_x().detach(), make_layers()
    if name == "x":
        x = x.to(dtype)
    else:
        third = third._replace(**{name: getattr(third, name).detach().to(dtype)})
    message = f"expected {name} in float64, float32, float16 or bfloat16, got {dtype}"
    with pytest.raises(TypeError, match=message):
        shared_lora_linear(x, [first, second, third])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_frozen_layers_of_several_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    x, (first, second, third) = make_x(), make_layers()
    third = third._replace(**{name: getattr(third, name).to(dtype)})
    message = f"expected {name} in x's dtype torch.float32, got {dtype}; .* torch.autocast"
    with pytest.raises(ValueError, match=message):
        shared_lora_linear(x, [first, second, third])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([(1, 2)], "a list with a tuple in it"),
        ((torch.nn.Linear(K, 2),), "a tuple with a Linear in it"),
        (make_layers()[0], "a Projection with a Tensor in it"),
        (iter(make_layers()), "list_iterator"),
        (None, "NoneType"),
    ],
    ids=["tuples", "modules", "one alone", "an iterator", "nothing"],
)
def test_whatever_is_no_list_of_projections_is_refused(given: Any, told: str) -> None:
    expected = "expected layers of shared_lora_linear as a list of fastlora.functional.Projection"
    with pytest.raises(TypeError, match=f"{expected}, got {told}"):
        shared_lora_linear(make_x(), given)
