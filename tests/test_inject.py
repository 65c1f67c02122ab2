"""apply_lora and back: which modules it takes, what it leaves alone, what it refuses."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastlora
from fastlora import LoRALayer, LoRALinear, LoRAMultiheadAttention
from fastlora.nn import LoRAModule
from tests.lora_models import Snapshot, mlp, randomize_adapters, same_bits, tiny_vit

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VIT_BLOCK = [f"self_attention.{name}" for name in ("lora_A", "lora_B", "out_proj.lora_A", "out_proj.lora_B")]
VIT_BLOCK += [f"mlp.{index}.{name}" for index in (0, 3) for name in ("lora_A", "lora_B")]


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoRAModule)]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_every_adapter_of_a_vision_transformer_trains() -> None:
    model = fastlora.apply_lora(tiny_vit(), rank=2)
    blocks = [f"encoder.layers.encoder_layer_{i}.{name}" for i in range(2) for name in VIT_BLOCK]
    expected = {*blocks, "heads.head.weight", "heads.head.bias"}
    assert trainable(model) == expected
    # B starts at zero, and the gradient of A passes through B: one step of B alone first
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.autograd.backward(F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 0, 1])))
    optimiser.step()
    optimiser.zero_grad()
    torch.autograd.backward(F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 0, 1])))
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == expected


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_first_output_is_the_frozen_models(training: bool) -> None:
    model = tiny_vit().train(training)
    with torch.no_grad():
        before = model(IMAGES)
        fastlora.apply_lora(model, rank=2)
        assert all(module.training is training for module in model.modules())
        torch.testing.assert_close(model(IMAGES), before, rtol=1e-5, atol=1e-5)
    plain = mlp()
    x = torch.randn(4, 12)
    expected = plain(x)
    assert torch.equal(fastlora.apply_lora(plain, rank=2)(x), expected)


def test_it_returns_the_same_model_sharing_every_weight() -> None:
    model = tiny_vit()
    parameters = dict(model.named_parameters())
    assert fastlora.apply_lora(model, rank=2) is model
    assert {name for name, p in model.named_parameters() if p is parameters.get(name)} == set(parameters)


SELECTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({}, ["0", "2", "head"]),
    "end-of-name": ({"target_modules": ["head"]}, ["head"]),
    "tuple": ({"target_modules": ("0", "2")}, ["0", "2"]),
    "set": ({"target_modules": {"2"}}, ["2"]),
    "regex": ({"target_modules": r"\d|head"}, []),
    "exclude": ({"exclude_modules": ["head"]}, ["0", "2"]),
    "exclude-regex": ({"exclude_modules": r"\d"}, ["head"]),
    "whole": ({"modules_to_save": ["head"]}, ["0", "2"]),
}


@pytest.mark.parametrize(("arguments", "expected"), SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selection(arguments: dict[str, Any], expected: list[str]) -> None:
    model = mlp()
    if not expected:
        # the pattern takes the GELU at 1 too
        with pytest.raises(TypeError, match=r"got 1 that cannot.*\n  1: expected an nn.Linear, got GELU"):
            fastlora.apply_lora(model, **arguments)
        return
    assert adapted(fastlora.apply_lora(model, rank=2, **arguments)) == expected
    whole = {"head.weight", "head.bias"} if "modules_to_save" in arguments else set()
    assert trainable(model) == {f"{name}.lora_{part}" for name in expected for part in "AB"} | whole


def test_names_match_whole_components() -> None:
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "my_query": nn.Linear(4, 4)})
    model["block"] = nn.ModuleDict({"query": nn.Linear(4, 4)})
    assert adapted(fastlora.apply_lora(model, target_modules=["query"], rank=2)) == ["query", "block.query"]


def test_attention_is_taken_whole() -> None:
    attention = "encoder.layers.encoder_layer_0.self_attention"
    by_pattern = fastlora.apply_lora(tiny_vit(), target_modules=r".*layer_0\.self_attention.*", rank=2)
    assert adapted(by_pattern) == [attention, f"{attention}.out_proj"]
    by_name = fastlora.apply_lora(tiny_vit(), target_modules=["self_attention", "out_proj"], rank=2)
    assert len(adapted(by_name)) == 4
    model = tiny_vit()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"got '.*out_proj' alone.*name 'self_attention' instead"):
        fastlora.apply_lora(model, target_modules=["out_proj"])
    for argument in ("exclude_modules", "modules_to_save"):
        arguments: dict[str, Any] = {argument: ["out_proj"]}
        with pytest.raises(ValueError, match=r"got '.*out_proj' excluded from it"):
            fastlora.apply_lora(model, **arguments)
    before.assert_unchanged()


def test_settings_reach_every_layer() -> None:
    model = fastlora.apply_lora(
        tiny_vit(), rank=3, alpha=6, dropout=0.25, rslora=True, adapter_dtype=torch.bfloat16
    )
    layers = [module for module in model.modules() if isinstance(module, LoRAModule)]
    assert len(layers) == 8
    for layer in layers:
        assert (layer.rank, layer.scaling, layer.lora_dropout) == (3, 6 / 3**0.5, 0.25)
        assert layer.lora_A.dtype == torch.bfloat16


def test_the_draw_comes_from_torchs_generator() -> None:
    first, second, third = (copy.deepcopy(mlp()) for _ in range(3))
    for seed, model in ((0, first), (0, second), (1, third)):
        torch.manual_seed(seed)
        fastlora.apply_lora(model, rank=2)
    a = [model.get_parameter("0.lora_A") for model in (first, second, third)]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared)})
    fastlora.apply_lora(model, target_modules=["one"], rank=2)
    assert isinstance(model["one"], LoRALinear)
    assert model["one"] is model.get_submodule("two.0")
    fastlora.remove_adapters(model)
    assert type(model["one"]) is nn.Linear
    assert model["one"] is model.get_submodule("two.0")
    # excluding one of its names excludes the module
    with pytest.raises(ValueError, match="expected at least one module to adapt"):
        fastlora.apply_lora(model, exclude_modules=["two.0"])


def test_a_tied_output_embedding_is_left_alone() -> None:
    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
            self.lm_head.weight = self.embedding.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    assert adapted(fastlora.apply_lora(LanguageModel(), rank=2)) == ["body"]
    by_name = fastlora.apply_lora(LanguageModel(), target_modules=["lm_head"], rank=2)
    assert by_name.get_parameter("lm_head.weight") is by_name.get_parameter("embedding.weight")


def test_wrapped_models_are_adapted_inside() -> None:
    inner = mlp()
    wrapped = torch.compile(inner, backend="eager")
    assert isinstance(wrapped, nn.Module)
    assert fastlora.apply_lora(wrapped, target_modules=["head"], rank=2) is wrapped
    assert adapted(inner) == ["head"]
    assert fastlora.merge_adapters(wrapped) is wrapped
    fastlora.remove_adapters(wrapped)
    assert adapted(inner) == []


@pytest.mark.parametrize("make", [tiny_vit, mlp])
def test_merge_unmerge_remove(make: Any) -> None:
    model = make().eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    x = IMAGES if make is tiny_vit else torch.randn(4, 12)
    plain = model(x)
    randomize_adapters(fastlora.apply_lora(model, rank=2, alpha=2))
    with_lora = model(x)
    assert not torch.allclose(with_lora, plain, atol=1e-2)
    assert fastlora.merge_adapters(model) is model
    torch.testing.assert_close(model(x), with_lora, rtol=1e-4, atol=1e-4)
    assert fastlora.unmerge_adapters(model) is model
    assert torch.equal(model(x), with_lora)
    unloaded = fastlora.remove_adapters(copy.deepcopy(model))
    assert {name: type(module) for name, module in unloaded.named_modules()} == modules
    assert all(same_bits(unloaded.state_dict()[name], tensor) for name, tensor in original.items())
    torch.testing.assert_close(unloaded(x), plain, rtol=1e-5, atol=1e-5)
    folded = fastlora.remove_adapters(fastlora.merge_adapters(model))
    assert folded is model
    assert {name: type(module) for name, module in folded.named_modules()} == modules
    assert folded.state_dict().keys() == original.keys()
    torch.testing.assert_close(folded(x), with_lora, rtol=1e-4, atol=1e-4)
    assert adapted(fastlora.apply_lora(folded, rank=2))


def test_removing_a_wrapper_gives_the_original_object_back() -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(LoRALayer(linear, rank=2))
    fastlora.remove_adapters(model)
    assert model[0] is linear


def test_says_what_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_vit()
    total = sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.INFO, logger="fastlora"):
        fastlora.apply_lora(model, rank=2, modules_to_save=["heads"])
    summary = fastlora.adapter_summary(model)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    head = sum(p.numel() for p in model.heads.parameters())
    assert (summary.trainable_parameters, summary.total_parameters) == (lora + head, total + lora)
    assert summary.layers == {"LoRAMultiheadAttention": 2, "LoRALinear": 4}
    assert (summary.ranks, summary.also_trainable, summary.merged) == ((2,), ("heads.head",), False)
    assert str(summary) == (
        "LoRA rank 2 on 4 LoRALinear + 2 LoRAMultiheadAttention; also training heads.head; "
        f"{lora + head:,} of {total + lora:,} parameters train ({summary.trainable_percent:.2f} %)"
    )
    assert [record.message for record in caplog.records] == [f"VisionTransformer: {summary}"]
    assert "(merged)" in str(fastlora.adapter_summary(fastlora.merge_adapters(model)))
    assert str(fastlora.adapter_summary(nn.Linear(4, 4))).startswith("no LoRA layers; 20 of 20 parameters")


def test_a_whole_vision_transformer_compiles() -> None:
    torch.compiler.reset()
    model = tiny_vit().eval()
    randomize_adapters(fastlora.apply_lora(model, rank=2, alpha=2))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_kinds_of_layers_put_in() -> None:
    model = fastlora.apply_lora(tiny_vit(), rank=2)
    kinds = {type(module) for module in model.modules() if isinstance(module, LoRAModule)}
    assert kinds == {LoRALinear, LoRAMultiheadAttention}
