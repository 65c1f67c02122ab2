"""Diagrams of the fused layer for ``figures``: what launches read and write, what is kept, the cut."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

WIDTH = 420
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1b2a2f; text-anchor: middle; }
.title { font-weight: 600; text-anchor: start; }
.small { font-size: 11.5px; fill: #55666c; text-anchor: start; }
.card { fill: #ffffff; stroke: #cfd8dc; } .passed { fill: #eef3f4; stroke: #90a4ae; }
.kept { fill: #b2dfdb; stroke: #00897b; stroke-width: 2; } .trained { fill: #ffe0b2; stroke: #e07b00; }
.launch { fill: #455a64; stroke: #455a64; } text.launch { fill: #ffffff; stroke: none; }
.arrow { stroke: #607d8b; stroke-width: 1.4; fill: none; marker-end: url(#head); } .head { fill: #607d8b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6ecee; } .small { fill: #a7b4b9; } .card { fill: #1e2429; stroke: #3b464c; }
  .passed { fill: #2b343a; stroke: #78909c; } .kept { fill: #00574f; stroke: #4db6ac; }
  .trained { fill: #6b3f00; stroke: #ffb74d; } .launch { fill: #b0bec5; stroke: #b0bec5; }
  text.launch { fill: #1b2a2f; } .arrow { stroke: #90a4ae; } .head { fill: #90a4ae; }
}
"""
_HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
)
_HALF = 14


@dataclass(frozen=True)
class Box:
    """A tensor or a launch.

    Attributes:
        text: What stands in it.
        x: Its centre, in pixels from the left.
        y: Its centre, in pixels from the top.
        kind: ``"kept"`` for backward, ``"trained"`` (or such a one's gradient), ``"passed"`` or ``"launch"``.
        half: Half of its width in pixels.
    """

    text: str
    x: int
    y: int
    kind: str = "passed"
    half: int = 24


Arrows = Iterable[tuple[str, str]]
FORWARD = {
    "A": Box("A", 60, 56, "trained"),
    "x": Box("x", 222, 56, "kept"),
    "W": Box("W", 296, 56),
    "B": Box("B", 360, 56, "trained"),
    "down": Box("S = dropout(x)·Aᵀ", 110, 110, "launch", 86),
    "S": Box("S", 60, 164, "kept"),
    "mask": Box("mask", 150, 164, "kept", 28),
    "forward": Box("y = x·Wᵀ + S·Bᵀ", 210, 218, "launch", 186),
    "y": Box("y", 210, 272),
}
FORWARD_ARROWS = (
    ("A", "down"), ("x", "down"), ("down", "S"), ("down", "mask"),
    ("S", "forward"), ("x", "forward"), ("W", "forward"), ("B", "forward"), ("forward", "y"),
)  # fmt: skip
BACKWARD = {
    "S": Box("S", 60, 348, "kept"),
    "B": Box("B", 130, 348, "trained"),
    "dY": Box("dY", 224, 348),
    "grad_s_b": Box("dS = dY·B,  dB = dYᵀ·S", 110, 402, "launch", 90),
    "dB": Box("dB", 46, 456, "trained"),
    "dS": Box("dS", 108, 456),
    "mask": Box("mask", 170, 456, "kept", 28),
    "x": Box("x", 270, 456, "kept"),
    "A": Box("A", 326, 456, "trained"),
    "W": Box("W", 382, 456),
    "grad_x_a": Box("dX = dY·W + mask(dS·A),  dA = dSᵀ·mask(x)", 245, 510, "launch", 161),
    "dX": Box("dX", 170, 564),
    "dA": Box("dA", 320, 564, "trained"),
}
BACKWARD_ARROWS = (
    ("S", "grad_s_b"), ("B", "grad_s_b"), ("dY", "grad_s_b"), ("grad_s_b", "dB"), ("grad_s_b", "dS"),
    ("dS", "grad_x_a"), ("mask", "grad_x_a"), ("x", "grad_x_a"), ("A", "grad_x_a"), ("W", "grad_x_a"),
    ("dY", "grad_x_a"), ("grad_x_a", "dX"), ("grad_x_a", "dA"),
)  # fmt: skip
# three tiles of y with and without the cut
_TILES = (1, 2, 3)
WHOLE = {"x": Box("x", 106, 56)} | {
    name: box
    for i in _TILES
    for name, box in {
        f"S{i}": Box("x·Aᵀ", 66 * i - 26, 128, "launch", 27),
        f"y{i}": Box(f"y, tile {i}", 66 * i - 26, 200, half=30),
    }.items()
}
WHOLE_ARROWS = [pair for i in _TILES for pair in (("x", f"S{i}"), (f"S{i}", f"y{i}"))]
CUT = {
    "x": Box("x", 314, 56),
    "down": Box("x·Aᵀ", 314, 104, "launch", 27),
    "S": Box("S", 314, 152, "kept"),
} | {f"y{i}": Box(f"y, tile {i}", 182 + 66 * i, 200, half=30) for i in _TILES}
CUT_ARROWS = [("x", "down"), ("down", "S"), *(("S", f"y{i}") for i in _TILES)]


def layer() -> str:
    """The fused layer as SVG: forward, backward, and what is kept between them."""
    return _drawing(
        620,
        "The fused LoRA layer, forward and backward",
        [
            _text(12, 24, "forward: two launches", "title"),
            _text(12, 316, "backward: two launches, and sums of parts", "title"),
            _text(12, 604, "green: kept for backward · orange: trained · filled: a launch", "small"),
            *_graph(FORWARD, FORWARD_ARROWS),
            *_graph(BACKWARD, BACKWARD_ARROWS),
        ],
    )


def cut() -> str:
    """Why the graph is cut at S, as SVG: x·Aᵀ once, not in every tile of y."""
    return _drawing(
        272,
        "The graph is cut at S",
        [
            _text(12, 24, "not cut: x·Aᵀ in every tile", "title"),
            _text(226, 24, "cut at S: x·Aᵀ once", "title"),
            '<path class="card" d="M210 12 V232"/>',
            _text(12, 256, "S is as wide as the rank. It is kept: dB needs it.", "small"),
            *_graph(WHOLE, WHOLE_ARROWS),
            *_graph(CUT, CUT_ARROWS),
        ],
    )


def _drawing(height: int, title: str, parts: list[str]) -> str:
    card = f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="6"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">'
        f"<title>{title}</title><style>{_STYLE}</style>{_HEAD}\n" + "\n".join([card, *parts]) + "\n</svg>\n"
    )


def _graph(boxes: Mapping[str, Box], arrows: Arrows) -> list[str]:
    return [
        *(_arrow(boxes[start], boxes[end]) for start, end in arrows),
        *(_drawn(box) for box in boxes.values()),
    ]


def _drawn(box: Box) -> str:
    place = f'x="{box.x - box.half}" y="{box.y - _HALF}" width="{2 * box.half}" height="{2 * _HALF}" rx="5"'
    text = _text(box.x, box.y + 5, box.text, "launch" if box.kind == "launch" else "")
    return f'<rect class="{box.kind}" {place}/>{text}'


def _text(x: int, y: int, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'


def _arrow(start: Box, end: Box) -> str:
    """Straight down where one box stands above the other, else to the nearest corner of the wider one."""

    def within(box: Box, x: int) -> int:
        return min(max(x, box.x - box.half + 10), box.x + box.half - 10)

    begins = within(start, end.x) if start.half > end.half else start.x
    ends = within(end, start.x) if end.half >= start.half else end.x
    return f'<path class="arrow" d="M{begins} {start.y + _HALF} L{ends} {end.y - _HALF - 1}"/>'
