"""Adapter files of models whose input and output embeddings are one parameter, PEFT's and ours.

PEFT trains its own copy of a module in ``modules_to_save``, which unties it (huggingface/peft#2777); here
what is tied trains as one. Each file has to compute the same in both, and after merging and reloading
(huggingface/transformers#45127, unslothai/unsloth#9331).
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from torch import nn

import fastlora
from tests.hf_models import (
    Make,
    as_trained,
    assert_same,
    gpt2,
    llama,
    logits,
    masked_bert,
    peft_trained,
    plain,
    qwen2,
    t5,
    tied_llama,
    trained_names,
)
from tests.lora_models import Snapshot, same_bits

TIES: list[tuple[Make, str, list[str]]] = [
    (tied_llama, "q_proj", ["lm_head"]),
    (qwen2, "q_proj", ["lm_head"]),
    (qwen2, "q_proj", ["embed_tokens"]),
    (qwen2, "q_proj", ["embed_tokens", "lm_head"]),
    (llama, "q_proj", ["embed_tokens", "lm_head"]),
    (t5, "q", ["lm_head"]),
    (t5, "q", ["shared"]),
    (t5, "q", ["embed_tokens"]),
    (masked_bert, "query", ["decoder"]),
    (masked_bert, "query", ["word_embeddings"]),
    (masked_bert, "query", ["predictions"]),
]
NAMES = [f"{make.__name__}-{'+'.join(names)}" for make, _, names in TIES]


def reloaded(model: Any, folder: Path) -> nn.Module:
    """The model without adapters, written and read by transformers."""
    fastlora.remove_adapters(fastlora.merge_adapters(model))
    model.save_pretrained(folder)
    read: nn.Module = type(model).from_pretrained(folder).eval()
    return read


@pytest.mark.parametrize(("make", "target", "names"), TIES, ids=NAMES)
def test_from_peft(tmp_path: Path, make: Make, target: str, names: list[str]) -> None:
    theirs = peft_trained(make(), target_modules=[target], modules_to_save=names)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastlora.load_adapter(make(), tmp_path / "theirs").eval()
    assert_same(logits(ours), expected)
    fastlora.save_adapter(ours, tmp_path / "ours")
    assert_same(logits(fastlora.load_adapter(make(), tmp_path / "ours").eval()), expected)
    assert_same(logits(PeftModel.from_pretrained(make(), tmp_path / "ours").eval()), expected)
    assert_same(logits(reloaded(ours, tmp_path / "merged")), expected)


@pytest.mark.parametrize(("make", "target", "names"), TIES, ids=NAMES)
def test_from_fastlora(tmp_path: Path, make: Make, target: str, names: list[str]) -> None:
    ours = as_trained(fastlora.apply_lora(make(), target_modules=[target], rank=2, modules_to_save=names))
    expected = logits(ours)
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = fastlora.load_adapter(make(), tmp_path / "ours").eval()
    assert_same(logits(again), expected)
    if names != ["word_embeddings"]:
        # the decoder, which is tied to it, can only be saved with its bias
        assert trained_names(again) == trained_names(ours)
    assert_same(logits(PeftModel.from_pretrained(make(), tmp_path / "ours").eval()), expected)
    assert_same(logits(reloaded(ours, tmp_path / "merged")), expected)


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="+".join)
def test_lora_on_tied_layers(tmp_path: Path, names: list[str]) -> None:
    theirs = peft_trained(qwen2(), target_modules=names)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastlora.load_adapter(qwen2(), tmp_path / "theirs").eval()
    assert_same(logits(ours), logits(theirs))
    fastlora.save_adapter(ours, tmp_path / "ours")
    assert_same(logits(PeftModel.from_pretrained(qwen2(), tmp_path / "ours").eval()), logits(theirs))


def test_the_tied_head_of_gpt2(tmp_path: Path) -> None:
    theirs = peft_trained(gpt2(), target_modules=["lm_head"], modules_to_save=["wte"])
    theirs.save_pretrained(tmp_path)
    assert_same(logits(fastlora.load_adapter(gpt2(), tmp_path).eval()), logits(theirs))
    peft_trained(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"c_attn: expected an nn\.Linear, got Conv1D"):
        fastlora.load_adapter(gpt2(), tmp_path)


@pytest.mark.skipif("ensure_weight_tying" not in LoraConfig.__dataclass_fields__, reason="PEFT's since 0.18")
def test_ensure_weight_tying(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = peft_trained(qwen2(), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    theirs.save_pretrained(tmp_path / "whole")
    ours = fastlora.load_adapter(qwen2(), tmp_path / "whole").eval()
    assert_same(logits(ours), logits(theirs))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not caplog.records
    theirs = peft_trained(qwen2(), target_modules=["model.embed_tokens"], ensure_weight_tying=True)
    theirs.save_pretrained(tmp_path / "lora")
    ours = fastlora.load_adapter(qwen2(), tmp_path / "lora").eval()
    assert_same(logits(ours), logits(theirs))
    # PEFT 0.18 did not tie adapters yet
    assert ("each trains by itself from now on" in caplog.text) == hasattr(ours.lm_head, "lora_A")


def test_what_is_tied_trains_as_one_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = fastlora.apply_lora(qwen2(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        "model.embed_tokens.weight is tied to a module in modules_to_save and trains with it" in caplog.text
    )
    model = qwen2()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"targets with weights of their own, got 'model\.embed_tokens'"):
        fastlora.apply_lora(model, target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    before.assert_unchanged()


def test_an_untied_file_for_a_model_that_trains_them_as_one(tmp_path: Path) -> None:
    peft_trained(qwen2(), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = fastlora.apply_lora(qwen2(), target_modules=["q_proj"], rank=2, modules_to_save=["lm_head"])
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"lm_head\.weight: this model trains it as one with another module"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()
    # one that was untied by the same file takes it again
    once = qwen2()
    config = once.config
    fastlora.load_adapter(once, tmp_path)
    assert config.tie_word_embeddings
    assert not once.config.tie_word_embeddings
    head = once.lm_head.weight
    fastlora.load_adapter(once, tmp_path)
    assert once.lm_head.weight is head


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["first"]}, {"target_modules": ["head"], "modules_to_save": ["first"]}],
    ids=["lora", "whole"],
)
def test_one_module_under_two_names(tmp_path: Path, settings: dict[str, Any]) -> None:
    """PEFT adapts it under one of them."""
    peft_trained(Twice(), **settings).save_pretrained(tmp_path)
    model = Twice()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)'?first'?.* one module .*'second'"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()


def test_a_layer_inside_a_module_with_two_names(tmp_path: Path) -> None:
    """PEFT's layer is seen under both."""
    base = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    base["b"] = base["a"]
    theirs = peft_trained(copy.deepcopy(base), target_modules=["fc"])
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(2, 4)
    ours = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    expected = plain(theirs)["b"]["fc"](x)
    assert_same(ours.get_submodule("b.fc")(x), expected)
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_same(plain(again)["b"]["fc"](x), expected)


def test_lora_under_two_names_is_not_for_peft(tmp_path: Path) -> None:
    """PEFT would adapt it under the first name alone, so the file is in our format, which it refuses."""
    ours = as_trained(
        fastlora.apply_lora(Twice(), target_modules=["first"], rank=2, modules_to_save=["head"])
    )
    fastlora.save_adapter(ours, tmp_path)
    again = fastlora.load_adapter(Twice(), tmp_path)
    assert again.second.get_parameter("lora_B") is again.first.get_parameter("lora_B")
    assert all(same_bits(again.get_parameter(name), ours.get_parameter(name)) for name in trained_names(ours))
    with pytest.raises(KeyError):
        PeftModel.from_pretrained(Twice(), tmp_path)


def test_a_file_by_an_earlier_version_does_not_tell_what_trained_as_one(tmp_path: Path) -> None:
    """It held one name alone, as a file of a model whose weights are apart still does."""
    ours = fastlora.apply_lora(qwen2(), target_modules=["q_proj"], rank=2, modules_to_save=["lm_head"])
    as_trained(ours)
    fastlora.save_adapter(ours, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    other = "base_model.model.model.embed_tokens.weight"
    safetensors.torch.save_file({k: t for k, t in tensors.items() if k != other}, file, {"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["modules_to_save"] = ["lm_head"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = qwen2()
    before = Snapshot(model)
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight: the model shares it with lm_head\.weight, and"
    ):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()
    as_one = fastlora.apply_lora(qwen2(), target_modules=["q_proj"], rank=2, modules_to_save=["lm_head"])
    fastlora.load_adapter(as_one, tmp_path)
    assert as_one.lm_head.weight is as_one.model.embed_tokens.weight
    assert same_bits(as_one.lm_head.weight, ours.lm_head.weight)
    apart = qwen2()
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight.detach().clone())
    fastlora.load_adapter(apart, tmp_path)
    assert same_bits(apart.lm_head.weight, ours.lm_head.weight)
    assert not same_bits(apart.model.embed_tokens.weight, ours.lm_head.weight)
