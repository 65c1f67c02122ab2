"""Two folders of pictures as features of a pretrained model, and what lies between them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlora.anatomy.stages import head as find_head
from fastlora.domain.bound import CAVEATS, Bound, ben_david_bound
from fastlora.domain.divergence import coral_distance, mmd_distance
from fastlora.domain.shift import Diagnosis, diagnose_shift
from fastlora.domain.weighting import importance_weights
from fastlora.transfer.create import create_transfer_model
from fastlora.transfer.data import (
    Files,
    LabelledImages,
    cached_features,
    find_pictures,
    open_images,
    pretrained_transforms,
)
from fastlora.transfer.data.files import printable, visible_folders
from fastlora.transfer.finetune.cached import read_by
from fastlora.transfer.models.names import DINOV2
from fastlora.transfer.places import is_list
from fastlora.transfer.recommend import recommend_strategy
from fastlora.transfer.training.device import best_device

Told = Callable[[str, int, int], None]


def open_target(
    source: LabelledImages,
    place: Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[LabelledImages, bool]:
    """The target's pictures, and whether they are labelled: with classes of the source's names.

    Args:
        source: The labelled pictures of the other domain.
        place: A folder of pictures, or of a folder for each class, or a .csv file.
        image_column: Column of paths in a .csv file; None looks for a usual name.
        label_column: Column of classes in a .csv file; None looks for a usual name.

    Raises:
        FileNotFoundError: There is no such folder or file, or no pictures in it.
        ValueError: It has classes that the source has not, or a .csv file has no such column.
    """
    if is_list(place) or (place.is_dir() and visible_folders(place)):
        labelled = open_images(place, image_column=image_column, label_column=label_column)
        return labelled.with_classes(source.classes), True
    paths = find_pictures(place)
    names = tuple(printable(path.name) for path in paths)
    return LabelledImages(source.classes, (0,) * len(paths), names, Files(paths)), False


def diagnose_pictures(
    source: Path,
    target: Path,
    *,
    model: str,
    image_size: int | None = None,
    cache: Path,
    seed: int = 0,
    told: Told | None = None,
) -> dict[str, Any]:
    """Measure the shift between two folders of pictures in the features of a pretrained model.

    Args:
        source: Labelled pictures: class folders or a .csv file.
        target: Pictures of the other domain: class folders, a .csv file, or a folder of bare pictures.
        model: A name that :func:`fastlora.create_transfer_model` takes.
        image_size: Height and width in pixels; None takes the model's own.
        cache: Folder that keeps the features.
        seed: Seed of every split.
        told: Called with a task, and how many pictures of it are done, of how many.

    Returns:
        JSON: the kind of shift with its numbers and remedy, distances, the bound's terms, class shares, and
        the strategy that is advised.

    Raises:
        ValueError: Pictures, model or features that don't fit.
        FileNotFoundError: There are no such pictures.
    """
    labelled = open_images(source)
    others, known = open_target(labelled, target)
    first, labels = _features(labelled, "source", model, image_size, cache, told)
    second, truth = _features(others, "target", model, image_size, cache, told)
    shift = diagnose_shift(first, labels, second, seed=seed)
    bound = ben_david_bound(first, labels, second, truth if known else None, seed=seed)
    adapts = shift.kind in ("covariate shift", "both")
    advice = recommend_strategy(len(labelled), len(labelled.classes), target_is_unlabelled=adapts)
    return {
        "model": model,
        "pictures": {"source": len(labelled), "target": len(others)},
        **_shift_record(shift, labelled.classes),
        "effective_sample_size": importance_weights(first, second).effective_sample_size,
        "a_distance": asdict(bound.distance),
        "mmd": mmd_distance(first, second),
        "coral": coral_distance(first, second),
        "bound": _bound_record(bound),
        "recommendation": asdict(advice),
    }


def _shift_record(shift: Diagnosis, classes: Sequence[str]) -> dict[str, Any]:
    shares = shift.labels
    return {
        "kind": shift.kind,
        "remedy": shift.remedy,
        "domain_accuracy": shift.domain_accuracy,
        "domain_p_value": shift.domain_p_value,
        "residual_accuracy": shift.residual_accuracy,
        "residual_p_value": shift.residual_p_value,
        "classes": [
            {
                "class": classes[label],
                "source": float(shares.source[place]),
                "target": float(shares.target[place]),
                "interval": [float(limit) for limit in shares.interval[place]],
            }
            for place, label in enumerate(shares.classes)
        ],
        "class_shift": shares.shifted,
        "confusion_condition": shares.condition,
    }


def _bound_record(bound: Bound) -> dict[str, Any]:
    return {
        "source_error": bound.source_error,
        "joint_error": bound.joint_error,
        "total": bound.total,
        "target_error": bound.target_error,
        "caveats": list(CAVEATS),
        "text": str(bound),
    }


def _features(
    images: LabelledImages, domain: str, name: str, image_size: int | None, cache: Path, told: Told | None
) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    own: dict[str, Any] = {"image_size": image_size} if name == DINOV2 and image_size is not None else {}
    model = create_transfer_model(name, 2, **own).to(best_device())
    head = find_head(model)[1]
    seen = images.with_transform(pretrained_transforms(name, image_size=image_size)[1])

    def on_done(done: int, total: int) -> None:
        if told is not None:
            told(f"features of the {domain}", done, total)

    features, labels = cached_features(
        lambda batch: read_by(model, head, batch), model, seen, cache, head=head, on_done=on_done
    )
    return features, labels.numpy()
