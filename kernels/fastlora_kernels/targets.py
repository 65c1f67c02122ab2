"""GPU facts that plans and predictions need. An unknown GPU gets a sound default, never an error."""

import difflib
import functools
import re
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Target:
    """One GPU.

    Attributes:
        name: ``sm_90`` or ``gfx942`` as the compilers call its architecture.
        card: What it is sold as, for instance ``H100``.
        multiprocessors: SMs (compute units on AMD).
        shared_bytes: Shared memory that one program may use, in bytes.
        tiles: The architecture whose pinned tiles it uses.
        tensor_tflops: Peak of dense 16-bit products with float32 sums, in TFLOP/s.
        fp32_tflops: Peak of the ordinary float32 units, in TFLOP/s.
        bandwidth: Bandwidth of the memory, in GB/s.
        l2_bytes: Last cache before memory, in bytes; half of it where two halves may hold the same line.
        sustained: Share of ``tensor_tflops`` that a library's main loop keeps up under the power limit.
    """

    name: str
    card: str
    multiprocessors: int
    shared_bytes: int
    tiles: str
    tensor_tflops: float
    fp32_tflops: float
    bandwidth: float
    l2_bytes: int
    sustained: float

    @property
    def is_amd(self) -> bool:
        """Whether the target is compiled through ROCm."""
        return self.name.startswith("gfx")


_MIB = 2**20
# SMs, peaks, bandwidth, L2: the makers' data sheets (dense, without sparsity). Shared memory per block: CUDA
# programming guide, table "technical specifications per compute capability". Sustained: fitted to published
# times (A100: triton#6523; H100: triton#2339, FBGEMM#2766; H100 NVL: lorafusion#8; GB10, also its L2:
# huggingface/kernels#283), else assumed. GB10's peak: a quarter of its dense FP4 figure
CARDS = {
    target.card: target
    for target in (
        Target("sm_80", "A100", 108, 166_912, "sm_80", 312, 19.5, 2039, 20 * _MIB, 0.68),
        Target("sm_86", "A10", 72, 101_376, "sm_80", 125, 31.2, 600, 6 * _MIB, 0.6),
        Target("sm_86", "RTX 3090", 82, 101_376, "sm_80", 71, 35.6, 936, 6 * _MIB, 0.9),
        Target("sm_89", "RTX 4090", 128, 101_376, "sm_80", 165, 82.6, 1008, 72 * _MIB, 0.9),
        Target("sm_89", "L4", 58, 101_376, "sm_80", 121, 30.3, 300, 48 * _MIB, 0.55),
        Target("sm_89", "L40S", 142, 101_376, "sm_80", 362, 91.6, 864, 96 * _MIB, 0.75),
        Target("sm_90", "H100", 132, 232_448, "sm_90", 989, 67, 3350, 25 * _MIB, 0.9),
        Target("sm_90", "H100 PCIe", 114, 232_448, "sm_90", 756, 51, 2000, 25 * _MIB, 0.75),
        Target("sm_90", "H100 NVL", 132, 232_448, "sm_90", 835, 60, 3938, 25 * _MIB, 0.75),
        Target("sm_90", "H200", 132, 232_448, "sm_90", 989, 67, 4800, 25 * _MIB, 0.9),
        Target("sm_100", "B200", 148, 232_448, "sm_100", 2250, 75, 8000, 63 * _MIB, 0.8),
        Target("sm_103", "B300", 148, 232_448, "sm_100", 2250, 75, 8000, 63 * _MIB, 0.8),
        Target("sm_120", "RTX 5090", 170, 101_376, "sm_80", 210, 104.8, 1792, 96 * _MIB, 0.9),
        Target("sm_121", "GB10", 48, 101_376, "sm_80", 125, 31, 273, 24 * _MIB, 0.74),
        Target("gfx942", "MI300X", 304, 65_536, "gfx942", 1307, 163, 5300, 256 * _MIB, 0.55),
    )
}
# the usual card of an architecture, which stands for it where only that is known
TARGETS = {
    CARDS[card].name: CARDS[card]
    for card in ("A100", "RTX 3090", "RTX 4090", "H100", "B200", "B300", "RTX 5090", "GB10", "MI300X")
}
# what every GPU that Triton supports can run
DEFAULT = Target("default", "unknown", 64, 65_536, "default", 60, 15, 500, 4 * _MIB, 0.8)


def find_card(name: str) -> Target:
    """The target of a card or an architecture, however it is written: ``h100``, ``RTX4090``, ``sm_90``.

    Raises:
        ValueError: No such GPU is known; the message lists those that are.

    Example:
        >>> find_card("rtx-4090").card
        'RTX 4090'
    """
    known = {_plain(card): target for card, target in CARDS.items()}
    known |= {_plain(target): TARGETS[target] for target in TARGETS}
    found = known.get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(_plain(name), known, n=1)
        hint = f"did you mean {known[near[0]].card!r}? " if near else ""
        raise ValueError(
            f"{hint}expected a GPU out of {', '.join(CARDS)} or {', '.join(TARGETS)}, got {name!r}"
        )
    return found


def card_named(device: str) -> Target | None:
    """The card that a driver's name means, if it is a known one.

    Example:
        >>> card_named("NVIDIA H100 NVL").card
        'H100 NVL'
    """
    words = _words(device)
    # the longest name that fits: an H100 NVL is no H100, and an L40 no L4
    fitting = [card for card in CARDS if _words(card) <= words]
    return CARDS[max(fitting, key=len)] if fitting else None


@functools.cache
def detect(device: torch.device) -> Target:
    """The target of a tensor's device; :data:`DEFAULT` for an unknown GPU and for Triton's interpreter."""
    if device.type != "cuda":
        return DEFAULT
    properties = torch.cuda.get_device_properties(device)
    architecture = _architecture(properties)
    known = TARGETS.get(architecture)
    if known is None:
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", DEFAULT.shared_bytes)
        known = replace(DEFAULT, shared_bytes=shared_bytes)
    named = card_named(properties.name)
    known = named if named is not None and named.name == architecture else known
    count = properties.multi_processor_count
    # a part of a card, or a relative of it
    scale = count / known.multiprocessors
    return replace(
        known,
        multiprocessors=count,
        tensor_tflops=known.tensor_tflops * scale,
        fp32_tflops=known.fp32_tflops * scale,
    )


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _architecture(properties: "torch._C._CudaDeviceProperties") -> str:
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
