"""The Python blocks of a page, run as a reader would who copies them."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest


def blocks(page: Path) -> list[str]:
    """A page's Python blocks."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks write into this folder, temporary folders of theirs included: these hold real models."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def run(block: str, place: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a block; what it shows in comments has to be what its lines print.

    Args:
        block: Its lines.
        place: Where it stands, for tracebacks.
        names: What blocks before it have named; the block's own names are added.
        capsys: pytest's.
    """
    exec(compile(block, place, "exec"), names)
    printed = capsys.readouterr().out
    for line in re.findall(r"# prints: (.*)", block):
        assert line in printed
