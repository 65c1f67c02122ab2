"""Autograd behaviour of the adapter op: gradcheck, what is kept and skipped, autocast, compile, bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import reference
from fastlora.functional import adapter
from fastlora.ops import adapter as adapter_op
from tests.adapter_yardstick import NAMES
from tests.cases import cases
from tests.exactness import assert_as_exact
from tests.test_ops_autograd import kept_bytes

M, H, D = 6, 7, 3


def make(dtype: torch.dtype = torch.float32, *, grad: bool = True) -> list[Tensor]:
    """h and the four parameters."""
    shapes = ((M, H), (D, H), (D,), (H, D), (H,))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("separate", [False, True], ids=["input", "own-residual"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str, separate: bool, activation: Any, dropout: float) -> None:
    tensors = [*make(torch.float64), torch.randn(M, H, dtype=torch.float64, requires_grad=True)]

    def call(*args: Tensor) -> Tensor:
        *inputs, residual = args
        return adapter(
            *inputs,
            residual=residual if separate else "input",
            activation=activation,
            dropout=dropout,
            generator=torch.Generator().manual_seed(1),
        )

    with fastlora.use_backend(backend):
        assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("dropout", cases([0.4], [0.0]))
@pytest.mark.parametrize("leading", cases([(2, 3), (0,)], [pytest.param(()), pytest.param((M,))]), ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend: Any, leading: tuple[int, ...], dropout: float, kernel_device: torch.device) -> None:
    device = kernel_device if backend == "triton" else torch.device("cpu")
    _, *parameters = (t.to(device) for t in make(grad=False))
    h, dout, residual = (torch.randn(*leading, H, device=device) for _ in range(3))
    seed = torch.tensor([1], device=device) if dropout else None
    for added in (None, residual):
        forward: Any = (h, *parameters, added, seed, added is None, "gelu", dropout)
        torch.library.opcheck(torch.ops.fastlora.adapter_forward.default, (*forward, backend))
    _, z = torch.ops.fastlora.adapter_forward(*forward, backend)
    for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        backward = (dout, h, z, parameters[0], parameters[2], True, "gelu", dropout, *need, backend)
        torch.library.opcheck(torch.ops.fastlora.adapter_backward.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("size", [16, 100])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_z_is_kept_beside_h(
    backend: str, size: int, dropout: float, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    device = kernel_device if backend == "triton" else torch.device("cpu")
    shapes = ((64, 80), (size, 80), (size,), (80, size), (80,))
    tensors = tuple(torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes)
    with fastlora.use_backend(backend):
        kept = kept_bytes(lambda: adapter(*tensors, dropout=dropout), tensors)
    assert kept == 64 * size * dtype.itemsize
    with fastlora.use_backend("reference"):
        assert kept < kept_bytes(lambda: adapter(*tensors, dropout=dropout), tensors)


def test_h_is_not_kept_for_the_up_projection_alone() -> None:
    h, *parameters = make(grad=False)
    parameters[2].requires_grad_()
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        seen.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(h, *parameters)
    assert h.data_ptr() not in seen


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2)], ids=str)
def test_gradients_that_are_not_wanted_are_skipped(
    backend: str, wanted: tuple[int, ...], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = kernel_device if backend == "triton" else torch.device("cpu")
    tensors = [t.detach().to(device).requires_grad_(i in wanted) for i, t in enumerate(make())]
    asked: list[tuple[bool, ...]] = []
    original = adapter_op.adapter_backward

    def spy(*args: Any) -> Any:
        asked.append(args[8:11])
        return original(*args)

    monkeypatch.setattr(adapter_op, "adapter_backward", spy)
    sources = [tensors[i] for i in wanted]
    with fastlora.use_backend(backend):
        gradients = torch.autograd.grad(adapter(*tensors).sum(), sources)
    assert asked == [(0 in wanted, bool({1, 2} & {*wanted}), bool({3, 4} & {*wanted}))]
    expected = torch.autograd.grad(reference.adapter(*tensors).sum(), sources)
    torch.testing.assert_close(gradients, expected)


def test_a_residual_alone_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, residual = make(grad=False), torch.randn(M, H, requires_grad=True)

    def refuse(*args: Any) -> Any:
        raise AssertionError("nothing but the residual wants a gradient")

    monkeypatch.setattr(adapter_op, "adapter_backward", refuse)
    dout = torch.randn(M, H)
    (gradient,) = torch.autograd.grad(adapter(*tensors, residual=residual), residual, dout)
    assert torch.equal(gradient, dout)


@pytest.mark.parametrize("wanted", range(5), ids=["dh", "dW_d", "db_d", "dW_u", "db_u"])
def test_second_derivative_says_what_to_do(wanted: int) -> None:
    tensors = make()
    # under auto a call as small as this one is eager's
    with fastlora.use_backend("torch"):
        loss = adapter(*tensors).square().sum()
    (gradient,) = torch.autograd.grad(loss, tensors[wanted], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"fused adapter has no second derivative.*use_backend\('reference'\)"
    ):
        (loss + gradient.square().sum()).backward()


def test_output_can_be_changed_in_place() -> None:
    tensors = make()
    out = adapter(*tensors)
    out.add_(1.0).relu_()
    out.sum().backward()
    assert tensors[0].grad is not None


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(input_dtype: torch.dtype) -> None:
    """As exact as the eager formula under autocast; a float32 residual stream stays float32."""
    h, *parameters = (t.detach() for t in make())

    def compute(operands: list[Tensor]) -> list[Tensor]:
        *inputs, dout = (t.detach().requires_grad_() for t in operands)
        # which leaves float64 as it is
        with torch.autocast("cpu", torch.bfloat16):
            out = adapter(*inputs)
        assert out.dtype == inputs[0].dtype
        return [out, *torch.autograd.grad(out, inputs, dout)]

    operands = [h.to(input_dtype), *parameters, torch.randn(M, H).to(input_dtype)]
    with fastlora.use_backend("torch"):
        got = compute(operands)
    with fastlora.use_backend("reference"):
        assert_as_exact(NAMES, got, compute, operands)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("residual", cases(["own"], ["input", "none"]))
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiles_without_graph_breaks(dropout: float, residual: str, autocast: bool) -> None:
    tensors, own = make(), torch.randn(M, H)
    added: Any = {"input": "input", "own": own, "none": None}[residual]

    def step(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return adapter(*args, residual=added, dropout=dropout).float().square().sum()

    # every case compiles the same code anew, and dynamo counts them
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*tensors), tensors)
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)
    if dropout == 0:
        torch.testing.assert_close(gradients, torch.autograd.grad(step(*tensors), tensors))


def test_compiles_once_for_any_number_of_rows() -> None:
    def step(h: Tensor, rest: list[Tensor]) -> Tensor:
        return adapter(h, *rest).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    h, *rest = make()
    for rows in (6, 4, 5, 3):
        part = h.detach()[:rows].requires_grad_()
        got = torch.autograd.grad(compiled(part, rest), (part, *rest))
        torch.testing.assert_close(got, torch.autograd.grad(step(part, rest), (part, *rest)))


BAD: dict[str, tuple[str, Callable[[], Any], type[Exception], str]] = {
    "last dimension": (
        "h",
        lambda: torch.randn(M, H + 1),
        ValueError,
        r"last dimension 7.*got shape \(6, 8\)",
    ),
    "no dimension": ("h", lambda: torch.tensor(1.0), ValueError, "last dimension 7"),
    "integer h": ("h", lambda: torch.ones(M, H, dtype=torch.int64), TypeError, "h in float64.*torch.int64"),
    "not a tensor": ("h", lambda: [[1.0] * H], TypeError, "h to be a torch.Tensor, got list"),
    "no h": ("h", lambda: None, TypeError, "h to be a torch.Tensor, got NoneType"),
    "no weight": ("up_weight", lambda: None, TypeError, "up_weight to be a torch.Tensor, got NoneType"),
    "empty bottleneck": ("down_weight", lambda: torch.randn(0, H), ValueError, r"at least 1.*\(0, 7\)"),
    "vector weight": ("down_weight", lambda: torch.randn(H), ValueError, "down_weight"),
    "up transposed": ("up_weight", lambda: torch.randn(D, H), ValueError, r"up_weight of shape \(7, 3\)"),
    "down bias": ("down_bias", lambda: torch.randn(H), ValueError, r"down_bias of shape \(3,\)"),
    "up bias": ("up_bias", lambda: torch.randn(D), ValueError, r"up_bias of shape \(7,\)"),
    "residual's shape": ("residual", lambda: torch.randn(H), ValueError, r"residual of shape \(6, 7\)"),
    "residual's name": ("residual", lambda: "output", ValueError, "'input', a tensor or None, got 'output'"),
    "meta": ("up_weight", lambda: torch.empty(H, D, device="meta"), ValueError, "holds no data"),
    "activation": ("activation", lambda: "tanh", ValueError, "out of gelu, relu, silu, got 'tanh'"),
    "dropout above one": ("dropout", lambda: 1.5, ValueError, r"in \[0, 1\], got 1.5"),
    "dropout's type": ("dropout", lambda: "0.1", TypeError, "dropout to be a number, got '0.1'"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_drawn(name: str, backend: str) -> None:
    argument, value, error, message = BAD[name]
    names = ("h", "down_weight", "down_bias", "up_weight", "up_bias")
    given: dict[str, Any] = dict(zip(names, make(grad=False), strict=True)) | {"dropout": 0.5}
    given[argument] = value()
    state = torch.get_rng_state()
    with fastlora.use_backend(backend), pytest.raises(error, match=message):
        adapter(**given)
    assert torch.equal(torch.get_rng_state(), state)
