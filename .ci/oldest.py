"""Print the oldest versions that pyproject.toml admits, one requirement a line, for pip to install."""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def oldest(extras: list[str]) -> dict[str, Version]:
    """The lower bound of each requirement of the package and of these extras, the highest of several."""
    bounds: dict[str, Version] = {}
    texts = [
        *PROJECT["dependencies"],
        *(text for e in extras for text in PROJECT["optional-dependencies"][e]),
    ]
    for requirement in map(Requirement, texts):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if requirement.name == PROJECT["name"]:
            found = oldest(sorted(requirement.extras))
        else:
            found = {requirement.name: _lower_bound(requirement)}
        for name, bound in found.items():
            bounds[name] = max(bound, bounds.get(name, bound))
    return bounds


def _lower_bound(requirement: Requirement) -> Version:
    bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==", "~=")]
    if len(bounds) != 1:
        sys.exit(f"{requirement}: expected one lower bound, got {len(bounds)}")
    return Version(bounds[0])


if __name__ == "__main__":
    print(*(f"{name}=={bound}" for name, bound in sorted(oldest(sys.argv[1:]).items())), sep="\n")
