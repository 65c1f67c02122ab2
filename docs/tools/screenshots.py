"""Pictures of the reports of small real runs, light and dark: ``python -m docs.tools.screenshots``.

It needs Chromium and the packages of ``pip install -e ".[dev]"``; the language model's run takes minutes.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from fastlora._core.extras import package_folder
from fastlora.transfer.data.bundled import load_images

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "guides" / "reports"
MEASURED = ROOT / "benchmarks" / "results" / "amd-epyc-2026-11-28.json"
# of Chromium's setting for pages that ask which one the reader prefers
_SCHEMES = {"": 1, "-dark": 0}
# pixels: a report's first figure or table, and what stands above it
_SIZES = {"finetune": (900, 790), "adapt": (900, 900), "language": (900, 800), "bench": (1080, 880)}
_COLOURS = 200


def main() -> None:
    """Take the pictures of the reports that are named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Out of {', '.join(REPORTS)}; all without.")
    parser.add_argument(
        "--runs", type=Path, help="Folder of the runs; those that are there are not run again."
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = arguments.runs or Path(folder)
        for name in arguments.names or REPORTS:
            page = runs / name / "report.html"
            if not page.exists():
                page.parent.mkdir(parents=True, exist_ok=True)
                REPORTS[name](page.parent)
            for suffix, scheme in _SCHEMES.items():
                take(page, FOLDER / f"{name}{suffix}.png", _SIZES[name], scheme)


def take(page: Path, picture: Path, size: tuple[int, int], scheme: int) -> None:
    """Take a picture of a page's top, in few colours.

    Args:
        page: An HTML file.
        picture: Where to write the PNG.
        size: Its width and height in pixels.
        scheme: 1 for a reader who prefers light pages, 0 for dark ones.
    """
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    shown = ["--window-size={},{}".format(*size), f"--blink-settings=preferredColorScheme={scheme}"]
    subprocess.run([*chromium, *shown, f"--screenshot={picture}", page.resolve().as_uri()], check=True)
    Image.open(picture).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(
        picture, optimize=True
    )


def _finetune(folder: Path) -> None:
    data = load_images("mnist5k", 56)
    # they are sorted by class
    data = data.subset(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:800])
    for index, (picture, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        path = folder / "digits" / data.classes[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[0].numpy()).save(path)
    options = "--model efficientnet_lite0 --strategy lora --rank 8 --image-size 56 --no-flip --epochs 6"
    _fastlora(folder, f"finetune digits {options} --output .")


def _adapt(folder: Path) -> None:
    cells = package_folder("elpv_dataset", distribution="elpv-dataset", purpose="the solar cells") / "data"
    rows = [line.split() for line in (cells / "labels.csv").read_text().splitlines()]
    for kind in ("mono", "poly"):
        # certain ones, half of them
        lines = [
            f"{cells / path},{'defective' if float(share) else 'functional'}"
            for path, share, own in rows[::2]
            if own == kind and float(share) in (0.0, 1.0)
        ]
        (folder / f"{kind}.csv").write_text("\n".join(["path,label", *lines]))
    options = "--model dinov2_vits14 --image-size 84 --method mmd --cache-features"
    _fastlora(folder, f"adapt --source mono.csv --target poly.csv {options} --output .")


def _language(folder: Path) -> None:
    _fastlora(folder, "demo --output .")


def _bench(folder: Path) -> None:
    _fastlora(folder, f"bench report {MEASURED} --output .")


def _fastlora(folder: Path, command: str) -> None:
    """Run a command in its run's folder, so that its page names no other."""
    subprocess.run([sys.executable, "-m", "fastlora.cli", *command.split()], check=True, cwd=folder)


REPORTS: dict[str, Callable[[Path], None]] = {
    "finetune": _finetune,
    "adapt": _adapt,
    "language": _language,
    "bench": _bench,
}


if __name__ == "__main__":
    main()
