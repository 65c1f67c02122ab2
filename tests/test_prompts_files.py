"""Files of models with prompts: written whole, checked whole, bit for bit back."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastlora
from fastlora.nn.prompts.modules import PROMPTS
from tests.adapter_models import randomize_bottlenecks
from tests.lora_models import Snapshot, mlp, randomize_adapters, same_bits, tiny_vit
from tests.prompt_models import IMAGES, TOKENS, main_output, prompts_of, text_model, vision_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[2, 7, 9, 4, 11, 3]])
KEY = "base_model.model.prompts.tokens"
Change = Callable[[nn.Module], Any]
CASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "shallow": (tiny_vit, False),
    "deep": (tiny_vit, True),
    "timm": (lambda: vision_model("timm-registers"), True),
    "inside": (lambda: vision_model("hf-classifier"), True),
    "bert": (lambda: text_model("bert"), False),
    "bert-inside": (lambda: text_model("bert-classifier"), False),
    "llama": (lambda: text_model("llama"), False),
}
STACKS: dict[str, list[Change]] = {
    "lora": [lambda m: fastlora.apply_lora(m, rank=2, alpha=6, rslora=True)],
    "adapters": [lambda m: fastlora.apply_adapters(m, adapter_size=3, scale=0.5)],
    "adapters-lora": [
        lambda m: fastlora.apply_adapters(m, adapter_size=3, layer_norm="pre"),
        lambda m: fastlora.apply_lora(m, rank=2),
    ],
}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def trained(model: nn.Module, *others: Change, seed: int = 3, **settings: Any) -> nn.Module:
    """The model in eval mode with prompts, and what else is put in, that matter."""
    fastlora.apply_prompts(model, **{"num_tokens": TOKENS, **settings})
    for put_in in others:
        put_in(model)
    tokens = prompts_of(model).tokens
    with torch.no_grad():
        tokens.copy_(torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed)))
    return randomize_bottlenecks(randomize_adapters(model, seed=seed), seed=seed).eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    # without gradients, because nn.MultiheadAttention computes otherwise where a weight may train
    text = type(model).__name__.startswith(("Bert", "Llama"))
    return main_output(model(IDS if text else IMAGES))


def check_same(loaded: nn.Module, model: nn.Module) -> None:
    assert repr(loaded) == repr(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(same_bits(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert trainable(loaded) == trainable(model)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize(("make", "deep"), CASES.values(), ids=CASES.keys())
def test_round_trip_into_the_frozen_model(tmp_path: Path, make: Callable[[], nn.Module], deep: bool) -> None:
    base = make().eval()
    plain = run(base)
    model = trained(copy.deepcopy(base), deep=deep, dropout=0.25)
    assert fastlora.save_adapter(model, tmp_path) == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS]
    loaded = fastlora.load_adapter(base, tmp_path)
    assert loaded is base
    check_same(loaded, model)
    assert not torch.allclose(run(loaded), plain)
    assert torch.equal(run(fastlora.remove_prompts(loaded)), plain)


@pytest.mark.parametrize("others", STACKS.values(), ids=STACKS.keys())
@pytest.mark.parametrize("kind", ["shallow", "deep", "bert"])
def test_round_trip_beside_other_kinds(tmp_path: Path, kind: str, others: list[Change]) -> None:
    make, deep = CASES[kind]
    base = make().eval()
    model = trained(copy.deepcopy(base), *others, deep=deep)
    fastlora.save_adapter(model, tmp_path)
    check_same(fastlora.load_adapter(copy.deepcopy(base), tmp_path), model)
    # into a model that has its prompts, with other values, put in last
    other = copy.deepcopy(base)
    for put_in in others:
        put_in(other)
    trained(other, deep=deep, dropout=0.5, seed=4)
    fastlora.load_adapter(other, tmp_path)
    assert torch.equal(run(other), run(model))
    assert prompts_of(other).settings.dropout == 0.5


def test_a_head_that_trains_beside_prompts(tmp_path: Path) -> None:
    base = tiny_vit().eval()
    model = trained(copy.deepcopy(base), modules_to_save=["head"])
    nn.init.ones_(model.get_parameter("heads.head.bias"))
    fastlora.save_adapter(model, tmp_path)
    check_same(fastlora.load_adapter(base, tmp_path), model)


def test_the_config_says_everything(tmp_path: Path) -> None:
    fastlora.save_adapter(trained(tiny_vit(), deep=True), tmp_path)
    prompts = {
        "kind": "visual",
        "hidden_size": 8,
        "position": 1,
        "num_tokens": TOKENS,
        "deep": True,
        "dropout": 0.0,
        "init": "auto",
    }
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "format": "fastlora",
        "format_version": 1,
        "lora": None,
        "bottleneck": None,
        "prompts": {"modules": {"prompts": prompts}},
        "modules_to_save": [],
    }
    (key,) = safetensors.torch.load_file(tmp_path / TENSORS)
    assert key == KEY


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prompts_beside_16_bit_weights_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_vit().to(dtype).eval()
    model = trained(copy.deepcopy(base)).to(dtype)
    fastlora.save_adapter(model, tmp_path)
    loaded: Any = fastlora.load_adapter(base, tmp_path)
    assert prompts_of(loaded).tokens.dtype == torch.float32
    images = IMAGES.to(dtype)
    assert torch.equal(loaded(images), model(images))


def test_what_trains_around_the_prompts_is_refused(tmp_path: Path) -> None:
    model = trained(tiny_vit())
    model.get_parameter("class_token").requires_grad_(True)
    with pytest.raises(ValueError, match="adapters or prompts, got 'class_token'"):
        fastlora.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return edit


def edit_prompts(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda config: config["prompts"]["modules"][PROMPTS].update(changes))


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / TENSORS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / TENSORS)

    return edit


def rename(name: str) -> Callable[[Path], None]:
    def change(config: dict[str, Any]) -> None:
        modules = config["prompts"]["modules"]
        modules[name] = modules.pop(PROMPTS)

    return edit_config(change)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "section": (edit_config(lambda c: c.update(prompts=[1])), "prompts: expected an object with 'modules'"),
    "modules": (edit_config(lambda c: c["prompts"].update(modules=3)), "an object with 'modules', got "),
    "entry": (
        edit_config(lambda c: c["prompts"]["modules"].update(prompts=3)),
        "the fields of prompts, got 3",
    ),
    "setting": (edit_prompts(magic=1), r"unknown: \['magic'\]"),
    "kind": (edit_prompts(kind="spoken"), r"kind of 'prompts' in \('visual', 'soft'\), got 'spoken'"),
    "name": (rename("tokens"), "a name that ends in 'prompts', got 'tokens'"),
    "count-text": (edit_prompts(num_tokens="5"), "expected num_tokens to be an integer, got '5'"),
    "count-zero": (edit_prompts(num_tokens=0), "expected num_tokens >= 1, got 0"),
    "width-bool": (edit_prompts(hidden_size=True), "expected hidden_size to be an integer, got True"),
    "position-text": (edit_prompts(position="1"), "expected position of 'prompts' to be an integer"),
    "deep-number": (edit_prompts(deep=1), "expected deep to be True or False, got 1"),
    "init": (edit_prompts(init="zeros"), "expected init to be .*, got 'zeros'"),
    "dropout": (edit_prompts(dropout=1.5), "expected dropout in .*, got 1.5"),
    "other-kind": (edit_prompts(kind="soft"), "prompts: expected kind 'visual' as in the model, got 'soft'"),
    "other-width": (edit_prompts(hidden_size=9), "expected hidden_size 8 as in the model, got 9"),
    "other-position": (edit_prompts(position=3), "expected position 1 as in the model, got 3"),
    "elsewhere": (
        rename("encoder.prompts"),
        r"encoder\.prompts: (expected a VisionTrans|no prompts of this)",
    ),
    "nowhere": (rename("body.prompts"), r"body\.prompts: no (such transformer|prompts of this name)"),
    "gone": (
        edit_config(lambda c: c.update(prompts=None)),
        f"{KEY}: nothing in the model takes it",
    ),
    "missing": (edit_tensors(lambda t: t.pop(KEY)), f"differences: 1.*{KEY}: missing"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), "extra: nothing in the model"),
    "width": (edit_tensors(lambda t: t.update({KEY: torch.zeros(1, 5, 9)})), r"\[1, 5, 8\], got \[1, 5, 9\]"),
    "integers": (edit_tensors(lambda t: t.update({KEY: t[KEY].int()})), "floating dtype, got torch.int32"),
}


@pytest.mark.parametrize("ready", [False, True], ids=["frozen", "prompted"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_file_changes_nothing(tmp_path: Path, case: str, ready: bool) -> None:
    damage, match = DAMAGE[case]
    others = STACKS["lora"]
    fastlora.save_adapter(trained(tiny_vit(), *others), tmp_path)
    damage(tmp_path)
    model = trained(tiny_vit(), *others, seed=5) if ready else tiny_vit()
    before, expected = Snapshot(model), run(model.eval())
    model.train(before.training[""])
    with pytest.raises(ValueError, match=f"(?s){match}"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()
    assert torch.equal(run(model.eval()), expected)


@pytest.mark.parametrize(
    ("saved", "loaded", "match"),
    [
        ({"deep": True}, {}, "expected deep False as in the model, got True"),
        ({"num_tokens": 4}, {}, "expected num_tokens 5 as in the model, got 4"),
    ],
    ids=["deep", "count"],
)
def test_other_prompts_than_the_models(
    tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any], match: str
) -> None:
    fastlora.save_adapter(trained(tiny_vit(), **saved), tmp_path)
    model = trained(tiny_vit(), **loaded)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=match):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()


def test_another_model_or_another_kind(tmp_path: Path) -> None:
    fastlora.save_adapter(trained(tiny_vit(), deep=True), tmp_path / "visual")
    fastlora.save_adapter(trained(text_model("bert")), tmp_path / "soft")
    fastlora.save_adapter(fastlora.apply_lora(tiny_vit(), rank=1), tmp_path / "lora")
    lora_on_head = fastlora.apply_lora(tiny_vit(), rank=1, target_modules=["head"])
    cases = [
        (mlp(), "visual", "prompts: expected a VisionTransformer"),
        (vision_model("torchvision"), "soft", "expected kind 'visual' as in the model, got 'soft'"),
        (text_model("bert"), "visual", "expected deep=False for BertModel, got True"),
        (trained(tiny_vit()), "lora", "prompts: prompts in the model, none in the file"),
        (lora_on_head, "visual", "no prompts of this name in the model"),
    ]
    for model, name, match in cases:
        before = Snapshot(model)
        with pytest.raises(ValueError, match=f"(?s){match}"):
            fastlora.load_adapter(model, tmp_path / name)
        before.assert_unchanged()
