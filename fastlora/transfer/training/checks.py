"""What is wrong with a run is said before it begins, or names the batch where it went wrong."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlora.transfer.data import LabelledImages
from fastlora.transfer.places import MODEL
from fastlora.transfer.training.batches import Part
from fastlora.transfer.training.checkpoint import CHECKPOINTS, PREFIX
from fastlora.transfer.training.settings import TrainSettings
from fastlora.transfer.unfreezing import GradualUnfreezing, all_unfrozen

_NAMED = 8


def check_unused(output: Path, *, resume: bool) -> None:
    """Refuse a folder that holds a run, unless it is to go on.

    Raises:
        ValueError: It holds one, and ``resume`` is False.
    """
    if resume:
        return
    steps = sorted(path.name.removeprefix(PREFIX) for path in (output / CHECKPOINTS).glob(f"{PREFIX}*"))
    if steps or (output / MODEL).exists():
        where = f" at step {steps[-1].lstrip('0')}" if steps else ""
        raise ValueError(
            f"expected a folder without a run, {output} has one{where}; "
            "resume it (--resume), or choose another folder (--output)"
        )


def check_state(state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint's state that lacks what a trainer writes.

    Raises:
        ValueError: Something is missing, or of another kind.
    """
    kinds = {"engine": dict, "progress": dict, "generators": list, "fingerprint": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise ValueError(f"expected the state of a trainer, got one without {', '.join(wrong)}")


@contextmanager
def told_as_damage(folder: Path) -> Iterator[None]:
    """Around what is restored from checkpoints that somebody made by other means.

    Raises:
        ValueError: Something isn't what a trainer writes.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"expected the state of a trainer in the last checkpoint in {folder}, got something else "
            f"({type(error).__name__}: {error}); remove that checkpoint to go on from the one before"
        ) from error


def check_classes(train: LabelledImages, validation: LabelledImages) -> None:
    """Refuse two sets of pictures with different classes, or none.

    Raises:
        ValueError: The classes differ, or there are no pictures.
    """
    if train.classes != validation.classes:
        raise ValueError(
            f"expected the same classes in training and validation, got {', '.join(train.classes)} and "
            f"{', '.join(validation.classes)}; relabel one with validation.with_classes(train.classes)"
        )
    for name, images in (("training", train), ("validation", validation)):
        if not len(images):
            raise ValueError(f"expected pictures for {name}, got none")


def check_processes(
    processes: int, examples: int, settings: TrainSettings, unfreezing: GradualUnfreezing | None
) -> None:
    """Refuse what can't be divided among processes.

    Raises:
        ValueError: A batch has fewer examples than parts, or stages are to unfreeze that are sharded.
    """
    parts = processes * settings.accumulation
    if parts > min(settings.batch_size, examples):
        raise ValueError(
            f"expected batch_size of at least {parts} for {processes} processes with accumulation "
            f"{settings.accumulation}, got {settings.batch_size} of {examples} examples"
        )
    if unfreezing is not None and settings.sharding == "fsdp2" and processes > 1:
        raise ValueError(
            "expected sharding='ddp' for unfreezing by a schedule, got 'fsdp2'; what is sharded decides "
            "once what trains"
        )


@contextmanager
def several_examples() -> Iterator[None]:
    """Say what to do where a BatchNorm that trains has one value per channel; torch names only the layer's.

    Raises:
        ValueError: A BatchNorm that trains got one value per channel.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "expected two or more examples at a time for a BatchNorm that trains, got one; raise batch_size, "
            "lower accumulation, or leave BatchNorm frozen"
        ) from error


def what_changes(model: nn.Module, head: nn.Module, unfreezing: GradualUnfreezing | None) -> list[str]:
    """Names of the parameters that train at any time, and of all buffers.

    Raises:
        ValueError: Nothing trains, or ``unfreezing`` is for more stages than the model has.
    """
    with all_unfrozen(model, head, unfreezing):
        frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        something_trains = any(p.requires_grad for p in model.parameters())
    if not something_trains:
        raise ValueError("expected a model in which something trains, got one with every parameter frozen")
    state = model.state_dict()
    return [name for name, value in state.items() if isinstance(value, Tensor) and name not in frozen]


def check_finite(what: str, value: float, step: int, parts: Sequence[Part], lr: float, output: Path) -> None:
    """Refuse to go on with a loss or gradients that are no longer finite.

    Raises:
        FloatingPointError: Names the batch it happened on.
    """
    if math.isfinite(value):
        return
    names = [name for part in parts for name in part.names]
    folder = output / CHECKPOINTS
    kept = f"the checkpoints in {output} are from before; " if folder.is_dir() else ""
    raise FloatingPointError(
        f"expected a finite {what}, got {value} at step {step} on {', '.join(names[:_NAMED])}"
        f"{', …' if len(names) > _NAMED else ''}; {kept}"
        f"lower lr ({lr:g}) or look at these pictures"
    )
