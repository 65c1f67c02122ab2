"""DoRA's op on every backend: as exact as eager, gradients, dropout, what it keeps, and the norm."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import reference
from fastlora.functional import dora_linear, dora_weight_norm
from fastlora.ops.decide import Decision
from fastlora.ops.dora_linear import DoRALinearFunction, dora_linear_forward
from fastlora.ops.keep_mask import keep_probability
from tests.cases import cases
from tests.exactness import assert_as_exact
from tests.lora_yardstick import DTYPES, EACH_DTYPE, Case, make_case, unpack_mask

NAMES = ("y", "dX", "dA", "dB", "dm")
SIZES = [(33, 37, 41, 5), (1, 64, 32, 16), (65, 48, 7, 3), (130, 96, 160, 16)]


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        pytest.importorskip("triton", reason="the triton backend needs Triton")
    with fastlora.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("kernel_device") if backend == "triton" else torch.device("cpu")


def gradients(forward: Any, case: Case, magnitude: Tensor) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (case.x, case.lora_a, case.lora_b, magnitude)]
    y = forward(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, case.dy)]


def eager(case: Case, magnitude: Tensor, norm: Tensor | None) -> list[Tensor]:
    def forward(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        layer = (x, case.weight, case.bias, a, b, m)
        if case.keep is None:
            return reference.dora_linear(*layer, scaling=case.scaling, weight_norm=norm)
        return reference.dora_linear_with_mask(
            *layer,
            case.keep,
            scaling=case.scaling,
            keep_probability=case.keep_probability,
            weight_norm=norm,
        )

    return gradients(forward, case, magnitude)


def assert_as_exact_as_eager(got: list[Tensor], case: Case, magnitude: Tensor) -> None:
    def compute(tensors: list[Tensor]) -> list[Tensor]:
        return eager(case.holding(tensors[:-1]), tensors[-1], None)

    assert_as_exact(NAMES, got, compute, [*case.tensors, magnitude])


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
@EACH_DTYPE
@pytest.mark.parametrize("size", cases(SIZES[:2], map(pytest.param, SIZES[2:])), ids=str)
def test_as_exact_as_eager(
    backend: Any,
    device: torch.device,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    dropout: float,
) -> None:
    m, n, k, r = size
    case = make_case(m, n, k, r, dtype, bias=n != 48, device=device)
    # smaller than the weight, as in training: where both cancel, every rounding is amplified
    case.lora_b *= 0.2
    magnitude = (torch.rand(n) + 0.5).to(device)
    seed = torch.tensor([5], device=device) if dropout else None

    def forward(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        factor = m / dora_weight_norm(case.weight, a, b, case.scaling)
        y: Tensor
        y, _, mask, _ = DoRALinearFunction.apply(
            x, case.weight, case.bias, a, b, factor, seed, case.scaling, dropout, Decision(backend)
        )
        if dropout:
            case.keep = unpack_mask(mask, x.shape[-1])
            case.keep_probability = keep_probability(dropout)
        return y

    assert_as_exact_as_eager(gradients(forward, case, magnitude), case, magnitude)


def test_the_public_op(backend: str, device: torch.device) -> None:
    case = make_case(1, 37, 41, 5, torch.float32, device=device)
    case = replace(case, x=torch.randn(2, 3, 41, device=device), dy=torch.randn(2, 3, 37, device=device))
    magnitude = torch.rand(37, device=device)
    got = gradients(
        lambda x, a, b, m: dora_linear(x, case.weight, case.bias, a, b, m, scaling=case.scaling),
        case,
        magnitude,
    )
    assert_as_exact_as_eager(got, case, magnitude)


def test_empty_axes(backend: str, device: torch.device) -> None:
    for m, n, k in ((0, 5, 6), (4, 0, 6)):
        case = make_case(m, n, k, 2, torch.float32, device=device)
        magnitude = torch.ones(n, device=device)
        got = gradients(
            lambda x, a, b, g, case=case: dora_linear(x, case.weight, case.bias, a, b, g, scaling=1.0),
            case,
            magnitude,
        )
        assert [t.shape for t in got] == [(m, n), (m, k), (2, k), (n, 2), (n,)]
        assert not got[4].any()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str, dropout: float) -> None:
    """With the norm given: it is a constant to autograd, as in the paper."""
    x, weight, bias, a, b, m = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 7), (5, 7), (5,), (3, 7), (5, 3), (5,))
    )
    norm = dora_weight_norm(weight, a, b, 1.3)

    def call(*args: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return dora_linear(*args, scaling=1.3, dropout=dropout, generator=generator, weight_norm=norm)

    with fastlora.use_backend(backend):
        assert torch.autograd.gradcheck(call, (x, weight, bias, a, b, m))


@pytest.mark.parametrize("dropout", cases([0.4], [0.0]))
@pytest.mark.parametrize("keep", [True, False], ids=["product", "no-product"])
def test_opcheck(backend: Any, device: torch.device, keep: bool, dropout: float) -> None:
    x, weight, bias, a, b, factor = (
        torch.randn(*shape, device=device) for shape in ((2, 3, 7), (5, 7), (5,), (3, 7), (5, 3), (5,))
    )
    seed = torch.tensor([1], device=device) if dropout else None
    forward = (x, weight, bias, a, b, factor, seed, 1.3, dropout, keep, backend)
    torch.library.opcheck(torch.ops.fastlora.dora_linear_forward.default, forward)
    product = dora_linear_forward(*forward[:-1], Decision(backend))[3] if keep else None
    grad = (torch.randn(2, 3, 5, device=device), product, factor, backend)
    torch.library.opcheck(torch.ops.fastlora.dora_grad_product.default, grad)


@pytest.mark.parametrize("trains", [True, False], ids=["magnitude", "frozen-magnitude"])
def test_the_product_is_kept_only_for_the_magnitude(trains: bool) -> None:
    case = make_case(64, 48, 80, 4, torch.float32)
    magnitude = torch.rand(48, requires_grad=trains)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dora_linear(
            case.x, case.weight, None, case.lora_a.requires_grad_(), case.lora_b, magnitude, scaling=1.0
        )
    assert ((64, 48) in kept) == trains


def test_norm(backend: str, device: torch.device) -> None:
    """As exact as forming W + s·B·A at once."""
    for dtype in DTYPES.values():
        case = make_case(1, 96, 160, 8, dtype, device=device)
        operands = (case.weight, case.lora_a, case.lora_b)

        def formed(tensors: list[Tensor]) -> list[Tensor]:
            weight, a, b = tensors
            return [torch.linalg.vector_norm(weight + 1.7 * (b @ a), dim=1)]

        assert_as_exact(["norm"], [dora_weight_norm(*operands, 1.7)], formed, operands, dtype=torch.float32)


def test_compiled() -> None:
    case = make_case(8, 6, 10, 3, torch.float32)
    magnitude = torch.rand(6, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return dora_linear(x, case.weight, case.bias, case.lora_a, case.lora_b, magnitude, scaling=1.3)

    expected = torch.autograd.grad(call(case.x).square().sum(), magnitude)[0]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.x), call(case.x))
    torch.testing.assert_close(torch.autograd.grad(compiled(case.x).square().sum(), magnitude)[0], expected)


@pytest.mark.parametrize(
    ("magnitude", "error", "text"),
    [
        (torch.ones(4), ValueError, r"expected magnitude with shape \(5,\).*got \(4,\)"),
        (torch.ones(5, dtype=torch.int64), TypeError, "expected magnitude in float64"),
        (torch.ones(5, device="meta"), ValueError, "expected all tensors on one device"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_bad_magnitude(magnitude: Tensor, error: type[Exception], text: str) -> None:
    case = make_case(3, 5, 4, 2, torch.float32)
    with pytest.raises(error, match=text):
        dora_linear(case.x, case.weight, None, case.lora_a, case.lora_b, magnitude, scaling=1.0)
