"""What a model says of pictures, divided among processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastlora.transfer.data import LabelledImages


def predict(
    evaluate: Callable[[Tensor], Tensor],
    images: LabelledImages,
    batch_size: int,
    workers: int,
    accelerator: Any,
    on_done: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Logits ``[n, classes]`` of all pictures, float32 on the CPU, the same in every process.

    Args:
        evaluate: From inputs ``[B, ...]`` on the accelerator's device to logits.
        images: With the evaluation transform.
        batch_size: Pictures at a time, over all processes.
        workers: Processes that load pictures.
        accelerator: An ``accelerate.Accelerator``.
        on_done: Called with how many pictures are done, of how many.
    """
    rank, processes, count = accelerator.process_index, accelerator.num_processes, len(images)
    size = -(-batch_size // processes)
    # what is short of a round is filled up with the last picture, and cut off again
    starts = range(0, count, size * processes)
    keys = [[min(start + rank * size + i, count - 1) for i in range(size)] for start in starts]
    if processes == 1:
        keys[-1] = list(range(starts[-1], count))
    loader: DataLoader[Any] = DataLoader(
        images, batch_sampler=keys, num_workers=workers, generator=torch.Generator()
    )
    found: list[Tensor] = []
    for done, (inputs, _) in enumerate(loader, start=1):
        logits = evaluate(inputs.to(accelerator.device))
        found.append(accelerator.gather(logits).cpu())
        if on_done is not None:
            on_done(min(done * size * processes, count), count)
    return torch.cat(found)[:count]
