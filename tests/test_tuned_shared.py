"""What ``tune`` found for layers alone where they share x: it is taken forward, and loaded for graphs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastlora._core import backend
from fastlora.functional import Projection, shared_lora_linear
from fastlora.ops import before_graphs, kernel_paths, lora_passes, lora_triton, shared_triton
from fastlora.ops import shared_triton_forward as forward
from fastlora.ops.decide import Paths
from fastlora.ops.prepared import Memory
from fastlora.tuning import shared
from fastlora.tuning.candidates import draw
from fastlora_kernels import targets
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import REFERENCE, Choice, Record
from fastlora_kernels.shared.grad_x import shared_grad_x
from fastlora_kernels.tile import Shape
from tests.tuning_models import GPU, SHARED, device, pretend, record, shared_record

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """dX of layers together, and what runs of each for a graph's sake alone: outputs, pass and path."""
    found: list[str] = []
    pretend(monkeypatch)
    monkeypatch.setattr(backend, "_automatic", lambda *_: "triton")

    def together(*arguments: Any, **settings: Any) -> Any:
        found.append("together")
        return shared_grad_x(*arguments, **settings)

    def noting(part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(x: Any, *arguments: Any) -> Any:
            outputs = (arguments[0] if part == "forward" else x).shape[0 if part == "forward" else 1]
            found.append(f"{outputs} {part} {getattr(arguments[-1].paths, part).path}")
            return run(x, *arguments)

        return noted

    monkeypatch.setattr(shared_triton, "shared_grad_x", together)
    for part in ("forward", "backward"):
        name = f"lora_linear_{part}"
        monkeypatch.setattr(before_graphs, name, noting(part, getattr(lora_passes, name)))
    Memory.forget_all()
    return found


def records(*, graph: str = "split", host: str = "split") -> list[Record]:
    """Of every layer alone; what won for the first one differs."""
    first, *others = SHARED.layers
    return [
        record(first, graph, from_host=host),
        *(record(each, "split", from_host="split") for each in others),
    ]


def step(rows: int = SHARED.layers[0].rows, *, train: bool = True) -> None:
    layers = shared.draw_shared([replace(layer, rows=rows) for layer in SHARED.layers], device())
    given = [
        Projection(t.weight, t.bias, t.lora_A.requires_grad_(train), t.lora_B.requires_grad_(train), 1.0)
        for t in layers
    ]
    ys = shared_lora_linear(layers[0].x.requires_grad_(train), given)
    if train:
        torch.autograd.backward(ys, [t.dy for t in layers])


def test_layers_that_a_graph_computes_together_are_loaded_together(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager PyTorch won for one of them, but not in a graph: calls from Python compute them apart."""
    together = Choice("shared")
    tuned.pin(GPU, [*records(host=REFERENCE), shared_record(together, together)])
    torch.manual_seed(0)
    step(train=False)
    assert "together" not in ran
    ran.clear()
    for rows in (33, 35, 33):
        step(rows)
    assert ran.count("together") == 1
    ran.clear()
    monkeypatch.setattr(kernel_paths, "_is_capturing", lambda device: True)
    Memory.forget_all()
    step(33)
    assert ran == ["together"]


def test_layers_that_a_graph_computes_apart_are_loaded_apart(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager PyTorch won for one of them in a graph: the others launch kernels of their own there."""
    together = Choice("shared")
    tuned.pin(GPU, [*records(graph=REFERENCE), shared_record(together, together)])
    for rows in (33, 35):
        step(rows)
    loaded = [f"{outputs} {part} split" for outputs in (16, 32) for part in ("forward", "backward")]
    assert ran == [*loaded, "together", "together"]
    monkeypatch.setattr(kernel_paths, "_is_capturing", lambda device: True)
    Memory.forget_all()
    step(33)
    assert ran[6:] == []


def test_layers_one_by_one_are_loaded_by_what_won_for_each(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together from Python, and one by one in a graph: again where something else won for a layer."""
    loaded: list[str] = []
    separate = shared_triton._separate

    def noted(layers: Any) -> Any:
        loaded.append("separate")
        return separate(layers)

    monkeypatch.setattr(shared_triton, "_separate", noted)
    of_group = shared_record(Choice("separate"), Choice("shared"))
    for path in ("split", "epilogue"):
        alone = [replace(record(each, "split"), backward=Choice(path)) for each in SHARED.layers]
        tuned.pin(GPU, [*alone, of_group])
        for rows in (33, 35):
            step(rows)
    assert loaded == ["separate"] * 2


def test_forward_each_layer_takes_what_was_measured_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one was not measured, the prediction says whether they share a launch."""
    pretend(monkeypatch, targets.find_card("H100"))
    shapes = tuple(Shape(8192, outputs, 4096, 16) for outputs in (4096, 1024))
    alone = [
        Record(shape, "bfloat16", dropping=True, forward=Choice("split"), backward=Choice("split"))
        for shape in shapes
    ]

    def chosen(*measured: Record, dropping: bool = True) -> str:
        tuned.pin(GPU, measured)
        given = (shapes, torch.bfloat16, torch.device("cuda"))
        return kernel_paths.choose_shared_forward(*given, dropping=dropping)

    assert chosen(*alone) == "separate"
    assert chosen() == chosen(alone[0]) == chosen(*alone, dropping=False) == "shared"


@pytest.mark.parametrize("path", ["epilogue", "split", "single"])
def test_what_won_for_a_layer_fills_its_y(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of paths that make an S of their own another one."""
    pretend(monkeypatch)
    for name in ("_epilogue", "_up"):
        monkeypatch.setattr(lora_triton, name, lambda *_, name=name: name)
    first, found, choose = draw(SHARED.layers[0], device()), list[str](), kernel_paths.choose

    def noted(*arguments: Any, **settings: Any) -> Choice:
        assert settings == {"dropping": True, "in_graph": False}
        choice = choose(*arguments, **settings)
        found.append(choice.path)
        return choice

    monkeypatch.setattr(kernel_paths, "choose", noted)
    own = Paths(SHARED.layers[0].shape, Choice(path), Choice("split"))
    y, s = first.dy, first.x.new_empty(first.x.shape[0], first.lora_A.shape[0])
    prepare: Any = vars(lora_triton.fill_from_s)["__wrapped__"]
    filled = prepare(first.x, first.weight, first.bias, s, first.lora_B, y, paths=own)
    (left,) = found if path == "single" else [path, *found]
    assert filled == {"epilogue": "_epilogue", "split": "_up"}[left]


def test_each_layer_fills_its_y_by_its_own_paths(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Paths | None] = []
    fill = lora_triton.fill_from_s

    def noted(*tensors: Any, paths: Paths | None, **known: Any) -> Any:
        given.append(paths)
        return fill(*tensors, paths=paths, **known)

    monkeypatch.setattr(forward, "fill_from_s", noted)
    monkeypatch.setattr(kernel_paths, "choose_shared_forward", lambda *_, **__: "shared")
    tuned.pin(GPU, records()[:2])
    step(train=False)
    assert [_known(paths) for paths in given] == list(SHARED.shapes)


def _known(paths: Paths | None) -> Shape | None:
    return None if paths is None else paths.shape
