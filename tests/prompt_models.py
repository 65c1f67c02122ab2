"""Small transformers of every kind that takes prompts, and what they compute written out by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.nn.prompts.modules import PromptModule
from tests.lora_models import tiny_vit

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VISION_KINDS = ["torchvision", "timm", "timm-registers", "timm-patches", "hf", "hf-classifier", "hf-deit"]
TEXT_KINDS = ["bert", "roberta", "distilbert"]
TOKENS = 5


def prompts_of(model: nn.Module) -> PromptModule:
    (prompts,) = (module for module in model.modules() if isinstance(module, PromptModule))
    return prompts


def main_output(output: Any) -> Tensor:
    """The tensor a user would train on."""
    return output if isinstance(output, Tensor) else output[0]


def vision_model(kind: str) -> nn.Module:
    """Two blocks, eight wide, 8×8 pixels in 4×4 patches; the head does not start at zero."""
    if kind == "torchvision":
        plain: nn.Module = tiny_vit()
        return plain
    if kind.startswith("timm"):
        timm = pytest.importorskip("timm", reason="prompts a model of timm, an optional package")
        more = {
            "timm": {},
            "timm-registers": {"reg_tokens": 2, "global_pool": "avg"},
            "timm-patches": {"class_token": False, "global_pool": "avg", "pre_norm": True},
        }[kind]
        vit = timm.models.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, **more
        )
        nn.init.normal_(vit.head.weight)
        return vit  # type: ignore[no-any-return]
    transformers = pytest.importorskip("transformers", reason="prompts a Hugging Face model, optional")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"image_size": 8, "patch_size": 4, "num_labels": 3}
    if kind == "hf-deit":
        return transformers.DeiTModel(transformers.DeiTConfig(**sizes))  # type: ignore[no-any-return]
    config = transformers.ViTConfig(**sizes)
    maker = transformers.ViTForImageClassification if kind == "hf-classifier" else transformers.ViTModel
    return maker(config)  # type: ignore[no-any-return]


def text_model(kind: str, **settings: Any) -> nn.Module:
    """Two layers, eight wide, thirty words, positions for twelve tokens of text."""
    transformers = pytest.importorskip("transformers", reason="prompts a Hugging Face model, optional")
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=12, **settings
        )
        return transformers.DistilBertModel(config)  # type: ignore[no-any-return]
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 14 if kind == "roberta" else 12}
    makers = {
        "bert": ("BertConfig", "BertModel"),
        "bert-classifier": ("BertConfig", "BertForSequenceClassification"),
        "bert-masked": ("BertConfig", "BertForMaskedLM"),
        "roberta": ("RobertaConfig", "RobertaModel"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
    }
    config, maker = (getattr(transformers, name) for name in makers[kind])
    return maker(config(**sizes, **settings))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ByHand:
    """A vision transformer cut open around its blocks."""

    blocks: Sequence[nn.Module]
    prefix: int
    before: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor, tokens: Tensor, deep: bool) -> Tensor:
        """The formula of visual prompt tuning; ``tokens`` ``[blocks or 1, num_tokens, hidden]``."""
        x, last = self.before(images), len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            if deep or index == 0:
                new = tokens[index].repeat(len(x), 1, 1)
                x = torch.cat([x[:, : self.prefix], new, x[:, self.prefix :]], dim=1)
            x = block(x)
            if deep or index == last:
                x = torch.cat([x[:, : self.prefix], x[:, self.prefix + tokens.shape[1] :]], dim=1)
        return self.after(x)


def open_vision(kind: str, model: Any) -> ByHand:
    """The parts of a model *without* prompts, in eval mode."""
    if kind == "torchvision":
        encoder = model.encoder

        def embed(images: Tensor) -> Tensor:
            classes = model.class_token.expand(len(images), -1, -1)
            embedded: Tensor = (
                torch.cat([classes, model._process_input(images)], dim=1) + encoder.pos_embedding
            )
            return embedded

        return ByHand(list(encoder.layers), 1, embed, lambda x: model.heads(encoder.ln(x)[:, 0]))
    if kind.startswith("timm"):
        prefix = {"timm": 1, "timm-registers": 3, "timm-patches": 0}[kind]
        return ByHand(
            list(model.blocks),
            prefix,
            lambda images: model.norm_pre(model._pos_embed(model.patch_embed(images))),
            lambda x: model.forward_head(model.norm(x)),
        )
    prefix = 2 if kind == "hf-deit" else 1
    if kind == "hf-classifier":
        vit = model.vit
        return ByHand(
            list(vit.layers), prefix, vit.embeddings, lambda x: model.classifier(vit.layernorm(x)[:, 0])
        )
    return ByHand(list(model.layers), prefix, model.embeddings, model.layernorm)
