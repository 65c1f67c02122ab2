"""Emoji in two drawing styles, Noto and Twemoji, with the same nine categories: from npm, if it is there."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import torch

from fastlora.transfer.data import Files, LabelledImages

VERSION, SIZE = "16.0.0", 64
STYLES = {"noto": "google", "twemoji": "twitter"}


def fetch(folder: Path) -> Path | None:
    """Unpack both packages into a folder; None where there is neither npm nor an earlier copy."""
    for vendor in STYLES.values():
        if (folder / vendor).is_dir():
            continue
        if shutil.which("npm") is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        name = f"emoji-datasource-{vendor}"
        subprocess.run(["npm", "pack", "--silent", f"{name}@{VERSION}"], cwd=folder, check=True, timeout=600)
        with tarfile.open(folder / f"{name}-{VERSION}.tgz") as archive:
            wanted = (f"package/img/{vendor}/{SIZE}/", "package/emoji.json")
            archive.extractall(
                folder / vendor,
                members=[member for member in archive if member.name.startswith(wanted)],
                filter="data",
            )
    return folder


def pictures(folder: Path, style: str, half: int) -> LabelledImages:
    """One half of the emoji in one style: no emoji is in both halves.

    Args:
        folder: From :func:`fetch`.
        style: In :data:`STYLES`.
        half: 0 or 1.
    """
    vendor = STYLES[style]
    entries = json.loads((folder / vendor / "package" / "emoji.json").read_text())
    both = [
        e for e in entries if e["has_img_google"] and e["has_img_twitter"] and e["category"] != "Component"
    ]
    both.sort(key=lambda entry: str(entry["unified"]))
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [both[place] for place in sorted(order[half::2])]
    classes = tuple(sorted({entry["category"] for entry in both}))
    paths = [folder / vendor / "package" / "img" / vendor / str(SIZE) / e["image"] for e in chosen]
    labels = tuple(classes.index(entry["category"]) for entry in chosen)
    return LabelledImages(classes, labels, tuple(path.name for path in paths), Files(paths))
