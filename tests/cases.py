"""Which cases run by default: a few that differ in kind; ``make test-all`` runs the others, too."""

from collections.abc import Iterable
from typing import Any

import pytest


def cases(quick: Iterable[Any], more: Iterable[Any]) -> list[Any]:
    """Values for ``pytest.mark.parametrize``, of which the default run takes the quick ones.

    Args:
        quick: One of each kind.
        more: Near-equals of them, marked ``full``.
    """
    return [*quick, *(full(value) for value in more)]


def full(value: Any) -> Any:
    """One value, a tuple of them or a ``pytest.param``, that only ``make test-all`` takes."""
    if hasattr(value, "marks"):
        return pytest.param(*value.values, marks=[*value.marks, pytest.mark.full], id=value.id)
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.full)
