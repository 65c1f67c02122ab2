"""Accelerated PEFT models answer, learn, save, merge and switch as PEFT's own."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.interop._peft_linear import FusedLinear

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "bias": {"lora_bias": True},
    "modules to save": {"target_modules": ["first"], "modules_to_save": ["head"]},
    "patterns": {"rank_pattern": {"first": 3}, "alpha_pattern": {"second": 5}},
    "dropout": {"lora_dropout": 0.3},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.3},
}
# backward orders its sums in another way; a rounding error of the eager path is allowed this often
FACTOR = 4.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(x).tanh()))
        return y


def make(name: str = "lora", *, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    settings = {"target_modules": ["first", "second"], **CONFIGS[name]}
    model = get_peft_model(Net().to(dtype), LoraConfig(r=4, lora_alpha=8, **settings))
    return wake(model)


def wake(model: Any) -> Any:
    """B starts at zero, where half of the gradients are; values that bfloat16 holds, to which A and B go."""
    generator = torch.Generator().manual_seed(7)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        if "lora_" in parameter_name:
            parameter.data.copy_(parameter.bfloat16())
    return model


def twins(name: str = "lora", **how: Any) -> tuple[Any, Any]:
    # PEFT's modules have no types
    model = make(name, **how)
    return copy.deepcopy(model), fastlora.accelerate(model)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(3)).to(dtype)


def fused(model: nn.Module) -> list[FusedLinear]:
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model(x).float().square().mean().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "x": x.grad}


def assert_as_good(found: Tensor, eager: Tensor, exact: Tensor, where: str = "") -> None:
    """No further from float64 than PEFT's own, up to a factor, and some units in the last place."""
    # norms: which single number is furthest off, and how far, is chance
    size, own, error = (
        t.double().norm().item() for t in (exact, eager.double() - exact, found.double() - exact)
    )
    assert error <= FACTOR * own + 4 * torch.finfo(found.dtype).eps * size, (where, error, own, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_peft(name: str, dtype: torch.dtype) -> None:
    eager, model = twins(name, dtype=dtype)
    exact = copy.deepcopy(eager).double().eval()
    assert len(fused(model)) == len(
        [m for m in eager.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]
    )
    for each in (eager, model):
        # masks differ, so dropout is compared elsewhere
        each.eval()
    x = inputs(dtype)
    assert_as_good(model(x), eager(x), exact(x.double()))
    mine, own, true = gradients(model, x), gradients(eager, x), gradients(exact, x.double())
    assert mine.keys() == own.keys() == true.keys()
    for key, gradient in mine.items():
        assert gradient.dtype == own[key].dtype
        assert_as_good(gradient, own[key], true[key], key)


@pytest.mark.parametrize("name", ["lora", "dora", "bias", "modules to save"])
def test_training_saves_the_adapter_that_peft_would_have(name: str, tmp_path: Path) -> None:
    files = []
    for place, model in enumerate(twins(name)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(4):
            x = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        model.save_pretrained(tmp_path / str(place))
        files.append(load_file(tmp_path / str(place) / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        torch.testing.assert_close(files[1][key], tensor, rtol=1e-3, atol=1e-5)
    torch.manual_seed(0)
    loaded = fastlora.accelerate(PeftModel.from_pretrained(Net(), tmp_path / "1"))
    assert all(torch.equal(t, files[1][k]) for k, t in saved(loaded, tmp_path / "again").items())


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def test_merging_disabling_and_unloading_are_those_of_peft() -> None:
    eager, model = twins()
    x = inputs()
    with eager.disable_adapter(), model.disable_adapter():
        assert torch.equal(model(x), eager(x))
    for each in (eager, model):
        each.base_model.merge_adapter()
    assert torch.equal(model(x), eager(x))
    for each in (eager, model):
        each.base_model.unmerge_adapter()
    torch.testing.assert_close(model(x), eager(x))
    merged, own = model.merge_and_unload(), eager.merge_and_unload()
    assert not fused(merged)
    assert torch.equal(merged(x), own(x))


def test_adapters_are_added_switched_and_used_together() -> None:
    eager, model = twins()
    x = inputs()
    for each in (eager, model):
        torch.manual_seed(5)
        each.add_adapter("other", LoraConfig(r=3, lora_alpha=9, target_modules=["first", "second"]))
        wake(each)
    assert len(fused(model)) == 2
    outputs = []
    for name in ("default", "other"):
        eager.set_adapter(name)
        model.set_adapter(name)
        torch.testing.assert_close(model(x), eager(x))
        outputs.append(model(x))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    for each in (eager, model):
        each.base_model.set_adapter(["default", "other"])
    mine, own = gradients(model, x), gradients(eager, x)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-5, atol=1e-5)
    assert sum("other" in key for key in mine) == 4
    for key, gradient in mine.items():
        torch.testing.assert_close(gradient, own[key], rtol=1e-4, atol=1e-6)
    names = ["default", "other", "__base__", "default", "other"]
    for each in (eager, model):
        each.eval()
    torch.testing.assert_close(model(x, adapter_names=names), eager(x, adapter_names=names))
    for each in (eager, model):
        each.base_model.add_weighted_adapter(["default", "other"], [0.6, 0.4], "mix", combination_type="cat")
        each.set_adapter("mix")
    torch.testing.assert_close(model(x), eager(x), rtol=1e-5, atol=1e-5)


def test_dropout_has_the_right_mean_and_repeats_under_checkpointing() -> None:
    _, model = twins("dropout")
    model.train()
    x = inputs()
    torch.manual_seed(0)
    mean = torch.stack([model(x) for _ in range(400)]).mean(dim=0)
    noise = torch.stack([model(x) for _ in range(50)]).std(dim=0).max()
    # tanh between the layers keeps the mean from being exact
    assert (mean - model.eval()(x)).abs().max() < 6 * noise / 400**0.5 + 0.05
    model.train()
    found = []
    for run in (model, lambda y: checkpoint(model, y, use_reentrant=False)):
        torch.manual_seed(1)
        model.zero_grad()
        run(x).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_dora_drops_what_peft_drops() -> None:
    """PEFT's own masks: W sees the dropped input too, and a gradient reaches everything through it."""
    eager, model = twins("dora with dropout")
    results = []
    for each in (eager, model):
        torch.manual_seed(4)
        results.append((each.train()(inputs()), gradients_at(each, seed=4)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0][0], eager.eval()(inputs()), atol=1e-2)
    for key, gradient in results[1][1].items():
        torch.testing.assert_close(gradient, results[0][1][key], rtol=1e-4, atol=1e-6)


def gradients_at(model: nn.Module, *, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return gradients(model, inputs())


def test_several_adapters_have_masks_of_their_own() -> None:
    """The first without dropout, the second with PEFT's own mask: the same numbers."""
    eager, model = twins()
    results = []
    for each in (eager, model):
        torch.manual_seed(5)
        other = LoraConfig(r=3, lora_alpha=9, lora_dropout=0.5, target_modules=["first", "second"])
        each.add_adapter("other", other)
        wake(each).base_model.set_adapter(["default", "other"])
        results.append(gradients_at(each.train(), seed=6))
    assert sum("other" in key for key in results[1]) == 4
    for key, gradient in results[1].items():
        torch.testing.assert_close(gradient, results[0][key], rtol=1e-4, atol=1e-6)


def test_autocast_is_honoured() -> None:
    eager, model = twins()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, own = model(inputs()), eager(inputs())
    assert mine.dtype == own.dtype == torch.bfloat16
    torch.testing.assert_close(mine.float(), own.float(), rtol=0.05, atol=0.05)


def test_hooks_inside_are_called() -> None:
    _, model = twins()
    seen: list[Any] = []
    fused(model)[0].base_layer.register_forward_hook(lambda *call: seen.append(call))
    model(inputs())
    assert len(seen) == 1


def test_restore_gives_back_what_was_there() -> None:
    eager, model = twins("dora")
    before = model.state_dict()
    assert fastlora.restore(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in eager.modules()]
    assert torch.equal(model(inputs()), eager(inputs()))
    assert all(model.state_dict()[key] is not None for key in before)
    assert list(model.state_dict()) == list(eager.state_dict())


def test_what_cannot_be_served_is_left_and_told(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
    eager = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "fastlora"):
        fastlora.accelerate(model)
    assert [r.message for r in caplog.records] == [
        "1 of 2 LoRA layers run fused; left to PEFT: 1 lora.Conv2d"
    ]
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(model(x), eager(x))


class Shifted:
    """A variant of PEFT's that nobody here knows."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **more: Any) -> Tensor:
        return result + 1.0


def test_a_variant_that_comes_later_is_left_to_peft() -> None:
    eager, model = twins()
    for each in (eager, model):
        for layer in (each.base_model.model.first, each.base_model.model.second):
            layer.lora_variant["default"] = Shifted()
    assert torch.equal(model(inputs()), eager(inputs()))


def test_a_model_without_lora_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a model with LoRA layers of PEFT, got Net"):
        fastlora.accelerate(Net())
    assert fastlora.restore(Net()) is not None


def test_a_compiled_model_has_no_graph_breaks() -> None:
    eager, model = twins()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs()), eager(inputs()))
