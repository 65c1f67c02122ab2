"""Tensors of a file that a model can compute with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_sound(
    tensors: Mapping[str, Tensor], where: object, like: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse tensors that would make a model answer nonsense without a word.

    Args:
        tensors: The file's, by name.
        where: The file, for people.
        like: What they are loaded into, of the same names; None only looks at the values.

    Raises:
        ValueError: Infinite values or NaN, or integers in the place of floating-point numbers.
    """
    for name, tensor in tensors.items():
        place = None if like is None else like.get(name)
        if place is not None and place.is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"expected {name} in {where} as {_kind(place)}, got {_kind(tensor)}; quantised weights have "
                "to be made floating-point ones first"
            )
        if tensor.is_floating_point() and not _finite(tensor):
            raise ValueError(
                f"expected finite weights in {where}, got NaN or infinite values in {name}; training went "
                "wrong or the file is damaged, take an older one"
            )


def _finite(tensor: Tensor) -> bool:
    # what has 8 bits has no such question of its own
    values: Any = tensor.float() if tensor.itemsize == 1 else tensor
    return bool(values.isfinite().all())


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
