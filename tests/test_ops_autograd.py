"""Autograd behaviour: gradcheck, what is kept, what is skipped, autocast, compile, torch.library."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.functional import lora_linear
from fastlora.ops import lora_linear as lora_op
from fastlora.ops import lora_passes
from fastlora.ops.decide import Decision
from tests.cases import cases
from tests.exactness import assert_as_exact
from tests.lora_yardstick import NAMES

M, N, K, R = 6, 5, 7, 3


def make(dtype: torch.dtype = torch.float64, *, grad: bool = True) -> tuple[Tensor, ...]:
    """x, weight, bias, lora_A and lora_B; the first and the last two train."""
    x, weight, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    a, b = torch.randn(R, K), torch.randn(N, R)
    tensors = [t.to(dtype) for t in (x, weight, bias, a, b)]
    for index in (0, 3, 4):
        tensors[index].requires_grad_(grad)
    return tuple(tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str, dropout: float) -> None:
    tensors = [t.requires_grad_() for t in make()]

    def call(*args: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return lora_linear(*args, scaling=1.3, dropout=dropout, generator=generator)

    with fastlora.use_backend(backend):
        assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("dropout", cases([0.4], [0.0]))
@pytest.mark.parametrize("leading", cases([(2, 3), (0,)], [pytest.param(()), pytest.param((M,))]), ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend: Any, leading: tuple[int, ...], dropout: float, kernel_device: torch.device) -> None:
    device = kernel_device if backend == "triton" else torch.device("cpu")
    _, weight, bias, a, b = (t.to(device) for t in make(torch.float32, grad=False))
    x, dy = torch.randn(*leading, K, device=device), torch.randn(*leading, N, device=device)
    seed = torch.tensor([1], device=device) if dropout else None
    forward = (x, weight, bias, a, b, seed, 1.3, dropout, backend)
    torch.library.opcheck(torch.ops.fastlora.lora_linear_forward.default, forward)
    _, s, mask = lora_passes.lora_linear_forward(*forward[:-1], Decision(backend))
    for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        backward = (dy, x, weight, a, b, s, mask, 1.3, dropout, *need, backend)
        torch.library.opcheck(torch.ops.fastlora.lora_linear_backward.default, backward)


def kept_bytes(call: Any, shared: tuple[Tensor, ...]) -> int:
    """Bytes that a forward pass keeps for backward beside the tensors it was given."""
    given = {t.untyped_storage().data_ptr() for t in shared}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_kept_bytes_follow_the_formula(
    backend: str, dropout: float, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    m, n, k, r = 64, 48, 80, 4
    x, weight = torch.randn(m, k, requires_grad=True), torch.randn(n, k)
    a, b = torch.randn(r, k, requires_grad=True), torch.randn(n, r, requires_grad=True)
    device = kernel_device if backend == "triton" else torch.device("cpu")
    tensors = tuple(t.to(device, dtype).detach().requires_grad_(t.requires_grad) for t in (x, weight, a, b))

    def call() -> Tensor:
        x, weight, a, b = tensors
        return lora_linear(x, weight, None, a, b, scaling=1.0, dropout=dropout)

    mask_bytes = m * k if backend == "torch" else m * -(-k // 32) * 4
    expected = m * r * dtype.itemsize + (mask_bytes if dropout else 0)
    with fastlora.use_backend(backend):
        assert kept_bytes(call, tensors) == expected


def test_only_needed_tensors_are_kept() -> None:
    x, weight, bias, a, b = make(torch.float32)

    def saved(*, x_grad: bool, a_grad: bool, b_grad: bool) -> set[int]:
        tensors = [x.detach().requires_grad_(x_grad), weight, bias]
        tensors += [a.detach().requires_grad_(a_grad), b.detach().requires_grad_(b_grad)]
        seen: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            seen.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lora_linear(*tensors, scaling=1.0)
        return seen

    assert x.data_ptr() not in saved(x_grad=True, a_grad=False, b_grad=True)
    assert weight.data_ptr() not in saved(x_grad=False, a_grad=True, b_grad=True)
    assert a.data_ptr() not in saved(x_grad=False, a_grad=False, b_grad=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (3, 4), (0, 3)], ids=str)
def test_gradients_that_are_not_wanted_are_skipped(
    backend: str, wanted: tuple[int, ...], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = kernel_device if backend == "triton" else torch.device("cpu")
    tensors = [t.detach().to(device).requires_grad_(i in wanted) for i, t in enumerate(make(torch.float32))]
    asked: list[tuple[bool, ...]] = []
    original = lora_passes.lora_linear_backward

    def spy(*args: Any) -> Any:
        asked.append(args[9:12])
        return original(*args)

    monkeypatch.setattr(lora_op, "lora_linear_backward", spy)
    with fastlora.use_backend(backend):
        y = lora_linear(*tensors, scaling=1.0)
        gradients = torch.autograd.grad(y.sum(), [tensors[i] for i in wanted])
    assert asked == [(0 in wanted, 3 in wanted, 4 in wanted)]
    with fastlora.use_backend("reference"):
        expected = torch.autograd.grad(lora_linear(*tensors, scaling=1.0).sum(), [tensors[i] for i in wanted])
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("constant_dy", [True, False])
@pytest.mark.parametrize("wanted", [0, 3, 4], ids=["dX", "dA", "dB"])
def test_second_derivative_says_what_to_do(wanted: int, constant_dy: bool) -> None:
    """A gradient penalty must never lose its gradient silently, not even where dY is a constant."""
    tensors = make(torch.float32)
    y = lora_linear(*tensors, scaling=1.0)
    loss = y.sum() if constant_dy else y.square().sum()
    (gradient,) = torch.autograd.grad(loss, tensors[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*use_backend\('reference'\)"):
        (loss + gradient.square().sum()).backward()


def test_output_can_be_changed_in_place() -> None:
    tensors = make(torch.float32)
    y = lora_linear(*tensors, scaling=1.0)
    y.add_(1.0).relu_()
    y.sum().backward()
    assert tensors[0].grad is not None


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(input_dtype: torch.dtype) -> None:
    """Under autocast as exact as the eager formula under autocast, each gradient in its tensor's dtype."""
    x, weight, bias, a, b = (t.detach() for t in make(torch.float32))

    def compute(operands: list[Tensor]) -> list[Tensor]:
        *inputs, weight, bias, dy = operands
        x, a, b = (t.detach().requires_grad_() for t in inputs)
        # which leaves float64 as it is
        with torch.autocast("cpu", torch.bfloat16):
            y = lora_linear(x, weight, bias, a, b, scaling=1.0)
        return [y, *torch.autograd.grad(y, (x, a, b), dy.to(y.dtype))]

    operands = [x.to(input_dtype), a, b, weight, bias, torch.randn(M, N, dtype=torch.bfloat16)]
    with fastlora.use_backend("torch"):
        got = compute(operands)
    assert got[0].dtype == torch.bfloat16
    with fastlora.use_backend("reference"):
        assert_as_exact(NAMES, got, compute, operands)


def test_backward_inside_autocast_keeps_precision() -> None:
    tensors = [t.requires_grad_() for t in make(torch.float32)]
    loss = lora_linear(*tensors, scaling=1.0).square().sum()
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_meta_tensors_only_get_a_shape() -> None:
    layer = fastlora.LoRALinear(K, N, rank=R, device="meta")
    assert layer(torch.empty(2, M, K, device="meta")).shape == (2, M, N)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiles_without_graph_breaks(dropout: float, autocast: bool) -> None:
    tensors = make(torch.float32)

    def step(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return lora_linear(*args, scaling=1.5, dropout=dropout).float().square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(*tensors)
    gradients = torch.autograd.grad(loss, (tensors[0], *tensors[3:]))
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)
    if dropout == 0:
        # a call as small as this one is eager's where nothing is compiled
        with fastlora.use_backend("torch"):
            expected = torch.autograd.grad(step(*tensors), (tensors[0], *tensors[3:]))
        torch.testing.assert_close(gradients, expected)


@pytest.mark.full
def test_compiles_with_changing_scaling_and_rows() -> None:
    def step(x: Tensor, rest: list[Tensor], scaling: float) -> Tensor:
        return lora_linear(x, *rest, scaling=scaling).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    x, *rest = make(torch.float32)
    for rows, scaling in ((6, 1.0), (4, 2.5), (5, 0.3), (3, 7.0)):
        part = x.detach()[:rows].requires_grad_()
        got = torch.autograd.grad(compiled(part, rest, scaling), (part, *rest[2:]))
        expected = torch.autograd.grad(step(part, rest, scaling), (part, *rest[2:]))
        torch.testing.assert_close(got, expected)
