"""Models with quantised layers adapted, merged, saved, evaluated and given back."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests.quantised import four_bit
from tests.test_nn_quantised import IN, OUT, awake, inputs, run


class Net(nn.Module):
    """Two quantised layers, of which one is called by its attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = four_bit(IN, IN), four_bit(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def test_the_life_of_an_adapted_model(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, x = Net(), inputs()
    frozen = model(x)
    kinds, states = [type(m) for m in model.modules()], model.state_dict()
    fastlora.apply_lora(model, rank=4, target_modules=["first", "second"])
    torch.testing.assert_close(model(x), frozen)
    for layer in (model.first, model.second):
        awake(layer)
    adapted = model(x)
    fastlora.merge_adapters(model)
    size = (IN * IN + OUT * IN) * 4 / 2**20
    assert caplog.messages == [
        f"2 quantised weights were merged into float32 copies of {size:.1f} MiB; unmerge_adapters puts the "
        "quantised ones back, requantise=True quantises the merged ones"
    ]
    fastlora.unmerge_adapters(model)
    assert torch.equal(model(x), adapted)
    fastlora.merge_adapters(model, requantise=True)
    assert caplog.messages[1].startswith("2 merged weights were quantised again: relative error 0.")
    fastlora.unmerge_adapters(model)
    fastlora.save_adapter(model, tmp_path / "adapter")
    other = fastlora.load_adapter(Net(), tmp_path / "adapter")
    assert torch.equal(other(x), adapted)
    fastlora.remove_adapters(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), frozen)
    fastlora.merge_adapters(other)
    fastlora.remove_adapters(other)
    assert type(other.second) is nn.Linear
    torch.testing.assert_close(other(x), adapted)


def test_adapters_in_the_format_of_peft(tmp_path: Path) -> None:
    """A PEFT model of the same quantised layers reads what was trained here, and the other way round."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, x = fastlora.apply_lora(Net(), rank=4, target_modules=["first", "second"]), inputs()
    for layer in (model.first, model.second):
        awake(layer)
    fastlora.save_adapter(model, tmp_path / "ours")
    theirs: Any = PeftModel.from_pretrained(Net(), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(x), model(x))
    trained: Any = get_peft_model(Net(), LoraConfig(r=3, target_modules=["first", "second"]))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(fastlora.load_adapter(Net(), tmp_path / "theirs")(x), trained(x))


def test_bottleneck_adapters_and_named_ones() -> None:
    model, x = Net(), inputs()
    frozen = model(x)
    fastlora.apply_adapters(model, target_modules=["first"], adapter_size=4, hidden_size=IN)
    fastlora.apply_lora(model, rank=4, target_modules=["second"])
    fastlora.add_adapter(model, "other", rank=2)
    torch.testing.assert_close(model(x), frozen)
    fastlora.set_adapter(model, "other")
    model(x).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    assert all("adapter" in name or "lora" in name for name in trained)


@pytest.mark.parametrize("start", [fastlora.init.pissa_, fastlora.init.olora_])
def test_starts_out_of_a_quantised_weight(start: Callable[..., Any]) -> None:
    model, x = Net(), inputs()
    frozen = model(x)
    start(fastlora.apply_lora(model, rank=4, target_modules=["first", "second"]))
    assert model.first.lora_B.any()
    torch.testing.assert_close(model(x), frozen, rtol=1e-4, atol=1e-4)


def test_an_evaluation_between_two_steps_changes_nothing() -> None:
    """On CPUs with AVX512-BF16 bitsandbytes rewrites 4-bit weights then, and gives x a gradient of zeros."""
    model = Net()
    for layer in (model.first, model.second):
        layer.support_avx512bf16_for_cpu = True
    # the first one stays bitsandbytes'
    fastlora.apply_lora(model, rank=4, target_modules=["second"])
    x = inputs()
    before = run(model, x)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    assert all(map(torch.equal, run(model, x), before))


def test_what_no_weight_can_hold_is_told_when_a_model_is_saved(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """``save_pretrained`` writes updates into weights; quantised ones hold none."""

    class Saved(Net):
        def save_pretrained(self, folder: Path) -> None:
            torch.save(self.state_dict(), folder / "model.pt")

    model = fastlora.apply_lora(Saved(), rank=4, target_modules=["first"])
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "LoRA that no weight can hold (1)" in caplog.text
    state = torch.load(tmp_path / "model.pt")
    assert torch.equal(state["first.weight"], model.first.weight.data)
    assert "first.lora_A" in state
