"""One process of a step: ``python -m fastlora.bench.gpu_check.child layers --output FILE``.

It works through its share of the step's items and appends a line of JSON for all that it finds.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from fastlora.bench.gpu_check import preflight
from fastlora.bench.gpu_check.items import GpuLostError, Item, work_through

STEPS = ("preflight", "exactness", "layers", "training")


def items_of(step: str, device: torch.device) -> Sequence[Item]:
    """What a step consists of.

    Args:
        step: One of :data:`STEPS`.
        device: The GPU.
    """
    if step == "preflight":
        return preflight.items(device)
    # where Triton is missing these can't be imported, and the first step says so
    from fastlora.bench.gpu_check import exactness, layers, quantised, shared, training

    if step == "exactness":
        # those that take longest first
        return [*layers.comparisons(device), *exactness.items(device), *quantised.items(device)]
    if step == "layers":
        timed = [*layers.items(device), *quantised.timed_items(device), *shared.timed_items(device)]
        return [*timed, *layers.profiles(), *quantised.profiles(device), *shared.profiles(device)]
    return training.items(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Work through a share of a step; 0 where it came to its end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--output", type=Path, required=True, help="file that lines are appended to")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no item begins")
    parser.add_argument("--share", type=int, default=0, help="number of this process among those of the step")
    parser.add_argument("--of", type=int, default=1, help="how many processes share the step")
    parser.add_argument("--skip", type=int, default=0, help="items of the share that were begun before")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + given.seconds
    # a card that others see differently is theirs to hide: the first visible one is checked
    items = items_of(given.step, torch.device("cuda", 0))
    mine = items[given.share :: given.of][given.skip :]
    with given.output.open("a", encoding="utf-8") as file:
        try:
            names = [item.name for item in mine]
            for found in chain([{"items": names}], work_through(mine, deadline), [{"end": given.step}]):
                file.write(json.dumps(found, allow_nan=False) + "\n")
                # what comes next may end the process
                file.flush()
        except GpuLostError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
