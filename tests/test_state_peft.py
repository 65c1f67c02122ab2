"""The same folders in PEFT and in fastlora, both ways.

Compared bit for bit: every A, B and saved module; outputs of models without attention, under the reference
backend, whose formula is PEFT's; and PEFT's own outputs before and after a round trip through fastlora.
PEFT folds the update into the weights of an nn.MultiheadAttention for each call, and rounds a convolution's
or an embedding's update before it adds it, so there its outputs and ours agree to rounding only.

What PEFT does otherwise, and these tests pin down:

- up to 0.21.2 it adds the update of an nn.MultiheadAttention's ``out_proj`` twice (huggingface/peft#3774);
- its ``lora_dropout`` has no effect in nn.MultiheadAttention;
- ``modules_to_save`` entries match any name that *ends* with them, with or without a dot;
- pattern keys match the end of a name unless they start with ``^``.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.nn import LoRAModule, LoRAMultiheadAttention
from tests.lora_models import (
    Snapshot,
    TextNet,
    conv_net,
    mlp,
    randomize_adapters,
    same_bits,
    text_net,
    tiny_vit,
)

peft = pytest.importorskip("peft", reason="compares with PEFT, an optional package")

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "all": (mlp, {"target_modules": ["0", "2", "head"]}),
    "rslora": (mlp, {"target_modules": ["0", "2"], "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        mlp,
        {"target_modules": r"0|2|head", "rank_pattern": {"0": 5, "^head": 1}, "alpha_pattern": {"2": 9.5}},
    ),
    "modules-to-save": (mlp, {"target_modules": ["0"], "modules_to_save": ["head"]}),
    "gaussian": (mlp, {"target_modules": ["2"], "init_lora_weights": "gaussian"}),
    "vit": (tiny_vit, {"target_modules": ["self_attention", "mlp.0", "mlp.3"], "modules_to_save": ["heads"]}),
    "vit-rank": (
        tiny_vit,
        {"target_modules": ["self_attention", "head"], "rank_pattern": {r".*layer_0\.self_attention": 3}},
    ),
    "conv": (conv_net, {"target_modules": ["stem", "grouped", "point"], "modules_to_save": ["head"]}),
    "conv-patterns": (
        conv_net,
        {"target_modules": ["stem", "point", "head"], "rank_pattern": {"point": 5}, "use_rslora": True},
    ),
    "embedding": (text_net, {"target_modules": ["words", "head"]}),
    "vit-all": (
        tiny_vit,
        {"target_modules": ["self_attention", "mlp.0", "mlp.3", "head"], "use_rslora": True},
    ),
}


def given(model: nn.Module) -> Tensor:
    if isinstance(model, TextNet):
        return torch.tensor([[1, 2, 1, 0], [7, 10, 3, 4]])
    shape = (4, 12) if isinstance(model, nn.Sequential) else (4, 3, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def peft_model(base: nn.Module, settings: dict[str, Any]) -> Any:
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@torch.no_grad()
def peft_counts_out_proj() -> int:
    """How often PEFT adds the update of an attention's ``out_proj``: once as defined, or twice."""
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    before = base.get_parameter("attention.out_proj.weight").clone()
    model = peft_model(base, {"target_modules": ["attention"]})
    inner = model.base_model.model["attention"].base_layer.out_proj
    update = inner.get_delta_weight("default").clone()
    after = model.merge_and_unload()["attention"].out_proj.weight
    counts = [n for n in (1, 2) if torch.allclose(after, before + n * update, atol=1e-6)]
    assert len(counts) == 1
    return counts[0]


@torch.no_grad()
def as_peft_computes(ours: nn.Module) -> nn.Module:
    model = copy.deepcopy(ours)
    for module in model.modules():
        if isinstance(module, LoRAMultiheadAttention):
            module.out_proj.get_parameter("lora_B").mul_(peft_counts_out_proj())
    return model


def assert_outputs_agree(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    with fastlora.use_backend("reference"):
        actual = as_peft_computes(ours)(x)
    rounded = (nn.MultiheadAttention, nn.Conv2d, nn.Embedding)
    if any(isinstance(module, rounded) for module in ours.modules()):
        torch.testing.assert_close(actual, theirs(x), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(actual, theirs(x))


@torch.no_grad()
@pytest.mark.parametrize(("make", "settings"), CASES.values(), ids=CASES.keys())
def test_from_peft_and_back(tmp_path: Path, make: Any, settings: dict[str, Any]) -> None:
    base = make().eval()
    theirs = peft_model(base, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    x = given(base)
    assert_outputs_agree(ours, theirs, x)
    assert not torch.allclose(ours(x), base(x), atol=1e-2)
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(again(x), theirs(x))
    before, after = (peft.get_peft_model_state_dict(model) for model in (theirs, again))
    assert before.keys() == after.keys()
    assert all(same_bits(after[key], value) for key, value in before.items())


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (mlp, "all-linear"),
        (tiny_vit, "all-linear"),
        (conv_net, ["stem", "point"]),
        (text_net, ["words"]),
    ],
)
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
def test_from_fastlora_and_back(tmp_path: Path, make: Any, targets: Any, rslora: bool) -> None:
    base = make().eval()
    ours = randomize_adapters(
        fastlora.apply_lora(
            copy.deepcopy(base),
            target_modules=targets,
            rank=3,
            alpha=5,
            rslora=rslora,
            modules_to_save=["head"],
        )
    )
    ours.get_submodule("heads.head" if make is tiny_vit else "head").get_parameter("bias").add_(1.0)
    fastlora.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    x = given(base)
    assert_outputs_agree(ours, theirs, x)
    theirs.save_pretrained(tmp_path / "theirs")
    again = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert all(same_bits(again.state_dict()[name], value) for name, value in ours.state_dict().items())
    assert torch.equal(again(x), ours(x))


@torch.no_grad()
def test_merging_and_removing_is_merge_and_unload(tmp_path: Path) -> None:
    base = tiny_vit().eval()
    theirs = peft_model(base, CASES["vit-all"][1])
    theirs.save_pretrained(tmp_path)
    ours = as_peft_computes(fastlora.load_adapter(copy.deepcopy(base), tmp_path))
    fastlora.remove_adapters(fastlora.merge_adapters(ours))
    plain = theirs.merge_and_unload()
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_names_that_end_alike_stay_apart_in_peft(tmp_path: Path) -> None:
    """PEFT reads a target as the end of any module's name, so ours become a pattern where that matters."""
    base = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    ours = fastlora.apply_lora(copy.deepcopy(base), target_modules=r"fc", rank=2)
    randomize_adapters(ours)
    fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    wrapped = [name for name, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert wrapped == ["fc"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "fc"


@torch.no_grad()
def test_a_half_precision_adapter_from_peft(tmp_path: Path) -> None:
    base = mlp(torch.bfloat16)
    config = peft.LoraConfig(target_modules=["0"], r=2)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path)
    loaded = fastlora.load_adapter(base, tmp_path).get_submodule("0")
    assert isinstance(loaded, LoRAModule)
    theirs_a = theirs.base_model.model[0].lora_A["default"].weight
    assert theirs_a.dtype == torch.bfloat16
    assert same_bits(loaded.lora_A, theirs_a)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' \(changes the frozen weights\)"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' \(changes the frozen weights\)"),
    ],
    ids=["bias", "lora-bias", "pissa", "olora"],
)
def test_kinds_of_peft_adapters_we_do_not_have(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    model = peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["0"], r=2, **settings))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"expected plain LoRA, got .*{match}"):
        fastlora.load_adapter(mlp(), tmp_path)


def test_another_tuner(tmp_path: Path) -> None:
    peft.get_peft_model(mlp(), peft.LoHaConfig(target_modules=["0"], r=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected peft_type 'LORA', got 'LOHA'"):
        fastlora.load_adapter(mlp(), tmp_path)


def test_peft_adapters_for_attention_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert peft_counts_out_proj() in (1, 2)
    peft_model(tiny_vit(), CASES["vit"][1]).save_pretrained(tmp_path / "vit")
    fastlora.load_adapter(tiny_vit(), tmp_path / "vit")
    assert "out_proj twice (huggingface/peft#3774)" in caplog.text
    caplog.clear()
    peft_model(mlp(), CASES["all"][1]).save_pretrained(tmp_path / "mlp")
    fastlora.load_adapter(mlp(), tmp_path / "mlp")
    fastlora.save_adapter(fastlora.apply_lora(tiny_vit()), tmp_path / "ours")
    fastlora.load_adapter(tiny_vit(), tmp_path / "ours")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_peft_ignores_dropout_in_attention() -> None:
    x = given(tiny_vit())
    model = peft_model(tiny_vit(), {"target_modules": ["self_attention"], "lora_dropout": 0.9}).train()
    assert torch.equal(model(x), model(x))
    ours = randomize_adapters(fastlora.apply_lora(tiny_vit(), target_modules=["self_attention"], dropout=0.9))
    assert not torch.equal(ours(x), ours(x))


def test_convolutions_that_peft_computes_otherwise_are_told(tmp_path: Path, caplog: Any) -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.Conv2d(4, 4, 1))
    theirs = peft_model(base, {"target_modules": ["0", "1"]})
    theirs.save_pretrained(tmp_path)
    ours = fastlora.load_adapter(copy.deepcopy(base), tmp_path)
    assert "covers 0, an nn.Conv2d with dilation=(2, 2)" in caplog.text
    x = torch.randn(2, 3, 8, 8)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(ours(x), merged(x), rtol=1e-4, atol=1e-4)


class Embedded(nn.Module):
    """What PEFT takes for a language model's input: it saves the frozen embedding as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


@torch.no_grad()
def test_a_frozen_embedding_in_a_peft_file_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = Embedded()
    theirs = peft_model(base, {"target_modules": ["embed_tokens"]})
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = fastlora.load_adapter(copy.deepcopy(base), tmp_path)
    assert isinstance(loaded.embed_tokens, fastlora.LoRAEmbedding)
    assert not caplog.records
    other = copy.deepcopy(base)
    other.embed_tokens.weight.add_(1.0)
    adapted = fastlora.apply_lora(copy.deepcopy(other), target_modules=["embed_tokens"], rank=2)
    fastlora.load_adapter(other, tmp_path)
    assert torch.equal(other.embed_tokens.weight, base.embed_tokens.weight)
    assert "1 frozen tensors of the model were replaced" in caplog.text
    # whose other adapters belong to the weights that it has
    before = Snapshot(adapted)
    with pytest.raises(ValueError, match="not what the model has; load it into a model without adapters"):
        fastlora.load_adapter(adapted, tmp_path)
    before.assert_unchanged()
