"""The same choices on every process: those of the first."""

import torch
import torch.distributed as dist

from fastlora.ops.tuned_file import gpu_of
from fastlora_kernels.choose import tuned


def share() -> None:
    """Give every process of a distributed run the measured choices of rank 0.

    Call it after ``init_process_group``, on every rank, before the first step; the trainer does. Without it
    ranks on machines whose caches differ may choose different tiles, whose sums differ in the last bit. Does
    nothing without a process group.

    Example:
        >>> import fastlora.tuning
        >>> fastlora.tuning.share()
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if torch.cuda.is_available():
        # first on every rank: read later, a rank's own file would win
        gpu_of(torch.device("cuda", torch.cuda.current_device()))
    shared = [{gpu: tuned.pinned(gpu) for gpu in tuned.gpus()}]
    dist.broadcast_object_list(shared, src=0)
    for gpu in {*tuned.gpus(), *shared[0]}:
        tuned.pin(gpu, shared[0].get(gpu, ()))
