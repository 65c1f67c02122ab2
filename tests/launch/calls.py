"""Calls of every op: forward passes that return their backward pass. Tensors hold whatever memory holds."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import fastlora
from fastlora.functional import Projection
from fastlora.ops import kernel_paths
from fastlora.ops.tuned_file import gpu_key
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.tuning.calls import LayerCall
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Choice, Record
from tests.launch.stage import DEVICE

Backward = Callable[[], object]
Work = Callable[[], Backward | None]


class Case(NamedTuple):
    """One call, or a few that belong together.

    Attributes:
        name: Says what is special about it.
        work: The call.
        quick: Whether the default run takes it.
    """

    name: str
    work: Work
    quick: bool = False


def lora(
    m: int,
    n: int,
    k: int,
    r: int = 16,
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype | None = torch.float32,
    p: float = 0.0,
    scaling: float = 1.5,
    wanted: str = "xab",
    bias: bool = True,
    dora: bool = False,
    backend: str = "auto",
    training: bool = True,
    x: Tensor | None = None,
    weight: Tensor | FrozenWeight | None = None,
    a: Tensor | None = None,
    dy: Callable[[Tensor], Tensor] = torch.empty_like,
) -> Work:
    """A LoRA layer's call.

    Args:
        m: Rows of x.
        n: Features that come out.
        k: Features that go in.
        r: Rank.
        dtype: Dtype of x, weight and bias.
        adapter_dtype: Dtype of A, B and DoRA's magnitude; None for ``dtype``.
        p: Dropout's probability.
        scaling: Factor of the low-rank path.
        wanted: Whose gradients: letters out of ``x``, ``a``, ``b`` and, with DoRA, ``m``.
        bias: Whether the layer has a bias.
        dora: Whether it is DoRA's.
        backend: Name of a backend, see :func:`fastlora.use_backend`.
        training: Whether dropout is on.
        x: Another input than a new ``[m, k]``.
        weight: Another weight than a new ``[n, k]``, or a quantised one.
        a: Another A than a new ``[r, k]``.
        dy: Makes the output's gradient from the output.
    """

    def forward() -> Backward | None:
        small = adapter_dtype or dtype
        tensors = {
            "x": torch.empty(m, k, dtype=dtype) if x is None else x.detach(),
            "a": torch.empty(r, k, dtype=small) if a is None else a.detach(),
            "b": torch.empty(n, r, dtype=small),
            "m": torch.empty(n, dtype=small),
        }
        sources = [tensor.requires_grad_() for name, tensor in tensors.items() if name in wanted]
        frozen: Any = torch.empty(n, k, dtype=dtype) if weight is None else weight
        added = torch.empty(n, dtype=dtype) if bias else None
        operands = (tensors["x"], frozen, added, tensors["a"], tensors["b"])
        options: dict[str, Any] = {"scaling": scaling, "dropout": p, "training": training}
        with fastlora.use_backend(backend):
            if dora:
                y = fastlora.functional.dora_linear(*operands, tensors["m"], **options)
            else:
                y = fastlora.functional.lora_linear(*operands, **options)
        assert y.shape == (*tensors["x"].shape[:-1], n)
        return _backward(y, sources, dy, backend)

    return forward


def shared(
    m: int,
    k: int,
    sizes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    p: float = 0.0,
    wanted: str = "xab",
    backend: str = "auto",
    choice: Choice | None = None,
) -> Work:
    """A call of layers that share their input.

    Args:
        m: Rows of x.
        k: Features that go in.
        sizes: Features that come out of each layer, and its rank.
        dtype: Dtype of x and the weights; A and B are in float32.
        p: Dropout's probability.
        wanted: Whose gradients: letters out of ``x``, ``a`` and ``b``.
        backend: Name of a backend, see :func:`fastlora.use_backend`.
        choice: Path and tile of the backward pass; None for what is planned.
    """

    def forward() -> Backward | None:
        x, layers = torch.empty(m, k, dtype=dtype), list[Projection]()
        for n, r in sizes:
            adapters = torch.empty(r, k), torch.empty(n, r)
            layers.append(Projection(torch.empty(n, k, dtype=dtype), None, *adapters, 1.5, p))
        named = {"x": [x], "a": [each.lora_A for each in layers], "b": [each.lora_B for each in layers]}
        sources = [tensor.requires_grad_() for letter in wanted for tensor in named[letter]]
        with fastlora.use_backend(backend):
            ys = fastlora.functional.shared_lora_linear(x, layers)
        backward = _backward(ys, sources, torch.empty_like, backend)

        def planned() -> None:
            assert backward is not None
            choose: Any = kernel_paths.choose_shared if choice is None else lambda *_, **__: choice
            with mock.patch.object(kernel_paths, "choose_shared", choose):
                backward()

        return planned if backward is not None else None

    return forward


def adapter(
    m: int,
    hidden: int,
    size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    parameter_dtype: torch.dtype | None = torch.float32,
    p: float = 0.0,
    wanted: str = "hdu",
    bias: bool = True,
    residual: Literal["input", "tensor"] | None = "input",
    activation: Literal["gelu", "relu", "silu"] = "gelu",
    backend: str = "triton",
) -> Work:
    """A bottleneck adapter's call.

    Args:
        m: Rows of h.
        hidden: Columns of h.
        size: The bottleneck.
        dtype: Dtype of h.
        parameter_dtype: Dtype of the four parameters; None for ``dtype``.
        p: Dropout's probability.
        wanted: Whose gradients: letters out of ``h``, ``d`` (down) and ``u`` (up).
        bias: Whether both products have a bias.
        residual: ``input``, ``tensor`` for another tensor, or None.
        activation: Name of the function between the products.
        backend: Name of a backend, see :func:`fastlora.use_backend`.
    """

    def forward() -> Backward | None:
        small = parameter_dtype or dtype
        h = torch.empty(m, hidden, dtype=dtype)
        down, up = torch.empty(size, hidden, dtype=small), torch.empty(hidden, size, dtype=small)
        biases = [torch.empty(each, dtype=small) if bias else None for each in (size, hidden)]
        groups: dict[str, list[Tensor | None]] = {"h": [h], "d": [down, biases[0]], "u": [up, biases[1]]}
        tensors = [each for letter in wanted for each in groups[letter] if each is not None]
        sources = [each.requires_grad_() for each in tensors]
        added = torch.empty(m, hidden, dtype=dtype) if residual == "tensor" else residual
        with fastlora.use_backend(backend):
            out = fastlora.functional.adapter(
                h, down, biases[0], up, biases[1], residual=added, activation=activation, dropout=p
            )
        assert out.shape == h.shape
        return _backward(out, sources, torch.empty_like, backend)

    return forward


def module(layer: torch.nn.Module, *inputs: Tensor, call: Callable[..., Any] | None = None) -> Work:
    """A module's call, and the gradients of what it trains.

    Args:
        layer: The module.
        inputs: What it is called with; floating-point ones want a gradient.
        call: Calls it in another way.
    """

    def forward() -> Backward:
        given = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
        made = (call or layer)(*given)
        out = made[0] if isinstance(made, tuple) else made
        trained = [each for each in layer.parameters() if each.requires_grad]
        return lambda: torch.autograd.grad(out, trained, torch.empty_like(out), allow_unused=True)

    return forward


@contextlib.contextmanager
def measured(call: LayerCall, forward: Choice, backward: Choice) -> Iterator[None]:
    """Calls run as though ``fastlora tune`` had found these to be the fastest on this GPU.

    Args:
        call: The call that was timed.
        forward: Path and tile of its forward pass.
        backward: Path and tile of its backward pass.
    """
    gpu = gpu_key(DEVICE)
    tuned.pin(gpu, [Record(call.shape, call.dtype, call.dropout > 0, forward, backward)])
    try:
        yield
    finally:
        tuned.pin(gpu, [])


def _backward(
    out: Tensor | tuple[Tensor, ...],
    sources: Sequence[Tensor],
    dout: Callable[[Tensor], Tensor],
    backend: str,
) -> Backward | None:
    if not sources:
        return None
    outs = out if isinstance(out, tuple) else (out,)

    def backward() -> None:
        with fastlora.use_backend(backend):
            gradients = torch.autograd.grad(outs, sources, [dout(each) for each in outs])
        for gradient, source in zip(gradients, sources, strict=True):
            assert (gradient.shape, gradient.dtype) == (source.shape, source.dtype)

    return backward
