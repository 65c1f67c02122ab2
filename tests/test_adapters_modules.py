"""An adapted module for whoever calls, wraps, reads, loads or shards it: as the module inside."""

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import fastlora
from fastlora.anatomy.names import adapted_modules
from tests.adapter_models import (
    CASES,
    adapted,
    bottleneck,
    place,
    randomize_bottlenecks,
    sequences,
    timm_vit,
)
from tests.lora_models import same_bits, tiny_vit

X = sequences()[0]


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
