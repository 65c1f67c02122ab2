"""What a release says of itself, and its page on a package index; ``make dist`` checks what is uploaded."""

import re
import runpy
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import fastlora

ROOT = Path(__file__).parents[1]
on_package_index: Callable[..., str] = runpy.run_path(str(ROOT / "setup.py"))["on_package_index"]
ADDRESS = "https://example.org/blob/v1"


def test_one_version_everywhere() -> None:
    released = re.findall(r"^## \[(\d.*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = (ROOT / "CITATION.cff").read_text()
    assert released[0][0] == fastlora.__version__
    assert re.findall(r'^version: "?([^"\n]+)', cited, re.M) == [fastlora.__version__]
    assert re.findall(r'^date-released: "?([^"\n]+)', cited, re.M) == [released[0][1]]
    assert f"version = {{{fastlora.__version__}}}" in (ROOT / "docs" / "cite.md").read_text()


def test_changelog_has_a_place_for_what_comes_next() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"


@pytest.mark.parametrize("address", [None, ADDRESS], ids=["nowhere", "public"])
def test_no_link_of_the_readme_leads_into_a_package_index(address: str | None) -> None:
    text = on_package_index((ROOT / "README.md").read_text(), address)
    prose = "".join(re.split(r"^```.*?^```$", text, flags=re.M | re.S))
    targets = re.findall(r"\]\(([^)]+)\)|(?:href|src|srcset)=\"([^\"]+)\"", prose)
    leading = [one or other for one, other in targets]
    assert [target for target in leading if not re.match(r"https?://|#|mailto:", target)] == []


@pytest.mark.parametrize(
    ("given", "linked", "named"),
    [
        ("a [guide](docs/a.md#b).", f"a [guide]({ADDRESS}/docs/a.md#b).", "a guide (`docs/a.md#b`)."),
        ("[`LICENSE`](LICENSE)", f"[`LICENSE`]({ADDRESS}/LICENSE)", "`LICENSE`"),
        ("![x](docs/x.svg)", f"![x]({ADDRESS}/docs/x.svg?raw=true)", ""),
        (
            "[![x](docs/x.svg)](docs/x.md)",
            f"[![x]({ADDRESS}/docs/x.svg?raw=true)]({ADDRESS}/docs/x.md)",
            "",
        ),
        (
            '<picture><source media="dark" srcset="d.svg"><img alt="x" src="l.svg"></picture>',
            f'<picture><source media="dark" srcset="{ADDRESS}/d.svg?raw=true">'
            f'<img alt="x" src="{ADDRESS}/l.svg?raw=true"></picture>',
            "<picture></picture>",
        ),
        (
            '<a class="b" href="docs/a.md">a</a>',
            f'<a class="b" href="{ADDRESS}/docs/a.md">a</a>',
            "a (`docs/a.md`)",
        ),
        ("[x](https://x.org) [y](#y)", "[x](https://x.org) [y](#y)", "[x](https://x.org) [y](#y)"),
        ("```\nf[x](y)\n```", "```\nf[x](y)\n```", "```\nf[x](y)\n```"),
    ],
    ids=["link", "name", "picture", "linked-picture", "two-themes", "html", "elsewhere", "code"],
)
def test_links_lead_to_the_repository_or_name_the_file(given: str, linked: str, named: str) -> None:
    assert on_package_index(given, ADDRESS) == linked
    assert on_package_index(given) == named


def test_a_gpu_library_is_no_requirement_of_its_own() -> None:
    """A torch for a CPU needs no Triton, one for a GPU brings its own, under another name on ROCm."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [text for text in project["dependencies"] if text.startswith(("triton", "nvidia"))]
