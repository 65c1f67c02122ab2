"""Pictures that can't be decoded or are there twice, found before training and told by name."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import Tensor

from fastlora._core.log import logger
from fastlora.transfer.data.images import LabelledImages

_SHOWN = 5


def find_corrupt(
    images: LabelledImages, *, workers: int = 4, on_done: Callable[[int, int], None] | None = None
) -> dict[int, str]:
    """Decode every picture once.

    Args:
        images: Pictures to check.
        workers: Threads that decode.
        on_done: Called with how many are done, of how many.

    Returns:
        Why they can't be read, by index.

    Example:
        >>> from fastlora.transfer.data import open_images
        >>> from torchvision.datasets import FakeData
        >>> images = open_images(FakeData(4, (3, 8, 8), num_classes=2))
        >>> find_corrupt(images)
        {}
    """
    found = enumerate(_looked_at(images, workers, on_done))
    return {index: seen for index, seen in found if isinstance(seen, str)}


def readable(
    images: LabelledImages,
    *,
    on_corrupt: Literal["refuse", "skip"] = "refuse",
    on_done: Callable[[int, int], None] | None = None,
) -> LabelledImages:
    """The pictures that can be decoded, with the digests of what they show.

    Args:
        images: Pictures to check.
        on_corrupt: What to do about others: refuse them all, or skip them and log their names as a warning.
        on_done: Called with how many are done, of how many.

    Raises:
        ValueError: Some can't be decoded and ``on_corrupt`` is ``"refuse"``, or none of a class can.

    Example:
        >>> from fastlora.transfer.data import open_images
        >>> from torchvision.datasets import FakeData
        >>> images = open_images(FakeData(4, (3, 8, 8), num_classes=2))
        >>> len(readable(images))
        4
    """
    if on_corrupt not in ("refuse", "skip"):
        raise ValueError(f"expected on_corrupt as 'refuse' or 'skip', got {on_corrupt!r}")
    seen = _looked_at(images, 4, on_done)
    digests = tuple(each if isinstance(each, bytes) else b"" for each in seen)
    checked = replace(images, digests=digests)
    corrupt = {index: why for index, why in enumerate(seen) if isinstance(why, str)}
    if not corrupt:
        return checked
    message = f"{len(corrupt)} of {len(images)} pictures can't be read: " + _listed(
        [f"{images.names[index]} ({why})" for index, why in corrupt.items()]
    )
    if on_corrupt == "refuse" or len(corrupt) == len(images):
        raise ValueError(f"{message}; mend or remove them, or skip them with on_corrupt='skip'")
    kept = checked.subset([index for index in range(len(images)) if index not in corrupt])
    emptied = sorted({images.classes[i] for i in images.labels} - {kept.classes[i] for i in kept.labels})
    if emptied:
        raise ValueError(f"{message}; skipping them leaves no picture of {', '.join(emptied)}")
    logger.warning("%s; they are skipped", message)
    return kept


def tell_copies(images: LabelledImages) -> None:
    """Log which pictures are there more than once, and which of them have more than one class.

    Args:
        images: Pictures from :func:`readable`.

    Example:
        >>> from fastlora.transfer.data import open_images
        >>> from torchvision.datasets import FakeData
        >>> images = open_images(FakeData(4, (3, 8, 8), num_classes=2))
        >>> tell_copies(readable(images))  # nothing is logged: there are none
    """
    places = defaultdict[bytes, list[int]](list)
    for index, digest in enumerate(images.digests or ()):
        places[digest].append(index)
    copies = [same for same in places.values() if len(same) > 1]
    if copies:
        logger.warning(
            "%d of %d pictures are duplicates of others: %s; copies stay on one side of a split",
            sum(map(len, copies)) - len(copies),
            len(images),
            _listed([" = ".join(sorted({images.names[i] for i in same})) for same in copies]),
        )
    torn = [same for same in copies if len({images.labels[i] for i in same}) > 1]
    if torn:
        named = [
            " = ".join(f"{images.names[i]} ({images.classes[images.labels[i]]})" for i in s) for s in torn
        ]
        logger.warning("the same picture has more than one class: %s; correct the labels", _listed(named))


def tell_overlap(train: LabelledImages, judged: LabelledImages, part: str) -> None:
    """Log which pictures of another part are training pictures too: their scores say too much.

    Args:
        train: Pictures to train on, from :func:`readable`.
        judged: Pictures of the other part, from :func:`readable`.
        part: What the other part is called.

    Example:
        >>> from fastlora.transfer.data import open_images
        >>> from torchvision.datasets import FakeData
        >>> images = open_images(FakeData(4, (3, 8, 8), num_classes=2))
        >>> images = readable(images)
        >>> tell_overlap(images.subset([0, 1]), images.subset([2, 3]), "validation")  # nothing is logged
    """
    known = set(train.digests or ())
    both = [name for name, digest in zip(judged.names, judged.digests or (), strict=False) if digest in known]
    if both:
        message = (
            "%d of %d pictures for %s are duplicates of training pictures: %s; scores on them are too good"
        )
        logger.warning(message, len(both), len(judged), part, _listed(both))


def _looked_at(
    images: LabelledImages, workers: int, on_done: Callable[[int, int], None] | None
) -> list[bytes | str]:
    """The digest of every picture, or why it can't be read."""
    plain, found = images.with_transform(None), list[bytes | str]()

    def look(index: int) -> bytes | str:
        try:
            shown = plain[index][0]
        except ValueError as error:
            return str(error.__cause__ or error) or type(error.__cause__ or error).__name__
        # NumPy has no bfloat16, and sees only the CPU's memory
        pixels = shown.detach().cpu().float().numpy() if isinstance(shown, Tensor) else np.asarray(shown)
        sha = hashlib.blake2b(f"{pixels.dtype} {pixels.shape}".encode(), digest_size=16)
        sha.update(pixels.tobytes())
        return sha.digest()

    with ThreadPoolExecutor(workers) as pool:
        for seen in pool.map(look, range(len(images))):
            found.append(seen)
            if on_done is not None:
                on_done(len(found), len(images))
    return found


def _listed(texts: list[str]) -> str:
    return "; ".join(texts[:_SHOWN]) + ("; …" if len(texts) > _SHOWN else "")
