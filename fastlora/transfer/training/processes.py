"""Leaving the other processes of a run."""

import torch.distributed as dist


def leave_processes() -> None:
    """Wait for the others, then end the process group; in a run of one process, nothing.

    A process that leaves without it may be aborted while the interpreter shuts down.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
