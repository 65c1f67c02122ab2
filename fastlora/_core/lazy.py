"""Packages that import what they show when it is first used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any


def shown_lazily(
    package: str, places: Mapping[str, Iterable[str]] = MappingProxyType({})
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``; its submodules are found by them too.

    Type checkers don't run it: the package imports the same names under ``TYPE_CHECKING``.

    Args:
        package: The package's ``__name__``.
        places: The names that each of its submodules defines; none for a submodule that is shown itself.

    Example:
        >>> find, names = shown_lazily("fastlora", {"nn": ["LoRALinear"]})
        >>> find("LoRALinear").__module__, "LoRALinear" in names()
        ('fastlora.nn.lora.linear', True)
    """
    homes = {name: place for place, names in places.items() for name in names}

    def find(name: str) -> Any:
        if name in homes:
            found = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
            # from now on it is an attribute like any other
            setattr(sys.modules[package], name, found)
            return found
        # tools that only look ask for "__wrapped__" and the like
        if name.isidentifier() and name[:2] != "__" and find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        # what is defined or imported so far, and what will be
        return sorted({*vars(sys.modules[package]), *homes, *places})

    return find, names
