"""Folders of pictures that a small network can tell apart."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("dark", "light")


def write_pictures(folder: Path, count: int = 12, size: int = 40, classes: tuple[str, ...] = CLASSES) -> Path:
    """A folder for each class, brighter from class to class."""
    generator = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = generator.integers(0, 60, (size, size, 3))
            pixels = (noise + level * 180 // max(1, len(classes) - 1)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    return folder
