"""Run the notebooks and write what they print into them: ``python -m docs.tools.notebooks``."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("peft_model", "pictures", "two_domains")


def main() -> None:
    """Refresh the outputs of every notebook."""
    for name in NAMES:
        notebook = read(name)
        printed = iter(list(run(notebook)))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                lines = next(printed).splitlines(keepends=True)
                cell["outputs"] = (
                    [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
                )
        (FOLDER / f"{name}.ipynb").write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def read(name: str) -> dict[str, Any]:
    """A notebook as it is in its file.

    Args:
        name: One of ``NAMES``.
    """
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return found


def run(notebook: dict[str, Any]) -> Iterator[str]:
    """What each code cell prints, run one after another in an empty folder.

    Args:
        notebook: As :func:`read` gives it.
    """
    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec("".join(cell["source"]), names)
                yield printed.getvalue()


def shown(cell: dict[str, Any]) -> str:
    """What a code cell printed when its notebook was written."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def as_page(name: str) -> str:
    """A notebook as a page of the site.

    Args:
        name: One of ``NAMES``.
    """
    parts = []
    for cell in read(name)["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        else:
            parts.append(f"```python\n{text}\n```")
            parts += [f"```text\n{shown(cell).rstrip()}\n```"] * bool(cell["outputs"])
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"
    main()
