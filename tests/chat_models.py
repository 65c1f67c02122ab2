"""A tiny language model that chats, saved as transformers saves one: bytes are its words."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SPECIAL = ["<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> Any:
    """Every byte a token, and ChatML around what is said."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*_SPECIAL, *letters])}
    found = Tokenizer(models.BPE(vocab=words, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(_SPECIAL)
    # without types
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=found, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=_TEMPLATE
    )


def save_tiny(folder: Path, intermediate_size: int = 128) -> None:
    """Write a Llama of two layers, 64 wide, and its tokenizer."""
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
