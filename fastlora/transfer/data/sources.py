"""Where pictures come from: a folder of folders, a CSV file, a Hugging Face data set, any ``Dataset``."""

import csv
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastlora.transfer.data.images import LabelledImages
from fastlora.transfer.places import check_labelled, check_pictures

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_IMAGE_COLUMNS = ("path", "image", "file", "filename", "img", "image_path")
_LABEL_COLUMNS = ("label", "labels", "class", "target", "category")


def open_images(
    source: Any, *, image_column: str | None = None, label_column: str | None = None
) -> LabelledImages:
    """Labelled pictures from wherever they are; nothing is decoded yet.

    Args:
        source: One of

            - a folder with a folder of pictures for each class (hidden files are left out),
            - a ``.csv`` file with a header, a column of paths (relative to the file) and one of class names,
            - a Hugging Face ``datasets.Dataset`` with a column of images and one of classes,
            - a ``torch.utils.data.Dataset`` of (picture or tensor, label) pairs; ``classes`` and ``targets``
              are used if it has them, as torchvision's have. Its own transform stays on;
              tensors are uint8, or floats from 0 to 1.
        image_column: Of a CSV file or Hugging Face data set; None looks for a usual name.
        label_column: The same for the class.

    Raises:
        FileNotFoundError: There is no such folder or file, or a CSV file names a picture that isn't there.
        ValueError: No pictures, fewer than two classes, a class without pictures, or no such column.
        TypeError: ``source`` is none of these.
    """
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


@dataclass(frozen=True)
class Files:
    """Reads pictures from paths, as RGB."""

    paths: list[Path]

    def __call__(self, index: int) -> Image.Image:
        """The picture at an index."""
        with Image.open(self.paths[index]) as picture:
            return picture.convert("RGB")


@dataclass(frozen=True)
class _Items:
    dataset: Any
    column: str | int

    def __call__(self, index: int) -> Image.Image | Tensor:
        # a data set of Hugging Face decodes the row it is asked for
        item = self.dataset[index][self.column]
        if isinstance(item, Tensor):
            return item
        picture = item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item))
        return picture.convert("RGB")


def _from_path(path: Path, image_column: str | None, label_column: str | None) -> LabelledImages:
    check_labelled(path)
    if path.is_dir():
        return _from_folder(path)
    return _from_csv(path, image_column, label_column)


def _from_folder(folder: Path) -> LabelledImages:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    found = {name: _pictures(folder / name) for name in classes}
    empty = [name for name, paths in found.items() if not paths]
    if empty and len(empty) < len(classes):
        raise ValueError(
            f"expected pictures ({', '.join(SUFFIXES)}) in every class folder of {folder}, "
            f"found none in {', '.join(empty)}; fill or remove them"
        )
    paths = [path for name in classes for path in found[name]]
    labels = tuple(label for label, name in enumerate(classes) for _ in found[name])
    names = tuple(str(path.relative_to(folder)) for path in paths)
    return LabelledImages(tuple(classes), labels, names, Files(paths))


def find_pictures(place: Path) -> list[Path]:
    """A picture itself, or all pictures in a folder.

    Raises:
        FileNotFoundError: There is nothing, or no pictures in it.
    """
    check_pictures(place)
    if place.is_file():
        return [place]
    paths = _pictures(place)
    if not paths:
        raise FileNotFoundError(f"expected pictures ({', '.join(SUFFIXES)}) in {place}, found none")
    return paths


def _pictures(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in files if path.name[0] != "." and path.is_file())


def _from_csv(path: Path, image_column: str | None, label_column: str | None) -> LabelledImages:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        image = _column(image_column, _IMAGE_COLUMNS, columns, "image_column", path)
        label = _column(label_column, _LABEL_COLUMNS, columns, "label_column", path)
        rows = [(row[image], row[label]) for row in reader]
    paths = [path.parent / name for name, _ in rows]
    missing = [name for (name, _), full in zip(rows, paths, strict=True) if not full.is_file()]
    if missing:
        raise FileNotFoundError(
            f"expected the {len(rows)} pictures that {path} names, {len(missing)} are not there, "
            f"{missing[0]!r} first; paths are relative to the file's folder"
        )
    return _named(LabelledImages, [name for name, _ in rows], [label for _, label in rows], Files(paths))


def _from_hugging_face(source: Any, image_column: str | None, label_column: str | None) -> LabelledImages:
    columns = list(source.column_names)
    kinds = {name: type(feature).__name__ for name, feature in source.features.items()}
    images = [name for name in columns if kinds.get(name) == "Image"]
    labels = [name for name in columns if kinds.get(name) == "ClassLabel"]
    image = _column(image_column, (*images, *_IMAGE_COLUMNS), columns, "image_column", "the data set")
    label = _column(label_column, (*labels, *_LABEL_COLUMNS), columns, "label_column", "the data set")
    names, read, given = [f"row {i}" for i in range(len(source))], _Items(source, image), list(source[label])
    declared = getattr(source.features[label], "names", None)
    if declared is None:
        return _named(LabelledImages, names, [str(value) for value in given], read)
    return LabelledImages(tuple(declared), tuple(map(int, given)), tuple(names), read)


def _from_dataset(source: Any) -> LabelledImages:
    targets = getattr(source, "targets", None)
    if targets is None:
        targets = [source[index][1] for index in range(len(source))]
    labels = tuple(int(target) for target in targets)
    declared = getattr(source, "classes", None)
    classes = declared or [str(label) for label in range(max(labels, default=-1) + 1)]
    names = tuple(f"item {index}" for index in range(len(source)))
    return LabelledImages(tuple(map(str, classes)), labels, names, _Items(source, 0))


def _named(
    make: Callable[..., LabelledImages], names: Sequence[str], labels: Iterable[str], read: Any
) -> LabelledImages:
    given = list(labels)
    # numbers in their own order: "10" after "9"
    numeric = all(value.lstrip("-").isdigit() for value in given)
    classes = sorted(set(given), key=int) if numeric else sorted(set(given))
    places = {name: index for index, name in enumerate(classes)}
    return make(tuple(classes), tuple(places[value] for value in given), tuple(names), read)


def _column(given: str | None, usual: Sequence[str], columns: list[str], option: str, where: object) -> str:
    wanted = [given] if given is not None else usual
    found = [name for name in wanted if name in columns]
    if not found:
        raise ValueError(
            f"expected a column {' or '.join(dict.fromkeys(map(repr, wanted)))} in {where}, "
            f"got {', '.join(columns) or 'none'}; name it with {option}"
        )
    return found[0]


def _check(images: LabelledImages, source: object) -> None:
    where = source if isinstance(source, str | Path) else type(source).__name__
    if not images.labels:
        raise ValueError(
            f"expected pictures ({', '.join(SUFFIXES)}) in a folder for each class, found none in {where}"
        )
    wrong = [label for label in images.labels if not 0 <= label < len(images.classes)]
    if wrong:
        raise ValueError(
            f"expected labels from 0 to {len(images.classes) - 1} in {where}, got {wrong[0]}; "
            "drop unlabelled items"
        )
    used = {images.classes[label] for label in images.labels}
    if len(used) < 2:
        raise ValueError(
            f"expected two classes or more in {where}, got {len(used)} ({', '.join(used)}); "
            "a classifier tells classes apart"
        )
