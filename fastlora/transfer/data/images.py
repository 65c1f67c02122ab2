"""Pictures with a class each, decoded when they are asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastlora.transfer.data.order import natural


@dataclass(frozen=True)
class LabelledImages(Dataset[tuple[Any, int]]):
    """Pictures with a class each.

    Attributes:
        classes: Names of the classes; a label is an index into them.
        labels: Label of every picture.
        names: Name of every picture, for people: a path, or its place in a data set.
        read: Decodes the picture at an index, as RGB; a data set of tensors gives those. One that draws no
            random numbers may say so by an attribute ``draws_nothing``.
        transform: What items pass through; None gives pictures as they are.
        digests: Hash of every picture's pixels, if they were looked at: equal ones are the same picture.
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    read: Callable[[int], Image.Image | Tensor]
    transform: Callable[[Any], Any] | None = None
    digests: tuple[bytes, ...] | None = None

    @classmethod
    def named(
        cls, names: Sequence[str], labels: Sequence[str], read: Callable[[int], Image.Image | Tensor]
    ) -> Self:
        """Pictures labelled by the names of their classes, which get their natural order."""
        classes = sorted(set(labels), key=natural)
        places = {name: index for index, name in enumerate(classes)}
        return cls(tuple(classes), tuple(places[label] for label in labels), tuple(names), read)

    @property
    def draws_nothing(self) -> bool:
        """Whether reading an example is known to draw no random numbers."""
        return self.transform is None and bool(getattr(self.read, "draws_nothing", False))

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The transformed picture and its label.

        Raises:
            ValueError: It can't be decoded; names it.
        """
        try:
            picture = self.read(index)
        # decoders fail in any way on a damaged file
        except Exception as error:
            raise ValueError(
                f"expected a picture at {self.names[index]}, but it can't be read ({error}); "
                "drop such pictures with readable(images), or mend the file"
            ) from error
        return (self.transform(picture) if self.transform else picture), self.labels[index]

    def subset(self, indices: Sequence[int]) -> Self:
        """The pictures at these indices, with the same classes."""
        chosen, read = list(indices), self.read
        return replace(
            self,
            labels=tuple(self.labels[i] for i in chosen),
            names=tuple(self.names[i] for i in chosen),
            read=_Chosen(read, chosen),
            digests=None if self.digests is None else tuple(self.digests[i] for i in chosen),
        )

    def with_transform(self, transform: Callable[[Any], Any] | None) -> Self:
        """The same pictures through another transform."""
        return replace(self, transform=transform)

    def with_classes(self, classes: Sequence[str]) -> Self:
        """The same pictures labelled as in another data set.

        Args:
            classes: Classes of that data set; all that occur here have to be among them.

        Raises:
            ValueError: A class here is unknown there: nothing trained on the other can answer it.
        """
        used = {self.classes[label] for label in self.labels}
        unknown = sorted(used - set(classes))
        if unknown:
            raise ValueError(
                f"expected only classes that training has ({', '.join(classes)}), got {', '.join(unknown)}; "
                "add training pictures of them or leave these out"
            )
        places = {name: index for index, name in enumerate(classes)}
        labels = tuple(places[self.classes[label]] for label in self.labels)
        return replace(self, classes=tuple(classes), labels=labels)


@dataclass(frozen=True)
class _Chosen:
    """Reads by the index in a subset; a class, so that workers of a loader can be sent it."""

    read: Callable[[int], Image.Image | Tensor]
    indices: list[int]

    @property
    def draws_nothing(self) -> bool:
        return bool(getattr(self.read, "draws_nothing", False))

    def __call__(self, index: int) -> Image.Image | Tensor:
        return self.read(self.indices[index])
