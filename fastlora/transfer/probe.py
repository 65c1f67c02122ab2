"""Linear probe: features of the frozen backbone once, then a linear layer on them."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastlora._core.memory import PeakMemory
from fastlora.transfer.data.bundled import ImageSet, normalise
from fastlora.transfer.fit import Examples, Fit, FitSettings, Task, run_batched
from fastlora.transfer.report import MethodResult, parameter_counts
from fastlora.transfer.study import Study

PROBE = "Linear probe"


class StandardisedLinear(nn.Module):
    """A linear layer on standardised features, in float32 also under autocast.

    Args:
        features: float32 ``[n, width]`` of the training examples, for mean and standard deviation.
        num_classes: Outputs.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: Tensor, num_classes: int) -> None:
        """See the class."""
        super().__init__()
        self.register_buffer("mean", features.mean(dim=0))
        # a feature that never varies carries nothing; the floor keeps it from becoming infinite
        self.register_buffer("scale", features.std(dim=0, correction=0).clamp_min(1e-6))
        self.linear = nn.Linear(features.shape[1], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """From float32 ``[n, width]`` to logits ``[n, classes]``."""
        with torch.autocast(features.device.type, enabled=False):
            output: Tensor = self.linear((features.float() - self.mean) / self.scale)
        return output


def mirrored(images: ImageSet) -> list[Tensor]:
    """The pictures in every orientation that their data set allows, themselves first.

    Example:
        >>> cells = ImageSet("cells", "", ("a",), torch.zeros(3, 1, 2, 2), torch.zeros(3), flip_dims=(-1, -2))
        >>> len(mirrored(cells))
        4
    """
    variants = [images.images]
    for dim in images.flip_dims:
        variants += [variant.flip(dim) for variant in variants]
    return variants


def extract_features(
    backbone: nn.Module,
    variants: list[Tensor],
    accelerator: Any,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Features of pictures under each of their variants.

    Args:
        backbone: From pictures to features ``[n, width]``, on the accelerator's device.
        variants: Each uint8 ``[n, 1, size, size]``.
        accelerator: An ``accelerate.Accelerator``.
        on_batch: Called after each batch with its size.

    Returns:
        float32 ``[n, variants, width]``.
    """
    backbone.eval()
    features = [run_batched(backbone, v, normalise, accelerator, on_batch) for v in variants]
    return torch.stack(features, dim=1)


def probe_task(train: Examples, validation: Examples) -> Task:
    """Train on a random variant of each example's features ``[n, variants, width]``, judge on the first."""
    return Task(train, validation, augment=_random_variant, prepare=lambda features: features[:, 0])


def linear_probe(study: Study, settings: FitSettings) -> MethodResult:
    """Train a linear layer on what the frozen backbone makes of the pictures.

    The seconds are those of the features of the training pictures, in every orientation, and of the training.
    """
    parts, memory = study.parts, PeakMemory(study.accelerator.device)
    backbone = study.backbone().requires_grad_(False)
    backbone.heads = nn.Identity()
    variants = mirrored(parts.train)
    pictures = len(variants) * len(parts.train) + len(parts.validation) + len(parts.test)
    on_batch = study.on_batch(f"{PROBE}: features", pictures)

    def features(images: ImageSet, variants: list[Tensor]) -> Examples:
        return Examples(extract_features(backbone, variants, study.accelerator, on_batch), images.labels)

    with memory:
        started = time.perf_counter()
        train = features(parts.train, variants)
        extraction = time.perf_counter() - started
    validation, test = (features(part, [part.images]) for part in (parts.validation, parts.test))
    torch.manual_seed(study.seed)
    head = StandardisedLinear(train.inputs.flatten(0, 1), len(parts.train.classes))
    task = probe_task(train, validation)
    fit = Fit(head, task, settings, study.accelerator, seed=study.seed, on_step=study.on_step(PROBE))
    with memory:
        while not fit.finished:
            fit.run_epoch()
    return MethodResult(
        strategy="linear_probe",
        title=PROBE,
        parameters=parameter_counts(backbone, head),
        labels=parts.test.labels,
        predictions=fit.predict(test.inputs),
        num_classes=len(parts.test.classes),
        history=fit.history,
        seconds=extraction + fit.seconds,
        peak_memory_bytes=memory.bytes,
        adapter_bytes=len(save(head.state_dict())),
        hyper_parameters=asdict(settings),
    )


def _random_variant(features: Tensor, generator: torch.Generator) -> Tensor:
    choice = torch.randint(features.shape[1], (len(features),), generator=generator)
    return features[torch.arange(len(features)), choice]
