"""Layers whose weights a model reads without calling them carry nothing."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import fastlora
from fastlora.anatomy.names import named_modules
from fastlora.anatomy.uncalled import bypassed
from fastlora.nn import LoRAModule
from tests.adapter_models import CASES, TorchDecoder, torch_encoder
from tests.lora_models import Snapshot, randomize_adapters, tiny_vit
from tests.prompt_models import text_model, vision_model

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


class Reader(nn.Module):
    """Reads ``first``, calls ``second``, asks ``third`` for its dtype, and calls or reads ``fourth``."""

    def __init__(self, calls: bool = True, threshold: int = 0) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(4, 4) for _ in range(4))
        nn.init.zeros_(self.second.weight)
        self.calls, self.threshold = calls, threshold
        self.factor = None if threshold else nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first.weight, self.first.bias)
        x = self.second(x.to(self.third.weight.dtype))
        if self.calls:
            x = self.third(x)
        if self.factor is not None and not self.threshold > 3:
            x = x * self.factor
        return F.linear(x, self.fourth.weight) if self.factor is None else apply(self.fourth, x)

    def tie(self) -> None:
        self.second.weight = self.third.weight


class Inheriting(Reader):
    """Its methods are those of its base."""


class Overriding(Reader):
    """Calls what its base reads."""

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.second, apply(self.first, x))


class Handing(nn.Module):
    """Reads a layer in a method and gives it away whole in another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight) + self.apart(x)

    def apart(self, x: Tensor) -> Tensor:
        return apply(self.layer, x)


def names(model: nn.Module) -> set[str]:
    return set(reasons(model))


def reasons(model: nn.Module) -> dict[str, str]:
    return bypassed(named_modules(model), list(model.modules()))


def test_what_a_class_does_with_its_layers() -> None:
    assert names(nn.Sequential(Reader())) == {"0.first"}
    assert reasons(Inheriting()) == {"first": "Inheriting"}
    assert names(Overriding()) == names(Handing()) == set()
    # its settings say which branch it takes: without a factor it reads the fourth layer
    assert names(Reader(threshold=2)) == {"first", "fourth"}


def test_a_layer_that_another_module_calls_too_is_called() -> None:
    reader = Reader()
    assert names(nn.ModuleDict({"reader": reader, "again": reader.first})) == set()
    assert names(nn.ModuleDict({"reader": reader, "again": reader})) == {"reader.first", "again.first"}


def test_a_class_without_source_code_is_left_alone() -> None:
    scope: dict[str, Any] = {"nn": nn, "F": F}
    exec(
        "class Hidden(nn.Module):\n    def forward(self, x):\n        return F.linear(x, self.a.weight)",
        scope,
    )
    module = scope["Hidden"]()
    module.a = nn.Linear(4, 4)
    assert names(module) == set()


@pytest.mark.parametrize(
    "make",
    [
        *(case.make for name, case in CASES.items() if name != "swin"),
        lambda: text_model("llama"),
        lambda: text_model("distilbert"),
        lambda: vision_model("timm-registers"),
        torch_encoder,
        TorchDecoder,
    ],
)
def test_models_that_call_every_layer(make: Callable[[], nn.Module]) -> None:
    assert names(make()) == set()


def swin(version: int) -> nn.Module:
    newer = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    model: nn.Module = SwinTransformer(
        [2, 2], 8, [2], [2], [2, 2], num_classes=3, stochastic_depth_prob=0.0, **newer
    )
    return model


def timm_beit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="adapts a timm model, an optional package")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.Beit(**sizes)  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], str, set[str]]] = {
    "swin": (lambda: swin(1), "ShiftedWindowAttention", {"qkv", "proj"}),
    "swin-v2": (lambda: swin(2), "ShiftedWindowAttentionV2", {"qkv", "proj"}),
    "timm-beit": (timm_beit, "Attention", {"qkv"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_leaves_them_out_and_says_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, parent, layers = MODELS[kind]
    model: Any = make()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # the head of timm's and torchvision's is trained whole
    linear = [name for name in linear if name != "head"]
    out = [name for name in linear if name.rpartition(".")[2] in layers and ".attn." in name]
    fastlora.apply_lora(model, rank=2)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert f"left out {len(out)} of {len(linear)} linear layers, {out[0]!r} first: {parent} reads" in warning
    kept = {name for name, module in model.named_modules() if isinstance(module, LoRAModule)}
    assert kept == set(linear) - set(out)
    # and what is there trains, and can be merged without a change
    randomize_adapters(model).eval()
    expected = model(IMAGES)
    expected.square().sum().backward()
    assert all(model.get_submodule(name).lora_A.grad is not None for name in kept)
    torch.testing.assert_close(fastlora.merge_adapters(model)(IMAGES), expected, rtol=1e-3, atol=1e-4)


def test_a_file_with_updates_of_them_loads_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft", reason="writes the file; ours leave such layers out")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "head"], init_lora_weights=False)
    peft.get_peft_model(swin(1), config).save_pretrained(tmp_path)
    model = fastlora.load_adapter(swin(1), tmp_path)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "2 of the 3 layers in" in warning
    assert "ShiftedWindowAttention reads their weights without calling them" in warning
    assert isinstance(model.get_submodule("head"), LoRAModule)


def test_no_warning_for_layers_that_were_excluded(caplog: pytest.LogCaptureFixture) -> None:
    fastlora.apply_lora(swin(1), exclude_modules=r".*\.(qkv|proj)")
    fastlora.apply_lora(tiny_vit())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", [["qkv"], r".*\.attn\.qkv", ["qkv", "head"]], ids=str)
@pytest.mark.parametrize("apply", [fastlora.apply_lora, fastlora.apply_adapters], ids=["lora", "adapters"])
def test_names_of_them_are_refused(kind: str, names: Any, apply: Callable[..., nn.Module]) -> None:
    make, parent, _ = MODELS[kind]
    model = make()
    before = Snapshot(model)
    message = rf"layers that the model calls, got \d others, '.*qkv' first: {parent} reads their weights"
    with pytest.raises(ValueError, match=message):
        apply(model, target_modules=names)
    before.assert_unchanged()


def test_they_may_train_whole() -> None:
    model = fastlora.apply_lora(swin(1), target_modules=["mlp.0"], modules_to_save=["qkv"], rank=2)
    model(IMAGES).square().sum().backward()
    weights = [p for name, p in model.named_parameters() if name.endswith("qkv.weight")]
    assert len(weights) == 2
    assert all(p.grad is not None for p in weights)


def test_nothing_but_such_layers() -> None:
    attention = swin(1).get_submodule("features.1.0.attn")
    with pytest.raises(ValueError, match="expected at least one module to adapt"):
        fastlora.apply_lora(attention)
