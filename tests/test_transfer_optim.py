"""Parameter groups: real rates, all parameters from the start; and unfreezing by a schedule."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

import fastlora
from fastlora.anatomy.stages import stages
from fastlora.transfer.create import create_transfer_model
from fastlora.transfer.models.freezing import keep_frozen_in_eval
from fastlora.transfer.optim import parameter_groups
from fastlora.transfer.unfreezing import GradualUnfreezing


def small_vit() -> models.VisionTransformer:
    torch.manual_seed(0)
    return models.VisionTransformer(28, 14, 3, 2, 32, 64, num_classes=3)


def by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in groups}


def test_every_parameter_is_in_one_group_frozen_or_not() -> None:
    for strategy in ("feature_extraction", "fine_tuning", "full"):
        model = create_transfer_model("resnet18", 3, strategy, weights=None)
        groups = parameter_groups(model, model.get_submodule("fc"), lr=0.1)
        ids = [id(p) for group in groups for p in group["params"]]
        assert len(ids) == len(set(ids))
        assert set(ids) == set(map(id, model.parameters()))
        assert [group["name"] for group in groups][:3] == ["stem", "stem.no_decay", "layer1"]


def test_rates_fall_towards_the_input() -> None:
    model = small_vit()
    groups = by_name(parameter_groups(model, model.heads, lr=0.2, layer_decay=0.5, head_factor=10))
    blocks = [f"encoder.layers.encoder_layer_{index}" for index in range(3)]
    wanted = {"stem": 0.2 / 16, **{name: 0.2 / 2 ** (3 - i) for i, name in enumerate(blocks)}, "head": 2.0}
    assert {name: groups[name]["lr"] for name in wanted} == pytest.approx(wanted)


def test_what_has_no_weight_decay() -> None:
    model = small_vit()
    fastlora.apply_lora(model, rank=2, modules_to_save=["heads.head"])
    groups = parameter_groups(model, model.heads, lr=0.1, weight_decay=0.3)
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    names = {name for name, p in model.named_parameters() if id(p) not in decayed}
    assert {"class_token", "encoder.pos_embedding", "encoder.ln.weight", "heads.head.bias"} <= names
    assert all(p.dim() == 1 or "class" in n or "pos" in n for n, p in model.named_parameters() if n in names)
    assert all(p.dim() > 1 for n, p in model.named_parameters() if n not in names)


def test_prompts_are_not_decayed() -> None:
    model = small_vit()
    fastlora.apply_prompts(model, num_tokens=2, deep=True)
    groups = parameter_groups(model, model.heads, lr=0.1, weight_decay=0.3)
    free = {id(p) for group in groups for p in group["params"] if not group["weight_decay"]}
    prompts = [p for n, p in model.named_parameters() if p.requires_grad and "heads" not in n]
    assert prompts
    assert all(id(p) in free for p in prompts)


def test_lora_plus() -> None:
    model = small_vit()
    fastlora.apply_lora(model, rank=2, modules_to_save=["heads.head"])
    groups = parameter_groups(model, model.heads, lr=0.1, lora_plus_ratio=16)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1.6 if "lora_B" in name else 0.1), name


def test_norms_with_more_dimensions_are_norms() -> None:
    model = nn.Sequential(nn.LayerNorm((4, 4)), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
    groups = parameter_groups(model, model[3], lr=0.1)
    free = {p for group in groups for p in group["params"] if not group["weight_decay"]}
    assert model[0].weight in free
    assert model[2].weight not in free


@pytest.mark.parametrize("kind", ["cosine", "one-cycle", "lambda"])
def test_schedulers_scale_every_group(kind: str) -> None:
    model = small_vit()
    groups = parameter_groups(model, model.heads, lr=0.1, layer_decay=0.5)
    first = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups)
    made: dict[str, Any] = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        "one-cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, first, total_steps=10),
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    }
    schedule = made[kind]()
    for _ in range(5):
        optimizer.step()
        schedule.step()
    factors = [group["lr"] / rate for group, rate in zip(optimizer.param_groups, first, strict=True)]
    assert factors == pytest.approx([factors[0]] * len(factors))
    assert factors[0] != 1


def test_a_stage_that_two_stages_share_learns_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4), shared, nn.Linear(4, 2))
    groups = parameter_groups(model, model[4], lr=0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))


BAD = [
    ({"lr": 0.0}, "expected lr (above 0|to be finite)"),
    ({"lr": float("nan")}, "expected lr (above 0|to be finite)"),
    ({"lr": 0.1, "weight_decay": -1}, "weight_decay of 0 or more"),
    ({"lr": 0.1, "layer_decay": 1.5}, "layer_decay above 0 and at most 1"),
    ({"lr": 0.1, "head_factor": -3}, "head_factor above 0"),
    ({"lr": 0.1, "lora_plus_ratio": 0}, "lora_plus_ratio above 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_numbers(settings: dict[str, Any], message: str) -> None:
    model = small_vit()
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, model.heads, **settings)


def test_a_head_of_another_model() -> None:
    with pytest.raises(ValueError, match="expected head to be a module of VisionTransformer"):
        parameter_groups(small_vit(), small_vit().heads, lr=0.1)


def test_unfreezing_switches_groups_on_and_moves_nothing_before() -> None:
    model = keep_frozen_in_eval(small_vit())
    groups = parameter_groups(model, model.heads, lr=0.01, layer_decay=0.8)
    optimizer, schedule = torch.optim.AdamW(groups), GradualUnfreezing((1, 2, 2))
    names = [stage.name for stage in stages(model, model.heads)]
    x, y = torch.randn(6, 3, 28, 28), torch.tensor([0, 1, 2] * 2)
    for epoch, expected in enumerate([0, 1, 3, 3]):
        assert [s.name for s in schedule.apply(model, model.heads, epoch)] == names[len(names) - expected :]
        before = copy.deepcopy(dict(model.named_parameters()))
        loss = nn.functional.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
        trained = {n for n in before if n.startswith("encoder.layers")} & moved
        assert {n.split(".")[2] for n in trained} == {
            n.split(".")[-1] for n in names[len(names) - expected :]
        }


def test_even_schedules() -> None:
    assert GradualUnfreezing.evenly(2, 9).at == (3, 6)
    assert GradualUnfreezing.evenly(5, 3).at == (0, 1, 1, 2, 2)
    steps = GradualUnfreezing.evenly(3, 1000, unit="step")
    assert [steps.trained_at(step) for step in (0, 249, 250, 999)] == [0, 0, 1, 3]


def test_bad_schedules() -> None:
    for at in ((), (3, 1), (-1, 2)):
        with pytest.raises(ValueError, match="that don't fall"):
            GradualUnfreezing(at)
    with pytest.raises(TypeError, match="at as integers"):
        GradualUnfreezing((1.5,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'epoch' or 'step', got 'hour'"):
        GradualUnfreezing((1,), "hour")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        GradualUnfreezing.evenly(0, 3)
    model = small_vit()
    with pytest.raises(ValueError, match="from 0 to 4, got 5"):
        GradualUnfreezing((0, 0, 0, 0, 0)).apply(model, model.heads, 0)
