"""DoRA layers: PEFT's formula, fresh start, norms that follow the weights, merging, files, models."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear
from fastlora.nn import LoRAModule
from fastlora.nn.lora import norm_cache

MAKERS: dict[str, Callable[[], tuple[LoRAModule, nn.Module, Tensor]]] = {}


def maker(function: Callable[[], tuple[LoRAModule, nn.Module, Tensor]]) -> None:
    MAKERS[function.__name__] = function


@maker
def linear() -> tuple[LoRAModule, nn.Module, Tensor]:
    base = nn.Linear(6, 5)
    return LoRALinear.from_linear(base, rank=2, dora=True), base, torch.randn(4, 6)


@maker
def wrapped() -> tuple[LoRAModule, nn.Module, Tensor]:
    base = nn.Linear(6, 5, bias=False)
    return LoRALayer(base, rank=2, dora=True), base, torch.randn(2, 3, 6)


@maker
def conv() -> tuple[LoRAModule, nn.Module, Tensor]:
    base = nn.Conv2d(3, 5, 3, padding=1, stride=2)
    return LoRAConv2d.from_conv(base, rank=2, dora=True), base, torch.randn(2, 3, 7, 7)


@maker
def pointwise() -> tuple[LoRAModule, nn.Module, Tensor]:
    base = nn.Conv2d(3, 5, 1, bias=False)
    return LoRALayer(base, rank=2, dora=True), base, torch.randn(3, 7, 7)


@maker
def embedding() -> tuple[LoRAModule, nn.Module, Tensor]:
    base = nn.Embedding(11, 5)
    return LoRAEmbedding.from_embedding(base, rank=2, dora=True), base, torch.randint(11, (3, 4))


@maker
def wrapped_embedding() -> tuple[LoRAModule, nn.Module, Tensor]:
    base = nn.Embedding(11, 5)
    return LoRALayer(base, rank=2, dora=True), base, torch.randint(11, (3, 4))


@pytest.fixture(params=list(MAKERS.values()), ids=list(MAKERS))
def made(request: pytest.FixtureRequest) -> tuple[LoRAModule, nn.Module, Tensor]:
    make: Callable[[], tuple[LoRAModule, nn.Module, Tensor]] = request.param
    return make()


def move(layer: LoRAModule) -> None:
    """As if trained: every part away from its start."""
    with torch.no_grad():
        for name in layer.adapter_params():
            parameter = layer.get_parameter(name)
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def test_a_fresh_layer_computes_the_frozen_one(made: tuple[LoRAModule, nn.Module, Tensor]) -> None:
    layer, base, x = made
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == layer.adapter_params()
    assert layer.adapter_params()[-1] == "lora_magnitude_vector"
    torch.testing.assert_close(layer(x), base(x))
    move(layer)
    assert not torch.allclose(layer(x), base(x))
    layer.reset_lora_parameters()
    torch.testing.assert_close(layer(x), base(x))


def test_merged_is_unmerged(made: tuple[LoRAModule, nn.Module, Tensor]) -> None:
    layer, _, x = made
    move(layer)
    expected = layer(x)
    original = layer._weight()
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.to_base()(x), expected, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert layer._weight() is original
    assert torch.equal(layer(x), expected)


def test_rows_are_folded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in MAKERS.values():
        layer, _, _ = make()
        move(layer)
        whole = layer._fold(layer._weight())
        monkeypatch.setattr("fastlora.nn.lora.folding._ELEMENTS", 8)
        torch.testing.assert_close(layer._fold(layer._weight()), whole)
        monkeypatch.undo()


def test_the_norm_is_kept_in_eval_mode_until_something_changes(
    made: tuple[LoRAModule, nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _, x = made
    move(layer)
    calls: list[int] = []

    def spy(*arguments: Any) -> Tensor:
        calls.append(1)
        return fastlora.functional.dora_weight_norm(*arguments)

    monkeypatch.setattr(norm_cache, "dora_weight_norm", spy)
    layer(x), layer(x)
    assert len(calls) == 2
    layer.eval()
    layer(x), layer(x)
    assert len(calls) == 3
    first, second = (layer.get_parameter(name) for name in layer.adapter_params()[:2])
    changes: list[Callable[[], object]] = [
        lambda: nn.init.normal_(first),
        lambda: nn.init.normal_(second),
        lambda: setattr(layer, "alpha", 3.0),
        lambda: layer._set_weight(nn.Parameter(layer._weight() * 2, requires_grad=False)),
        lambda: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
        layer.double,
    ]
    for count, change in enumerate(changes, start=4):
        change()
        x = x.double() if change == layer.double and x.is_floating_point() else x
        fresh = copy.deepcopy(layer)
        fresh.eval()
        expected = fresh(x)
        del calls[:]
        assert torch.equal(layer(x), expected), count
        assert len(calls) == 1, count
        layer(x)
        assert len(calls) == 1, count


def test_a_plain_state_dict_loads_into_a_fresh_layer() -> None:
    for make in MAKERS.values():
        layer, base, x = make()
        if isinstance(layer, LoRALayer):
            continue
        other = copy.deepcopy(base)
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), other(x))
        move(layer)
        magnitude = layer.lora_magnitude_vector.clone()
        layer.load_state_dict(base.state_dict())
        assert torch.equal(layer.lora_magnitude_vector, magnitude)


class Model(nn.Module):
    """One of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(6, 5, (1, 3), padding=(0, 1))
        self.linear = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, words: Tensor) -> Tensor:
        image = self.embedding(words).transpose(1, 2)[:, :, None]
        out: Tensor = self.head(torch.tanh(self.linear(self.conv(image).flatten(2).transpose(1, 2))))
        return out


TARGETS = ["embedding", "conv", "linear"]
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"linear": 3}, "alpha_pattern": {"conv": 5}},
    "head": {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_peft_files_both_ways(tmp_path: Path, options: dict[str, object]) -> None:
    """What PEFT trained computes the same here, learns the same, and goes back bit for bit."""
    peft = pytest.importorskip("peft", reason="compares with PEFT, an optional package")
    base, words = Model(), torch.randint(11, (2, 4))
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, use_dora=True, **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours(words), theirs(words))

    for model in (ours, theirs):
        model(words).square().sum().backward()
    own = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in own.values())
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            plain = name.removeprefix("base_model.model.").replace(".default", "")
            plain = plain if plain.endswith("bias") else plain.removesuffix(".weight")
            torch.testing.assert_close(own[plain], parameter.grad, rtol=1e-4, atol=1e-5)

    fastlora.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(back(words), theirs(words))
    merged = fastlora.remove_adapters(fastlora.merge_adapters(ours))
    torch.testing.assert_close(merged(words), theirs.merge_and_unload()(words))


def test_what_does_not_fit_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 4))
    with pytest.raises(TypeError, match="without groups for DoRA, got groups=2"):
        fastlora.apply_lora(model, target_modules=["0"], dora=True)
    attention = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(TypeError, match=r"can carry DoRA, got nn.MultiheadAttention.*leave it out"):
        fastlora.apply_lora(attention, target_modules=["self_attn"], dora=True)
    with pytest.raises(TypeError, match="expected dora to be True or False, got 1"):
        LoRALinear(3, 4, dora=1)  # type: ignore[arg-type]
    assert not any(isinstance(module, LoRAModule) for module in [*model.modules(), *attention.modules()])


def test_files_of_the_other_kind_are_told(tmp_path: Path) -> None:
    def model(*, dora: bool) -> nn.Module:
        return fastlora.apply_lora(nn.Sequential(nn.Linear(4, 2)), rank=1, dora=dora)

    with pytest.raises(ValueError, match="expected dora=False as in the model, got True"):
        fastlora.load_adapter(model(dora=False), fastlora.save_adapter(model(dora=True), tmp_path))


def test_half_precision_keeps_the_magnitude_in_float32() -> None:
    layer = LoRALinear(6, 5, rank=2, dora=True, dtype=torch.bfloat16)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0.02, atol=0.02)
    assert layer(x).dtype == torch.bfloat16


def test_described() -> None:
    assert "dora=True" in repr(LoRALinear(3, 4, dora=True))
