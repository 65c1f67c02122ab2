"""A pretrained backbone with a new linear classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.option_checks import check_flag
from fastlora.anatomy.stages import Stage, stages
from fastlora.transfer.models.freezing import KeepsFrozenInEval, freeze_stages

# what Hugging Face's and torchvision's models call the features in their outputs, best first
_FEATURE_KEYS = ("pooler_output", "features", "x_norm_clstoken", "last_hidden_state", "out")
_USUAL_SIZES = (224, 32, 64, 299, 384, 518, 28)


class TransferLearningModel(KeepsFrozenInEval):
    """A backbone and a linear classifier on its features.

    The backbone may return a tensor, a tuple or list (its first element counts), or a mapping such as a
    Hugging Face output. Feature maps ``[B, C, H, W]``, volumes and sequences ``[B, T, C]`` are averaged to
    one vector for each example. What is frozen stays in eval mode through :meth:`train`, so its running
    statistics never move.

    Args:
        backbone: Any model that maps inputs to features; a head of its own is better replaced by
            ``nn.Identity()`` before.
        num_classes: Outputs of the classifier, at least 2.
        freeze_backbone: Train only the classifier at first.
        sample_input: A batch to find the feature size with. None makes one, from what the model says about
            its inputs or the shape of its first layer.
        train_batch_norm: Train BatchNorm layers, weights and running statistics, even where they stand in
            frozen stages.

    Raises:
        TypeError: ``backbone`` is no ``nn.Module``, or returns no floating-point features.
        ValueError: ``num_classes`` is below 2, or the backbone takes none of the inputs tried.

    Example:
        >>> from torchvision.models import resnet18
        >>> backbone = resnet18()
        >>> backbone.fc = nn.Identity()
        >>> model = TransferLearningModel(backbone, num_classes=5)
        >>> model(torch.zeros(2, 3, 64, 64)).shape, model.unfreeze_layers(1)
        (torch.Size([2, 5]), ['layer4'])
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        freeze_backbone: bool = True,
        *,
        sample_input: Tensor | None = None,
        train_batch_norm: bool = False,
    ) -> None:
        """See the class."""
        check_num_classes(num_classes)
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"expected backbone to be an nn.Module, got {type(backbone).__name__}")
        check_flag("freeze_backbone", freeze_backbone)
        check_flag("train_batch_norm", train_batch_norm)
        super().__init__()
        sample = _dry_run(backbone, sample_input)
        self.num_features = sample.shape[-1]
        self.train_batch_norm = train_batch_norm
        self.backbone = backbone
        self.classifier = nn.Linear(self.num_features, num_classes, device=sample.device, dtype=sample.dtype)
        if freeze_backbone:
            self.freeze()

    @property
    def stages(self) -> list[Stage]:
        """The backbone's stages from input to output, which :meth:`unfreeze_layers` counts."""
        return stages(self.backbone)

    def freeze(self) -> None:
        """Train only the classifier."""
        self.unfreeze_layers(0)

    def unfreeze_layers(self, num_layers: int) -> list[str]:
        """Train the classifier and the last ``num_layers`` stages of the backbone, freeze the others.

        A stage is what belongs together: a ResNet's ``layer4``, a transformer's block with the final norm.

        Returns:
            The names of the stages that train now.

        Raises:
            ValueError: The backbone has fewer stages; nothing is changed.
        """
        chosen = freeze_stages(
            self,
            self.classifier,
            num_layers,
            parts=self.stages,
            train_batch_norm=self.train_batch_norm,
        )
        return [stage.name for stage in chosen]

    def features(self, x: Any) -> Tensor:
        """Features ``[B, num_features]`` of inputs ``[B, …]``."""
        return _pooled(self.backbone(x))

    def forward(self, x: Any) -> Tensor:
        """Class logits ``[B, num_classes]`` of inputs ``[B, …]``."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def check_num_classes(num_classes: int) -> None:
    """Refuse what is no number of classes.

    Raises:
        ValueError: It is below 2.
        TypeError: It is no integer.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"expected num_classes as an integer, got {num_classes!r}")
    if num_classes < 2:
        raise ValueError(f"expected num_classes >= 2, got {num_classes}; a classifier tells classes apart")


def _pooled(output: Any) -> Tensor:
    features = _first_tensor(output)
    if features.dim() == 3:
        return features.mean(dim=1)
    return features.flatten(2).mean(dim=2) if features.dim() > 3 else features


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        values = [output[key] for key in _FEATURE_KEYS if output.get(key) is not None]
        return _first_tensor((values or list(output.values()))[0])
    if isinstance(output, Sequence) and output:
        return _first_tensor(output[0])
    if isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2:
        return output
    shape = f" {tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else ""
    raise TypeError(
        f"expected the backbone to return floating-point features [B, …], a tuple or a mapping of them, "
        f"got {type(output).__name__}{shape}"
    )


def _dry_run(backbone: nn.Module, sample_input: Tensor | None) -> Tensor:
    """Features of one input, leaving modes, statistics and random state as they were."""
    modes = {module: module.training for module in backbone.modules()}
    devices = {p.device for p in backbone.parameters() if p.device.type == "cuda"}
    errors: list[str] = []
    backbone.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            for sample in [sample_input] if sample_input is not None else _samples(backbone):
                try:
                    return _pooled(backbone(sample))
                except (RuntimeError, ValueError, AssertionError, IndexError) as error:
                    errors.append(f"{tuple(sample.shape)}: {str(error).splitlines()[0]}")
    finally:
        for module, mode in modes.items():
            module.training = mode
    raise ValueError(
        f"expected {type(backbone).__name__} to take an input of one of the usual shapes, got errors "
        f"({'; '.join(errors[:3])}); give a batch of yours as sample_input"
    )


def _samples(backbone: nn.Module) -> list[Tensor]:
    parameter = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    shapes = _input_shapes(backbone)
    return [torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device) for shape in shapes]


def _input_shapes(backbone: nn.Module) -> list[tuple[int, ...]]:
    """Shapes that the backbone may take, the likeliest first."""
    # timm's way to say it
    described = getattr(backbone, "pretrained_cfg", None) or getattr(backbone, "default_cfg", None)
    if isinstance(described, Mapping) and described.get("input_size"):
        return [tuple(described["input_size"])]
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    first = next((module for module in backbone.modules() if isinstance(module, kinds)), None)
    if isinstance(first, nn.Linear):
        return [(first.in_features,)]
    channels = 3 if first is None else first.in_channels
    dims = 2 if first is None else len(first.kernel_size)
    own = getattr(backbone, "image_size", None) or getattr(
        getattr(backbone, "config", None), "image_size", None
    )
    sizes = (own, *_USUAL_SIZES) if isinstance(own, int) else _USUAL_SIZES
    return [(channels, *[size] * dims) for size in sizes]
