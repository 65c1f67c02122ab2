"""What the scripts share whose results are pages: runs that are kept, and tables of their means."""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Runs:
    """A file with a line of JSON for each run, so that nothing is run twice.

    Args:
        path: The file; its folder is made.
        key: Entries of a row that tell runs apart.
    """

    def __init__(self, path: Path, *key: str) -> None:
        """See the class."""
        self._path, self._key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[Row]:
        """The runs that are there."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def has(self, *key: Any) -> bool:
        """Whether this run is there, also where another process has just added it."""
        return key in {tuple(row[name] for name in self._key) for row in self.rows()}

    def add(self, row: Row) -> None:
        """Keep a run."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def page_parser(text: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with the option ``--output``, the folder of the page.

    Args:
        text: What the script does.
        output: The folder where its results are committed.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown.

    Example:
        >>> table(["a", "b"], [["1", "2"]])
        ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    return [_line(heads), "|---" * len(heads) + "|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def percent(shares: Sequence[float]) -> str:
    """Mean and standard deviation of shares of 1, in percent.

    Example:
        >>> percent([0.5, 0.75]), percent([0.5])
        ('62.5 ± 17.7', '50.0')
    """
    values = [100 * share for share in shares]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
