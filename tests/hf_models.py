"""Tiny random models of Hugging Face's transformers, and PEFT models around them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

Make = Callable[[], Any]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(5))


def llama(*, tied: bool = False, kind: str = "LlamaForCausalLM", **options: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied, **options)
    return _made(kind, config)


def tied_llama() -> Any:
    return llama(tied=True)


def qwen2() -> Any:
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return _made("Qwen2ForCausalLM", config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return _made("GPT2LMHeadModel", config)


def t5() -> Any:
    sizes: dict[str, Any] = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes | {"vocab_size": 60, "decoder_start_token_id": 0})
    return _made("T5ForConditionalGeneration", config)


def bert(kind: str) -> Any:
    return _made(kind, transformers.BertConfig(**SIZES))


def masked_bert() -> Any:
    return bert("BertForMaskedLM")


def _made(kind: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        decoder = {"decoder_input_ids": IDS} if "T5" in repr(type(plain(model))) else {}
        out = model(input_ids=IDS, **decoder)
    found: Tensor = out.start_logits if "start_logits" in out else out.logits
    return found


def plain(model: Any) -> Any:
    """The model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def as_trained(model: Any) -> Any:
    """Every parameter that trains moved, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def peft_trained(base: Any, **settings: Any) -> Any:
    """A PEFT model around ``base``, by default with LoRA on ``q_proj``."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **settings})
    return as_trained(get_peft_model(base, config))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
