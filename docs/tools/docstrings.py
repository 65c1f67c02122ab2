"""Docstrings as the site shows them: roles become links, examples become code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|obj|exc):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that griffe has read.

        Args:
            obj: The object; one without a docstring is left alone.
            **kwargs: What else griffe tells its extensions.
        """
        if obj.docstring is None:
            return
        if obj.docstring.value == "See the class.":
            # the signature is enough
            obj.docstring = None
        else:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """A docstring with roles as links, and with its examples where griffe looks for them.

    Args:
        docstring: Text in Google style, with Sphinx's roles.
    """
    return _EXAMPLE.sub(r"\1Examples:", _ROLE.sub(_linked, docstring))


def _linked(role: re.Match[str]) -> str:
    short, name = role.groups()
    shown = name.rpartition(".")[2] if short else name
    # names that no page holds stay plain
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'
