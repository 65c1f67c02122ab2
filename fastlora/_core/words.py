"""Names and messages from outside, made fit to be shown: on a terminal, in a figure, on a page."""

import unicodedata

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
