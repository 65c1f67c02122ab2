"""What tracers, modes, compiled graphs or a class of tensors watch goes through torch's dispatcher."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.functional import adapter, dora_linear, lora_linear

M, N, K, R = 6, 16, 32, 4
Op = Callable[..., Tensor]


def _lora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return lora_linear(x, weight, None, lora_A, lora_B, scaling=1.5)


def _dora(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return dora_linear(x, weight, None, lora_A, lora_B, weight[:, 0].abs(), scaling=1.5)


def _adapter(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return adapter(x, lora_A, None, lora_A.t(), None)


OPS: dict[str, tuple[Op, str]] = {
    "lora_linear": (_lora, "lora_linear_forward"),
    "dora_linear": (_dora, "dora_linear_forward"),
    "adapter": (_adapter, "adapter_forward"),
}
ops = pytest.mark.parametrize(("op", "beneath"), OPS.values(), ids=OPS)


@pytest.fixture
def operands(kernel_device: torch.device) -> Any:
    """Those of a call; the kernels are asked for by name."""
    draw = torch.Generator().manual_seed(1)
    sizes = ((M, K), (N, K), (R, K), (N, R))
    with fastlora.use_backend("triton"):
        yield [torch.randn(size, generator=draw).to(kernel_device) for size in sizes]


@ops
def test_fake_tensors_compute_nothing(op: Op, beneath: str, operands: list[Tensor]) -> None:
    real = op(*operands)
    # left alone they come without their mode
    fakes = [FakeTensorMode().from_tensor(each) for each in operands[:1]]
    fakes += [fakes[0].fake_mode.from_tensor(each) for each in operands[1:]]
    for _ in range(2):
        with fakes[0].fake_mode:
            inside = op(*fakes)
        for fake in (inside, op(*fakes)):
            assert type(fake) is FakeTensor
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    torch.testing.assert_close(op(*operands), real)


@ops
def test_a_traced_graph_computes_other_inputs(op: Op, beneath: str, operands: list[Tensor]) -> None:
    op(*operands)
    graph = make_fx(op)(*operands)
    assert f"fastlora.{beneath}" in graph.code
    others = [2 * each for each in operands]
    torch.testing.assert_close(graph(*others), op(*others))


@ops
def test_a_mode_sees_the_op(op: Op, beneath: str, operands: list[Tensor]) -> None:
    real, seen = op(*operands), list[str]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        torch.testing.assert_close(op(*operands), real)
    assert f"fastlora.{beneath}.default" in seen


class Logged(Tensor):
    """Sees every operation of torch on it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.seen.append(str(func))
        with no_dispatch():
            return func(*args, **(kwargs or {}))


@ops
@pytest.mark.parametrize("which", [0, 2], ids=["input", "A"])
def test_a_class_of_tensors_sees_the_op(op: Op, beneath: str, which: int, operands: list[Tensor]) -> None:
    real = op(*operands)
    operands[which] = operands[which].as_subclass(Logged)
    for _ in range(2):
        Logged.seen.clear()
        torch.testing.assert_close(op(*operands), real)
        assert f"fastlora.{beneath}.default" in Logged.seen


@ops
def test_the_kernels_asked_for_compile(op: Op, beneath: str, operands: list[Tensor]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for rows in (M, M - 1, M - 2):
        given = [operands[0][:rows].clone().requires_grad_(), *operands[1:]]
        y, eager = compiled(*given), op(*given)
        torch.testing.assert_close(y, eager)
        for found, right in zip(
            torch.autograd.grad(y.sum(), given[:1]), torch.autograd.grad(eager.sum(), given[:1]), strict=True
        ):
            torch.testing.assert_close(found, right)
