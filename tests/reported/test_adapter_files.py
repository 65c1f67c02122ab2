"""Public complaints about adapter files and loading, tried on ours; each test names its source."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fastlora
from tests.hf_models import as_trained, assert_same, peft_trained, trained_names
from tests.lora_models import Snapshot, mlp, tiny_vit

HEAD = "base_model.model.head.modules_to_save.default.weight"
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))


def test_whole_modules_survive_merging(tmp_path: Path) -> None:
    """unslothai/unsloth-zoo#369, unslothai/unsloth#9331."""
    base = mlp().eval()
    theirs = peft_trained(copy.deepcopy(base), target_modules=["0"], modules_to_save=["head"])
    theirs.save_pretrained(tmp_path)
    expected = theirs(X)
    merged = fastlora.remove_adapters(fastlora.merge_adapters(fastlora.load_adapter(base, tmp_path)))
    assert torch.equal(merged.get_parameter("head.weight"), theirs.get_parameter(HEAD))
    assert_same(merged(X), expected)


class Nested(nn.Module):
    """Names that mean something to PEFT, to wrappers or to us."""

    PARTS = ("base_model", "model", "module", "lora", "adapter", "original_module", "head")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for part in self.PARTS:
            inner = nn.ModuleDict({"model": nn.ModuleDict({"fc": nn.Linear(6, 6)}), "fc": nn.Linear(6, 6)})
            self.add_module(part, inner)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.PARTS:
            inner = self.get_submodule(part)
            x = torch.tanh(inner.get_submodule("fc")(inner.get_submodule("model.fc")(x)))
        return x


def test_nested_names(tmp_path: Path) -> None:
    """huggingface/peft#2699, hiyouga/LLaMA-Factory#10294: keys that are missing after a round trip."""
    base = Nested().eval()
    ours = as_trained(
        fastlora.apply_lora(
            copy.deepcopy(base),
            target_modules=["fc"],
            exclude_modules=["head.fc"],
            modules_to_save=["head.fc"],
        )
    )
    x = torch.randn(3, 6)
    fastlora.save_adapter(ours, tmp_path / "ours")
    assert torch.equal(fastlora.load_adapter(copy.deepcopy(base), tmp_path / "ours")(x), ours(x))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_same(theirs(x), ours(x))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert torch.equal(fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")(x), ours(x))


def test_names_that_end_like_a_whole_modules(tmp_path: Path) -> None:
    """PEFT takes them for whole modules too: it misses their tensors if they are not in the file."""
    base = nn.Sequential(nn.Linear(6, 6))
    base.add_module("overhead", nn.Linear(6, 6))
    base.add_module("head", nn.Linear(6, 3))
    ours = fastlora.apply_lora(copy.deepcopy(base), target_modules=["0"], rank=2)
    ours.get_submodule("head").requires_grad_(True)
    as_trained(ours)
    fastlora.save_adapter(ours, tmp_path)
    x = torch.randn(3, 6)
    assert_same(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), ours(x))
    again = fastlora.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), ours(x))
    assert trained_names(again) == trained_names(ours)


def test_whole_modules_of_several_adapters(tmp_path: Path) -> None:
    """huggingface/peft#2422, #899: PEFT switches them with the adapter, we have one set and say so."""
    peft_trained(mlp(), target_modules=["0"], modules_to_save=["head"]).save_pretrained(tmp_path / "head")
    peft_trained(mlp(), target_modules=["0"]).save_pretrained(tmp_path / "plain")
    model = fastlora.load_adapter(mlp(), tmp_path / "head", adapter_name="head")
    before = Snapshot(model)
    with pytest.raises(ValueError, match="trains 'head' whole, which PEFT would switch with the adapter"):
        fastlora.load_adapter(model, tmp_path / "plain", adapter_name="plain")
    with pytest.raises(ValueError, match="expected LoRA alone for a further adapter"):
        fastlora.load_adapter(model, tmp_path / "head", adapter_name="other")
    before.assert_unchanged()
    # names of whole modules alone are none
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    (tmp_path / "plain" / "adapter_config.json").write_text(
        json.dumps(config | {"modules_to_save": ["score"]})
    )
    two = fastlora.load_adapter(mlp(), tmp_path / "plain", adapter_name="a")
    fastlora.load_adapter(two, tmp_path / "plain", adapter_name="b")
    assert fastlora.adapter_names(two) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_after_the_optimiser_was_made(tmp_path: Path, dtype: torch.dtype) -> None:
    """radixark/miles#2572: stale copies must not overwrite what was loaded at the first step."""
    trained = as_trained(fastlora.apply_lora(mlp(), rank=2, adapter_dtype=dtype))
    fastlora.save_adapter(trained, tmp_path)
    model = fastlora.apply_lora(mlp(), rank=2, adapter_dtype=dtype)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    held = [id(p) for p in optimiser.param_groups[0]["params"]]
    fastlora.load_adapter(model, tmp_path)
    assert [id(p) for p in model.parameters() if p.requires_grad] == held
    model(X).square().sum().backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            step = (parameter - trained.get_parameter(name)).abs().max()
            assert 0 < step < 0.02


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["head"]}, {"dora": True}], ids=str)
def test_what_trains_is_the_same_after_resuming(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Blaizzy/mlx-vlm#2178, unslothai/unsloth-zoo#939: resuming must not unfreeze the base."""
    model = fastlora.apply_lora(mlp(), target_modules=["0"], **settings)
    fastlora.save_adapter(model, tmp_path)
    for resumed in (mlp(), fastlora.apply_lora(mlp(), target_modules=["0"], **settings)):
        assert trained_names(fastlora.load_adapter(resumed, tmp_path)) == trained_names(model)


def test_an_adapter_that_is_there_goes_on_as_it_was(tmp_path: Path) -> None:
    """X-GenGroup/Flow-Factory#56: loading another one must not freeze it, nor the other way round."""
    fastlora.save_adapter(as_trained(fastlora.apply_lora(mlp(), rank=3)), tmp_path)
    model = fastlora.apply_lora(mlp(), rank=2)
    trains = trained_names(model)
    with pytest.raises(ValueError, match="expected a model without LoRA"):
        fastlora.apply_lora(model)
    fastlora.load_adapter(model, tmp_path, adapter_name="second")
    assert trained_names(model) == trains
    assert trained_names(fastlora.set_adapter(model, "second")) == trains
    model.requires_grad_(False)
    fastlora.load_adapter(model, tmp_path, adapter_name="third")
    assert not trained_names(fastlora.set_adapter(model, "third"))


def test_what_fits_no_layer_is_an_error(tmp_path: Path) -> None:
    """unslothai/unsloth-zoo#647, #779, #812, #885: deltas that are dropped in silence."""
    fastlora.save_adapter(as_trained(fastlora.apply_lora(mlp(), rank=2)), tmp_path)
    model = mlp()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="got 'experts', which matches none"):
        fastlora.apply_lora(model, target_modules=["0", "experts"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    extra = {
        "base_model.model.experts.lora_A.weight": "experts: no module of this name in the model",
        "base_model.model.0.lora_A.experts": "0.lora_A.experts: nothing in the model takes it",
        "0.lora_A.weight": "0.lora_A.weight: nothing in the model takes it",
    }
    for key, problem in extra.items():
        safetensors.torch.save_file(tensors | {key: torch.zeros(2, 12)}, file)
        with pytest.raises(ValueError, match=problem):
            fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()


def test_settings_within_settings(tmp_path: Path) -> None:
    """huggingface/peft#3583: a config inside the config comes back from JSON as a dict."""
    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    theirs = as_trained(get_peft_model(mlp(), config))
    theirs.save_pretrained(tmp_path / "theirs")
    assert isinstance(
        json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["eva_config"], dict
    )
    ours = fastlora.load_adapter(mlp(), tmp_path / "theirs")
    assert torch.equal(ours[0].get_parameter("lora_A"), theirs.base_model.model[0].lora_A["default"].weight)
    # our own settings inside the format of several kinds
    model = fastlora.apply_lora(tiny_vit(), rank=2)
    fastlora.apply_adapters(model, adapter_size=3, activation="relu", layer_norm="pre", scale="learned")
    fastlora.apply_prompts(model, num_tokens=2)
    fastlora.save_adapter(model, tmp_path / "ours")
    again = fastlora.load_adapter(tiny_vit(), tmp_path / "ours")
    assert repr(again) == repr(model)
    fastlora.save_adapter(again, tmp_path / "again")
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("ours", "again")]
    assert texts[0] == texts[1]
    assert asdict(config)["eva_config"]["rho"] == 1.0
