"""Pictures that can't be decoded, found before training and told by name."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from fastlora.transfer.data.images import LabelledImages

_LOG = logging.getLogger("fastlora")
_SHOWN = 5


def find_corrupt(
    images: LabelledImages, *, workers: int = 4, on_done: Callable[[int, int], None] | None = None
) -> dict[int, str]:
    """Decode every picture once.

    Args:
        images: To check.
        workers: Threads that decode.
        on_done: Called with how many are done, of how many.

    Returns:
        Why they can't be read, by index.
    """
    plain, found = images.with_transform(None), dict[int, str]()

    def problem(index: int) -> str | None:
        try:
            plain[index]
        except ValueError as error:
            return str(error.__cause__ or error) or type(error).__name__
        return None

    with ThreadPoolExecutor(workers) as pool:
        for index, message in enumerate(pool.map(problem, range(len(images)))):
            if message is not None:
                found[index] = message
            if on_done is not None:
                on_done(index + 1, len(images))
    return found


def readable(
    images: LabelledImages,
    *,
    on_corrupt: Literal["refuse", "skip"] = "refuse",
    on_done: Callable[[int, int], None] | None = None,
) -> LabelledImages:
    """The pictures that can be decoded.

    Args:
        images: To check.
        on_corrupt: What to do about others: refuse them all, or skip them and log their names as a warning.
        on_done: See :func:`find_corrupt`.

    Raises:
        ValueError: Some can't be decoded and ``on_corrupt`` is ``"refuse"``, or none can.
    """
    if on_corrupt not in ("refuse", "skip"):
        raise ValueError(f"expected on_corrupt as 'refuse' or 'skip', got {on_corrupt!r}")
    corrupt = find_corrupt(images, on_done=on_done)
    if not corrupt:
        return images
    shown = "; ".join(f"{images.names[i]} ({why})" for i, why in list(corrupt.items())[:_SHOWN])
    message = f"{len(corrupt)} of {len(images)} pictures can't be read: {shown}"
    message += "; …" if len(corrupt) > _SHOWN else ""
    if on_corrupt == "refuse" or len(corrupt) == len(images):
        raise ValueError(f"{message}; mend or remove them, or skip them with on_corrupt='skip'")
    _LOG.warning("%s; they are skipped", message)
    return images.subset([index for index in range(len(images)) if index not in corrupt])
