"""MLPs of ``apply_lora`` with unusual modules in them: a step is what the modules' own forwards compute."""

import copy
import pickle
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from transformers import BertConfig, BertModel
from transformers import activations as known
from transformers.models.bert.modeling_bert import BertLayer

import fastlora
from fastlora.together.fused_class import FusedModule, fused_class
from fastlora.together.mlp import unfuse
from tests.mlp_models import INNER, ROWS, WIDTH, calls_of_the_op

BERT: Any = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 2, "vocab_size": 20}


class MLP(nn.Module):
    """One without a gate."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, INNER), act or nn.SiLU(), nn.Linear(INNER, WIDTH)

    def forward(self, x: Any) -> Any:
        x = self.fc1(x)
        x = self.act(x)
        x = self.fc2(x)
        return x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.act_fn, self.down_proj = nn.SiLU(), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class More(MLP):
    """One that takes what it doesn't use."""

    def forward(self, x: Any, *more: Any) -> Any:
        x = self.fc1(x)
        x = self.act(x)
        x = self.fc2(x)
        return x


class Named(MLP):
    """One that takes more, by name."""

    def forward(self, x: Any, *, more: Any = None) -> Any:
        x = self.fc1(x)
        x = self.act(x)
        x = self.fc2(x)
        return x


class Doubled(fastlora.LoRALinear):
    """A LoRA layer that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Activations with which the op is called from now on."""
    return calls_of_the_op(monkeypatch)


def adapted(module: Any) -> Any:
    """With LoRA whose B is not zero, in every linear layer."""
    torch.manual_seed(0)
    fastlora.apply_lora(module, target_modules="all-linear", rank=2)
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return module


def layer() -> Any:
    """One of BERT's, with LoRA."""
    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(num_hidden_layers=1, hidden_dropout_prob=0.0, **BERT))
    return adapted(model).encoder.layer[0]


def assert_as_apart(module: Any, call: str = "forward") -> None:
    """A module gives what its copy of its own class gives."""
    apart = copy.deepcopy(module)
    for each in apart.modules():
        unfuse(each)
    x = torch.randn(*ROWS, WIDTH)
    torch.testing.assert_close(getattr(module, call)(x), getattr(apart, call)(x))


@pytest.mark.parametrize("name", ["fc2", "down_proj", "gate_proj", "up_proj"])
def test_a_layer_with_a_forward_of_its_class(name: str, seen: list[str]) -> None:
    module = adapted(MLP() if name == "fc2" else Gated())
    setattr(module, name, Doubled.from_linear(getattr(module, name).to_base(), rank=2))
    x = torch.randn(*ROWS, WIDTH, requires_grad=True)
    apart = copy.deepcopy(module)
    unfuse(apart)
    torch.testing.assert_close(module(x), apart(x))
    assert seen == (["silu"] if name in ("gate_proj", "up_proj") else [])


@pytest.mark.parametrize(
    ("activation", "name", "value"),
    [
        (nn.GELU(), "approximate", "tanh"),
        (known.GELUActivation(), "act", F.relu),
        (known.ACT2FN["gelu_pytorch_tanh"], "act", F.gelu),
    ],
    ids=["torch", "exact", "tanh"],
)
def test_what_an_activation_computes_by_may_change(
    activation: Any, name: str, value: Any, seen: list[str]
) -> None:
    module = adapted(MLP(copy.deepcopy(activation)))
    assert_as_apart(module)
    assert len(seen) == 1
    setattr(module.act, name, value)
    assert_as_apart(module)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", [nn.SiLU, nn.GELU, known.GELUActivation, known.NewGELUActivation])
def test_a_class_of_activations_that_was_patched_is_unknown(
    kind: Any, monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> None:
    monkeypatch.setattr(kind, "forward", lambda self, x: F.relu(x))
    module = adapted(MLP(kind()))
    assert type(module) is MLP
    assert_as_apart(module)
    assert not seen


def _under_its_name(self: Any, x: Tensor) -> Tensor:
    return F.relu(x)


_under_its_name.__qualname__, _under_its_name.__module__ = nn.SiLU.forward.__qualname__, nn.SiLU.__module__


@pytest.mark.parametrize("forward", [_under_its_name, nn.ReLU.forward])
def test_a_patch_that_looks_like_what_it_replaces_is_seen(
    forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.SiLU, "forward", forward)
    assert type(adapted(MLP())) is MLP


def _deleted(name: str, to: Any = None) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        parent, _, last = name.rpartition(".")
        parent = module.get_submodule(parent)
        delattr(parent, last)
        object.__setattr__(parent, last, to or (lambda x: x))

    return change


@pytest.mark.parametrize("change", [_deleted("act", F.gelu), _deleted("fc2", lambda x: x[..., :WIDTH])])
def test_what_is_no_module_any_more_is_called(change: Callable[[Any], None], seen: list[str]) -> None:
    module = adapted(MLP())
    change(module)
    assert_as_apart(module)
    assert not seen


def _checkpointed(name: str) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, name, checkpoint_wrapper(getattr(layer, name)))


@pytest.mark.parametrize(
    ("change", "activations"),
    [
        (_checkpointed("intermediate"), []),
        (_checkpointed("output"), []),
        (_deleted("intermediate.intermediate_act_fn", F.relu), []),
        (lambda layer: setattr(layer.intermediate.intermediate_act_fn, "act", F.relu), []),
        (_deleted("output.dense", lambda x: x[..., :WIDTH]), []),
        (_deleted("output.dropout"), ["gelu"]),
        (_deleted("output.LayerNorm"), ["gelu"]),
    ],
)
def test_what_stands_in_the_place_of_berts_modules_is_called(
    change: Callable[[Any], None], activations: list[str], seen: list[str]
) -> None:
    module = layer()
    change(module)
    assert_as_apart(module, "feed_forward_chunk")
    assert seen == activations


def test_a_layer_of_berts_whose_dropout_is_no_module_is_fused(seen: list[str]) -> None:
    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(num_hidden_layers=1, **BERT))
    _deleted("output.dropout")(model.encoder.layer[0])
    assert_as_apart(adapted(model).encoder.layer[0], "feed_forward_chunk")
    assert seen == ["gelu"]


def test_parallel_adapters_beside_lora() -> None:
    model = layer()
    fastlora.apply_adapters(model, placement="parallel")
    assert_as_apart(model, "feed_forward_chunk")


@pytest.mark.parametrize("kind", [More, Named])
def test_a_forward_that_takes_more_is_called_with_it(kind: Any) -> None:
    module = adapted(kind())
    assert type(module) is kind


def test_a_call_that_the_forward_refuses_is_refused_by_it() -> None:
    with pytest.raises(TypeError, match=r"MLP\.forward\(\)"):
        adapted(MLP())(torch.randn(*ROWS, WIDTH), None)


@pytest.mark.parametrize("first", [0, 1])
def test_a_layer_is_found_by_its_name_where_some_have_lora(first: int) -> None:
    model: Any = BertModel(BertConfig(num_hidden_layers=3, hidden_dropout_prob=0.0, **BERT))
    targets = [f"encoder.layer.{first}.output.dense"]
    fastlora.apply_lora(model, target_modules=targets, rank=2)
    layers = list(model.encoder.layer)
    # accelerate is not typed
    kind = import_module("accelerate.utils.dataclasses").get_module_class_from_name(model, "BertLayer")
    assert kind is not None
    assert all(isinstance(each, kind) for each in layers)
    for each in layers:
        assert_as_apart(each, "feed_forward_chunk")
    fastlora.remove_adapters(model)
    assert {type(each) for each in layers} == {BertLayer}


def _other_forward(self: Any, x: Any) -> Any:
    return self.fc2(F.relu(self.fc1(x))) * 2


def _other_chunk(self: Any, x: Any) -> Any:
    return self.output(self.intermediate(x) * 2, x)


@pytest.mark.parametrize(
    ("make", "patched", "method", "other"),
    [
        (lambda: adapted(MLP()), MLP, "forward", _other_forward),
        (lambda: adapted(MLP()), nn.SiLU, "forward", lambda self, x: F.relu(x)),
        (layer, BertLayer, "feed_forward_chunk", _other_chunk),
    ],
    ids=["MLP", "activation", "BERT"],
)
def test_what_was_stored_is_loaded_by_todays_classes(
    make: Any, patched: Any, method: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    assert isinstance(module, FusedModule)
    stored = pickle.dumps(module)
    # of another process
    fused_class.cache_clear()
    monkeypatch.setattr(patched, method, other)
    loaded = pickle.loads(stored)
    assert not isinstance(loaded, FusedModule)
    unfuse(module)
    x, call = torch.randn(*ROWS, WIDTH), "forward" if patched is not BertLayer else method
    torch.testing.assert_close(getattr(loaded, call)(x), getattr(module, call)(x))


def test_a_start_is_subtracted(seen: list[str]) -> None:
    module = adapted(MLP())
    fastlora.init.pissa_(module)
    nn.init.normal_(module.fc2.lora_B)
    assert_as_apart(module)
    assert seen == ["silu"]


@pytest.mark.parametrize(
    "activation", [nn.GELU(approximate="tanh"), known.ACT2FN["gelu_pytorch_tanh"]], ids=["torch", "named"]
)
def test_it_compiles_without_graph_breaks(activation: Any) -> None:
    module = adapted(MLP(copy.deepcopy(activation)))
    x = torch.randn(*ROWS, WIDTH)
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
