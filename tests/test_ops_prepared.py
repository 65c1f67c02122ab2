"""What is found out once for a layout serves no other call: each gets its own result and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import fastlora
from fastlora import reference
from fastlora.functional import adapter, dora_linear, lora_linear
from fastlora.ops.prepared import _MOST, Memory, layouts, signature
from tests.cases import cases

M, N, K, R = 6, 16, 32, 4

Operands = dict[str, Any]


def operands(device: torch.device | str) -> Operands:
    """A LoRA call's arguments."""
    draw = torch.Generator().manual_seed(1)
    sizes = {"x": (M, K), "weight": (N, K), "bias": (N,), "lora_A": (R, K), "lora_B": (N, R)}
    drawn = {name: torch.randn(size, generator=draw).to(device) for name, size in sizes.items()}
    return {**drawn, "scaling": 1.5}


def off(tensor: Tensor) -> Tensor:
    """The same numbers, one element off alignment."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def wider(tensor: Tensor) -> Tensor:
    """The same numbers, as columns of a wider matrix."""
    wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1]), float("nan"))
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


CHANGES: dict[str, Callable[[Operands], Operands]] = {
    "alpha": lambda given: {"scaling": 3.0},
    "x off alignment": lambda given: {"x": off(given["x"])},
    "x in a wider": lambda given: {"x": wider(given["x"])},
    "x transposed": lambda given: {"x": given["x"].t().contiguous().t()},
    "fewer rows": lambda given: {"x": given["x"][:3]},
    "three dimensions": lambda given: {"x": given["x"].view(2, 3, K)},
    "weight moved": lambda given: {"weight": off(given["weight"] + 1)},
    "weight transposed": lambda given: {"weight": given["weight"].t().contiguous().t()},
    "bias in a wider": lambda given: {"bias": given["bias"].repeat_interleave(2)[::2]},
    "no bias": lambda given: {"bias": None},
    "A in 16 bits": lambda given: {"lora_A": given["lora_A"].bfloat16()},
    "B in a wider": lambda given: {"lora_B": wider(given["lora_B"])},
    "another rank": lambda given: {"lora_A": given["lora_A"][:2], "lora_B": given["lora_B"][:, :2]},
    "dropout of one": lambda given: {"dropout": 1.0},
}


def results(op: Callable[..., Tensor], given: Operands, dy: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The output and the gradients of x, A and B."""
    names = ("x", "lora_A", "lora_B")
    sources = [given[name].detach().requires_grad_() for name in names]
    y = op(**{**given, **dict(zip(names, sources, strict=True))})
    return [y, *torch.autograd.grad(y, sources, dy(y))]


def check(given: Operands, dy: Callable[[Tensor], Tensor] = torch.ones_like) -> None:
    """As the eager formula."""
    for ours, eager in zip(
        results(lora_linear, given, dy), results(reference.lora_linear, given, dy), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("change", CHANGES)
def test_another_call_is_computed_as_another(change: str, backend: str, kernel_device: torch.device) -> None:
    given = operands(kernel_device)
    with fastlora.use_backend(backend):
        check(given)
        check({**given, **CHANGES[change](given)})
        check(given)


@pytest.mark.parametrize(
    "dy",
    cases(
        [lambda y: wider(torch.ones_like(y)), lambda y: torch.ones_like(y[0, 0]).expand_as(y)],
        [lambda y: off(torch.ones_like(y)), lambda y: torch.ones_like(y).t().contiguous().t()],
    ),
)
def test_another_gradient_is_read_as_it_lies(dy: Any, kernel_device: torch.device) -> None:
    given = operands(kernel_device)
    with fastlora.use_backend("triton"):
        check(given)
        check(given, dy)


def test_saved_tensors_may_come_back_elsewhere(kernel_device: torch.device) -> None:
    """As from a copy on the host: other strides, off alignment."""
    given = operands(kernel_device)
    with fastlora.use_backend("triton"):
        check(given)
        with saved_tensors_hooks(
            lambda tensor: tensor, lambda tensor: wider(off(tensor)) if tensor.dim() == 2 else tensor
        ):
            check(given)


def test_another_backend_and_autocast_are_noticed(kernel_device: torch.device) -> None:
    given = operands(kernel_device)
    for backend in ("triton", "reference", "torch", "auto"):
        with fastlora.use_backend(backend):
            check(given)
            with torch.autocast(kernel_device.type, torch.bfloat16):
                assert lora_linear(**given).dtype == torch.bfloat16
            assert lora_linear(**given).dtype == torch.float32


def test_dora_and_adapters_too(kernel_device: torch.device) -> None:
    given = operands(kernel_device)
    layer: list[Any] = [given[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    magnitude = torch.rand(N, device=kernel_device)
    # the adapter's two products are A and its transpose's like
    bottleneck = (given["lora_A"], None, given["lora_A"].t().contiguous(), None)
    with fastlora.use_backend("triton"):
        for scaling, x in ((1.5, layer[0]), (0.5, layer[0]), (0.5, wider(layer[0])), (1.5, off(layer[0]))):
            call: Any = (x, *layer[1:], magnitude)
            eager = reference.dora_linear(*call, scaling=scaling)
            torch.testing.assert_close(dora_linear(*call, scaling=scaling), eager)
            for activation in ("gelu", "relu"):
                for residual in ("input", None):
                    options: Any = {"activation": activation, "residual": residual}
                    eager = reference.adapter(x, *bottleneck, **options)
                    torch.testing.assert_close(adapter(x, *bottleneck, **options), eager)


def test_bad_input_is_refused_after_a_call_like_it(kernel_device: torch.device) -> None:
    given = {**operands(kernel_device), "scaling": 1.0, "dropout": 0.0}
    lora_linear(**given)
    for change, error in (
        ({"scaling": [1.5]}, TypeError),
        # equal to what was given before
        ({"scaling": True}, TypeError),
        ({"dropout": False}, TypeError),
        ({"weight": given["weight"].to("meta")}, ValueError),
        ({"scaling": float("nan")}, ValueError),
        ({"lora_A": given["lora_A"].int()}, TypeError),
        ({"weight": given["weight"].half()}, ValueError),
        ({"lora_B": given["lora_B"][:-1]}, ValueError),
    ):
        with pytest.raises(error):
            lora_linear(**{**given, **change})
    h, down = given["x"], given["lora_A"]
    adapter(h, down, None, down.t(), None)
    with pytest.raises(TypeError, match="dropout"):
        adapter(h, down, None, down.t(), None, dropout=False)
    with pytest.raises(ValueError, match="meta tensor holds no data"):
        adapter(h, down.to("meta"), None, down.t(), None)
    with pytest.raises(ValueError, match="residual"):
        adapter(h, down, None, down.t(), None, residual="inputs")  # type: ignore[arg-type]


def test_a_layer_left_on_meta_is_refused_after_one_like_it() -> None:
    x = torch.ones(2, 32)
    fastlora.LoRALinear(32, 16)(x)
    with pytest.raises(ValueError, match="meta tensor holds no data"):
        fastlora.LoRALinear(32, 16, device="meta")(x)


def test_nothing_is_remembered_where_layouts_do_not_tell_all() -> None:
    x = torch.ones(2, 3)
    assert signature(x, None, settings=(1.0,)) is not None
    for odd in (x.to_sparse(), torch.nested.nested_tensor([x]), [x]):
        assert signature(odd, settings=()) is None  # type: ignore[arg-type]
    assert torch.func.vmap(lambda row: row * (signature(row, settings=()) is None))(x).all()


def test_memory_is_bounded() -> None:
    memory = Memory[int]()
    for number in range(_MOST + 2):
        memory[number] = number
    assert len(memory) == 2
    assert memory.of(_MOST, lambda: 0) == _MOST
    three = torch.ones(3)
    assert layouts(three[:2], None) == layouts(torch.zeros(2), None)
    assert layouts(three[:2], None) != layouts(three[1:], None)


def test_what_trains_nothing_answers_as_eager_to_the_bit() -> None:
    """A small call in 16 bits on a CPU, of an odd number of rows; while training a checkpoint counts more."""
    given: Operands = {
        name: each.bfloat16() if isinstance(each, Tensor) else each for name, each in operands("cpu").items()
    }
    given["x"] = given["x"][:5]
    with torch.no_grad():
        lora_linear(**given)
        assert torch.equal(lora_linear(**given, training=False), reference.lora_linear(**given))
