"""Scales, dropout, activity and number of adapters in an accelerated model: results are PEFT's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.peft_twins import (
    assert_equal_runs,
    awake,
    inputs,
    is_fused,
    layer_of,
    peft_model,
    run,
    twins,
    with_adapters,
)

SCALES: dict[str, dict[str, float]] = {
    "first off": {"default": 0.0},
    "second off": {"b": 0.0},
    "all off": {"default": 0.0, "b": 0.0, "c": 0.0},
    "negative": {"default": -1.0, "c": -0.5},
    "opposite": {"default": 1.0, "b": -1.0, "c": 0.0},
    "far apart": {"default": 1e-6, "b": 10.0},
    "tiny": {"default": 0.0, "b": 1e-30, "c": 0.0},
}


def set_scales(scales: dict[str, float]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, scale in scales.items():
            layer_of(model).set_scale(name, scale)

    return change


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}], ids=["lora", "lora_bias"])
@pytest.mark.parametrize("scales", SCALES)
def test_any_scales_of_several_adapters(scales: str, settings: dict[str, Any]) -> None:
    model = with_adapters(peft_model(**settings), "b", "c", **settings)
    plain, accelerated = twins(model, change=set_scales(SCALES[scales]))
    assert is_fused(accelerated, inputs())
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


@pytest.mark.parametrize("scale", [0.0, -2.0])
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_any_scale_of_one_adapter(scale: float, settings: dict[str, Any]) -> None:
    plain, accelerated = twins(peft_model(**settings), change=set_scales({"default": scale}))
    assert is_fused(accelerated, inputs())
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_beside_another_adapter(scale: float) -> None:
    plain, accelerated = twins(with_adapters(peft_model(), "b"), change=set_scales({"b": scale}))
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()), exactly=True)


def test_scaling_and_unscaling_a_layer() -> None:
    plain, accelerated = twins(with_adapters(peft_model(use_rslora=True), "b"))
    changes: tuple[Callable[[Any], object], ...] = (
        lambda layer: layer.scale_layer(0.0),
        lambda layer: layer.unscale_layer(None),
        lambda layer: layer.scale_layer(3),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.set_scale("b", 0),
    )
    for change in changes:
        for model in (plain, accelerated):
            change(layer_of(model))
        assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


def test_an_adapter_that_is_named_twice_counts_twice() -> None:
    model = with_adapters(peft_model(lora_bias=True), "b", lora_bias=True)
    twice = lambda model: setattr(layer_of(model), "_active_adapter", ["b", "default", "b"])  # noqa: E731
    plain, accelerated = twins(model, change=twice)
    assert is_fused(accelerated, inputs())
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


@pytest.mark.parametrize("other", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_dropout": 1.0}], ids=str)
def test_a_mask_or_magnitude_beside_another_adapter(other: dict[str, Any]) -> None:
    plain, accelerated = twins(with_adapters(peft_model(), "b", **other).train())
    assert is_fused(accelerated, inputs()) == ("lora_dropout" in other)
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


def test_several_adapters_with_dropout_in_sixteen_bits() -> None:
    """Float32 adapters beside a bfloat16 weight, to which PEFT casts x."""
    model = with_adapters(peft_model(dtype=torch.bfloat16), "b", lora_dropout=0.5)
    plain, accelerated = twins(model.train())
    x = inputs(torch.bfloat16)
    assert is_fused(accelerated, x)
    found, expected = run(accelerated, x), run(plain, x)
    assert found["output"].dtype == torch.bfloat16
    torch.testing.assert_close(found["output"], expected["output"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "settings", [{}, {"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}], ids=str
)
def test_dropout_of_one_leaves_the_frozen_layer(settings: dict[str, Any]) -> None:
    """As ``nn.Dropout(1)``: nothing but zeros, in the gradients of A and B too."""
    plain, accelerated = twins(peft_model(lora_dropout=1.0, **settings).train())
    assert is_fused(accelerated, inputs())
    found, expected = run(accelerated, inputs()), run(plain, inputs())
    assert_equal_runs(found, expected)
    matrices = [name for name in found if "lora_A" in name or "lora_B.default.weight" in name]
    assert len(matrices) == 2
    assert all(not found[name].any() for name in matrices)
    assert_equal_runs(run(accelerated.eval(), inputs()), run(plain.eval(), inputs()))


def test_dropout_that_changes_counts_from_the_next_call() -> None:
    plain, accelerated = twins(peft_model(lora_dropout=0.5).train())
    for p in (1.0, 0.0):
        for model in (plain, accelerated):
            layer_of(model).lora_dropout["default"].p = p
        assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))
    for model in (plain, accelerated):
        layer_of(model).lora_dropout["default"].p = 1.5
        with pytest.raises(ValueError, match="probability"):
            model(inputs())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("layer_trains", [True, False])
def test_the_dropout_module_and_the_layer_train_apart(settings: dict[str, Any], layer_trains: bool) -> None:
    """PEFT's DoRA asks both, its LoRA the module alone."""

    def change(model: Any) -> None:
        model.train(layer_trains)
        layer_of(model).lora_dropout["default"].train(not layer_trains)

    plain, accelerated = twins(peft_model(lora_dropout=1.0, **settings), change=change)
    assert is_fused(accelerated, inputs())
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


def test_adapters_come_and_go() -> None:
    plain, accelerated = twins(with_adapters(peft_model(), "b"))
    for model in (plain, accelerated):
        model.delete_adapter("default")
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))
    for model in (plain, accelerated):
        torch.manual_seed(2)
        model.add_adapter("kasa", LoraConfig(r=2, target_modules=["0"], init_lora_weights="mica"))
        awake(model).set_adapter("kasa")
    assert not is_fused(accelerated, inputs())
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()), exactly=True)
    for model in (plain, accelerated):
        model.set_adapter("b")
    assert is_fused(accelerated, inputs())
    assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))


def test_what_trains_may_change() -> None:
    plain, accelerated = twins(peft_model(lora_bias=True))
    for trained in ("base_layer", "lora_A", "lora_B"):
        for model in (plain, accelerated):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained in name)
        found = run(accelerated, inputs())
        assert any(trained in name for name in found)
        assert_equal_runs(found, run(plain, inputs()))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_merging_and_unmerging_between_calls(settings: dict[str, Any]) -> None:
    plain, accelerated = twins(with_adapters(peft_model(**settings), "b"))
    for step in ("merge_adapter", "unmerge_adapter"):
        for model in (plain, accelerated):
            getattr(model.base_model, step)()
        assert_equal_runs(run(accelerated, inputs()), run(plain, inputs()))
    for model in (plain, accelerated):
        model.base_model.merge_adapter()
    outputs = []
    for model in (plain, accelerated):
        # a merged layer that is switched off unmerges itself
        with model.disable_adapter():
            outputs.append(model(inputs()))
    assert torch.equal(*outputs)


def test_adapters_of_a_batch_are_named_in_the_call() -> None:
    plain, accelerated = twins(with_adapters(peft_model(), "b").eval())
    for names in (["default", "b", "__base__"], ["b", "b", "b"]):
        assert torch.equal(accelerated(inputs(), adapter_names=names), plain(inputs(), adapter_names=names))
