"""docs/reported.md names tests that exist, and every test file of this folder."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/reported.md").read_text())))


def test_every_test_named_there_exists() -> None:
    for path, name in NAMED:
        text = (ROOT / path).read_text()
        assert not name or f"def {name}(" in text, f"{path}::{name}"


def test_every_file_here_is_named_there() -> None:
    here = {str(path.relative_to(ROOT)) for path in Path(__file__).parent.glob("test_*.py")}
    assert here - {path for path, _ in NAMED} == {"tests/reported/test_page.py"}
