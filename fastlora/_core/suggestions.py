"""What a mistyped name may have meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], *, count: int = 2, cutoff: float = 0.6) -> str:
    """The nearest names as a question to begin an error with; empty if none is near.

    Example:
        >>> did_you_mean("loar", ["lora", "full"])
        "did you mean 'lora'? "
    """
    near = difflib.get_close_matches(str(name), list(known), n=count, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""
