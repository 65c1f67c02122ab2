"""The one order of class names, whichever source they come from."""

import re
from typing import Any


def natural(name: str) -> tuple[Any, ...]:
    """Sorts names as people do: numbers by value, digits inside names as numbers, equals by their text.

    Example:
        >>> sorted(["10", "9", "-1", "01", "1", "b10", "b9", "²"], key=natural)
        ['-1', '01', '1', '9', '10', 'b9', 'b10', '²']
    """
    is_number = re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", name) is not None
    value = float(name) if is_number else 0.0
    # text and digits take turns, so that like is compared with like
    parts = [_by_length(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))]
    return not is_number, value, parts, name


def _by_length(digits: str) -> tuple[int, str]:
    """Sorts as the number does, of any length."""
    short = digits.lstrip("0")
    return len(short), short
