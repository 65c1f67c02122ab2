"""What changes in a layer after ``accelerate`` counts from the next call on, as in PEFT's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune, weight_norm

from tests.peft_twins import (
    IN,
    assert_equal_runs,
    inputs,
    is_fused,
    layer_of,
    peft_model,
    run,
    twins,
)

Change = Callable[[Any], object]


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


class HalfDropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * input


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def doubled(linear: Any) -> None:
    linear.__class__ = Doubled


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2.0 * output


def double_input(module: nn.Module, args: Any) -> Any:
    return tuple(2.0 * x for x in args)


def double_gradient(module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
    return tuple(None if grad is None else 2.0 * grad for grad in grad_in)


def own_forward(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda *args, **kwargs: 2.0 * own(*args, **kwargs)


def bias_in_lora_A(layer: Any) -> None:
    layer.lora_A["default"] = nn.Linear(IN, 4)
    nn.init.constant_(layer.lora_A["default"].weight, 0.1)
    nn.init.constant_(layer.lora_A["default"].bias, 0.5)


def put(kind: str, module: Callable[[], nn.Module]) -> Change:
    return lambda model: getattr(layer_of(model), kind).update({"default": module()})


def inside(model: Any, part: str) -> Any:
    layer = layer_of(model)
    return layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]


PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")
CHANGES: dict[str, Change] = {
    "dropout is another module": put("lora_dropout", Half),
    "dropout is a subclass": put("lora_dropout", lambda: HalfDropout(0.3)),
    "dropout is channelwise": put("lora_dropout", lambda: nn.Dropout1d(0.5)),
    "lora_B is a sequence": lambda model: layer_of(model).lora_B.update(
        {"default": nn.Sequential(layer_of(model).lora_B["default"], Twice())}
    ),
    "lora_A has a bias": lambda model: bias_in_lora_A(layer_of(model)),
    "lora_A is a subclass": lambda model: doubled(layer_of(model).lora_A["default"]),
    "base_layer is a subclass": lambda model: doubled(layer_of(model).base_layer),
    "base_layer is wrapped": lambda model: setattr(
        layer_of(model), "base_layer", nn.Sequential(layer_of(model).base_layer, Twice())
    ),
    "scaling is a tensor": lambda model: layer_of(model).scaling.update(default=torch.tensor(1.5)),
    "scaling has an element": lambda model: layer_of(model).scaling.update(default=torch.tensor([1.5])),
    "scaling is infinite": lambda model: layer_of(model).scaling.update(default=float("inf")),
    "scaling is no number": lambda model: layer_of(model).scaling.update(default=float("nan")),
    "compiled hotswap": lambda model: prepare_model_for_compiled_hotswap(model, target_rank=8),
    "pruned": lambda model: prune.random_unstructured(layer_of(model).lora_A["default"], "weight", 5),
    "weight norm": lambda model: weight_norm(layer_of(model).lora_B["default"]),
    "parametrized": lambda model: parametrize.register_parametrization(
        layer_of(model).base_layer, "weight", Twice()
    ),
    "merged": lambda model: model.base_model.merge_adapter(),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "sparse": lambda model: setattr(
        layer_of(model).base_layer,
        "weight",
        nn.Parameter(layer_of(model).base_layer.weight.detach().to_sparse_csr(), requires_grad=False),
    ),
}
INSIDE: dict[str, Change] = {
    "hook": lambda module: module.register_forward_hook(double_output),
    "pre-hook": lambda module: module.register_forward_pre_hook(double_input),
    "backward hook": lambda module: module.register_full_backward_hook(double_gradient),
    "forward of its own": own_forward,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_fused_op_does_not_know_is_computed_by_peft(change: str) -> None:
    """Bit for bit: the same call of the same code."""
    plain, accelerated = twins(peft_model(lora_dropout=0.3 if "dropout" in change else 0.0).train())
    assert is_fused(accelerated, inputs())
    for model in (plain, accelerated):
        torch.manual_seed(5)
        CHANGES[change](model)
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()), exactly=True)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", INSIDE)
def test_what_stands_around_a_module_inside_is_run(change: str, part: str) -> None:
    def make() -> Any:
        return peft_model(lora_dropout=0.3, use_dora=part == "lora_magnitude_vector").train()

    plain, accelerated = twins(make(), change=lambda model: INSIDE[change](inside(model, part)))
    expected = run(plain, inputs())
    assert_equal_runs(run(accelerated, inputs()), expected, exactly=True)
    assert not torch.equal(expected["x"], run(make(), inputs())["x"])


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook"])
def test_hooks_on_all_modules_see_those_inside(kind: str) -> None:
    register = getattr(torch_module, f"register_module_{kind}")
    seen: list[list[str]] = []
    plain, accelerated = twins(peft_model(lora_dropout=0.3).train())
    for model in (plain, accelerated):
        found: list[str] = []
        handle = register(lambda module, *more, found=found: found.append(type(module).__name__))
        try:
            run(model, inputs())
        finally:
            handle.remove()
        seen.append([name.replace("FusedLinear", "Linear") for name in found])
    assert seen[0] == seen[1]
    assert seen[0].count("Linear") == 4
    assert is_fused(accelerated, inputs())


def test_a_patched_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, accelerated = twins(peft_model())
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2.0 * own(self, x))
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()), exactly=True)
    monkeypatch.undo()
    assert is_fused(accelerated, inputs())


def test_a_trained_scaling_gets_its_gradient() -> None:
    plain, accelerated = twins(peft_model())
    gradients = []
    for model in (plain, accelerated):
        scaling = torch.tensor(1.5, requires_grad=True)
        layer_of(model).scaling["default"] = scaling
        run(model, inputs())
        assert scaling.grad is not None
        gradients.append(scaling.grad)
    assert torch.equal(*gradients)


def test_a_hook_that_went_leaves_a_fused_layer() -> None:
    plain, accelerated = twins(peft_model())
    handle = layer_of(accelerated).lora_A["default"].register_forward_hook(double_output)
    assert not is_fused(accelerated, inputs())
    handle.remove()
    assert is_fused(accelerated, inputs())
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


def test_a_forward_around_the_layers_own_is_called() -> None:
    plain, accelerated = twins(peft_model(), change=lambda model: own_forward(layer_of(model)))
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


def test_matrices_of_two_dtypes_are_refused_as_by_peft() -> None:
    twin = twins(peft_model(), change=lambda model: layer_of(model).lora_B["default"].double())
    for model in twin:
        with pytest.raises(RuntimeError, match="dtype"):
            model(inputs())


def test_dropout_in_place_changes_its_input_as_in_peft() -> None:
    outputs = []
    for model in twins(peft_model(lora_dropout=0.5).train()):
        layer_of(model).lora_dropout["default"].inplace = True
        torch.manual_seed(1)
        x = inputs()
        with torch.no_grad():
            outputs.append((model(x), x))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][1], inputs())
