"""Where pictures come from: a folder of folders, a CSV file, a Hugging Face data set, any ``Dataset``."""

import math
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fastlora._core.log import logger
from fastlora.transfer.data.files import (
    Files,
    by_suffix,
    is_shown,
    printable,
    search,
    tell_left_out,
    visible_folders,
)
from fastlora.transfer.data.images import LabelledImages
from fastlora.transfer.data.layout import find_layout
from fastlora.transfer.data.order import natural
from fastlora.transfer.data.picture import as_picture
from fastlora.transfer.data.tables import IMAGE_COLUMNS, LABEL_COLUMNS, find_column, from_csv
from fastlora.transfer.places import check_labelled


def open_images(
    source: Any, *, image_column: str | None = None, label_column: str | None = None
) -> LabelledImages:
    """Labelled pictures from wherever they are; nothing is decoded yet.

    Classes get their natural order ("9" before "10"), unless a data set declares one. Files that aren't
    pictures are left out, and how many is logged; hidden ones are nothing to tell of.

    Args:
        source: One of

            - a folder with a folder of pictures for each class, in any format that Pillow decodes; if it has
              ``train/`` and ``val/`` inside the former is read (:func:`open_parts` reads both),
            - a ``.csv`` or ``.tsv`` file in UTF-8 with a header, a column of paths (relative to the file) and
              one of class names, separated by commas, semicolons or tabs,
            - a Hugging Face ``datasets.Dataset`` with a column of images and one of classes; of a
              ``DatasetDict`` the split ``train`` is read,
            - a ``torch.utils.data.Dataset`` of (picture, array or tensor, label) pairs; ``classes`` and
              ``targets`` are used if it has them, as torchvision's have. Its own transform stays on;
              tensors are uint8, or floats from 0 to 1.
        image_column: Column of images in a CSV file or Hugging Face data set; None looks for a usual name.
        label_column: Column of classes in a CSV file or Hugging Face data set; None looks for a usual name.

    Raises:
        FileNotFoundError: There is no such folder or file, or a CSV file names a picture that isn't there.
        ValueError: No pictures, fewer than two classes, a class without pictures, no such column, or a line
            of a CSV file that isn't as it should be.
        TypeError: ``source`` is none of these.

    Example:
        >>> from torchvision.datasets import FakeData
        >>> images = open_images(FakeData(4, (3, 8, 8), num_classes=2))
        >>> len(images), images.classes
        (4, ('0', '1'))
    """
    layout = find_layout(source)
    if layout is None:
        return _open(source, image_column, label_column)
    whole = source if isinstance(source, str | Path) else "the data"
    logger.warning("only the part to train on is read of %s, which comes in parts", whole)
    return _open(layout.train, image_column, label_column)


def open_parts(
    source: Any, *, image_column: str | None = None, label_column: str | None = None
) -> tuple[LabelledImages, LabelledImages | None]:
    """Labelled pictures to train on and, where the source sets some apart, those to validate on.

    Args:
        source: Anything that :func:`open_images` takes; a folder with ``train/`` and ``val/`` (or ``valid/``,
            ``validation/``) inside has both, as has a dictionary or ``DatasetDict`` of such splits.
        image_column: Column of images in a CSV file or Hugging Face data set; None looks for a usual name.
        label_column: Column of classes in a CSV file or Hugging Face data set; None looks for a usual name.

    Raises:
        FileNotFoundError, TypeError: See :func:`open_images`.
        ValueError: See there; or the parts have different classes.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("train/a", "train/b", "val/a", "val/b"):
        ...     (folder / name).mkdir(parents=True)
        ...     Image.new("RGB", (8, 8)).save(folder / name / "1.png")
        >>> train, validation = open_parts(folder)
        >>> len(train), len(validation), train.classes
        (2, 2, ('a', 'b'))
    """
    layout = find_layout(source)
    if layout is None:
        return _open(source, image_column, label_column), None
    if layout.left_out:
        left_out = ", ".join(layout.left_out)
        logger.warning("left out of the data: %s; name pictures to test on by themselves (--test)", left_out)
    train = _open(layout.train, image_column, label_column)
    if layout.validation is None:
        return train, None
    validation = _open(layout.validation, image_column, label_column)
    differing = sorted(_used(train) ^ _used(validation), key=natural)
    if differing:
        raise ValueError(
            "expected the same classes in the parts for training and validation, only one of them has "
            f"{', '.join(differing)}; add or remove these"
        )
    return train, validation.with_classes(train.classes)


@dataclass(frozen=True)
class _Items:
    dataset: Any
    column: str | int

    def __call__(self, index: int) -> Image.Image | Tensor:
        # a data set of Hugging Face decodes the row it is asked for
        return as_picture(self.dataset[index][self.column])


def _open(source: Any, image_column: str | None, label_column: str | None) -> LabelledImages:
    if isinstance(source, LabelledImages):
        return source
    if isinstance(source, str | Path):
        images = _from_path(Path(source), image_column, label_column)
    elif hasattr(source, "column_names") and hasattr(source, "features"):
        images = _from_hugging_face(source, image_column, label_column)
    elif hasattr(source, "__getitem__") and isinstance(source, Sized):
        images = _from_dataset(source)
    else:
        raise TypeError(
            "expected a folder, a .csv file, a Hugging Face Dataset or a torch Dataset of (picture, label), "
            f"got {type(source).__name__}"
        )
    _check(images, source)
    return images


def _from_path(path: Path, image_column: str | None, label_column: str | None) -> LabelledImages:
    check_labelled(path)
    if path.is_dir():
        return _from_folder(path)
    return from_csv(path, image_column, label_column)


def _from_folder(folder: Path) -> LabelledImages:
    found = {entry.name: search(entry) for entry in visible_folders(folder)}
    classes = sorted(found, key=natural)
    empty = [f"{name} ({by_suffix(found[name][1]) or 'empty'})" for name in classes if not found[name][0]]
    if empty and len(empty) < len(classes):
        raise ValueError(
            f"expected pictures in every class folder of {folder}, found none in {', '.join(empty)}; "
            "fill or remove them"
        )
    tell_left_out(folder, [path for name in classes for path in found[name][1]])
    loose = [entry for entry in folder.iterdir() if is_shown(entry.name) and not entry.is_dir()]
    tell_left_out(folder, loose, "outside of the class folders")
    paths = [path for name in classes for path in found[name][0]]
    labels = [printable(name) for name in classes for _ in found[name][0]]
    return LabelledImages.named([printable(path.relative_to(folder)) for path in paths], labels, Files(paths))


def _from_hugging_face(source: Any, image_column: str | None, label_column: str | None) -> LabelledImages:
    columns = list(source.column_names)
    kinds = {name: type(feature).__name__ for name, feature in source.features.items()}
    images = [name for name in columns if kinds.get(name) == "Image"]
    labels = [name for name in columns if kinds.get(name) == "ClassLabel"]
    image = columns[
        find_column(image_column, (*images, *IMAGE_COLUMNS), columns, "image_column", "the data set")
    ]
    label = columns[
        find_column(label_column, (*labels, *LABEL_COLUMNS), columns, "label_column", "the data set")
    ]
    declared = getattr(source.features[label], "names", None)
    return _labelled(list(source[label]), declared, [f"row {i}" for i in range(len(source))], source, image)


def _from_dataset(source: Any) -> LabelledImages:
    targets = getattr(source, "targets", None)
    if targets is None:
        targets = [source[index][1] for index in range(len(source))]
    names = [f"item {index}" for index in range(len(source))]
    return _labelled(list(targets), getattr(source, "classes", None), names, source, 0)


def _labelled(
    given: list[Any], declared: Any, names: list[str], dataset: Any, column: str | int
) -> LabelledImages:
    """Examples of a data set whose labels are places in the declared classes, or names."""
    labels = [_plain(value, name) for value, name in zip(given, names, strict=True)]
    read = _Items(dataset, column)
    if declared is None:
        unlabelled = [value for value in labels if isinstance(value, int) and value < 0]
        if unlabelled:
            raise ValueError(f"expected labels of 0 or more, got {unlabelled[0]}; drop unlabelled items")
        return LabelledImages.named(names, [str(value) for value in labels], read)
    classes = [str(name) for name in declared]
    unknown = sorted({value for value in labels if isinstance(value, str)} - set(classes))
    if unknown:
        raise ValueError(f"expected labels out of {', '.join(classes)}, got {', '.join(unknown)}")
    places = tuple(classes.index(value) if isinstance(value, str) else value for value in labels)
    return LabelledImages(tuple(classes), places, tuple(names), read)


def _plain(label: Any, name: str) -> int | str:
    """A label of any library as a number or a name."""
    if hasattr(label, "tolist"):
        # NumPy's and torch's
        label = label.tolist()
    if isinstance(label, str | bool):
        return label
    if isinstance(label, int | float) and math.isfinite(label) and label == int(label):
        return int(label)
    raise ValueError(
        f"expected a whole number or a name as the label of {name}, got {label!r}; drop unlabelled items, "
        "and give classes instead of shares or measurements"
    )


def _used(images: LabelledImages) -> set[str]:
    return {images.classes[label] for label in images.labels}


def _check(images: LabelledImages, source: object) -> None:
    where = source if isinstance(source, str | Path) else type(source).__name__
    if not images.labels:
        raise ValueError(f"expected pictures in a folder for each class, found none in {where}")
    wrong = [label for label in images.labels if not 0 <= label < len(images.classes)]
    if wrong:
        raise ValueError(
            f"expected labels from 0 to {len(images.classes) - 1} in {where}, got {wrong[0]}; "
            "drop unlabelled items"
        )
    used = _used(images)
    if len(used) < 2:
        raise ValueError(
            f"expected two classes or more in {where}, got {len(used)} ({', '.join(used)}); "
            "a classifier tells classes apart"
        )
