"""What pyproject.toml can't say: README's links as they work on a page of a package index."""

import re
import runpy
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# of the repository: neither an address nor a heading of the page
PATH = r"(?!https?:|mailto:|#)([^)\s\"]+)"


def on_package_index(text: str, address: str | None = None) -> str:
    """Markdown whose links to files of the repository lead there from anywhere.

    Args:
        text: Markdown with links relative to the repository's root.
        address: Where the repository's files of this version can be read, without a slash at its end; without
            it, files are named instead of linked, and pictures are left out.
    """
    parts = FENCED.split(text)
    parts[::2] = [_resolved(part, address) for part in parts[::2]]
    return "".join(parts)


def _resolved(text: str, address: str | None) -> str:
    if address is not None:
        # ?raw=true gives a picture's bytes, not a page around them
        text = re.sub(rf"(!\[[^\]]*\]\(){PATH}\)", rf"\1{address}/\2?raw=true)", text)
        text = re.sub(rf'(<(?:img|source)\b[^>]*?\bsrc(?:set)?="){PATH}"', rf'\1{address}/\2?raw=true"', text)
        return re.sub(rf'(\]\(|<a\b[^>]*?\bhref="){PATH}([)"])', rf"\1{address}/\2\3", text)
    text = re.sub(rf'!\[[^\]]*\]\({PATH}\)|<(?:img|source)\b[^>]*?\bsrc(?:set)?="{PATH}"[^>]*>', "", text)
    text = re.sub(rf"\[\]\({PATH}\)", "", text)
    # a link whose text is the file's name needs it only once
    text = re.sub(rf"\[(`?)([^\]`]+)\1\]\((?=\2\)){PATH}\)", r"`\2`", text)
    text = re.sub(rf"\[([^\]]+)\]\({PATH}\)", r"\1 (`\2`)", text)
    return re.sub(rf'<a\b[^>]*?\bhref="{PATH}"[^>]*>(.*?)</a>', r"\2 (`\1`)", text, flags=re.DOTALL)


def _address() -> str | None:
    """Where files of this version are: as GitHub and GitLab have them, of a tag such as v0.2.0."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
    version = runpy.run_path(str(ROOT / "fastlora" / "_version.py"))["__version__"]
    return f"{urls['Repository']}/blob/v{version}" if "Repository" in urls else None


if __name__ == "__main__":
    from setuptools import setup

    setup(
        long_description=on_package_index((ROOT / "README.md").read_text("utf-8"), _address()),
        long_description_content_type="text/markdown",
    )
