"""How many programs of a compiled kernel one multiprocessor holds at a time."""

import functools

import torch

from fastlora_kernels.compiled import Row, committed, tile_text
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Tile

# what the table leaves out differs little from what it holds
_NAMES = {torch.float32: "fp32", torch.float16: "bf16", torch.bfloat16: "bf16"}
_LIKE = {
    "sm_86": ("sm_80",),
    "sm_89": ("sm_86", "sm_80"),
    "sm_103": ("sm_100",),
    "sm_120": ("sm_86", "sm_80"),
    "sm_121": ("sm_120", "sm_86", "sm_80"),
}
# per multiprocessor: CUDA programming guide; a block reserves 1 KiB of shared memory beside its own
_REGISTERS, _THREADS, _RESERVED = 65_536, 2048, 1024
_FEWER_THREADS = dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 1536)


def programs_at_once(kernel: str, tile: Tile, dtype: torch.dtype, target: Target, *, dropping: bool) -> int:
    """Programs that a multiprocessor holds, by registers and shared memory; 1 where the table lacks the tile.

    Args:
        kernel: Name of the kernel.
        tile: Block sizes.
        dtype: The layer's dtype.
        target: The GPU.
        dropping: Whether dropout is active.
    """
    row = _find(kernel, target.name, _NAMES.get(dtype, ""), tile, dropping)
    if row is None or target.is_amd:
        return 1
    threads = 32 * tile.warps
    by_registers = _REGISTERS // max(row.registers * threads, 1)
    by_shared = (target.shared_bytes + _RESERVED) // (row.shared_bytes + _RESERVED)
    return max(1, min(by_registers, by_shared, _FEWER_THREADS.get(target.name, _THREADS) // threads))


@functools.lru_cache(maxsize=1024)
def _find(kernel: str, architecture: str, dtype: str, tile: Tile, dropping: bool) -> Row | None:
    """A row of the architecture itself, else of those that its code is like; with a rank as most have."""
    settings = (tile_text(tile), tile.warps, tile.stages)
    for name in (architecture, *_LIKE.get(architecture, ())):
        fitting = [row for row in _rows(kernel, name, dtype) if (row.tile, row.warps, row.stages) == settings]
        if fitting:
            return max(fitting, key=lambda row: (row.dropout == dropping, row.rank_aligned))
    return None


@functools.cache
def _rows(kernel: str, architecture: str, dtype: str) -> list[Row]:
    """The rows of aligned calls with every argument and adapters in float32."""
    what = (kernel, architecture, dtype, "fp32", "")
    return [
        row
        for row in committed()[1]
        if row.aligned and (row.kernel, row.target, row.dtype, row.adapter_dtype, row.absent) == what
    ]
