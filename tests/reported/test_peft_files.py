"""Ordinary files of PEFT: each is read exactly, or refused with the reason before anything changes."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastlora
from tests.hf_models import (
    Make,
    as_trained,
    assert_same,
    bert,
    llama,
    logits,
    peft_trained,
    tied_llama,
    trained_names,
)
from tests.lora_models import Snapshot

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("task", "make", "target"),
    [
        ("SEQ_CLS", lambda: bert("BertForSequenceClassification"), "query"),
        ("SEQ_CLS", lambda: llama(kind="LlamaForSequenceClassification"), "q_proj"),
        ("TOKEN_CLS", lambda: bert("BertForTokenClassification"), "query"),
        ("QUESTION_ANS", lambda: bert("BertForQuestionAnswering"), "query"),
        ("CAUSAL_LM", llama, "q_proj"),
    ],
    ids=["sequences", "llama", "tokens", "questions", "causal"],
)
def test_task_types(tmp_path: Path, task: Any, make: Make, target: str) -> None:
    """PEFT lists every name that a task's classifier may have in modules_to_save."""
    theirs = peft_trained(make(), target_modules=[target], task_type=task)
    theirs.save_pretrained(tmp_path)
    ours = fastlora.load_adapter(make(), tmp_path).eval()
    assert_same(logits(ours), logits(theirs))
    ends = {name.rpartition(".")[0] for name in trained_names(ours) if "lora_" not in name}
    assert all(name in {"classifier", "score", "qa_outputs"} for name in ends)


def edit(folder: Path, rename: Callable[[str], str], **changes: Any) -> None:
    tensors = safetensors.torch.load_file(folder / TENSORS)
    safetensors.torch.save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_modules_to_save_that_only_one_side_has(tmp_path: Path) -> None:
    make = partial(bert, "BertForSequenceClassification")
    theirs = peft_trained(make(), target_modules=["query"], modules_to_save=["classifier"])
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, str, modules_to_save=["classifier", "pooler"])
    model = make()
    before = Snapshot(model)
    with pytest.raises(
        ValueError, match=r"modules_to_save 'pooler': 'bert\.pooler' is in the model, but not in"
    ):
        fastlora.load_adapter(model, tmp_path)
    edit(tmp_path, lambda key: key.replace("classifier", "score"), modules_to_save=["score"])
    with pytest.raises(ValueError, match=r"base_model\.model\.score\.\w+: nothing in the model takes it"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()


def compiled() -> Any:
    return torch.compile(llama(), backend="eager")


def parallel() -> Any:
    return nn.DataParallel(llama())


READ: dict[str, tuple[Make, dict[str, Any]]] = {
    "compiled": (compiled, {}),
    "compiled-head": (compiled, {"modules_to_save": ["lm_head"]}),
    # anchored, so it means no layer of the compiled model
    "compiled-pattern": (compiled, {"alpha_pattern": {"^model.layers.0.*": 90}}),
    "compiled-name": (compiled, {"alpha_pattern": {f"^_orig_mod.{LAYER}": 90}}),
    "data-parallel": (parallel, {}),
    "layers": (llama, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": (llama, {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}),
    "patterns": (llama, {"rank_pattern": {LAYER: 3}, "alpha_pattern": {"layers.1.*": 9}, "use_rslora": True}),
    "transposed": (llama, {"fan_in_fan_out": True}),
    "gaussian": (llama, {"init_lora_weights": "gaussian"}),
    "dora": (llama, {"use_dora": True}),
    "embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize(("make", "settings"), READ.values(), ids=READ.keys())
def test_read_exactly(tmp_path: Path, make: Make, settings: dict[str, Any]) -> None:
    theirs = peft_trained(make(), **settings)
    theirs.save_pretrained(tmp_path)
    base = tied_llama() if make is tied_llama else llama()
    # the compiler itself is not what is tested
    with torch.compiler.set_stance("force_eager"):
        assert_same(logits(fastlora.load_adapter(base, tmp_path).eval()), logits(theirs))


def test_the_state_dict_of_a_data_parallel_model(tmp_path: Path) -> None:
    theirs = peft_trained(llama(), modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, "module.{}".format)
    assert_same(logits(fastlora.load_adapter(llama(), tmp_path).eval()), logits(theirs))


def test_saved_merged_or_by_another_name(tmp_path: Path) -> None:
    theirs = as_trained(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), adapter_name="mine"))
    theirs.merge_adapter()
    theirs.save_pretrained(tmp_path)
    theirs.unmerge_adapter()
    with pytest.raises(FileNotFoundError, match=f"found no {CONFIG}; did you mean .*mine"):
        fastlora.load_adapter(llama(), tmp_path)
    assert_same(logits(fastlora.load_adapter(llama(), tmp_path / "mine").eval()), logits(theirs))


def test_one_peft_model_around_another(tmp_path: Path) -> None:
    inner = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=30, target_modules=["q_proj"]))
    theirs = peft_trained(copy.deepcopy(inner), target_modules=["v_proj"])
    theirs.save_pretrained(tmp_path)
    model = llama()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"got one put around another: .*q_proj' first is not among"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()
    theirs = peft_trained(inner, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path)
    assert_same(logits(fastlora.load_adapter(model, tmp_path).eval()), logits(theirs))


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    peft_trained(llama()).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    again = {
        key.replace("base_model.model.", "base_model.model._orig_mod."): t + 0 for key, t in tensors.items()
    }
    safetensors.torch.save_file(tensors | again, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=r"expected one tensor for base_model\.model\.model\.layers"):
        fastlora.load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_a_resized_vocabulary(tmp_path: Path, settings: dict[str, Any], tied: bool) -> None:
    """The rows that are new are random in every model: the file's are the right ones."""

    def resized(seed: int) -> Any:
        model = llama(tied=tied)
        torch.manual_seed(seed)
        model.resize_token_embeddings(64)
        return model

    theirs = peft_trained(resized(1), **settings)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = fastlora.load_adapter(resized(2), tmp_path).eval()
    assert_same(logits(ours), logits(theirs))
    fastlora.load_adapter(ours, tmp_path)
    assert_same(logits(ours), logits(theirs))
    assert not {"embed", "lm_head"} & trained_names(ours) or "modules_to_save" in settings
    with pytest.raises(ValueError, match=r"expected \[60, 32\].*got \[64, 32\]"):
        fastlora.load_adapter(llama(tied=tied), tmp_path)
    if not tied and not settings:
        with pytest.raises(ValueError, match="with which the model shares it; give the model tie_word"):
            fastlora.load_adapter(resized_tied(), tmp_path)


def resized_tied() -> Any:
    model = tied_llama()
    model.resize_token_embeddings(64)
    return model


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "all"}, r"bias='all' \(trains biases of the frozen layers\)"),
    "lora-bias": ({"lora_bias": True}, r"lora_bias=True \(adds a bias"),
    "tokens": (
        {"trainable_token_indices": [1, 2]},
        r"trainable_token_indices=.* \(trains rows of an embedding",
    ),
    "parameters": ({"target_parameters": ["v_proj.weight"]}, r"target_parameters=.* \(adapts parameters"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication=.*repeated layers"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' \(changes the frozen weights\)"),
    "olora": ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' \(changes the frozen weights\)"),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_the_reason(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    make = partial(llama, attention_bias=True)
    peft_trained(make(), **settings).save_pretrained(tmp_path)
    model = make()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=f"expected plain LoRA, got {reason}"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()


@dataclass
class LaterConfig(LoraConfig):
    """Of a PEFT to come."""

    from_the_future: int = 16


def test_configs_of_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields that are missing or unknown are harmless while they are off, or as PEFT has them by default."""
    theirs = peft_trained(llama())
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    needed = ("peft_type", "r", "lora_alpha", "target_modules", "auto_mapping")
    old = {name: config[name] for name in needed}
    for changed in (old, old | {"from_the_future": None, "off": False, "none": [], "empty": {}}):
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        assert_same(logits(fastlora.load_adapter(llama(), tmp_path).eval()), logits(theirs))
    (tmp_path / CONFIG).write_text(json.dumps(old | {"from_the_future": 16}))
    with pytest.raises(ValueError, match="expected plain LoRA, got from_the_future=16"):
        fastlora.load_adapter(llama(), tmp_path)
    monkeypatch.setattr(peft, "LoraConfig", LaterConfig)
    fastlora.load_adapter(llama(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(old | {"from_the_future": 7}))
    with pytest.raises(ValueError, match="expected plain LoRA, got from_the_future=7"):
        fastlora.load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    """huggingface/peft#2421; with PEFT's own formula the outputs are equal bit for bit."""
    base = llama().to(torch.bfloat16)
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False
    )
    as_trained(theirs)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert {p.dtype for name, p in ours.named_parameters() if "lora_" in name} == {dtype}
    if dtype == torch.bfloat16:
        with fastlora.use_backend("reference"):
            assert torch.equal(logits(ours), logits(theirs))
    fastlora.save_adapter(ours, tmp_path / "ours")
    written = [safetensors.torch.load_file(tmp_path / name / TENSORS) for name in ("theirs", "ours")]
    assert {tensor.dtype for tensor in written[1].values()} == {dtype}
    assert all(torch.equal(written[1][key], tensor) for key, tensor in written[0].items())
    beside = fastlora.load_adapter(
        fastlora.apply_lora(base, target_modules=["q_proj"], rank=8), tmp_path / "ours"
    )
    fastlora.load_adapter(beside, tmp_path / "ours", adapter_name="second")
    shelved = [p.dtype for name, p in beside.named_parameters() if "shelf" in name]
    assert set(shelved) == {dtype}
