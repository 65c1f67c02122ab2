"""What a step consists of: items that yield what they find, worked through by a process that may crash."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# one of items, begin, end, outcome, row, profile, failed, left_out, late and preflight, and what it holds
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """A part of a step that is worth something alone.

    Attributes:
        name: What the results call it.
        work: Yields what it finds.
    """

    name: str
    work: Callable[[], Iterable[Found]]


class GpuLostError(RuntimeError):
    """The GPU answers no more, so that nothing else can be found in this process."""


def work_through(items: Iterable[Item], deadline: float) -> Iterator[Found]:
    """What the items find, failures among it; an item all of which is too large for this GPU is a failure.

    Args:
        items: In their order.
        deadline: Time of ``time.monotonic`` after which no item begins; such are told as late.

    Raises:
        GpuLostError: An item failed, and the GPU answers no more.
    """
    for item in items:
        if time.monotonic() > deadline:
            yield {"late": item.name}
            continue
        yield {"begin": item.name}
        kinds = set[str]()
        try:
            for found in item.work():
                kinds |= found.keys()
                yield found
        # compilers, assemblers and drivers raise what they like
        except Exception as error:
            yield {"failed": _told(item.name, error)}
            refuse_lost_gpu(item.name)
        else:
            if kinds == {"left_out"}:
                why = "not checked: every part of it is too large for this GPU"
                yield {"failed": {"case": item.name, "error": why}}


def failure(case: str, error: BaseException) -> Found:
    """A part of an item that failed, as the results file has it; one too large for this GPU is left out."""
    # by their names: Triton is slow to import
    too_large = type(error).__name__ in ("OutOfMemoryError", "OutOfResources")
    return {"left_out" if too_large else "failed": _told(case, error)}


def _told(case: str, error: BaseException) -> dict[str, str]:
    lines = str(error).strip().splitlines() or [""]
    return {"case": case, "error": f"{type(error).__name__}: {lines[0][:300]}"}


def refuse_lost_gpu(after: str) -> None:
    """End the process where its GPU answers no more, and give back what a failed item took where it does.

    Args:
        after: What ran last, for the message.

    Raises:
        GpuLostError: It answers no more.
    """
    # slow to import
    from fastlora.tuning.search import answers

    if not answers(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        raise GpuLostError(f"the GPU answers no more after {after}")
