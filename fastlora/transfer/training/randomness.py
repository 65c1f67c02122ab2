"""Randomness that depends on what it is for, not on what was drawn before."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastlora._core.extras import require

_SEEDS = 2**63


def derived_seed(*parts: int | str) -> int:
    """A seed for one purpose, the same on every machine.

    Example:
        >>> derived_seed(0, "order", 3) == derived_seed(0, "order", 3) != derived_seed(0, "order", 4)
        True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _SEEDS


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from generators seeded anew, and put the old ones back: torch's on the CPU, NumPy's, Python's."""
    before = _host_state()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        _set_host_state(before)


def start_from(seed: int) -> None:
    """Seed all generators of this process, each process with its own."""
    require("accelerate.utils", distribution="accelerate", purpose="training").set_seed(
        seed, device_specific=True
    )


def generator_states() -> dict[str, Any]:
    """All generators of this process, in types that ``torch.load(weights_only=True)`` reads."""
    state = _host_state()
    return state | {"cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


@contextmanager
def others_draw() -> Iterator[None]:
    """Around what may draw from all generators of this process: they go on afterwards as if it had not."""
    before = generator_states()
    yield
    set_generator_states(before)


def gathered_states(accelerator: Any) -> list[dict[str, Any]]:
    """The generators of every process, in their order; each has to ask.

    Args:
        accelerator: An ``accelerate.Accelerator``.
    """
    states = [generator_states()]
    if accelerator.num_processes > 1:
        states = accelerator.gather_for_metrics(states, use_gather_object=True)
    return states


def set_gathered_states(states: Sequence[dict[str, Any]], accelerator: Any) -> None:
    """Undo what this process drew since :func:`gathered_states`, maybe among other processes now.

    Args:
        states: What it gave.
        accelerator: An ``accelerate.Accelerator``.
    """
    set_generator_states(states[accelerator.process_index % len(states)])


def set_generator_states(states: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`generator_states`."""
    _set_host_state(states)
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def _host_state() -> dict[str, Any]:
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = legacy
    return {
        "torch": torch.default_generator.get_state(),
        "numpy": (
            str(kind),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "python": random.getstate(),
    }


def _set_host_state(state: dict[str, Any]) -> None:
    torch.default_generator.set_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
