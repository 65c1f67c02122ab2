"""Attention that trains faster on a CPU: the same results, and nothing left behind."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from fastlora.transfer.data import LabelledImages
from fastlora.transfer.strategies import find_strategy
from fastlora.transfer.training import Trainer, TrainSettings
from fastlora.transfer.training.attention import speed_up_attention

CPU = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
GPU = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16")
HEAD = "heads.head"


def vit(strategy: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=2)
    nn.init.normal_(model.get_parameter(f"{HEAD}.weight"))
    find_strategy(strategy).apply(model, HEAD)
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# LoRA's attention orders its tokens itself, and what trains is multiplied fast in any order
@pytest.mark.parametrize(
    ("strategy", "each"), [("lora", 2), ("adapter", 3), ("prompt", 3), ("full", 2)], ids=lambda value: value
)
def test_it_says_the_same_and_leaves_nothing(strategy: str, each: int) -> None:
    model = vit(strategy).double()
    pictures = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    def learnt() -> list[Tensor]:
        model.zero_grad()
        logits = model(pictures)
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, before = learnt(), hooks(model)
    handles = speed_up_attention(model, CPU)
    assert hooks(model) - before == len(handles) == 2 * each
    for ours, theirs in zip(learnt(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for handle in handles:
        handle.remove()
    assert hooks(model) == before


def test_only_a_cpu_gets_it() -> None:
    assert speed_up_attention(vit("adapter"), GPU) == []


def test_in_32_bits_the_fused_kernel_stays() -> None:
    assert len(speed_up_attention(vit("full"), SimpleNamespace(device=CPU.device, mixed_precision="no"))) == 0


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("tokens", "fused"), [(160, False), (161, True)])
def test_few_tokens_are_multiplied_plainly(
    tokens: int, fused: bool, batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plain = F.scaled_dot_product_attention

    def watched(*given: Any, **named: Any) -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return plain(*given, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    speed_up_attention(attention, CPU)
    shape = (2, tokens, 8) if batch_first else (tokens, 2, 8)
    x = torch.randn(shape)
    attention(x, x, x, need_weights=False)
    assert seen == [fused]
    with pytest.raises(AssertionError):
        attention(x[..., :4], x[..., :4], x[..., :4], need_weights=False)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_other_calls_are_left_as_they_are() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)

    def answers() -> list[Tensor]:
        calls = (
            attention(x, memory, memory),
            attention(query=x, key=x, value=x),
            attention(x[0], x[0], x[0]),
            attention(x, x, x, None, False),
        )
        return [output for output, _ in calls]

    expected = answers()
    speed_up_attention(attention, CPU)
    for ours, theirs in zip(answers(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def pictures() -> LabelledImages:
    pixels = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(16)))
    return LabelledImages(("a", "b"), (0, 1) * 8, names, pixels.__getitem__)


def should_train(strategy: str, name: str) -> bool:
    marks = {"lora": ("lora_A", "lora_B"), "adapter": ("adapter",), "prompt": ("prompts.tokens",)}
    return strategy == "full" or name.startswith("heads.") or any(mark in name for mark in marks[strategy])


@pytest.mark.parametrize("strategy", ["lora", "adapter", "prompt", "full"])
def test_what_should_train_does_and_nothing_else(strategy: str, tmp_path: Path) -> None:
    model = vit(strategy)
    before, hooked = {name: p.detach().clone() for name, p in model.named_parameters()}, hooks(model)
    # with neither weight decay nor warm-up, only what gets a gradient moves
    settings = TrainSettings(epochs=2, batch_size=8, weight_decay=0.0, warmup=0.0, restore_best=False)
    Trainer(model, pictures(), pictures(), settings, output=tmp_path).fit()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if should_train(strategy, name)}
    assert hooks(model) == hooked
