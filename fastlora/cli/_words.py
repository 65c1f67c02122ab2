"""Errors of the Python interface in the words of a command."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

# what is said of a number or a choice, after the name of its parameter
_SAID = (
    r"(?= (?:above|below|from|between|out of|of at least|of at most|of 0 or more|as an? |to be |in [\[(]|>"
    r"|for|and |was ))"
)
_VALUE = r"""("[^"]*"|'[^']*'|[\w.+-]*\w)"""
_ENDS = r"(?<![\w/.'\"-]){}(?![\w/'\"=-]|\.\w)"
# parameters that are no words of English: wherever they stand, the option is meant
_ABBREVIATIONS = ("lr", "ema", "mixup")


def options_of_command(command: Any) -> dict[str, tuple[str, str | None]]:
    """Each parameter's option, and the option that switches it off, if it is a flag with one."""
    found = {}
    for parameter in command.params:
        names = [name for name in parameter.opts if name.startswith("--")]
        if names:
            off = next(iter(parameter.secondary_opts), None)
            found[str(parameter.name)] = (names[0], off)
    return found


def in_options(text: str, options: Mapping[str, tuple[str, str | None]]) -> str:
    """An error's text with the names of parameters as options.

    Args:
        text: Written for the Python interface.
        options: See :func:`options_of_command`.

    Example:
        >>> known = {"batch_size": ("--batch-size", None), "weights": ("--weights", None)}
        >>> in_options("expected batch_size of at least 1, got 0", known)
        'expected --batch-size of at least 1, got 0'
        >>> in_options("take random weights with weights=None", known)
        'take random weights with --weights none'
    """
    for name, (option, off) in options.items():
        text = re.sub(rf"(?<![\w/.-]){name}={_VALUE}", partial(_given, option, off), text)
        text = re.sub(rf"(?:options? )?'{name}'(?= for strategy)", option, text)
        text = re.sub(
            rf"(?:(?<=expected )|(?<=lower )|(?<=; )|(?<=, but )|(?<=^)){name}{_SAID}", option, text
        )
        text = re.sub(rf"(?<=as ){name}(?=[,;])", option, text)
        if "_" in name or name in _ABBREVIATIONS:
            text = re.sub(_ENDS.format(name), option, text)
    if "strategy" in options:
        text = re.sub(r"(?<![\w/.-])strategy '(\w+)'", r"--strategy \1", text)
    return text


def _given(option: str, off: str | None, found: re.Match[str]) -> str:
    value = found[1].strip("'\"")
    if value == "True":
        return option
    if value == "False":
        return off or f"no {option}"
    return f"{option} {'none' if value == 'None' else value}"
