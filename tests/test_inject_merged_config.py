"""Quantised models of Hugging Face, merged into dense copies: what is saved is read again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import fastlora
from tests.hf_models import as_trained, llama, logits

KINDS: dict[str, tuple[dict[str, Any], type[nn.Linear]]] = {
    "4 bits": ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}, Linear4bit),
    "8 bits": ({"load_in_8bit": True}, Linear8bitLt),
}
TARGETS: dict[str, Any] = {"all": "all-linear", "some": ["q_proj", "up_proj"]}


def answers(model: Any) -> Tensor:
    # bitsandbytes rewrites 4-bit weights of some sizes alone for inference; without dropout both are the same
    return logits(model.train())


def adapted(kind: str, targets: str, folder: Path) -> Any:
    """A Llama that was loaded quantised, with trained LoRA."""
    llama().bfloat16().save_pretrained(folder)
    quantised: Any = BitsAndBytesConfig
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantised(**KINDS[kind][0]))
    return as_trained(fastlora.apply_lora(model, rank=2, target_modules=TARGETS[targets]))


@pytest.mark.parametrize("removed", [False, True], ids=["merged", "removed"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_answers_as_the_model_did(
    kind: str, targets: str, removed: bool, tmp_path: Path
) -> None:
    model = adapted(kind, targets, tmp_path / "base")
    settings = model.config.quantization_config
    fastlora.merge_adapters(model)
    expected = answers(model)
    if removed:
        fastlora.remove_adapters(model)
        assert torch.equal(answers(model), expected)
    model.save_pretrained(tmp_path / "merged")
    if not removed:
        # the weights can be put back
        assert model.config.quantization_config is settings
        assert model.is_quantized
    read = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(answers(read), expected)
    attention = read.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear
    if targets == "all":
        assert not hasattr(read.config, "quantization_config")
    else:
        assert type(attention.k_proj) is KINDS[kind][1]


def test_a_removed_model_is_a_plain_one(tmp_path: Path) -> None:
    """transformers refuses to cast a model that says it is quantised."""
    model = adapted("4 bits", "all", tmp_path)
    fastlora.remove_adapters(fastlora.merge_adapters(model))
    assert not getattr(model, "is_quantized", False)
    assert logits(model.to(torch.float64)).dtype is torch.float64


def test_a_quantiser_that_can_except_no_layer_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted("4 bits", "some", tmp_path / "base")
    model.config.quantization_config = SimpleNamespace()
    fastlora.merge_adapters(model)
    with pytest.raises(ValueError, match="SimpleNamespace can't except the others"):
        model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    fastlora.remove_adapters(model)
    assert "can't except the others" in caplog.text
