"""What to fine-tune, on what, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastlora.transfer.models.names import DINOV2
from fastlora.transfer.training.settings import TrainSettings

# far above what any model has, far below what breaks a machine before it is refused
LARGEST = {
    "rank": 2**16,
    "adapter_size": 2**16,
    "num_tokens": 2**16,
    "hidden": 2**16,
    "image_size": 2**13,
}
_USUAL = {"rank": 16, "adapter_size": 64, "num_tokens": 10, "hidden": 256, "image_size": 224}
OPTIONS = ("rank", "alpha", "dropout", "adapter_size", "num_tokens", "num_stages", "train_batch_norm")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """What to fine-tune, and on what; :class:`TrainSettings` says how.

    Attributes:
        data: Folder with a folder of pictures for each class, or with train and val of such folders, or a
            .csv file of paths and classes.
        output: Folder for the model, the report, checkpoints and logs.
        validation: Pictures to watch and to choose the best epoch with; without it the val folder in data, or
            a share of data.
        validation_share: How large that share is, between 0 and 1; each class gives its part.
        test: Pictures to judge the result with, seen only at the end.
        image_column: Column of paths in a .csv file, if it has no usual name.
        label_column: Column of classes in a .csv file, if it has no usual name.
        on_corrupt: What to do about pictures that can't be decoded, or have more pixels than Pillow allows.
        model: A model of torchvision, timm:NAME, dinov2_vits14 or efficientnet_lite0.
        weights: DEFAULT, the name of others, a .safetensors or .pt file, or none for random ones.
        strategy: What trains: feature_extraction, fine_tuning, full, gradual, lp_ft, lora, adapter or prompt;
            without it what recommend_strategy advises, or feature_extraction with cache_features.
        rank: Rank of lora's updates (16).
        alpha: Strength of lora; its updates are scaled by alpha / rank (32).
        dropout: Probability, from 0 to below 1, of dropout in lora or adapter (0).
        adapter_size: Width of adapter's bottlenecks (64).
        num_tokens: How many tokens prompt adds (10).
        num_stages: How many of the last stages fine_tuning trains (1).
        train_batch_norm: Train BatchNorm in frozen stages too.
        hidden: Width of a hidden layer between features and classifier; without it the classifier is linear.
        image_size: Height and width in pixels of what the model sees; without it the model's own.
        flip: Mirror half of the training pictures; wrong for digits and text.
        cache_features: Compute the frozen features once and train the head on them: feature_extraction in
            seconds, without augmentation.
        lr: Highest learning rate; without it the strategy's.
        head_factor: Learning rate of the head as a multiple of ``lr``; without it the strategy's.
    """

    data: str
    output: str = "finetuned"
    validation: str | None = None
    validation_share: float = 0.2
    test: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    model: str = "dinov2_vits14"
    weights: str = "DEFAULT"
    strategy: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    adapter_size: int | None = None
    num_tokens: int | None = None
    num_stages: int | None = None
    train_batch_norm: bool | None = None
    hidden: int | None = None
    image_size: int | None = None
    flip: bool = True
    cache_features: bool = False
    lr: float | None = None
    head_factor: float | None = None

    def __post_init__(self) -> None:
        """Check what needs no look at the pictures."""
        if not 0 < self.validation_share < 1:
            raise ValueError(f"expected validation_share between 0 and 1, got {self.validation_share}")
        for name in ("data", "output", "model", "weights"):
            if not str(getattr(self, name)).strip():
                raise ValueError(f"expected {name} as a name or a path, got an empty text")
        check_sizes({name: getattr(self, name) for name in LARGEST})

    def options(self) -> dict[str, Any]:
        """The strategy's options that are given."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}

    def compared(self) -> dict[str, Any]:
        """What a resumed run must share, beside what its data and weights show."""
        names = ("model", "weights", "hidden", "image_size", "cache_features")
        return {**{name: getattr(self, name) for name in names}, **self.options()}

    def model_options(self) -> dict[str, Any]:
        """Those of the model itself."""
        # its position table is cut to the pictures; other models take any size
        fixed = self.model == DINOV2 and self.image_size is not None
        return {"image_size": self.image_size} if fixed else {}

    def model_weights(self) -> str | None:
        """As :func:`fastlora.create_transfer_model` takes them."""
        return None if self.weights.lower() == "none" else self.weights


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has.

    Args:
        sizes: By the names of :data:`LARGEST`; None stands for what is left to the model or strategy.

    Raises:
        ValueError: One is no integer, below 1 or too large.
    """
    for name, size in sizes.items():
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"expected {name} as an integer >= 1, got {size!r}; {_USUAL[name]} is usual")
        if size > LARGEST[name]:
            raise ValueError(
                f"expected {name} of at most {LARGEST[name]:,}, got {size:,}; {_USUAL[name]} is usual"
            )


def as_config(settings: FinetuneSettings, training: TrainSettings) -> dict[str, Any]:
    """Both as one flat table, what is None left out: what ``--config`` reads."""
    table = {field.name: getattr(training, field.name) for field in fields(training)}
    table |= {
        field.name: value
        for field in fields(settings)
        if (value := getattr(settings, field.name)) is not None
    }
    return {name: value for name, value in sorted(table.items()) if value is not None}
