"""What a model says of pictures, divided among processes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastlora._core.interruption import leave_signals_to_parent
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.training.engine import logits_of


@torch.no_grad()
def predict(
    model: nn.Module, images: LabelledImages, batch_size: int, workers: int, accelerator: Any
) -> Tensor:
    """Logits ``[n, classes]`` of all pictures, float32 on the CPU, the same in every process.

    Args:
        model: On the accelerator's device; put into eval mode.
        images: With the evaluation transform.
        batch_size: Pictures at a time, over all processes.
        workers: Processes that load pictures.
        accelerator: An ``accelerate.Accelerator``.
    """
    model.eval()
    rank, processes, count = accelerator.process_index, accelerator.num_processes, len(images)
    # no larger than what there is, or a round would be filled up without end
    size = -(-min(batch_size, count) // processes)
    # what is short of a round is filled up with the last picture, and cut off again
    starts = range(0, count, size * processes)
    keys = [[min(start + rank * size + i, count - 1) for i in range(size)] for start in starts]
    if processes == 1:
        keys[-1] = list(range(starts[-1], count))
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=keys,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),
    )
    found: list[Tensor] = []
    for inputs, _ in loader:
        with accelerator.autocast():
            logits = logits_of(model(inputs.to(accelerator.device))).float()
        found.append(accelerator.gather(logits).cpu())
    return torch.cat(found)[:count]
