"""LoRA's op over a quantised weight: what it keeps for backward, and what it notices."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow

from fastlora.functional import lora_linear
from fastlora.ops.weights.read import frozen_weight
from tests.quantised import four_bit, held, llm_int8, read, to_nf4

M, N, K, R = 8, 512, 256, 4


def layer_call(dropout: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, a, b = torch.randn(M, K), torch.randn(R, K), torch.randn(N, R)
    tensors = tuple(t.requires_grad_() for t in (x, a, b))
    weight = read(four_bit(N, K))
    return lora_linear(x, weight, None, a, b, scaling=1.0, dropout=dropout), tensors


def tensors_alive() -> dict[int, Tensor]:
    return {id(t): t for t in gc.get_objects() if type(t) is Tensor}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_nothing_of_the_weight_is_kept(dropout: float) -> None:
    kept: list[Tensor] = []
    before = tensors_alive()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, given = layer_call(dropout)
    pointers = {t.data_ptr() for t in given}
    own = [t for t in kept if t.data_ptr() not in pointers]
    assert sorted(t.numel() for t in own) == ([M * R, M * K] if dropout else [M * R])
    # whatever else a graph may hold on to: no tensor of the weight's size is alive beside it
    kept.clear()
    own.clear()
    assert [t.shape for key, t in tensors_alive().items() if key not in before and t.numel() >= N * K] == []
    assert y.requires_grad


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: four_bit(N, K),
    "fp4 by rows over blocks' ends": lambda: four_bit(N, K, "fp4", 4096, nested=False),
    "LLM.int8": lambda: llm_int8(N, K),
    "Int8Tensor": lambda: held(Int8Tensor.from_hp(torch.randn(N, K), PerRow())),
    "NF4Tensor": lambda: held(to_nf4(torch.randn(N, K), 64, 256)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_compiled_graph_keeps_nothing_of_the_weight(kind: str) -> None:
    """It is one graph, which makes the weight dense once more in backward."""
    layer = LAYERS[kind]()
    draws = (torch.randn(M, K), torch.randn(R, K), torch.randn(N, R))
    inputs = tuple(draw.requires_grad_() for draw in draws)

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, read(layer), None, a, b, scaling=1.0)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compiled(*inputs)
    assert max(kept) < N * K // 8
    expected = call(*inputs)
    assert torch.equal(y, expected)
    pairs = zip(*(torch.autograd.grad(found.sum(), inputs) for found in (y, expected)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_weight_that_changes_between_the_passes_is_refused() -> None:
    x = torch.randn(M, K, requires_grad=True)
    a, b = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    layer = four_bit(N, K)
    y = lora_linear(x, read(layer), None, a, b, scaling=1.0)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(RuntimeError, match="changed in place between a forward pass and its backward pass"):
        y.sum().backward()


def test_an_evaluating_call_between_the_passes_changes_nothing() -> None:
    """bitsandbytes repacks its weight then, on some CPUs; the bytes that were read stay as they are."""
    layer = four_bit(N, K)
    x = torch.randn(M, K, requires_grad=True)
    a, b = torch.zeros(R, K, requires_grad=True), torch.zeros(N, R, requires_grad=True)
    weight = read(layer)
    dense = weight.dense(torch.float32)
    y = lora_linear(x, weight, None, a, b, scaling=1.0)
    with torch.no_grad():
        layer.eval()(torch.randn(1, K))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.ones(M, N) @ dense)
    repacked = vars(layer.weight.quant_state).get("packing_format_for_cpu", False)
    assert isinstance(frozen_weight(layer), str) == repacked


@pytest.mark.parametrize(
    "x", [None, [[1.0] * K], torch.ones(M, K, dtype=torch.int64)], ids=lambda x: type(x).__name__
)
def test_an_input_that_is_no_floating_point_tensor_is_refused(x: object) -> None:
    with pytest.raises(TypeError, match="expected x"):
        lora_linear(x, read(four_bit(N, K)), None, torch.randn(R, K), torch.randn(N, R), scaling=1.0)  # type: ignore[arg-type]
