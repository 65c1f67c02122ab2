"""The diagram of the fused layer: what is computed from what, and what is kept. Drawn by ``figures``."""

from dataclasses import dataclass

WIDTH, HEIGHT = 420, 372
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1b2a2f; text-anchor: middle; }
.title { font-weight: 600; text-anchor: start; }
.small { font-size: 11.5px; fill: #55666c; text-anchor: start; }
.card { fill: #ffffff; stroke: #cfd8dc; } .box { fill: #eef3f4; stroke: #90a4ae; }
.kept { fill: #b2dfdb; stroke: #00897b; stroke-width: 2; } .trained { fill: #ffe0b2; stroke: #e07b00; }
.arrow { stroke: #607d8b; stroke-width: 1.4; fill: none; marker-end: url(#head); } .head { fill: #607d8b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6ecee; } .small { fill: #a7b4b9; } .card { fill: #1e2429; stroke: #3b464c; }
  .box { fill: #2b343a; stroke: #78909c; } .kept { fill: #00574f; stroke: #4db6ac; }
  .trained { fill: #6b3f00; stroke: #ffb74d; } .arrow { stroke: #90a4ae; } .head { fill: #90a4ae; }
}
"""


@dataclass(frozen=True)
class Box:
    """A tensor: its name, its place, and whether it is kept for backward or trained."""

    name: str
    x: int
    y: int
    kind: str = "box"


FORWARD = {
    "x": Box("x", 40, 110, "kept"),
    "mask": Box("mask", 135, 110, "kept"),
    "A": Box("A", 135, 62, "trained"),
    "S": Box("S", 230, 110, "kept"),
    "B": Box("B", 290, 62, "trained"),
    "W": Box("W", 230, 158),
    "y": Box("y", 380, 110),
}
BACKWARD = {
    "dY": Box("dY", 385, 274),
    "dB": Box("dB = dYᵀ·S", 255, 230, "trained"),
    "dS": Box("dS = dY·B", 255, 274),
    "dA": Box("dA = dSᵀ·x", 100, 230, "trained"),
    "dX": Box("dX = dY·W + dS·A", 100, 318),
}
# from, to
FORWARD_ARROWS = (("x", "mask"), ("mask", "S"), ("A", "S"), ("S", "y"), ("B", "y"), ("x", "W"), ("W", "y"))
BACKWARD_ARROWS = (("dY", "dS"), ("dY", "dB"), ("dS", "dA"), ("dS", "dX"), ("dY", "dX"))
_LEGEND = "green: kept · orange: trained · x and dS·A pass the mask"


def draw() -> str:
    """The diagram as SVG."""
    parts = [
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="6"/>',
        '<text class="title" x="12" y="24">forward: y = x·Wᵀ + S·Bᵀ, S = dropout(x)·Aᵀ</text>',
        '<text class="title" x="12" y="204">backward: what x, S and the mask are kept for</text>',
        f'<text class="small" x="12" y="358">{_LEGEND}</text>',
    ]
    for boxes, arrows in ((FORWARD, FORWARD_ARROWS), (BACKWARD, BACKWARD_ARROWS)):
        parts += [_arrow(boxes[start], boxes[end]) for start, end in arrows]
        parts += [_box(box) for box in boxes.values()]
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">'
        f"<title>The fused LoRA layer: the graph is cut at S</title><style>{_STYLE}</style>{head}\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _half(box: Box) -> int:
    return 14 + 4 * max(len(box.name), 2)


def _box(box: Box) -> str:
    half = _half(box)
    place = f'x="{box.x - half}" y="{box.y - 14}" width="{2 * half}" height="28" rx="5"'
    return f'<rect class="{box.kind}" {place}/><text x="{box.x}" y="{box.y + 5}">{box.name}</text>'


def _arrow(start: Box, end: Box) -> str:
    right = 1 if end.x > start.x else -1
    return (
        f'<path class="arrow" d="M{start.x + right * _half(start)} {start.y} '
        f'L{end.x - right * (_half(end) + 2)} {end.y}"/>'
    )
