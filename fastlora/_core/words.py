"""Names and lists of them made fit to be shown: in an error, on a terminal, in a figure, on a page."""

import difflib
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import TypeVar

Value = TypeVar("Value")

# control and format characters, lone surrogates of undecodable file names, line and paragraph separators
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# scripts and emoji are joined by them
_JOINERS = "\u200c\u200d"


def visible(text: object) -> str:
    r"""What a text holds, in one line that can't steer a terminal, nor change the order of what is read.

    Example:
        >>> print(visible("a\x1b[31m\n\u202eb"))
        a\x1b[31m\n\u202eb
    """
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _HIDDEN and character not in _JOINERS
        else character
        for character in whole
    )


def shortened(text: object, length: int) -> str:
    """A visible text of at most so many characters, its middle left out.

    Example:
        >>> shortened("a rather long name", 9)
        'a ra…name'
    """
    whole = visible(text)
    if len(whole) <= length:
        return whole
    end = (length - 1) // 2
    return f"{whole[: length - 1 - end]}…{whole[len(whole) - end :]}"


def first_few(texts: Collection[str], count: int) -> list[str]:
    """So many of the texts, and how many more there are.

    Example:
        >>> first_few(["a", "b", "c", "d"], 2)
        ['a', 'b', '… and 2 more']
    """
    left = len(texts) - count
    return [*islice(texts, count), *([f"… and {left} more"] if left > 0 else [])]


def look_up(name: str, known: Mapping[str, Value], what: str) -> Value:
    """What a table has under a name.

    Args:
        name: What was asked for.
        known: The table.
        what: What its names are of, in the words of the error: "a strategy".

    Raises:
        ValueError: It has no such name; near ones are said first.

    Example:
        >>> look_up("lora", {"lora": 1, "full": 2}, "a strategy")
        1
    """
    if name not in known:
        advice = did_you_mean(name, known)
        raise ValueError(f"{advice}expected {what} out of {', '.join(known)}, got {name!r}")
    return known[name]


def did_you_mean(name: object, known: Iterable[str], *, count: int = 2, cutoff: float = 0.6) -> str:
    """The nearest names as a question to begin an advice with; empty if none is near.

    Example:
        >>> did_you_mean("loar", ["lora", "full"])
        "did you mean 'lora'? "
    """
    near = difflib.get_close_matches(str(name), list(known), n=count, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""
