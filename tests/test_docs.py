"""The site: its reference has every public name, and what its pages show runs."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# modules whose __all__ is what users may rely on
PUBLIC = [
    "fastlora",
    "fastlora.functional",
    "fastlora.nn",
    "fastlora.init",
    "fastlora.parameters",
    "fastlora.distributed",
    "fastlora.tuning",
    "fastlora.transfer.costs",
    "fastlora.transfer.data",
    "fastlora.transfer.demo",
    "fastlora.transfer.finetune",
    "fastlora.transfer.strategies",
    "fastlora.transfer.training",
    "fastlora.domain.adaptation",
    "fastlora.domain.methods",
]


def named(path: str) -> Any:
    """What a dotted name of the reference stands for."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ModuleNotFoundError):
        return importlib.import_module(path)


def shown() -> dict[str, Any]:
    """What each page of the reference shows, by the name that it has there."""
    pages = (page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    return {name: named(name) for page in pages for name in re.findall(r"^::: (\S+)$", page, re.M)}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module: str) -> None:
    found = importlib.import_module(module)
    # under whichever of its names it is there; modules have pages, not entries
    there = {id(value) for value in shown().values()}
    modules = {name for name in found.__all__ if f"{module}.{name}" in PUBLIC}
    lacking = [n for n in found.__all__ if n not in modules and id(getattr(found, n)) not in there]
    assert lacking == []


def test_every_module_with_public_names_is_looked_at() -> None:
    """A new ``__all__`` must be added above, or its names would be nowhere."""
    package = DOCS.parent / "fastlora"
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    with_names = {path for path, text in texts.items() if re.search(r"^__all__ =", text, re.M)}
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in with_names
    }
    assert modules == set(PUBLIC)
