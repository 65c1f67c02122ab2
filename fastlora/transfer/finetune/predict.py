"""What a fine-tuned model says of picture files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastlora.transfer.data import Files, LabelledImages, find_pictures
from fastlora.transfer.finetune.saved import SavedRun
from fastlora.transfer.fit import best_device


def predict_files(
    run: SavedRun, places: Sequence[Path], *, top: int = 1, batch_size: int = 32
) -> list[dict[str, Any]]:
    """The likeliest classes of pictures.

    Args:
        run: See :func:`fastlora.transfer.finetune.load_run`.
        places: Picture files, or folders that are searched for them.
        top: How many classes to name for each.
        batch_size: Pictures at a time.

    Returns:
        A dict for each picture: ``path``, and ``classes`` as pairs of name and probability, likeliest first.

    Raises:
        FileNotFoundError: There is no such file, or no pictures in a folder.
        ValueError: A picture can't be decoded.
    """
    paths = [path for place in places for path in find_pictures(place)]
    names = tuple(map(str, paths))
    images = LabelledImages(run.classes, (0,) * len(paths), names, Files(paths), run.transform)
    device = best_device()
    model = run.model.to(device)
    with torch.no_grad():
        logits = [model(inputs.to(device)).cpu() for inputs, _ in DataLoader(images, batch_size)]
    shares, classes = torch.cat(logits).softmax(dim=1).topk(min(top, len(run.classes)), dim=1)
    return [
        {"path": name, "classes": [(run.classes[i], p) for i, p in zip(row, probabilities, strict=True)]}
        for name, row, probabilities in zip(names, classes.tolist(), shares.tolist(), strict=True)
    ]
