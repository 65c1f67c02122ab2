"""Files that are there whole or not at all."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step, beside its final name first."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write JSON in one step: readers see the old file or the whole new one."""
    write_file(path, (json.dumps(report, indent=2) + "\n").encode())
