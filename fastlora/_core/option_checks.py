"""Checks of options: every message says what was expected, what was given and what to do. Needs no torch."""

import math
from collections.abc import Iterable
from numbers import Integral, Real


def check_flag(name: str, value: object, advice: str = "") -> None:
    """Refuse anything but True and False: ``"no"`` would count as true.

    Raises:
        TypeError: Another value.
    """
    if not isinstance(value, bool):
        raise TypeError(
            f"expected {name} to be True or False, got {value!r}" + (f"; {advice}" if advice else "")
        )


def check_count(name: str, value: object, advice: str) -> int:
    """A size as a plain ``int``.

    Raises:
        TypeError: No integer.
        ValueError: Smaller than 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be an integer, got {value!r}; {advice}")
    if value < 1:
        raise ValueError(f"expected {name} >= 1, got {value}; {advice}")
    return int(value)


def check_number(name: str, value: object, advice: str) -> float:
    """A number as a plain ``float``.

    Raises:
        TypeError: No real number.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be a number, got {value!r}; {advice}")
    return float(value)


def check_finite(name: str, value: object, advice: str) -> float:
    """A finite number as a plain ``float``.

    Raises:
        TypeError: No real number.
        ValueError: Infinite or not a number.
    """
    number = check_number(name, value, advice)
    if not math.isfinite(number):
        raise ValueError(f"expected {name} to be finite, got {number}; {advice}")
    return number


def check_positive(name: str, value: object, advice: str) -> float:
    """A finite number above zero as a plain ``float``.

    Raises:
        TypeError: No real number.
        ValueError: Zero, negative, infinite or not a number.
    """
    number = check_finite(name, value, advice)
    if number <= 0:
        raise ValueError(f"expected {name} above 0, got {number}; {advice}")
    return number


def check_probability(name: str, value: object) -> float:
    """A dropout probability as a plain ``float``.

    Raises:
        TypeError: No real number.
        ValueError: Outside [0, 1].
    """
    probability = check_number(name, value, "use 0.0 for none")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"expected {name} in [0, 1], got {probability}; use 0.0 for none")
    return probability


def check_one_of(
    name: str, value: object, accepted: Iterable[object], advice: str = "use one of these"
) -> None:
    """Refuse a value that is none of a few words.

    Raises:
        ValueError: It is something else.
    """
    words = tuple(accepted)
    # unhashable values must not raise an error of their own
    if not any(value is word or (isinstance(value, str) and value == word) for word in words):
        raise ValueError(f"expected {name} to be {', '.join(map(repr, words))}, got {value!r}; {advice}")
