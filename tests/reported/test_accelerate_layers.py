"""Which layers are accelerated, which are told, and what gives PEFT's classes back."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

import fastlora
from fastlora.interop._peft_linear import FusedLinear
from tests.peft_twins import (
    assert_equal_runs,
    inputs,
    is_fused,
    layer_of,
    peft_model,
    run,
    twins,
    with_adapters,
)


class Reversed(nn.Linear):
    """Computes something else than nn.Linear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -super().forward(input)


def hooked(part: str) -> Callable[[Any], object]:
    return lambda layer: getattr(layer, part)["default"].register_forward_hook(lambda *call: None)


def own_forward(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda x: own(x)


REASONS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hook": (hooked("lora_B"), "hooks on lora_B"),
    "a dropout": (
        lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.1)}),
        "AlphaDropout as lora_dropout",
    ),
    "a forward inside": (
        lambda layer: own_forward(layer.base_layer),
        "a forward of its own in base_layer",
    ),
    "a forward of its own": (own_forward, "a forward of its own"),
    "a scaling": (
        lambda layer: layer.scaling.update(default=torch.tensor(2.0)),
        "scaling of Tensor",
    ),
    "a parametrization": (
        lambda layer: parametrize.register_parametrization(layer.lora_A["default"], "weight", nn.Identity()),
        "ParametrizedLinear as lora_A",
    ),
    "another adapter": (
        lambda layer: layer.update_layer(
            "b", r=2, lora_alpha=2, config=LoraConfig(r=2, init_lora_weights="mica")
        ),
        "MiCALinearVariant",
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_not_known_is_left_and_told(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = peft_model()
    change, words = REASONS[reason]
    change(layer_of(model))
    before = model.eval()(inputs())
    fastlora.accelerate(model)
    assert caplog.messages == [f"0 of 1 LoRA layers run fused; left to PEFT: 1 lora.Linear with {words}"]
    assert type(layer_of(model)) is PeftLinear
    assert torch.equal(model(inputs()), before)


def test_layers_are_counted_by_reason(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(4, 4), Reversed(4, 4), Reversed(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1", "2", "3", "4"]))
    hooked("lora_A")(model.base_model.model[3])
    fastlora.accelerate(model)
    assert caplog.messages == [
        "2 of 5 LoRA layers run fused; left to PEFT: 2 lora.Linear on Reversed, which is no "
        "quantised layer that is known, 1 lora.Linear with hooks on lora_A"
    ]


def test_accelerating_again_looks_again(caplog: pytest.LogCaptureFixture) -> None:
    model = fastlora.accelerate(fastlora.accelerate(peft_model()))
    assert is_fused(model, inputs())
    assert not caplog.messages
    handle = hooked("lora_B")(layer_of(model))
    assert type(layer_of(fastlora.accelerate(model))) is PeftLinear
    assert len(caplog.messages) == 1
    handle.remove()  # type: ignore[attr-defined]
    assert type(layer_of(fastlora.accelerate(model))) is FusedLinear
    assert len(caplog.messages) == 1


def subclassed(layer: nn.Module) -> None:
    """As ``fully_shard`` and ``parametrize`` do it."""
    kind = type(layer)
    layer.__class__ = type(f"FSDP{kind.__name__}", (kind,), {"sharded": True})


def test_restore_finds_layers_whose_class_changed() -> None:
    plain, accelerated = twins(peft_model(), change=lambda model: subclassed(layer_of(model)))
    layer = layer_of(accelerated)
    assert is_fused(accelerated, inputs())
    assert isinstance(layer_of(fastlora.accelerate(accelerated)), FusedLinear)
    fastlora.restore(accelerated)
    assert [kind.__name__ for kind in type(layer).__mro__[:2]] == ["FSDPLinear", "Linear"]
    assert not isinstance(layer, FusedLinear)
    assert layer.sharded
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()), exactly=True)


def test_a_forward_that_was_kept_is_restored_too() -> None:
    """Hooks of Hugging Face's accelerate keep the bound forward and call it."""
    plain, accelerated = twins(peft_model(), change=lambda model: own_forward(layer_of(model)))
    fastlora.restore(accelerated)
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()), exactly=True)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def whole(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in found.items()
    }


@pytest.mark.parametrize("before", [True, False], ids=["sharded before", "sharded after"])
def test_sharded_layers(before: bool, mesh: DeviceMesh, caplog: pytest.LogCaptureFixture) -> None:
    """FSDP2 changes the class of what it shards; a layer inside of that keeps its own."""
    expected = run(peft_model(), inputs())
    outer, inner = peft_model(), peft_model()
    for model, sharded in ((outer, outer), (inner, layer_of(inner))):
        if not before:
            fastlora.accelerate(model)
        fully_shard(sharded, mesh=mesh)
        if before:
            fastlora.accelerate(model)
        assert_equal_runs(whole(run(model, inputs())), expected)
    told = ["0 of 1 LoRA layers run fused; left to PEFT: 1 lora.FSDPLinear"]
    assert caplog.messages == (told if before else [])
    assert isinstance(layer_of(outer), FusedLinear)
    for model in (outer, inner):
        fastlora.restore(model)
        assert not isinstance(layer_of(model), FusedLinear)
        assert_equal_runs(whole(run(model, inputs())), expected)
    assert isinstance(layer_of(inner), FSDPModule)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_accelerated_model_are_accelerated(way: str) -> None:
    plain, accelerated = twins(with_adapters(peft_model(use_dora=True), "b"))
    accelerated.set_adapter("b")
    plain.set_adapter("b")
    file = io.BytesIO()
    if way == "torch.save":
        torch.save(accelerated, file)
        file.seek(0)
    copies: dict[str, Callable[[], Any]] = {
        "deepcopy": lambda: copy.deepcopy(accelerated),
        "pickle": lambda: pickle.loads(pickle.dumps(accelerated)),
        "torch.save": lambda: torch.load(file, weights_only=False),
    }
    copied = copies[way]()
    assert is_fused(copied, inputs())
    assert_equal_runs(run(copied, inputs()), run(plain, inputs()))
    fastlora.restore(copied)
    assert is_fused(accelerated, inputs())
    assert_equal_runs(run(copied, inputs()), run(plain, inputs()), exactly=True)


def test_restore_without_accelerate_changes_nothing() -> None:
    model = peft_model()
    kinds = [type(module) for module in model.modules()]
    assert fastlora.restore(model) is model
    assert [type(module) for module in model.modules()] == kinds
