"""Tiny transformers of every library that apply_adapters knows, built without weights from anywhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer

import fastlora
from fastlora.anatomy.names import Model
from fastlora.nn import AdaptedModule, AdapterLayer
from tests.lora_models import tiny_vit

HIDDEN = 8


@dataclass(frozen=True)
class Case:
    """A model, what to feed it, and where its adapters go.

    ``attention``, ``mlp`` and ``beside`` name the places in a block, ``{}`` being the block's number.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    attention: str
    mlp: str
    beside: str | None
    cross: str | None = None

    def places(self, placement: str) -> list[str]:
        spots = {
            "houlsby": (self.attention, self.cross, self.mlp),
            "pfeiffer": (self.mlp,),
            "parallel": (self.beside,),
        }[placement]
        return [spot.format(block) for block in range(2) for spot in spots if spot is not None]

    def run(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        out = model(*(inputs or self.inputs()))
        return out if isinstance(out, Tensor) else out[0]


def images() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def tokens() -> tuple[Tensor]:
    return (torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0)),)


def sequences() -> tuple[Tensor]:
    return (torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(0)),)


def timm_vit(**settings: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="adapts a timm model, an optional package")
    sizes = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": HIDDEN,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    model: nn.Module = timm.models.VisionTransformer(**sizes, **settings)
    return model


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="adapts Hugging Face models, an optional package")


def _sizes(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return sizes | more


def bert(**settings: Any) -> nn.Module:
    hf = transformers()
    return hf.BertModel(hf.BertConfig(**_sizes(vocab_size=20, max_position_embeddings=16, **settings)))  # type: ignore[no-any-return]


def hf_vit() -> nn.Module:
    hf = transformers()
    return hf.ViTModel(hf.ViTConfig(**_sizes(image_size=8, patch_size=4)))  # type: ignore[no-any-return]


def llama() -> nn.Module:
    hf = transformers()
    return hf.LlamaModel(hf.LlamaConfig(**_sizes(vocab_size=20, num_key_value_heads=1, use_cache=False)))  # type: ignore[no-any-return]


def torch_encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(HIDDEN, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


class TorchDecoder(nn.Module):
    """nn.TransformerDecoder, which attends to its own input here."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(HIDDEN, 2, 16, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, x.flip(0))  # type: ignore[no-any-return]


def swin() -> nn.Module:
    model: nn.Module = SwinTransformer(
        [2, 2], HIDDEN, [2], [2], [2, 2], num_classes=3, stochastic_depth_prob=0.0
    )
    return model


ENCODER = "encoder.layers.encoder_layer_{}"
CASES = {
    "torchvision": Case(tiny_vit, images, f"{ENCODER}.self_attention", f"{ENCODER}.mlp", f"{ENCODER}.mlp"),
    "swin": Case(swin, images, "features.1.{}.attn", "features.1.{}.mlp", "features.1.{}.mlp"),
    "timm": Case(timm_vit, images, "blocks.{}.attn", "blocks.{}.mlp", "blocks.{}.mlp"),
    "timm-layer-scale": Case(
        lambda: timm_vit(init_values=1e-5), images, "blocks.{}.ls1", "blocks.{}.ls2", "blocks.{}.mlp"
    ),
    "bert": Case(
        bert,
        tokens,
        "encoder.layer.{}.attention.output.dropout",
        "encoder.layer.{}.output.dropout",
        "encoder.layer.{}.output",
    ),
    "hf-vit": Case(hf_vit, images, "layers.{}.attention", "layers.{}.mlp", "layers.{}.mlp"),
    "llama": Case(llama, tokens, "layers.{}.self_attn", "layers.{}.mlp", "layers.{}.mlp"),
    "torch": Case(torch_encoder, sequences, "layers.{}.dropout1", "layers.{}.dropout2", None),
    "torch-decoder": Case(
        TorchDecoder,
        sequences,
        "decoder.layers.{}.dropout1",
        "decoder.layers.{}.dropout3",
        None,
        "decoder.layers.{}.dropout2",
    ),
}
PLACED = [
    pytest.param(case, placement, id=f"{name}-{placement}")
    for name, case in CASES.items()
    for placement in ("houlsby", "pfeiffer", "parallel")
    if placement != "parallel" or case.beside is not None
]


def randomize_bottlenecks(model: Model, seed: int = 1) -> Model:
    """Give every adapter values that matter; W_up and the biases are zero at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdapterLayer):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def adapted(model: Model, **settings: Any) -> Model:
    """The model in eval mode with adapters that matter."""
    return randomize_bottlenecks(fastlora.apply_adapters(model, **{"adapter_size": 3, **settings})).eval()


def place(model: nn.Module, name: str) -> AdaptedModule:
    module = model.get_submodule(name)
    assert isinstance(module, AdaptedModule)
    return module


def bottleneck(module: AdaptedModule, h: Tensor) -> Tensor:
    """The adapter's own part, from its weights alone."""
    layer = module.adapter
    down = h @ layer.down_proj.weight.T + layer.down_proj.bias
    return nn.functional.gelu(down) @ layer.up_proj.weight.T + layer.up_proj.bias
