"""Options of the wrong kind are refused everywhere, never taken for true or rounded in silence."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.domain import methods
from fastlora.init import eva_, olora_, pissa_
from fastlora.nn.gradient_reversal import ReversalSchedule
from fastlora.transfer.optim import parameter_groups
from fastlora.transfer.unfreezing import GradualUnfreezing
from tests.lora_models import mlp, tiny_vit

PLAIN = mlp()
NOT_A_FLAG = ["no", 1, 0, None, "False", 0.0]
NOT_A_COUNT: list[Any] = ["8", True, 4.0, 0, -1, None, math.nan]
NOT_A_NUMBER: list[Any] = ["2", True, math.nan, math.inf, None, [1.0]]
NOT_A_CHANCE: list[Any] = ["0.1", True, math.nan, 1.5, -0.1, None]


def with_two_adapters() -> nn.Module:
    return fastlora.add_adapter(fastlora.apply_lora(mlp(), rank=2), "b")


def weighted(**options: Any) -> Any:
    given = {"weights": [1.0, 1.0], "combination_type": "cat"} | options
    return fastlora.add_weighted_adapter(with_two_adapters(), ["default", "b"], adapter_name="c", **given)


def domain_model(**options: Any) -> Any:
    return fastlora.DomainAdaptationModel(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 1), **options)


LORA_MAKERS: dict[str, Callable[..., Any]] = {
    "apply_lora": lambda **o: fastlora.apply_lora(mlp(), **o),
    "LoRALinear": lambda **o: fastlora.LoRALinear(4, 4, **o),
    "from_linear": lambda **o: fastlora.LoRALinear.from_linear(nn.Linear(4, 4), **o),
    "LoRAConv2d": lambda **o: fastlora.LoRAConv2d(4, 4, 1, **o),
    "LoRALayer": lambda **o: fastlora.LoRALayer(nn.Linear(4, 4), **o),
    "from_attention": lambda **o: fastlora.LoRAMultiheadAttention.from_attention(
        nn.MultiheadAttention(4, 2), **o
    ),
    "from_embedding": lambda **o: fastlora.LoRAEmbedding.from_embedding(nn.Embedding(4, 4), **o),
}


@pytest.mark.parametrize("maker", LORA_MAKERS)
@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("rslora", NOT_A_FLAG),
        ("rank", NOT_A_COUNT),
        ("alpha", NOT_A_NUMBER),
        ("dropout", NOT_A_CHANCE),
    ],
)
def test_lora_options(maker: str, option: str, values: list[Any]) -> None:
    """apply_lora(rslora="no") silently meant yes."""
    if maker == "from_embedding" and option == "dropout":
        option, values = "dora", NOT_A_FLAG
    for value in values:
        with pytest.raises((TypeError, ValueError), match=option):
            LORA_MAKERS[maker](**{option: value})


OTHERS: dict[str, tuple[Callable[..., Any], dict[str, list[Any]]]] = {
    "LoRALinear": (LORA_MAKERS["LoRALinear"], {"bias": NOT_A_FLAG, "dora": NOT_A_FLAG}),
    "LoRAConv2d": (LORA_MAKERS["LoRAConv2d"], {"bias": NOT_A_FLAG}),
    "LoRAEmbedding": (
        lambda **o: fastlora.LoRAEmbedding(4, 4, **o), {"scale_grad_by_freq": NOT_A_FLAG},
    ),
    "LoRAMultiheadAttention": (
        lambda **o: fastlora.LoRAMultiheadAttention(4, 2, **o),
        {"bias": NOT_A_FLAG, "batch_first": NOT_A_FLAG, "dropout": NOT_A_CHANCE},
    ),
    "apply_adapters": (
        lambda **o: fastlora.apply_adapters(tiny_vit(), **o),
        {
            "adapter_size": ["8", True, 4.0, 0], "bias": NOT_A_FLAG, "dropout": NOT_A_CHANCE,
            "scale": ["x", True, math.nan, 0.0, None], "hidden_size": ["8", True, 8.0, 0],
            "reduction_factor": ["8", True, 2.0, 0],
        },
    ),
    "apply_prompts": (
        lambda **o: fastlora.apply_prompts(tiny_vit(), **o),
        {"num_tokens": NOT_A_COUNT, "deep": NOT_A_FLAG, "dropout": NOT_A_CHANCE},
    ),
    "add_adapter": (
        lambda **o: fastlora.add_adapter(fastlora.apply_lora(mlp(), rank=2), "b", **o),
        {"rank": ["8", True, 4.0, 0], "alpha": ["2", True, math.nan], "rslora": ["no", 1]},
    ),
    "add_weighted_adapter": (
        lambda **o: weighted(**o),
        {"weights": [["1", 1.0], [True, 1.0], [math.nan, 1.0]], "density": ["0.5", True, math.nan]},
    ),
    "GradientReversalLayer": (fastlora.GradientReversalLayer, {"alpha": NOT_A_NUMBER}),
    "gradient_reversal": (
        lambda **o: fastlora.gradient_reversal(torch.ones(2), **o), {"alpha": NOT_A_NUMBER},
    ),
    "ReversalSchedule": (
        lambda **o: ReversalSchedule(**{"total_steps": 2, **o}),
        {"total_steps": NOT_A_COUNT, "gamma": [*NOT_A_NUMBER, 0.0], "high": [*NOT_A_NUMBER, -1.0]},
    ),
    "DomainAdaptationModel": (
        domain_model,
        {"alpha": NOT_A_NUMBER, "alignment": ["nope", 1, nn.Linear(1, 1)], "separate_batch_norm": NOT_A_FLAG},
    ),
    "CDAN": (
        lambda **o: methods.CDAN(nn.Linear(6, 1), **{"num_features": 3, "num_classes": 2, **o}),
        {"num_features": NOT_A_COUNT, "entropy": NOT_A_FLAG, "max_features": NOT_A_COUNT},
    ),
    "MinimumClassConfusion": (methods.MinimumClassConfusion, {"temperature": [*NOT_A_NUMBER, 0.0]}),
    "JointMMD": (
        methods.JointMMD, {"bandwidths": ["1", [], [math.nan], [True]], "class_bandwidth": NOT_A_NUMBER},
    ),
    "TransferLearningModel": (
        lambda **o: fastlora.TransferLearningModel(nn.Linear(4, 3), 2, sample_input=torch.ones(1, 4), **o),
        {"freeze_backbone": NOT_A_FLAG, "train_batch_norm": NOT_A_FLAG},
    ),
    "parameter_groups": (
        lambda **o: parameter_groups(PLAIN, PLAIN[-1], **{"lr": 0.1, **o}),
        {"lr": NOT_A_NUMBER, "weight_decay": ["1", True, math.nan], "layer_decay": ["1", True, math.nan]},
    ),
    "GradualUnfreezing": (lambda **o: GradualUnfreezing((1,), **o), {"train_batch_norm": NOT_A_FLAG}),
    "eva_": (
        lambda **o: eva_(fastlora.apply_lora(mlp(), rank=2), [torch.ones(2, 12)], **o), {"rho": NOT_A_NUMBER},
    ),
    "pissa_": (
        lambda **o: pissa_(fastlora.apply_lora(mlp(), rank=2), **o),
        {"niter": ["8", True, 4.0, 0], "progress": NOT_A_FLAG},
    ),
    "olora_": (lambda **o: olora_(fastlora.apply_lora(mlp(), rank=2), **o), {"progress": NOT_A_FLAG}),
    "set_backend": (
        lambda **o: fastlora.set_backend(**o), {"name": [True, None, "fast", ["torch"]]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("maker", OTHERS)
def test_other_options(maker: str) -> None:
    make, options = OTHERS[maker]
    words = {"weights": "weight", "name": "backend", "bandwidths": "bandwidth"}
    for option, values in options.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=words.get(option, option)):
                make(**{option: value})
