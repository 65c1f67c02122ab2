"""Fused MLPs of ``apply_lora`` for whoever wraps, reads or traces them: as the MLPs whose place they take."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fastlora
from fastlora.nn import AdapterLayer
from tests import sibling_models
from tests.sibling_models import (
    FAMILIES,
    WAYS,
    WIDTH,
    an_input,
    assert_as_apart,
    family,
    gated,
    separated,
    step,
)


@pytest.fixture(autouse=True)
def way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models by ``apply_lora``."""
    monkeypatch.setattr(sibling_models, "way", WAYS["apply_lora"])


class ByName(nn.Module):
    """Calls its MLP by the argument's name."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x=x)


def adapt(model: nn.Module, *, lora_first: bool, **where: Any) -> Any:
    """A model with LoRA and adapters, none of which is zero."""

    def adapters(model: nn.Module) -> None:
        fastlora.apply_adapters(model, hidden_size=WIDTH, **where)

    ways = sibling_models.way.adapt, adapters
    for put_in in ways if lora_first else reversed(ways):
        put_in(model)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            nn.init.normal_(module.up_proj.weight, std=0.1)
    return model.train()


# style of whole blocks, or where
PLACES: list[tuple[str, str, list[str] | None]] = [
    *((name, style, None) for name in ("Llama", "BERT") for style in ("houlsby", "pfeiffer", "parallel")),
    *(
        (name, style, [where])
        for name, where in (("Llama", "mlp"), ("BERT", "layer.0"))
        for style in ("sequential", "parallel")
    ),
]


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize(("name", "placement", "targets"), PLACES)
def test_adapters_beside_lora(name: str, placement: str, targets: list[str] | None, lora_first: bool) -> None:
    torch.manual_seed(0)
    model, batch = FAMILIES[name]()
    adapt(model, lora_first=lora_first, placement=placement, target_modules=targets)
    with gated() as seen:
        found = step(model, batch)
    # what is parallel to an MLP wraps BERT's first half of it
    assert bool(seen) == ((name, placement, targets) != ("BERT", "parallel", None))
    assert any(".adapter." in each for each in found)
    assert_as_apart(found, step(separated(model), batch))


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_an_mlp_that_is_called_by_name(placement: str, lora_first: bool) -> None:
    torch.manual_seed(0)
    mlp: Any = FAMILIES["Llama"]()[0].get_submodule("model.layers.0.mlp")
    model = adapt(ByName(mlp), lora_first=lora_first, placement=placement, target_modules=["mlp"])
    assert torch.equal(model(an_input()), separated(model)(an_input()))


def _mlp(name: str, inside: str) -> Any:
    return family(name)[0].get_submodule(inside)


FUSED: list[tuple[str, str]] = [("Llama", "model.layers.0.mlp"), ("ViT", "vit.layers.0.mlp")]


@pytest.mark.parametrize(("name", "inside"), FUSED)
def test_the_signature_is_that_of_the_mlp(name: str, inside: str) -> None:
    mlp = _mlp(name, inside)
    with gated() as seen:
        mlp(an_input())
    assert seen
    assert inspect.signature(mlp.forward) == inspect.signature(separated(mlp).forward)


class LeavesLoRA(fx.Tracer):
    """Calls LoRA layers, and traces what is around."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, fastlora.LoRALinear) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize(("name", "inside"), FUSED)
def test_an_mlp_is_traced(name: str, inside: str) -> None:
    mlp = _mlp(name, inside)
    traced: Callable[[Tensor], Tensor] = fx.GraphModule(mlp, LeavesLoRA().trace(mlp))
    assert torch.equal(traced(an_input()), mlp(an_input()))
