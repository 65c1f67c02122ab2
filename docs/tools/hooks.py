"""MkDocs hooks: pages that stand outside ``docs``, links that lead out of it, and where lines may break."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.tools.notebooks import NAMES, as_page
from docs.tools.pages import with_breaks, with_dark_pictures, with_whole_numbers

ROOT = Path(__file__).parents[2]
# where a file of the repository stands on the site
_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "benchmarks/README.md": "contributing/benchmarks.md",
    "kernels/README.md": "contributing/kernels.md",
}
_MEASURED = "benchmarks/results/"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages and measured results that stand elsewhere in the repository.

    Args:
        files: What MkDocs found in ``docs``.
        config: MkDocs' settings.
    """
    for source, target in _outside().items():
        if source.endswith(".ipynb"):
            file = File.generated(config, target, content=as_page(Path(source).stem))
        else:
            file = File.generated(config, target, abs_src_path=str(ROOT / source))
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Let links that lead out of ``docs`` lead to where their files stand on the site.

    A file that isn't on the site is named without a link. Pictures that have a dark version show it on dark
    pages, and numbers in tables stay whole.

    Args:
        markdown: A page's text.
        page: The page.
        **kwargs: What else MkDocs tells its hooks.
    """
    outside = _outside()
    here = {target: source for source, target in outside.items()}.get(page.file.src_uri)
    here = here or f"docs/{page.file.src_uri}"

    def led(link: re.Match[str]) -> str:
        image, text, path, anchor = link.groups(default="")
        if "://" in path or path.startswith("mailto:"):
            return link[0]
        named = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        target = outside.get(named) or (named[len("docs/") :] if named.startswith("docs/") else "")
        if not target:
            if not (ROOT / named).exists():
                raise ValueError(f"expected a link to a file of the repository in {here}, got {path}")
            return text if text.startswith("`") else f"{text} (`{named}`)"
        relative = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({relative}{anchor})"

    text = with_dark_pictures(markdown, (ROOT / here).parent)
    return _LINK.sub(led, with_whole_numbers(text))


def on_page_content(html: str, **kwargs: Any) -> str:
    """Let long names break in tables and headings.

    Args:
        html: A page's content.
        **kwargs: What else MkDocs tells its hooks.
    """
    return with_breaks(html)


def _outside() -> dict[str, str]:
    """Files outside ``docs`` that are on the site, and where."""
    measured = (path for path in (ROOT / _MEASURED).rglob("*") if path.suffix in {".html", ".json", ".png"})
    names = (path.relative_to(ROOT).as_posix() for path in measured)
    notebooks = {f"notebooks/{name}.ipynb": f"notebooks/{name}.md" for name in NAMES}
    return _PAGES | notebooks | {name: f"results/measured/{name.removeprefix(_MEASURED)}" for name in names}
