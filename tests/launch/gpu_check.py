"""Rehearse ``fastlora.bench.gpu_check`` on the stand-in for a card: ``python -m tests.launch.gpu_check``.

Every kernel is compiled and launched as on the card, none runs: all results are wrong and no time means
anything. What has to hold is that nothing else fails, and that all is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora.bench import checked, clocks
from fastlora.bench.gpu_check import child, exactness, layers, other_ops, quantised, shared, training
from fastlora.bench.gpu_check.__main__ import check
from fastlora.bench.gpu_check.models import Sizes
from fastlora.bench.gpu_check.run import STEPS, GpuCheck
from fastlora.tuning.calls import LayerCall
from tests.launch import pretended
from tests.launch.cards import CARDS
from tests.launch.stage import Stage

NOTE = "rehearsed: no kernel ran, every number is meaningless"


def as_child(target: str, cache: Path, arguments: Sequence[str]) -> int:
    """One process of a step, on the stand-in and with sizes that a CPU has done at once."""
    torch.set_num_threads(1)
    Stage(target, cache, checking=False).install()
    pretended.pretend()
    _shrink()
    return child.main(arguments)


def _shrink() -> None:
    small: dict[Any, dict[str, Any]] = {
        exactness: {
            "CALLS": (LayerCall(64, 128, 96, 16, 0.1), LayerCall(64, 128, 96, 16, 0.1, weight="int8")),
            "TWINS": (LayerCall(64, 128, 96, 16, 0.1),),
            "MASKS": (exactness.MASKS[0],),
            "HUGE": LayerCall(64, 128, 96, 16, 0.1),
            "STRIDED": (64, 128, 96),
            "MANY_ROWS": 128,
        },
        other_ops: {
            "DORA": ((64, 96, 128, 16, torch.bfloat16, 0.1),),
            "ADAPTERS": ((64, 96, 16, torch.bfloat16, 0.1, "gelu", "tensor"),),
        },
        quantised: {
            "FOUR_BITS": ((64, 96, 64, True),),
            "EIGHT_BITS": ((64, 96, 1, 96),),
            "CALLS": ((64, 128, 96, torch.bfloat16),),
            "GPU": {quantised.LAYER: (64, 128, 96)},
        },
        shared: {
            "GROUPS": ((64, 128, ((96, 16), (32, 16)), "bfloat16", 0.1),),
            "QKV": (64, 128, (96, 32, 32)),
        },
        layers: {"SHAPES": {"a layer": (64, 128, 96)}, "ROUNDS": 2},
        training: {
            "ROUNDS": 2,
            "MODELS": {
                "ViT": Sizes(32, 2, 2, 64, 1, batch=2, tokens=5, causal=False),
                "LLaMA": Sizes(32, 4, 2, 64, 1, batch=2, tokens=8, causal=True),
            },
        },
        clocks: {"LEAST_FLUSH_BYTES": 1024},
        # nothing ran, so nothing is equal
        checked: {"check_equal": lambda *compared: None},
    }
    for module, values in small.items():
        for name, value in values.items():
            assert hasattr(module, name)
            setattr(module, name, value)


def main() -> int:
    """The check, or one process of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=[c for c in CARDS if c.startswith("sm_")], default="sm_90")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps compiled kernels")
    parser.add_argument("--folder", type=Path, default=Path("gpu-check"), help="for the results")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--process", nargs=argparse.REMAINDER, help="of a step: what child.py takes")
    given = parser.parse_args()
    if given.process:
        return as_child(given.target, given.cache, given.process)
    command = [sys.executable, "-m", "tests.launch.gpu_check", "--target", given.target]
    command += ["--cache", str(given.cache), "--process"]
    gpu = GpuCheck(given.folder, given.budget, child=command, note=NOTE)
    return check(gpu, [step.name for step in STEPS])


if __name__ == "__main__":
    sys.exit(main())
