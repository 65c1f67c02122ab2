"""What "all-linear" takes, trains and leaves out is what the field expects, and is said."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import fastlora
from tests.lora_models import mlp, tiny_vit

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def bert() -> nn.Module:
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    return model


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2, vocab_size=40)
    model: nn.Module = transformers.DistilBertForSequenceClassification(config)
    return model


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)
    model: nn.Module = transformers.LlamaForSequenceClassification(config)
    return model


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    return model


def whole(model: nn.Module) -> set[str]:
    """Modules that train without LoRA."""
    names = (name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name)
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (bert, {"classifier"}),
        (distilbert, {"pre_classifier", "classifier"}),
        (llama, {"score"}),
        (timm_vit, {"head"}),
        (tiny_vit, {"heads.head"}),
        (mlp, set()),
    ],
)
def test_all_linear_trains_a_classifiers_head_whole(
    make: Callable[[], nn.Module], heads: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT leaves the head out and trains it for a classification task; frozen, a new one stays random."""
    with caplog.at_level(logging.INFO):
        model = fastlora.apply_lora(make(), rank=2)
    assert whole(model) == heads
    assert all(head in caplog.text for head in heads)
    for head in heads:
        assert not any(isinstance(m, fastlora.LoRALinear) for m in model.get_submodule(head).modules())


def test_a_head_left_out_stays_frozen() -> None:
    assert not whole(fastlora.apply_lora(bert(), rank=2, exclude_modules=["classifier"]))


@pytest.mark.parametrize(
    "apply",
    [
        lambda **o: fastlora.apply_lora(bert(), target_modules=["query"], **o),
        lambda **o: fastlora.apply_adapters(bert(), **o),
        lambda **o: fastlora.apply_prompts(bert(), **o),
    ],
    ids=["lora", "adapters", "prompts"],
)
def test_a_head_that_stays_frozen_is_told(
    apply: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    apply()
    assert "modules_to_save=['classifier'] trains it" in caplog.text
    caplog.clear()
    apply(modules_to_save=["classifier"])
    assert not caplog.text


def test_experts_out_of_reach_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """unsloth-zoo#647, #779: experts kept in one tensor are no layers."""
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    with torch.device("cpu"):
        model = transformers.MixtralForCausalLM(config)
    experts = next((m for m in model.modules() if type(m).__name__ == "MixtralExperts"), None)
    fastlora.apply_lora(model, rank=2)
    (message,) = [record.getMessage() for record in caplog.records] or [""]
    # older versions of transformers keep experts as linear layers, which are adapted
    assert (experts is not None) == ("MixtralExperts" in message and "modules_to_save" in message)


def test_convolutions_out_of_reach_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = fastlora.apply_lora(resnet18(num_classes=3), rank=2)
    assert isinstance(model.fc, fastlora.LoRALinear)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "Conv2d" in message
    assert "target_modules" in message


def test_without_any_linear_layer_the_error_says_what_there_is() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    with pytest.raises(ValueError, match=r"Conv1D.*fastlora\.accelerate"):
        fastlora.apply_lora(transformers.GPT2LMHeadModel(config))
