"""Draw the figures of ``docs/concepts``: ``python -m docs.tools.figures``."""

from html import escape
from pathlib import Path

from docs.tools import diagram, steps
from docs.tools.traffic import Tensor, formula, tensors

FOLDER = Path(__file__).parents[1] / "concepts" / "figures"
# rows, inputs, outputs, rank; an adapter's hidden size and bottleneck
SIZES = {"M": 8192, "K": 4096, "N": 4096, "R": 16, "H": 4096, "D": 64}
# what is absent in LoRA without DoRA, and in a sequential adapter
_ABSENT = {"factor", "product"}
FIGURES = {
    "lora-forward": ("lora", ("lora_down", "lora_forward")),
    "lora-backward": ("lora", ("lora_grad_s_b", "lora_grad_x_a")),
    "shared": ("shared", ("shared_grad_x",)),
    "adapter": ("adapter", ("adapter_forward", "adapter_grad_z", "adapter_grad_h_weights")),
}
_OTHERS = {"layer": diagram.layer, "cut": diagram.cut, "steps": steps.draw}
NAMES = (*_OTHERS, *FIGURES)
_WIDTH, _ROW, _BAR = 420, 19, 120
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1b2a2f; }
.name { font: 600 14px ui-monospace, monospace; } .small { font-size: 12px; fill: #55666c; }
.card { fill: #ffffff; stroke: #cfd8dc; } .reads { fill: #00897b; } .writes { fill: #e07b00; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6ecee; } .small { fill: #a7b4b9; } .card { fill: #1e2429; stroke: #3b464c; }
  .reads { fill: #4db6ac; } .writes { fill: #ffb74d; }
}
"""


def main() -> None:
    """Write every figure."""
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        (FOLDER / f"{name}.svg").write_text(draw(name))


def draw(name: str) -> str:
    """A figure as SVG: a diagram, measured steps, or what launches read and write, bars as long as the bytes.

    Args:
        name: One of ``NAMES``.
    """
    if name in _OTHERS:
        return _OTHERS[name]()
    folder, kernels = FIGURES[name]
    parts, top = [], 0
    for kernel in kernels:
        found = [tensor for tensor in tensors(folder, kernel) if tensor.name not in _ABSENT]
        parts.append(_card(kernel, formula(folder, kernel), found, top))
        top += _height(formula(folder, kernel), found) + 10
    title = escape(f"What {', '.join(kernels)} read and write")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" role="img">'
        f"<title>{title}</title><style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _height(computes: str, found: list[Tensor]) -> int:
    return 42 + 16 * len(_two_lines(computes)) + _ROW * len(found)


def _card(kernel: str, computes: str, found: list[Tensor], top: int) -> str:
    rows = [tensor for written in (False, True) for tensor in found if tensor.written is written]
    box = f'width="{_WIDTH - 2}" height="{_height(computes, found)}" rx="6"'
    lines = [
        f'<rect class="card" x="1" y="{top + 1}" {box}/>',
        _text(12, top + 22, kernel, "name"),
        *(_text(12, top + 40 + 16 * i, line, "small") for i, line in enumerate(_two_lines(computes))),
    ]
    for index, tensor in enumerate(rows):
        y = top + 46 + 16 * len(_two_lines(computes)) + _ROW * index
        kind, size = ("writes" if tensor.written else "reads"), _bytes(tensor)
        said = "partial sums" if size is None else _mib(size)
        length = 2.0 if size is None else max(2.0, _BAR * size / _largest())
        lines += [
            _text(12, y, kind, "small"),
            _text(62, y, tensor.name),
            *([] if size is None else [_text(160, y, f"[{tensor.shape.rstrip(',')}]", "small")]),
            f'<rect class="{kind}" x="228" y="{y - 10}" width="{length:.1f}" height="11" rx="2"/>',
            _text(232 + length, y, said, "small"),
        ]
    return "\n".join(lines)


def _two_lines(text: str) -> list[str]:
    """A formula as it is, or cut where its second half begins."""
    first, joint, second = text.partition(" and ")
    return [text] if len(text) < 52 or not joint else [first, f"and {second}"]


def _text(x: float, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y}" class="{kind}">{escape(text)}</text>'


def _bytes(tensor: Tensor) -> int | None:
    """In bf16, trained parameters in float32; None where a plan says how many parts there are."""
    count = 1.0
    for dimension in filter(None, tensor.shape.replace(" ", "").split(",")):
        size, _, divisor = dimension.partition("/")
        # of several layers each has its own, N_0, say
        size = size.partition("_")[0]
        if size not in SIZES and not size.isdigit():
            return None
        count *= SIZES.get(size, 0) or int(size)
        count /= int(divisor or 1)
    return round(count * _itemsize(tensor.name))


def _itemsize(name: str) -> int:
    if name == "seed":
        return 8
    trained = name.startswith(("lora_", "up_", "down_"))
    return 4 if trained or name.startswith("mask") else 2


def _largest() -> int:
    return SIZES["M"] * SIZES["K"] * 2


def _mib(size: int) -> str:
    return (
        f"{size / 2**20:.3g} MiB"
        if size >= 2**18
        else f"{size / 2**10:.3g} KiB"
        if size > 1023
        else f"{size} B"
    )


if __name__ == "__main__":
    main()
