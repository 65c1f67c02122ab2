"""LoRA beside embeddings: the formula, its gradients, merging."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora import LoRAEmbedding, LoRALayer
from tests.lora_models import randomize_adapters

INDICES = torch.tensor([[1, 2, 1], [7, 0, 3]])


def make(dtype: torch.dtype = torch.float32, **more: Any) -> LoRAEmbedding:
    torch.manual_seed(0)
    return randomize_adapters(LoRAEmbedding(9, 5, rank=3, alpha=6, dtype=dtype, **more))


def formula(layer: LoRAEmbedding, dtype: torch.dtype) -> Tensor:
    update = F.embedding(INDICES, layer.lora_embedding_A.to(dtype).T) @ layer.lora_embedding_B.to(dtype).T
    return F.embedding(INDICES, layer.weight.to(dtype)) + 2.0 * update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_errs_no_more_than_twice_the_eager_formula(dtype: torch.dtype) -> None:
    layer = make(dtype)
    exact = formula(layer, torch.float64)
    eager = (formula(layer, dtype).double() - exact).abs().max()
    out = layer(INDICES)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 2 * eager + torch.finfo(dtype).eps * exact.abs().max()


def test_the_first_output_is_the_frozen_layers() -> None:
    embedding = nn.Embedding(9, 5)
    layer = LoRAEmbedding.from_embedding(embedding, rank=3)
    assert layer.weight is embedding.weight
    assert torch.equal(layer(INDICES), embedding(INDICES))
    assert not layer.lora_embedding_A.any()
    assert layer.lora_embedding_B.any()


def test_gradients() -> None:
    layer = make(torch.float64)

    def run(lora_A: Tensor, lora_B: Tensor) -> Tensor:
        parts = {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}
        out: Tensor = torch.func.functional_call(layer, parts, (INDICES,))
        return out

    parts = [p.detach().clone().requires_grad_() for p in (layer.lora_embedding_A, layer.lora_embedding_B)]
    assert torch.autograd.gradcheck(run, parts)
    layer(INDICES).sum().backward()
    assert layer.weight.grad is None


def test_a_padding_row_never_trains() -> None:
    layer = LoRAEmbedding(9, 5, padding_idx=0, rank=3)
    layer(INDICES).square().sum().backward()
    gradient = layer.lora_embedding_A.grad
    assert gradient is not None
    assert not gradient[:, 0].any()
    assert gradient[:, 1].any()


def test_frequency_scales_gradients_as_it_does_without_lora() -> None:
    scaled, plain = (make(torch.float64, scale_grad_by_freq=scale) for scale in (True, False))
    gradients = []
    for layer in (scaled, plain):
        layer(INDICES).sum().backward()
        assert layer.lora_embedding_A.grad is not None
        # the row that occurs twice
        gradients.append(layer.lora_embedding_A.grad[:, 1])
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_merging_gives_the_same_and_is_undone_to_the_bit() -> None:
    layer = make(torch.float64)
    before, weight = layer(INDICES), layer.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer(INDICES), before)
    torch.testing.assert_close(layer.to_base()(INDICES), before)
    # saved as the plain layer that it computes as
    assert torch.equal(layer.state_dict()["weight"], layer.to_base().weight)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(INDICES), before)
    assert torch.equal(copy.deepcopy(layer)(INDICES), before)


@pytest.mark.parametrize(
    ("make_layer", "kind", "told"),
    [
        (
            lambda: LoRAEmbedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0)),
            ValueError,
            "without max_norm",
        ),
        (lambda: LoRAEmbedding.from_embedding(nn.Embedding(4, 4, sparse=True)), ValueError, "sparse=False"),
        (lambda: LoRAEmbedding.from_embedding(nn.Linear(4, 4)), TypeError, "expected an nn.Embedding, got"),  # type: ignore[arg-type]
        (lambda: LoRAEmbedding(4, 4, rank=0), ValueError, "rank"),
        (lambda: LoRAEmbedding(4, 4, alpha=float("inf")), ValueError, "alpha"),
    ],
)
def test_bad_input(make_layer: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        make_layer()


def test_wrapped_it_computes_the_same_and_keeps_the_embedding_whole() -> None:
    layer = make()
    embedding = nn.Embedding(9, 5)
    wrapped = LoRALayer(embedding, rank=3, alpha=6)
    with torch.no_grad():
        assert torch.equal(wrapped(INDICES), embedding(INDICES))
        embedding.weight.copy_(layer.weight)
        for name in wrapped.adapter_params():
            wrapped.get_parameter(name).copy_(layer.get_parameter(name))
    assert torch.equal(wrapped(INDICES), layer(INDICES))
    merged = copy.deepcopy(wrapped)
    merged.merge()
    torch.testing.assert_close(merged.to_base()(INDICES), wrapped(INDICES))
    merged.unmerge()
    assert torch.equal(merged(INDICES), wrapped(INDICES))
    with pytest.raises(ValueError, match=r"no dropout for an nn.Embedding, got 0\.1"):
        LoRALayer(embedding, dropout=0.1)
