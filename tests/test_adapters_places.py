"""What an adapter computes at each place, against formulas written out by hand, and which modules get one."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.anatomy.names import adapted_modules
from fastlora.nn import AdaptedModule, AdapterLayer
from tests.adapter_models import (
    CASES,
    adapted,
    bert,
    bottleneck,
    place,
    randomize_bottlenecks,
    sequences,
    timm_vit,
    torch_encoder,
)
from tests.lora_models import mlp, tiny_vit

X = sequences()[0]


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_in_torchvisions_block(placement: Any) -> None:
    block: Any = adapted(tiny_vit(), placement=placement).get_submodule("encoder.layers.encoder_layer_0")
    norm = block.ln_1(X)
    attended, _ = (block.self_attention.original_module if placement == "houlsby" else block.self_attention)(
        norm, norm, norm, need_weights=False
    )
    if placement == "houlsby":
        attended = attended + bottleneck(block.self_attention, attended)
    y = X + attended
    fed = block.mlp.original_module(block.ln_2(y))
    part = bottleneck(block.mlp, block.ln_2(y) if placement == "parallel" else fed)
    torch.testing.assert_close(block(X), y + fed + part)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_in_berts_block(placement: Any) -> None:
    block: Any = adapted(bert(), placement=placement).get_submodule("encoder.layer.0")
    attended, out = block.attention.self(X)[0], block.attention.output
    attended = out.dense(attended)
    if placement == "houlsby":
        attended = attended + bottleneck(out.dropout, attended)
    y = out.LayerNorm(attended + X)
    fed = block.output.dense(block.intermediate(y))
    if placement == "parallel":
        fed = fed + bottleneck(block.output, y)
    else:
        fed = fed + bottleneck(block.output.dropout, fed)
    torch.testing.assert_close(block(X), block.output.LayerNorm(fed + y))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_in_torchs_block(norm_first: bool) -> None:
    """Under no_grad too, where its fused path would skip the adapters."""
    model = adapted(torch_encoder(norm_first))
    block: Any = model.layers[0]
    assert block.activation_relu_or_gelu == 0
    norm = block.norm1(X) if norm_first else X
    attended = block.self_attn(norm, norm, norm)[0]
    y = X + attended + bottleneck(block.dropout1, attended)
    y = y if norm_first else block.norm1(y)
    fed = block.linear2(block.linear1(block.norm2(y) if norm_first else y).relu())
    y = y + fed + bottleneck(block.dropout2, fed)
    with torch.no_grad():
        torch.testing.assert_close(block(X), y if norm_first else block.norm2(y))
    fastlora.remove_adapters(model)
    assert block.activation_relu_or_gelu == 1


def test_behind_a_layer_scale() -> None:
    """A factor of 1e-5 behind the adapter would keep it from being heard."""
    model = timm_vit(init_values=1e-5)
    block: Any = adapted(model, placement="pfeiffer").get_submodule("blocks.0")
    y = X + block.ls1(block.attn(block.norm1(X)))
    fed = block.ls2.original_module(block.mlp(block.norm2(y)))
    torch.testing.assert_close(block(X), y + fed + bottleneck(block.ls2, fed))


def test_in_llamas_block_beside_the_mlp() -> None:
    model = adapted(CASES["llama"].make(), placement="parallel", scale=-0.5)
    block: Any = model.get_submodule("layers.0")
    fed = block.mlp.original_module(X)
    torch.testing.assert_close(block.mlp(X), fed - 0.5 * bottleneck(block.mlp, X))
    torch.testing.assert_close(block.mlp(x=X), block.mlp(X))


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_named_modules(placement: Any) -> None:
    model = mlp()
    model.add_module("mix", nn.Linear(3, 3))
    fastlora.apply_adapters(model, target_modules=["mix"], placement=placement, adapter_size=2)
    module = place(randomize_bottlenecks(model), "mix")
    x = torch.randn(4, 3)
    out = module.original_module(x)
    torch.testing.assert_close(module(x), out + bottleneck(module, out if placement == "sequential" else x))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"mix.adapter.{linear}_proj.{part}" for linear in ("down", "up") for part in ("weight", "bias")
    }


SELECTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "end-of-name": ({"target_modules": ["head"]}, ["head"]),
    "regex": (
        {"target_modules": r"\d|head", "hidden_size": None, "exclude_modules": ["1"]},
        ["0", "2", "head"],
    ),
    "activation": ({"target_modules": ["1"], "hidden_size": 10}, ["1"]),
    "whole": ({"target_modules": ["2", "head"], "modules_to_save": ["head"]}, ["2"]),
}


@pytest.mark.parametrize(("arguments", "expected"), SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selection(arguments: dict[str, Any], expected: list[str]) -> None:
    model = fastlora.apply_adapters(mlp(), adapter_size=2, **arguments)
    assert list(adapted_modules(model)) == expected
    assert model(torch.randn(2, 12)).shape == (2, 3)
    head = [p.requires_grad for p in model.get_submodule("head").parameters()]
    assert all(head) if "modules_to_save" in arguments else not all(head)


def test_blocks_can_be_left_out() -> None:
    model = fastlora.apply_adapters(tiny_vit(), exclude_modules=["encoder_layer_0"], modules_to_save=["head"])
    assert list(adapted_modules(model)) == CASES["torchvision"].places("houlsby")[2:]
    assert model.get_parameter("heads.head.weight").requires_grad
    only_mlp = fastlora.apply_adapters(tiny_vit(), exclude_modules=["self_attention"])
    assert list(adapted_modules(only_mlp)) == CASES["torchvision"].places("pfeiffer")


@pytest.mark.parametrize("name", ["attn", "mlp"])
def test_parts_of_known_blocks_tell_their_width(name: str) -> None:
    model = fastlora.apply_adapters(timm_vit(), target_modules=[name], reduction_factor=2)
    assert list(adapted_modules(model)) == [f"blocks.{i}.{name}" for i in range(2)]
    assert place(model, f"blocks.0.{name}").adapter.adapter_size == 4


def test_a_shared_module_gets_one_adapter() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared)})
    fastlora.apply_adapters(model, target_modules=["one", "two.0"])
    assert isinstance(model["one"], AdaptedModule)
    assert model["one"] is model.get_submodule("two.0")
    fastlora.remove_adapters(model)
    assert model["one"] is model.get_submodule("two.0") is shared


def test_says_what_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_vit()
    with caplog.at_level(logging.INFO, logger="fastlora"):
        fastlora.apply_adapters(model, adapter_size=4, modules_to_save=["heads"])
    summary = fastlora.adapter_summary(model)
    assert (summary.layers, summary.adapters, summary.adapter_sizes) == ({}, 4, (4,))
    assert summary.also_trainable == ("heads.head",)
    ours = sum(p.numel() for m in model.modules() if isinstance(m, AdapterLayer) for p in m.parameters())
    assert summary.trainable_parameters == ours + 27
    assert str(summary).startswith("4 bottleneck adapters of size 4; also training heads.head; ")
    assert [record.message for record in caplog.records] == [f"VisionTransformer: {summary}"]


def test_a_block_that_changes_its_width_needs_target_modules() -> None:
    """Its norms differ, so none of them tells how wide its parts are."""

    class Narrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(16)
            self.attn, self.mlp = _Widen(), nn.Sequential(nn.Linear(16, 16))

    with pytest.raises(ValueError, match=r"hidden_size|target_modules"):
        fastlora.apply_adapters(nn.Sequential(Narrowing()), adapter_size=2)


def test_a_scale_that_is_no_module_leaves_no_place_behind_it() -> None:
    """Before a layer scale near zero an adapter would not be heard."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.attn, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.gamma_1 = nn.Parameter(torch.full((8,), 1e-5))

    with pytest.raises(ValueError, match="target_modules"):
        fastlora.apply_adapters(nn.Sequential(Scaled()), adapter_size=2)


class _Widen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)
