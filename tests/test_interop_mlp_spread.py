"""BERT's MLP, spread over two modules, in accelerated PEFT models: the same numbers, with one tensor kept."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, ElectraConfig, RobertaConfig
from transformers.models.bert.modeling_bert import BertLayer, BertOutput
from transformers.models.electra.modeling_electra import ElectraLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer

from fastlora.interop.peft import restore
from tests.mlp_models import (
    INNER,
    ROWS,
    WIDTH,
    assert_equal_steps,
    calls_of_the_op,
    hook_on,
    kept_of_inner_width,
)
from tests.peft_twins import apart_and_fused, layer_of

SIZES: Any = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 2}
LAYERS: Any = {
    "BERT": (BertLayer, BertConfig),
    "RoBERTa": (RobertaLayer, RobertaConfig),
    "ELECTRA": (ElectraLayer, ElectraConfig),
}


def twins(family: str = "BERT", **given: Any) -> tuple[Any, Any]:
    """An accelerated model of one layer whose MLP is apart, and its copy with the MLP fused."""
    torch.manual_seed(0)
    kind, config = LAYERS[family]
    layer = kind(config(attn_implementation="eager", **SIZES | given))
    return apart_and_fused(layer, target_modules=["intermediate.dense", "output.dense"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Activations with which the op is called from now on."""
    return calls_of_the_op(monkeypatch)


@pytest.mark.parametrize("family", LAYERS)
def test_a_step_is_that_of_modules_apart(family: str, seen: list[str]) -> None:
    assert_equal_steps(*twins(family))
    assert seen == ["gelu"]


def test_the_mlp_in_chunks_is_the_same(seen: list[str]) -> None:
    assert_equal_steps(*twins(chunk_size_feed_forward=2))
    assert seen == ["gelu"] * 3


@pytest.mark.parametrize(("hidden_act", "of_modules_apart"), [("gelu", 2), ("gelu_new", 5)])
def test_one_tensor_of_the_inner_width_is_kept(hidden_act: str, of_modules_apart: int) -> None:
    kept = [kept_of_inner_width(model) for model in twins(hidden_act=hidden_act)]
    assert kept == [of_modules_apart, 1]


def _other_activation(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = nn.SiLU()


@pytest.mark.parametrize(
    ("change", "activations"),
    [
        *((hook_on(name), []) for name in ("intermediate", "intermediate.intermediate_act_fn")),
        *((hook_on(name), []) for name in ("output", "output.dense")),
        *((hook_on(name), ["gelu"]) for name in ("intermediate.dense", "output.dropout")),
        (hook_on("output.LayerNorm"), ["gelu"]),
        (_other_activation, []),
    ],
)
def test_what_changes_later_counts(
    change: Callable[[Any], None], activations: list[str], seen: list[str]
) -> None:
    models = twins()
    for model in models:
        change(layer_of(model))
    assert_equal_steps(*models)
    assert seen == activations


def _doubled(self: Any, x: Tensor) -> Any:
    return self.output(self.intermediate(x), x * 2)


def test_a_class_that_is_patched_later_is_patched(monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    models = twins()
    with monkeypatch.context() as patched:
        patched.setattr(BertLayer, "feed_forward_chunk", _doubled)
        assert_equal_steps(*models)
    with monkeypatch.context() as patched:
        patched.setattr(BertOutput, "forward", lambda self, x, given: self.dense(x) * 2 + given)
        assert_equal_steps(*models)
    assert not seen


@pytest.mark.parametrize(("dropout", "activations"), [(0.0, ["gelu"]), (0.5, [])])
def test_two_adapters_are_computed_at_once_without_masks(
    dropout: float, activations: list[str], seen: list[str]
) -> None:
    models = twins()
    targets = ["output.dense"]
    config: Any = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    assert_equal_steps(*models)
    assert seen == activations


def test_its_own_class_comes_back_and_copies_stay_fused() -> None:
    plain, fused = twins()
    kind = type(layer_of(fused))
    # policies of sharding look for it by its name
    assert kind is not BertLayer
    assert kind.__name__ == "BertLayer"
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(layer_of(copied)) is kind
        assert_equal_steps(plain, copied)
    assert type(layer_of(restore(fused))) is BertLayer
    assert_equal_steps(plain, fused)


def test_it_compiles_without_graph_breaks() -> None:
    layer, x = layer_of(twins(hidden_dropout_prob=0.0)[1]), torch.randn(*ROWS, WIDTH)
    compiled: Any = torch.compile(layer.feed_forward_chunk, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer.feed_forward_chunk(x))
