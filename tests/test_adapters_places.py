"""What an adapter computes at each place, against formulas written out by hand, and modules by name."""

import copy
import logging
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import fastlora
from fastlora.anatomy.names import adapted_modules
from fastlora.nn import AdaptedModule, AdapterLayer
from tests.adapter_models import (
    CASES,
    adapted,
    bert,
    place,
    randomize_bottlenecks,
    sequences,
    timm_vit,
    torch_encoder,
)
from tests.lora_models import mlp, same_bits, tiny_vit

X = sequences()[0]


def bottleneck(module: AdaptedModule, h: Tensor) -> Tensor:
    """The adapter's own part, from its weights alone."""
    layer = module.adapter
    down = h @ layer.down_proj.weight.T + layer.down_proj.bias
    return nn.functional.gelu(down) @ layer.up_proj.weight.T + layer.up_proj.bias


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


class Pair(nn.Module):
    """Returns its input and more."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)

    def forward(self, x: Tensor, extra: int = 0) -> Any:
        return self.kind(self.linear(x), extra)


Named = namedtuple("Named", "hidden extra")


@pytest.mark.parametrize("kind", [lambda *out: out, Named], ids=["tuple", "namedtuple"])
def test_tuples_keep_what_follows(kind: Any) -> None:
    model = nn.ModuleDict({"pair": Pair(kind)})
    x = torch.randn(3, 4)
    plain = model["pair"](x, extra=7)
    fastlora.apply_adapters(model, target_modules=["pair"], hidden_size=4)
    out = randomize_bottlenecks(model)["pair"](x, extra=7)
    assert type(out) is type(plain)
    assert out[1] == 7
    torch.testing.assert_close(out[0], plain[0] + bottleneck(place(model, "pair"), plain[0]))


def test_a_module_that_returns_something_else_says_so() -> None:
    model = nn.ModuleDict({"pair": Pair(lambda hidden, extra: {"hidden": hidden})})
    fastlora.apply_adapters(model, target_modules=["pair"], hidden_size=4)
    with pytest.raises(TypeError, match="a tensor or a tuple that starts with one, got dict"):
        model["pair"](torch.zeros(3, 4))


def test_the_module_shows_through() -> None:
    model: Any = adapted(tiny_vit())
    block = model.encoder.layers.encoder_layer_0
    assert block.self_attention.num_heads == 2
    assert block.mlp[0] is block.mlp.original_module[0]
    assert model.get_submodule("encoder.layers.encoder_layer_0.mlp.0") is block.mlp[0]
    assert not hasattr(block.mlp, "fc1")
    with pytest.raises(AttributeError, match="nonsense"):
        block.mlp.nonsense  # noqa: B018
    timm: Any = adapted(timm_vit())
    mlp_module, narrow = timm.blocks[0].mlp, nn.Linear(8, 5)
    mlp_module.fc1, mlp_module.fc2 = narrow, nn.Linear(5, 8)
    assert mlp_module.original_module.fc1 is narrow
    assert mlp_module(X).shape == X.shape


def test_hooks_and_attributes_of_the_module_stay() -> None:
    model: Any = tiny_vit()
    block = model.encoder.layers.encoder_layer_0
    calls: list[int] = []
    block.mlp.register_forward_hook(lambda *_: calls.append(1))
    adapted(model)(torch.randn(1, 3, 8, 8))
    assert calls == [1]


def test_distributed_checkpoints_use_the_plain_names() -> None:
    model = adapted(tiny_vit())
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    other = fastlora.apply_adapters(tiny_vit(), adapter_size=3)
    set_model_state_dict(other, copy.deepcopy(state))
    assert all(same_bits(other.state_dict()[name], model.state_dict()[name]) for name in state)


def test_loading_reports_plain_names() -> None:
    model = adapted(tiny_vit())
    state = model.state_dict()
    block = "encoder.layers.encoder_layer_0"
    del state[f"{block}.mlp.0.weight"], state[f"{block}.mlp.adapter.up_proj.bias"]
    state[f"{block}.mlp.0.other"] = torch.zeros(1)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == [f"{block}.mlp.adapter.up_proj.bias", f"{block}.mlp.0.weight"]
    assert result.unexpected_keys == [f"{block}.mlp.0.other"]


def test_wrapped_models_are_adapted_inside() -> None:
    inner = tiny_vit()
    wrapped = torch.compile(inner, backend="eager")
    assert isinstance(wrapped, nn.Module)
    assert fastlora.apply_adapters(wrapped) is wrapped
    assert list(adapted_modules(inner)) == CASES["torchvision"].places("houlsby")
    fastlora.remove_adapters(wrapped)
    assert not adapted_modules(inner)


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tiny_vit()
    fastlora.apply_adapters(model, adapter_size=3)
    assert all(p.is_meta for p in model.parameters())
    state = adapted(tiny_vit()).state_dict()
    model.load_state_dict(state, assign=True)
    assert same_bits(
        model.get_parameter("encoder.layers.encoder_layer_0.mlp.adapter.up_proj.bias"),
        state["encoder.layers.encoder_layer_0.mlp.adapter.up_proj.bias"],
    )
    with torch.device("meta"):
        empty = fastlora.apply_adapters(tiny_vit())
    with pytest.raises(RuntimeError, match=r"Missing key.*mlp\.adapter\.down_proj\.weight"):
        empty.load_state_dict(tiny_vit().state_dict(), assign=True)


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


def test_parallel_refuses_a_module_that_changes_its_input() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
    fastlora.apply_adapters(model, target_modules="0", placement="parallel", adapter_size=2)
    with pytest.raises(RuntimeError, match=r"changes it in place.*inplace=False"):
        model(torch.randn(3, 4))


def test_parallel_says_which_argument_it_misses() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            out: Tensor = self.inner(kwargs["x"])
            return out

    model = nn.Sequential(Named())
    fastlora.apply_adapters(model, target_modules=["0"], placement="parallel", adapter_size=2, hidden_size=4)
    with pytest.raises(TypeError, match=r"argument 1 of Named.*got \['x'\]"):
        model[0](x=torch.randn(3, 4))


def test_length_and_deletion_show_through() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    fastlora.apply_adapters(model, target_modules="0|1", adapter_size=2)
    assert len(model.get_submodule("0")) == 2  # type: ignore[arg-type]
    assert model[1]
    del model[1].bias
    assert not hasattr(model[1].original_module, "bias")
