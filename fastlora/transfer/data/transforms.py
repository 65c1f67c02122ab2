"""The transforms a pretrained model was evaluated with, and their like for training."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import InterpolationMode, v2

from fastlora._core.extras import require
from fastlora.transfer.models.names import DINOV2, EFFICIENTNET_LITE0, TIMM_PREFIX

# what DINOv2 and torchvision's models were trained with
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE_MEAN, _LITE_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_SMALLEST_CROP = 0.35
# sides of a picture: a strip of one pixel's width would be blown up to gigabytes before it is cropped
LONGEST = 16

Transform = Callable[[Any], Tensor]


def pretrained_transforms(
    name: str, *, image_size: int | None = None, weights: str = "DEFAULT", flip: bool = True
) -> tuple[Transform, Transform]:
    """How a pretrained model wants its pictures: for training, and for evaluation.

    Evaluation is the model's own: size, crop, interpolation, mean and standard deviation. Training crops at
    random, at that size and with those numbers, and flips.

    Args:
        name: Name of the model, which :func:`fastlora.create_transfer_model` takes.
        image_size: Height and width in pixels, instead of the model's own; the resize scales along.
        weights: Name of one of torchvision's weights; they differ in their transforms.
        flip: Mirror half of the training pictures; wrong for digits and text.

    Raises:
        ValueError: An unknown model.
        ImportError: timm is wanted and not installed.

    Example:
        >>> train, evaluate = pretrained_transforms("resnet18", image_size=96)
        >>> from PIL import Image
        >>> evaluate(Image.new("RGB", (120, 100))).shape
        torch.Size([3, 96, 96])
    """
    crop, resize, interpolation, mean, std = _described(name, weights)
    if image_size is not None:
        if image_size < 1:
            raise ValueError(f"expected image_size >= 1, got {image_size}")
        resize, crop = round(resize * image_size / crop), image_size
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    cut = v2.RandomResizedCrop(crop, scale=(_SMALLEST_CROP, 1.0), interpolation=interpolation)
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    shrink = v2.Resize(resize, interpolation=interpolation)
    whole = [MiddleOfStrip(), shrink, v2.CenterCrop(crop), *finish]
    return v2.Compose([cut, *mirror, *finish]), v2.Compose(whole)


class MiddleOfStrip(nn.Module):
    """Cuts a picture down to 16 times its shorter side; no other picture is touched.

    Example:
        >>> tuple(MiddleOfStrip()(torch.zeros(3, 2, 50)).shape)
        (3, 2, 32)
    """

    def forward(self, picture: Any) -> Any:
        """The middle of a PIL picture or a tensor ``[..., H, W]``."""
        height, width = v2.functional.get_size(picture)
        longest = LONGEST * min(height, width)
        if max(height, width) <= longest:
            return picture
        return v2.functional.center_crop(picture, [min(height, longest), min(width, longest)])


def _described(name: str, weights: str) -> tuple[int, int, InterpolationMode, Any, Any]:
    if name == DINOV2:
        return 224, 256, InterpolationMode.BICUBIC, IMAGENET_MEAN, IMAGENET_STD
    if name == EFFICIENTNET_LITE0:
        return 224, 256, InterpolationMode.BICUBIC, _LITE_MEAN, _LITE_STD
    if name.startswith(TIMM_PREFIX):
        return _described_by_timm(name)
    try:
        enum = models.get_model_weights(name)
    except ValueError as error:
        raise ValueError(f"expected a classification model, got {name!r}; {error}") from error
    own = enum[weights].transforms() if weights in enum.__members__ else enum.DEFAULT.transforms()
    return own.crop_size[0], own.resize_size[0], own.interpolation, own.mean, own.std


def _described_by_timm(name: str) -> tuple[int, int, InterpolationMode, Any, Any]:
    timm = require("timm", distribution="timm", purpose=f"the model {name}", extra="timm")
    own = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)).to_dict()
    )
    size = int(own["input_size"][-1])
    mode = InterpolationMode(own["interpolation"])
    return size, math.floor(size / own["crop_pct"]), mode, own["mean"], own["std"]
