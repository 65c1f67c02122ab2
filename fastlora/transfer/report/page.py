"""Pages that need no other file: templates, their numbers and their pictures."""

import base64
from typing import Any

import jinja2
from markupsafe import Markup

from fastlora._core.text import readable_percent
from fastlora._core.words import visible


def page(template: str, **values: Any) -> str:
    """A page; strings are escaped and their control characters shown.

    Args:
        template: Path of a template inside this package, which fills the blocks of ``base.html.jinja``.
        values: What it shows; of a picture the bytes of its PNG, which the filters ``figure`` and ``inline``
            put in place.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastlora", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "figure": _figure,
        "inline": _inline,
        "mib": _mib,
        "percent": percent,
        "readable": readable_percent,
    }
    return environment.get_template(template).render(values)


def percent(share: float | None) -> str:
    """A share of 1 for people; a dash where there is none.

    Example:
        >>> percent(0.8241), percent(float("nan"))
        ('82.4 %', '–')
    """
    return "–" if share is None or share != share else f"{100 * share:.1f} %"


def _figure(picture: bytes, words: str) -> Markup:
    """A picture as wide as the page, in words for who can't see it."""
    element = '<div class="wide"><img src="{}" alt="{}"></div>'
    return Markup(element).format(_inline(picture), words)


def _inline(picture: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _shown(value: Any) -> Any:
    # what is markup already holds our own lines
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.1f} MiB"
