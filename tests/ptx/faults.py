"""Faults planted in compiled code, each in one place: none may go unnoticed.

Only such as no run can hide. A barrier or a wait may be there for nothing on a given shape.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator

Edit = Callable[[re.Match[str]], str]


def _later(match: re.Match[str]) -> str:
    """A wait that leaves one group more on its way."""
    return f"{match[1]}{int(match[2]) + 1};"


# what is broken → where, and what it becomes
_ANYWHERE: dict[str, tuple[str, Edit]] = {
    "a matrix transposed": (
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.(trans\.)?shared",
        lambda m: f"ldmatrix.sync.aligned.m8n8.x4.{'' if m[1] else 'trans.'}shared",
    ),
    "operands of a product swapped": (
        r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)",
        lambda m: f"{m[1]}{m[3]}, {m[2]}",
    ),
    "a shared address off by 16": (
        r"(ldmatrix[^\[]*\[%r\d+)(?:\+(\d+))?\]",
        lambda m: f"{m[1]}+{int(m[2] or 0) + 16}]",
    ),
    "a wait for copies one group late": (r"(cp\.async\.wait_group\s+)([1-9]\d*);", _later),
    "no barrier after a wait": (
        r"(cp\.async\.wait_group\s+[1-9]\d*;(?:\n[^;]*)*?\n)\s*bar\.sync\s+0;",
        lambda m: m[1],
    ),
    "a register never written": (r"^\tand\.b32 \t%r\d+, %r\d+, \d+;", lambda m: ""),
    "an operand of wgmma turned": (
        r"(wgmma\.mma_async[^;]*), (\d);",
        lambda m: f"{m[1]}, {1 - int(m[2])};",
    ),
    "a wait for wgmma one group late": (r"(wgmma\.wait_group\.sync\.aligned\s+)([1-9]\d*);", _later),
    "half the bytes expected": (
        r"(mbarrier\.arrive\.expect_tx[^;]*), (\d+);",
        lambda m: f"{m[1]}, {int(m[2]) // 2};",
    ),
    "an mbarrier never made": (r"^\t@%p\d+ mbarrier\.init[^;\n]*;", lambda m: ""),
    "no fence before a TMA store": (
        r"^\tfence\.proxy\.async\S*;(?=(?:[^;]*;){1,14}?[^;]*global\.shared::cta)",
        lambda m: "",
    ),
}
OFF_BY_ONE = "an end off by one"
KINDS = {*_ANYWHERE, OFF_BY_ONE}
# of a tile's elements along an axis, against the axis' length
_END = r"setp\.lt\.s32(\s+%p\d+, %r\d+, )({end});"
_FEWEST_COMPARED = 4


def faults(text: str, *, each: int) -> Iterator[tuple[str, str]]:
    """What is broken, and the PTX with it.

    Args:
        text: Right PTX.
        each: How many of each kind at most, spread over the text.
    """
    for kind, (pattern, edit) in _ANYWHERE.items():
        places = list(re.finditer(pattern, text, re.M))
        for match in places[:: max(1, len(places) // each)][:each]:
            yield kind, text[: match.start()] + edit(match) + text[match.end() :]
    compared = Counter(end for _, end in re.findall(_END.format(end=r"%r\d+"), text))
    for end in [end for end, count in compared.items() if count >= _FEWEST_COMPARED][:each]:
        yield OFF_BY_ONE, re.sub(_END.format(end=end), r"setp.le.s32\1\2;", text)
