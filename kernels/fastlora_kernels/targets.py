"""GPU facts that the plan needs, by architecture. An unknown GPU gets a sound default, never an error."""

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Target:
    """One GPU architecture.

    Attributes:
        name: ``sm_90`` or ``gfx942`` as the compilers call it.
        multiprocessors: SMs (compute units on AMD) of the card; in the table, of the usual one.
        shared_bytes: Shared memory that one program may use, in bytes.
        tiles: The architecture whose pinned tiles it uses.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    tiles: str

    @property
    def is_amd(self) -> bool:
        """Whether the target is compiled through ROCm."""
        return self.name.startswith("gfx")


# shared memory per block: CUDA programming guide, table "technical specifications per compute capability"
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", multiprocessors=108, shared_bytes=166_912, tiles="sm_80"),
        Target("sm_86", multiprocessors=82, shared_bytes=101_376, tiles="sm_80"),
        Target("sm_89", multiprocessors=128, shared_bytes=101_376, tiles="sm_80"),
        Target("sm_90", multiprocessors=132, shared_bytes=232_448, tiles="sm_90"),
        Target("sm_100", multiprocessors=148, shared_bytes=232_448, tiles="sm_100"),
        Target("gfx942", multiprocessors=304, shared_bytes=65_536, tiles="gfx942"),
    )
}
# what every GPU that Triton supports can run
DEFAULT = Target("default", multiprocessors=64, shared_bytes=65_536, tiles="default")


@functools.cache
def detect(device: torch.device) -> Target:
    """The target of a tensor's device; :data:`DEFAULT` for an unknown GPU and for Triton's interpreter."""
    if device.type != "cuda":
        return DEFAULT
    properties = torch.cuda.get_device_properties(device)
    known = TARGETS.get(_architecture(properties))
    if known is None:
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", DEFAULT.shared_bytes)
        known = replace(DEFAULT, shared_bytes=shared_bytes)
    return replace(known, multiprocessors=properties.multi_processor_count)


def _architecture(properties: "torch._C._CudaDeviceProperties") -> str:
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
