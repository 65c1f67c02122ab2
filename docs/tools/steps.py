"""Training steps beside PEFT's, of the figures in ``docs/results``: README's picture and its table.

``figures`` draws the picture, ``python -m docs.tools.steps`` prints the table.
"""

import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

_RESULTS = Path(__file__).parents[1] / "results"
# each page's rows, under the heading that they get here; None for the name that they have
_PAGES = {
    "peft": None,
    "language_models/dense": "SmolLM2-135M, 512 tokens",
    "language_models/one_mask": "SmolLM2-135M, 512 tokens",
    "language_models": "SmolLM2-135M over NF4, 512 tokens",
}
_WIDTH, _ROW, _TOP = 640, 18, 62
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1b2a2f; } .end { text-anchor: end; }
.middle { text-anchor: middle; }
.name { font-weight: 600; } .small { font-size: 12px; fill: #55666c; }
.gain { font-size: 12px; font-weight: 600; }
.card { fill: #ffffff; } .grid { stroke: #dfe5e8; } .floor { stroke: #90a4ae; stroke-dasharray: 3 3; }
.between { stroke: #b0bec5; stroke-width: 2; } .peft { fill: #e07b00; } .fastlora { fill: #00897b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6ecee; } .small { fill: #a7b4b9; } .card { fill: #1e2429; } .grid { stroke: #333c42; }
  .floor { stroke: #78909c; } .between { stroke: #55666c; }
  .peft { fill: #ffb74d; } .fastlora { fill: #4db6ac; }
}
"""


class Step(NamedTuple):
    """A step as it was measured.

    Attributes:
        model: The model and its input.
        setting: Dtype and dropout.
        times: PEFT's time and ours, as multiples of the frozen model's.
        kept: What PEFT's forward and ours leave for backward, in MiB.
    """

    model: str
    setting: str
    times: tuple[float, float]
    kept: tuple[float, float]


class _Panel(NamedTuple):
    """Where a quantity is drawn, and from which number to which."""

    title: str
    left: int
    right: int
    first: float
    last: float
    marks: tuple[float, ...]
    unit: str

    def x(self, value: float) -> float:
        """Of a value."""
        return self.left + (self.right - self.left) * (value - self.first) / (self.last - self.first)


_TIMES = _Panel("Time of a step; 1 is the frozen model's", 150, 392, 0.9, 2.7, (1, 1.5, 2, 2.5), "×")
_KEPT = _Panel("Kept for backward, MiB", 430, 618, 0, 1250, (0, 400, 800, 1200), "")


def steps() -> list[Step]:
    """LoRA's steps of all pages; of one that several have measured, the figures of the most turns."""
    found = dict[tuple[str, str], tuple[int, Step]]()
    for folder, heading in _PAGES.items():
        page = json.loads((_RESULTS / folder / "steps.json").read_text())
        rounds = page["environment"]["rounds"]
        for row in page["rows"]:
            if row.get("trained", "LoRA") != "DoRA":
                step = _step(row, heading or row["model"])
                which = (step.model, step.setting)
                found[which] = max((rounds, step), found.get(which, (0, step)), key=lambda each: each[0])
    return [step for _, step in found.values()]


def _step(row: dict[str, Any], model: str) -> Step:
    times, kept = row["median_ms"], row["kept_bytes"]
    has_dropout = row.get("dropout") or "dropout" in row.get("trained", "")
    return Step(
        model,
        row["dtype"] + (", dropout 0.1" if has_dropout else ""),
        (times["peft"] / times["frozen"], times["fastlora"] / times["frozen"]),
        (kept["peft"] / 2**20, kept["fastlora"] / 2**20),
    )


def draw() -> str:
    """All steps as SVG, each a line from PEFT's value to ours."""
    parts, y, model = list[str](), _TOP, ""
    for step in steps():
        if step.model != model:
            model, y = step.model, y + 24
            parts.append(_text(12, y, model, "name"))
        y += _ROW
        peft, ours = step.times
        parts += [_text(22, y, step.setting, "small"), *_line(_TIMES, step.times, y)]
        parts += [
            _text(_TIMES.x(max(step.times)) + 9, y, f"{peft / ours:.2f}×", "gain"),
            *_line(_KEPT, step.kept, y),
        ]
    bottom = y + 10
    frame = [*_axis(_TIMES, bottom), *_axis(_KEPT, bottom)]
    floor = f'<line class="floor" x1="{_TIMES.x(1):.1f}" x2="{_TIMES.x(1):.1f}" y1="{_TOP}" y2="{bottom}"/>'
    title = "Training steps with LoRA on a CPU: PEFT, and the same model after fastlora.accelerate"
    size = f'width="{_WIDTH}" height="{bottom + 26}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 26}" {size} role="img">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>\n"
        f'<rect class="card" {size} rx="6"/>\n'
        + "\n".join([*_legend(), *frame, floor, *parts])
        + "\n</svg>\n"
    )


def table() -> str:
    """The table of README, in Markdown: a line for each model and dtype."""
    found: dict[tuple[str, str], list[Step]] = {}
    for step in steps():
        found.setdefault((step.model, step.setting.partition(",")[0]), []).append(step)
    lines = [
        "| model | dtype | PEFT's time / ours | dropout 0.1 | kept, MiB: PEFT → ours | dropout 0.1 |",
        "|---|---|---|---|---|---|",
    ]
    for (model, dtype), both in found.items():
        gains = (f"**{step.times[0] / step.times[1]:.2f}×**" for step in both)
        kept = ("{:,.0f} → {:,.0f}".format(*step.kept) for step in both)
        lines.append(f"| {' | '.join([model, dtype, *gains, *kept])} |")
    return "\n".join(lines)


def _legend() -> list[str]:
    found = [_text(_WIDTH - 12, 22, "1.25×: PEFT's time over ours", "small end")]
    for x, kind, said in ((12, "peft", "PEFT"), (70, "fastlora", "the same model after fastlora.accelerate")):
        found += [f'<circle class="{kind}" cx="{x + 5}" cy="18" r="5"/>', _text(x + 16, 22, said)]
    return found


def _axis(panel: _Panel, bottom: int) -> list[str]:
    found = [_text(panel.left, _TOP - 14, panel.title, "small")]
    for mark in panel.marks:
        x = panel.x(mark)
        found.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        found.append(_text(x, bottom + 16, f"{mark:g}{panel.unit}", "small middle"))
    return found


def _line(panel: _Panel, values: tuple[float, float], y: int) -> list[str]:
    peft, ours = (panel.x(value) for value in values)
    return [
        f'<line class="between" x1="{peft:.1f}" x2="{ours:.1f}" y1="{y - 4}" y2="{y - 4}"/>',
        f'<circle class="peft" cx="{peft:.1f}" cy="{y - 4}" r="4.5"/>',
        f'<circle class="fastlora" cx="{ours:.1f}" cy="{y - 4}" r="4.5"/>',
    ]


def _text(x: float, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y}" class="{kind}">{escape(text)}</text>'


if __name__ == "__main__":
    print(table())
