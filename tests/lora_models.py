"""Small models for the tests of modules, injection and files."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import fastlora
from fastlora.anatomy.names import Model
from fastlora.nn import LoRAModule


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three linear layers and one that is none: ``0``, ``2``, ``head`` and ``1``."""
    model = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8, bias=False))
    model.add_module("head", nn.Linear(8, 3))
    return model.to(dtype)


def tiny_vit() -> VisionTransformer:
    """torchvision's ViT with two layers, eight wide, 8×8 pixels in 4×4 patches."""
    vit = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)
    # torchvision starts the head at zero, which would hide every other gradient
    nn.init.normal_(vit.heads.get_parameter("head.weight"))
    return vit


def randomize_adapters(model: Model, seed: int = 1) -> Model:
    """Give every A and B values that matter; B is zero at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRAModule):
                for matrix in map(module.get_parameter, module.adapter_params()):
                    matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.3)
    return model


def trained(model: Model, **settings: Any) -> Model:
    """The model with adapters that matter, in eval mode."""
    return randomize_adapters(fastlora.apply_lora(model, **{"rank": 2, "alpha": 2, **settings})).eval()


class Snapshot:
    """Everything an operation that fails must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: id(module) for name, module in model.named_modules()}
        self.parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.generator = torch.get_rng_state()

    def assert_unchanged(self) -> None:
        now = Snapshot(self.model)
        assert now.modules == self.modules
        assert now.parameters == self.parameters
        assert now.training == self.training
        assert torch.equal(now.generator, self.generator)
        assert now.values.keys() == self.values.keys()
        assert all(same_bits(now.values[name], value) for name, value in self.values.items())


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bytes (so −0 is not 0, and NaN is NaN)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (left, right)]
    return torch.equal(*as_bytes)


class ConvNet(nn.Module):
    """Convolutions of several kinds and a head: ``[B, 3, 8, 8]`` to ``[B, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.point(self.grouped(self.stem(x)).relu()).mean((2, 3)))
        return y


class TextNet(nn.Module):
    """An embedding and a head: indices ``[B, T]`` to ``[B, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.head = nn.Linear(6, 5)

    def forward(self, indices: Tensor) -> Tensor:
        y: Tensor = self.head(self.words(indices).mean(1))
        return y


def conv_net() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet()


def text_net() -> TextNet:
    torch.manual_seed(0)
    return TextNet()
