"""The GPUs that can be rehearsed: a card of every architecture that has tiles, and one that has none."""

from typing import NamedTuple


class Card(NamedTuple):
    """What a driver tells of a GPU.

    Attributes:
        name: What the driver calls the card.
        multiprocessors: SMs or compute units.
        shared_bytes: Shared memory that one program may use.
        shared_per_multiprocessor: Shared memory of all programs on one of them.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    shared_per_multiprocessor: int


CARDS = {
    "sm_75": Card("Tesla T4", 40, 65_536, 65_536),
    "sm_80": Card("NVIDIA A100-SXM4-80GB", 108, 166_912, 167_936),
    "sm_86": Card("NVIDIA A10", 72, 101_376, 102_400),
    "sm_89": Card("NVIDIA GeForce RTX 4090", 128, 101_376, 102_400),
    "sm_90": Card("NVIDIA H100 80GB HBM3", 132, 232_448, 233_472),
    "sm_100": Card("NVIDIA B200", 148, 232_448, 233_472),
    "sm_103": Card("NVIDIA B300 SXM6 AC", 148, 232_448, 233_472),
    "sm_120": Card("NVIDIA GeForce RTX 5090", 170, 101_376, 102_400),
    "sm_121": Card("NVIDIA GB10", 48, 101_376, 102_400),
    "gfx942": Card("AMD Instinct MI300X", 304, 65_536, 65_536),
}
