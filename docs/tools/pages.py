"""Pages as the site shows them: where lines may break, and dark pictures on dark pages."""

import re
from pathlib import Path

_PICTURE = re.compile(r"(!\[[^\]]*\]\(([^)\s]+))\.png\)")
# what belongs to the number before it, and to the one after it: 1.8 ± 0.2, 796 → 439, 12 %
_NUMBERS = re.compile(r"(?<=\d) (?=[±→×%]|[KMG]iB|ms\b)|(?<=[±→×]) (?=\d)")
_CELLS = re.compile(r"<t[dh]\b[^>]*>.*?</t[dh]>|<span class=\"doc doc-object-name[^>]*>.*?</span>", re.S)
# text between tags that is long enough, and where names break
_LONG = re.compile(r"(?<=>)[^<>]{13,}(?=<)")
_JOINTS = re.compile(r"(?<=[A-Za-z][./_(,=:])(?=\w)")


def with_whole_numbers(markdown: str) -> str:
    """A page whose numbers in tables stay on one line with their units and spreads.

    Args:
        markdown: The page's text.
    """
    lines = markdown.split("\n")
    return "\n".join(_NUMBERS.sub("\N{NO-BREAK SPACE}", s) if s.startswith("|") else s for s in lines)


def with_dark_pictures(markdown: str, folder: Path) -> str:
    """A page on which each picture that has a dark version beside it is shown in the reader's colours.

    Args:
        markdown: The page's text.
        folder: Where the page stands.
    """

    def both(picture: re.Match[str]) -> str:
        shown, path = picture.groups()
        there = (folder / f"{path}-dark.png").exists()
        return f"{shown}.png#only-light) {shown}-dark.png#only-dark)" if there else picture[0]

    return _PICTURE.sub(both, markdown)


def with_breaks(html: str) -> str:
    """A page whose long names in tables and headings break after dots, slashes, brackets and underscores.

    Args:
        html: The page's content.
    """
    return _CELLS.sub(lambda cell: _LONG.sub(lambda text: _JOINTS.sub("<wbr>", text[0]), cell[0]), html)
