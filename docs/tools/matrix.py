"""Which model can carry which method, tried: ``python -m docs.tools.matrix`` writes the tables."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import fastlora
from fastlora.anatomy.stages import head as find_head
from fastlora.transfer.models.weightless import ModelSpec, build
from fastlora.transfer.strategies import STRATEGIES

PAGE = Path(__file__).parents[1] / "matrix.md"
# a model of each family
PICTURES = (
    "resnet18", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_lite0", "convnext_tiny", "densenet121",
    "vgg11", "regnet_y_400mf", "inception_v3", "vit_b_16", "swin_t", "maxvit_t", "dinov2_vits14",
    "timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224",
    "timm:convnext_atto", "timm:resnet10t", "timm:mixer_s16_224",
)  # fmt: skip
_SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": 60, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 60, "n_positions": 32}
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 60}
_VIT = _SMALL | {"image_size": 16, "patch_size": 8}
# a model of Hugging Face's transformers, and the sizes of a small one
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _SMALL,
    "MistralForCausalLM": _SMALL,
    "Qwen2ForCausalLM": _SMALL,
    "Qwen3ForCausalLM": _SMALL,
    "GemmaForCausalLM": _SMALL,
    "PhiForCausalLM": _SMALL,
    "GPT2LMHeadModel": _GPT2,
    "T5ForConditionalGeneration": _T5,
    "BertForSequenceClassification": _SMALL,
    "RobertaForSequenceClassification": _SMALL | {"pad_token_id": 1},
    "ViTForImageClassification": _VIT,
    "Dinov2ForImageClassification": _VIT,
}
ADDED: dict[str, Callable[..., nn.Module]] = {
    "LoRA": fastlora.apply_lora,
    "adapters": fastlora.apply_adapters,
    "prompts": fastlora.apply_prompts,
}
# what is added to a frozen model first: there models differ
_STRATEGIES = sorted(STRATEGIES.values(), key=lambda strategy: not strategy.adds)
_METHODS = {"pictures": [strategy.name for strategy in _STRATEGIES], "transformers": list(ADDED)}
_PARTS = {"pictures": PICTURES, "transformers": tuple(HUGGING_FACE)}


def row(model: str) -> str:
    """A model's line of its table.

    Args:
        model: One of ``PICTURES`` or ``HUGGING_FACE``.
    """
    methods = _METHODS["pictures" if model in PICTURES else "transformers"]
    tried = (_of_pictures if model in PICTURES else _of_hugging_face)(model)
    return f"| `{model}` | {' | '.join('yes' if tried[method] else '–' for method in methods)} |"


def table(part: str) -> str:
    """A whole table.

    Args:
        part: ``"pictures"`` or ``"transformers"``.
    """
    methods = _METHODS[part]
    lines = [f"| model | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    return "\n".join([*lines, *(row(model) for model in _PARTS[part])])


def main() -> None:
    """Write both tables into the page."""
    logging.getLogger("fastlora").setLevel(logging.ERROR)
    text = PAGE.read_text()
    for part in _PARTS:
        before, rest = text.split(f"<!-- {part} -->\n")
        after = rest[rest.index("\n<!-- end -->") :]
        text = f"{before}<!-- {part} -->\n\n{table(part)}\n{after}"
    PAGE.write_text(text)


def _of_pictures(name: str) -> dict[str, bool]:
    found = {}
    for strategy in STRATEGIES.values():
        model = build(ModelSpec(name))
        found[strategy.name] = _works(lambda: strategy.apply_to(model, find_head(model)[0]))  # noqa: B023
    return found


def _of_hugging_face(name: str) -> dict[str, bool]:
    return {method: _works(lambda: apply(_small(name))) for method, apply in ADDED.items()}  # noqa: B023


def _works(apply: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            apply()
        except (ValueError, TypeError):
            return False
    return True


def _small(name: str) -> nn.Module:
    kind: Any = getattr(transformers, name)
    torch.manual_seed(0)
    model: nn.Module = kind(kind.config_class(**HUGGING_FACE[name]))
    return model


if __name__ == "__main__":
    main()
