"""Layers that share x by kernels: every path gives what the layers give one by one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

import fastlora
from fastlora.functional import Projection, shared_lora_linear
from fastlora.ops import kernel_paths, prepared, shared_triton, shared_triton_forward
from fastlora.ops.prepared import layouts
from fastlora_kernels.choose.shared import SharedPath
from fastlora_kernels.choose.shared_forward import shared_down_plan
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.shared.down import shared_down
from fastlora_kernels.shared.grad_x import shared_grad_x
from fastlora_kernels.tile import Plan, Shape
from tests.cases import cases
from tests.quantised import four_bit, read
from tests.test_ops_shared import (
    DROPOUTS,
    apart,
    assert_same_gradients,
    both_passes,
    make_layers,
    make_x,
)

PATHS: tuple[SharedPath, ...] = get_args(SharedPath)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Takes the path of ``request.param``; how many layers each launch was of."""
    of_layers = list[int]()

    def launch(dx: Tensor, *tensors: Tensor | None, **settings: Any) -> Any:
        of_layers.append(sum(dy is not None for dy in tensors[::5]))
        return shared_grad_x(dx, *tensors, **settings)

    monkeypatch.setattr(shared_triton, "shared_grad_x", launch)
    path = getattr(request, "param", "shared")
    monkeypatch.setattr(kernel_paths, "choose_shared", lambda *_, **__: Choice(path))
    return of_layers


@pytest.fixture
def read_x(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many layers each launch computed S, wherever one can."""
    of_layers = list[int]()

    def launch(x: Tensor, s: Tensor, *tensors: Tensor | None, **settings: Any) -> Any:
        of_layers.append(sum(lora_A is not None for lora_A in tensors[::3]))
        return shared_down(x, s, *tensors, **settings)

    monkeypatch.setattr(shared_triton_forward, "shared_down", launch)
    monkeypatch.setattr(kernel_paths, "choose_shared_forward", lambda *_, **__: "shared")
    return of_layers


def assert_as_apart(x: Tensor, layers: Sequence[Projection], **options: Any) -> None:
    with fastlora.use_backend("triton"):
        ys, got = both_passes(shared_lora_linear, x, layers, **options)
        expected_ys, expected = both_passes(apart, x, layers, **options)
    # on a GPU alone another path may be the fastest
    assert_same_gradients([y.detach() for y in ys], [y.detach() for y in expected_ys])
    assert_same_gradients(got, expected)


@pytest.mark.parametrize(
    ("dropouts", "ranks"),
    cases([("none", (16, 8, 8)), ("all", (4, 3, 8))], [("none", (4, 3, 8)), ("all", (16, 8, 8))]),
)
@pytest.mark.parametrize("launched", PATHS, indirect=True)
def test_every_path(
    launched: list[int],
    dropouts: str,
    ranks: tuple[int, ...],
    kernel_device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    """Ranks that 16 divides together, and others."""
    layers = of_ranks(make_layers(dropouts=DROPOUTS[dropouts], device=kernel_device), ranks)
    assert_as_apart(make_x(device=kernel_device), layers)
    path = request.node.callspec.params["launched"]
    assert launched == ([3] if path == "shared" else [])


def of_ranks(layers: Sequence[Projection], ranks: Sequence[int]) -> list[Projection]:
    """The same layers with other ranks."""
    found = []
    for layer, rank in zip(layers, ranks, strict=True):
        shapes = ((rank, layer.lora_A.shape[1]), (layer.lora_B.shape[0], rank))
        a, b = (torch.randn(shape).to(layer.lora_A).requires_grad_() for shape in shapes)
        found.append(layer._replace(lora_A=a, lora_B=b))
    return found


@pytest.mark.parametrize(
    ("dropouts", "ranks", "count"),
    cases(
        [("none", (4, 3, 8), 3), ("all", (16, 8, 40), 3)], [("all", (4, 3, 8), 2), ("none", (16, 8, 40), 2)]
    ),
)
@pytest.mark.parametrize("splits", cases([1], [3]))
def test_x_is_read_once_for_every_s(
    read_x: list[int],
    dropouts: str,
    ranks: tuple[int, ...],
    count: int,
    splits: int,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice, the second time as prepared; a second call has masks of its own."""

    def plan(*call: Any) -> Plan:
        return replace(shared_down_plan(*call), splits=splits)

    monkeypatch.setattr(shared_triton_forward, "shared_down_plan", plan)
    layers = of_ranks(make_layers(dropouts=DROPOUTS[dropouts], device=kernel_device), ranks)[:count]
    used = range(count)
    for x in (make_x(device=kernel_device), make_x(device=kernel_device) + 1):
        assert_as_apart(x.detach().requires_grad_(), layers, used=used)
    assert read_x == [count, count]


@pytest.mark.parametrize(
    "case", ["one layer", "four layers", "dropout in some", "a quantised weight", "faster apart"]
)
def test_what_no_launch_serves_reads_x_for_each_layer(
    read_x: list[int], case: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropouts = DROPOUTS["some" if case == "dropout in some" else "all"]
    layers = make_layers(dropouts=dropouts, device=kernel_device)
    if case == "one layer":
        layers = layers[:1]
    elif case == "four layers":
        layers.append(layers[0])
    elif case == "a quantised weight":
        layers[1] = layers[1]._replace(weight=read(four_bit(*dense(layers[1]).shape)))
    elif case == "faster apart":
        monkeypatch.setattr(kernel_paths, "choose_shared_forward", lambda *_, **__: "separate")
    x = make_x(device=kernel_device)
    with fastlora.use_backend("triton"):
        torch.manual_seed(0)
        ys = shared_lora_linear(x, layers)
        torch.manual_seed(0)
        expected = apart(x, layers)
    assert all(map(torch.equal, ys, expected))
    assert read_x == []


@pytest.mark.parametrize("path", ["shared", "separate"])
def test_a_second_call_is_known(
    path: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither chosen anew, nor looked at but for each layer's signature; two layouts are two calls."""
    chosen, looked_at = list[int](), list[int]()

    def choose(shapes: Sequence[Shape], *_: Any, **__: Any) -> str:
        chosen.append(shapes[0].m)
        return path

    def look(*tensors: Tensor | None) -> Any:
        looked_at.append(len(tensors))
        return layouts(*tensors)

    monkeypatch.setattr(kernel_paths, "choose_shared_forward", choose)
    monkeypatch.setattr(prepared, "layouts", look)
    layers = make_layers(device=kernel_device)
    # of one signature, in other places
    layers = [layers[1], layers[1]._replace(lora_A=layers[1].lora_A.detach() + 1), layers[0]]
    x = make_x(device=kernel_device).detach()
    with fastlora.use_backend("triton"), torch.no_grad():
        for given in (x, torch.cat([x, x])):
            first = shared_lora_linear(given, layers)
            looked_at.clear()
            assert all(map(torch.equal, shared_lora_linear(given, layers), first))
            assert len(looked_at) == len(layers)
            for y, alone in zip(first, apart(given, layers), strict=True):
                torch.testing.assert_close(y, alone)
    assert chosen == [10, 20]


def dense(layer: Projection) -> Tensor:
    """The weight of a layer that has one."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def test_inputs_and_weights_laid_out_otherwise(read_x: list[int], kernel_device: torch.device) -> None:
    """x in columns of a wider tensor, a transposed weight, an A in 16 bits and one of every second row."""
    x, layers = make_x(device=kernel_device).detach(), make_layers(device=kernel_device)
    margin = torch.full_like(x, float("nan"))
    x = torch.cat([x, margin], -1)[..., : x.shape[-1]].requires_grad_()
    first, second, third = layers
    first = first._replace(weight=dense(first).t().contiguous().t())
    second = second._replace(lora_A=second.lora_A.detach().bfloat16().requires_grad_())
    wider = third.lora_A.detach().repeat_interleave(2, 0)
    third = third._replace(lora_A=wider[::2].requires_grad_())
    assert_as_apart(x, [first, second, third])
    assert read_x == [3]


@pytest.mark.parametrize("used", [(0, 2), (1,)], ids=str)
def test_layers_without_a_gradient_are_left_out(
    launched: list[int], used: Sequence[int], kernel_device: torch.device
) -> None:
    """One alone is computed as ever."""
    assert_as_apart(make_x(device=kernel_device), make_layers(device=kernel_device), used=used)
    assert launched == ([2] if len(used) == 2 else [])


@pytest.mark.parametrize("launched", cases(["shared"], ["epilogue"]), indirect=True)
@pytest.mark.parametrize("case", ["some A frozen", "some B frozen", "an A in 16 bits", "only x"])
def test_what_trains_may_differ(launched: list[int], case: str, kernel_device: torch.device) -> None:
    layers = of_ranks(make_layers(device=kernel_device), (16, 8, 8))
    if case == "an A in 16 bits":
        layers[1] = layers[1]._replace(lora_A=layers[1].lora_A.detach().bfloat16().requires_grad_())
    for index, layer in enumerate(layers):
        layer.lora_A.requires_grad_(case != "only x" and not (case == "some A frozen" and index == 1))
        layer.lora_B.requires_grad_(case != "only x" and not (case == "some B frozen" and index == 1))
    assert_as_apart(make_x(device=kernel_device), layers)


def test_dropout_in_some_layers_alone_leaves_them_apart(
    launched: list[int], kernel_device: torch.device
) -> None:
    layers = make_layers(dropouts=DROPOUTS["some"], device=kernel_device)
    assert_as_apart(make_x(device=kernel_device), layers)
    assert launched == []


def test_four_layers_are_computed_apart(launched: list[int], kernel_device: torch.device) -> None:
    layers = make_layers(device=kernel_device)
    x = make_x(device=kernel_device)
    with fastlora.use_backend("triton"):
        torch.cat(shared_lora_linear(x, [*layers, layers[0]]), -1).sum().backward()
    assert launched == []
    assert x.grad is not None


def test_a_frozen_x_launches_nothing(launched: list[int], kernel_device: torch.device) -> None:
    assert_as_apart(make_x(device=kernel_device).requires_grad_(False), make_layers(device=kernel_device))
    assert launched == []


@pytest.mark.parametrize("launched", cases(["shared"], ["epilogue"]), indirect=True)
def test_gradients_laid_out_otherwise(launched: list[int], kernel_device: torch.device) -> None:
    """One for all rows, and columns of wider ones, after calls whose gradients lie one after the other."""
    x, layers = make_x(device=kernel_device), make_layers(device=kernel_device)
    wanted = [x, *(t for layer in layers for t in (layer.lora_A, layer.lora_B))]

    def gradients(op: Any, factor: float, *, otherwise: bool) -> list[Tensor]:
        ys = op(x, layers)
        dys = [torch.full_like(y, factor) for y in ys]
        if otherwise:
            margin = dys[1].new_full(dys[1].shape, float("nan"))
            dys[0] = dys[0][:1, :1].expand_as(ys[0])
            dys[1] = torch.cat([dys[1], margin], -1)[..., : margin.shape[-1]]
        return list(torch.autograd.grad(ys, wanted, dys))

    with fastlora.use_backend("triton"):
        for factor, otherwise in ((1.0, False), (2.0, False), (3.0, True)):
            got, expected = (gradients(op, factor, otherwise=otherwise) for op in (shared_lora_linear, apart))
            assert_same_gradients(got, expected)


def test_the_kernel_serves_whoever_asks_for_kernels_by_name(kernel_device: torch.device) -> None:
    """Also calls that no plan is for."""
    shapes = tuple(Shape(m=10, n=n, k=50, r=5, aligned=False) for n in (30, 40))
    call: Any = (shapes, torch.float32, kernel_device)
    assert kernel_paths.choose_shared(*call, dropping=False) == Choice("separate")
    with fastlora.use_backend("triton"):
        assert kernel_paths.choose_shared(*call, dropping=False) == Choice("shared")
