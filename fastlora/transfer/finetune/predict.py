"""What a fine-tuned model says of picture files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastlora._core.interruption import leave_signals_to_parent
from fastlora.transfer.data import Files, LabelledImages, find_pictures
from fastlora.transfer.finetune.saved import SavedRun
from fastlora.transfer.training.device import best_device
from fastlora.transfer.training.engine import logits_of

_NOT_FINITE = "the model's scores of it are not finite"


def predict_files(
    run: SavedRun,
    places: Sequence[Path],
    *,
    top: int = 1,
    batch_size: int = 32,
    workers: int = 0,
    on_done: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """The likeliest classes of pictures.

    A picture that can't be decoded costs none of the others' answers.

    Args:
        run: A finished run, from :func:`fastlora.transfer.finetune.load_run`.
        places: Picture files, or folders that are searched for them.
        top: How many classes to name for each.
        batch_size: Pictures at a time.
        workers: Processes that decode pictures; 0 decodes them in this one.
        on_done: Called with how many pictures are done, of how many.

    Returns:
        A dict for each picture: ``path``, ``classes`` as pairs of name and probability, likeliest first, and
        ``error``: None, or why there are no classes.

    Raises:
        FileNotFoundError: There is no such file, or no pictures in a folder.
    """
    paths = [path for place in places for path in find_pictures(place)]
    names = tuple(map(str, paths))
    images = LabelledImages(run.classes, (0,) * len(paths), names, Files(paths), run.transform)
    device = best_device()
    run.model.to(device)
    loader: DataLoader[Any] = DataLoader(
        _Attempts(images),
        min(batch_size, len(paths)),
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
    )
    answers: list[dict[str, Any]] = []
    for batch in loader:
        found = zip(names[len(answers) :], _answers(run, batch, top, device), strict=False)
        answers += [{"path": name} | answer for name, answer in found]
        if on_done is not None:
            on_done(len(answers), len(paths))
    return answers


@dataclass(frozen=True)
class _Attempts(Dataset[Tensor | str]):
    """Pictures, or in their place why they can't be read."""

    images: LabelledImages

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            picture: Tensor = self.images[index][0]
        # decoders fail in any way on a damaged file
        except Exception as error:
            return str(error.__cause__ or error) or type(error).__name__
        return picture


@torch.no_grad()
def _answers(
    run: SavedRun, batch: Sequence[Tensor | str], top: int, device: torch.device
) -> list[dict[str, Any]]:
    pictures = [each for each in batch if isinstance(each, Tensor)]
    rows = iter(logits_of(run.model(torch.stack(pictures).to(device))).float().cpu() if pictures else ())
    return [
        {"classes": [], "error": each} if isinstance(each, str) else _answer(run, next(rows), top)
        for each in batch
    ]


def _answer(run: SavedRun, logits: Tensor, top: int) -> dict[str, Any]:
    if not logits.isfinite().all():
        return {"classes": [], "error": _NOT_FINITE}
    shares, places = logits.softmax(dim=0).topk(min(top, len(run.classes)))
    named = [(run.classes[i], share) for i, share in zip(places.tolist(), shares.tolist(), strict=True)]
    return {"classes": named, "error": None}
