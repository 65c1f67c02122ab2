"""A fine-tuned model in a folder: an adapter or all weights, and how to build what they belong to."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlora._core.files import write_file, write_report
from fastlora.state.load import load_into_active
from fastlora.state.save import save_adapter
from fastlora.state.sound import check_sound
from fastlora.transfer.data import pretrained_transforms
from fastlora.transfer.data.transforms import Transform
from fastlora.transfer.finetune.description import (
    ADAPTER,
    FORMAT,
    WEIGHTS,
    Description,
    read_description,
)
from fastlora.transfer.finetune.settings import FinetuneSettings
from fastlora.transfer.models.find import find_model
from fastlora.transfer.models.names import PACKAGED
from fastlora.transfer.places import MODEL as MODEL
from fastlora.transfer.strategies import Strategy, find_strategy
from fastlora.transfer.training.whole import whole


@dataclass(frozen=True)
class SavedRun:
    """A fine-tuned model, ready to predict.

    Attributes:
        model: In eval mode.
        classes: Names of its outputs.
        transform: What pictures pass through.
        image_size: Height and width of the pictures it sees.
        name: Name of the pretrained model.
    """

    model: nn.Module
    classes: tuple[str, ...]
    transform: Transform
    image_size: int
    name: str = ""


def save_run(
    folder: Path,
    model: nn.Module,
    strategy: Strategy,
    settings: FinetuneSettings,
    classes: Sequence[str],
    image_size: int,
    *,
    is_main: bool = True,
) -> list[str]:
    """Write what was trained; in several processes each has to call it, and the main one writes.

    Returns:
        The names of what is written in the folder.
    """
    weights = settings.model_weights()
    holds_adapter = strategy.adds and weights is not None
    if holds_adapter:
        with tempfile.TemporaryDirectory() as unused:
            # parameters in pieces are gathered by all processes
            save_adapter(model, folder / ADAPTER if is_main else Path(unused) / ADAPTER)
    else:
        content = save({name: value.contiguous() for name, value in whole(model.state_dict()).items()})
        if is_main:
            write_file(folder / WEIGHTS, content)
    description = {
        "format": FORMAT,
        "model": settings.model,
        "weights": str(Path(weights).resolve()) if weights and Path(weights).suffix else weights,
        "strategy": strategy.name,
        "strategy_options": settings.options(),
        "model_options": settings.model_options(),
        "hidden": settings.hidden,
        "classes": list(classes),
        "image_size": image_size,
        "holds": ADAPTER if holds_adapter else WEIGHTS,
    }
    if is_main:
        write_report(folder / MODEL, description)
    return [MODEL, f"{ADAPTER}/" if holds_adapter else WEIGHTS]


def load_run(folder: str | Path) -> SavedRun:
    """The model that ``fastlora finetune`` wrote.

    An adapter needs the pretrained weights it was trained on, which are looked for where they came from.

    Raises:
        FileNotFoundError: The folder holds no finished run.
        ValueError: Its files are damaged or don't belong together.
        DownloadError: Pretrained weights couldn't be fetched.
    """
    folder = Path(folder)
    described = read_description(folder)
    model, size = _build(described, folder / MODEL), described.image_size
    if described.holds == ADAPTER:
        load_into_active(model, folder / ADAPTER)
    else:
        _fill(model, folder / WEIGHTS)
    transform = pretrained_transforms(
        described.model, image_size=size, weights=described.weights or "DEFAULT"
    )[1]
    model.eval().requires_grad_(False)
    try:
        check_takes(model, size)
    except ValueError as error:
        raise ValueError(f"{folder / MODEL}: {error}") from error
    return SavedRun(model, described.classes, transform, size, described.model)


def check_takes(model: nn.Module, image_size: int) -> None:
    """Refuse a size of pictures that a model can't take, without computing anything.

    Raises:
        ValueError: It can't; says why.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad():
            model(torch.zeros(2, 3, image_size, image_size))
    # each library refuses in its own way
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"expected image_size as one that a {type(model).__name__} takes, got {image_size} ({reason[0]})"
        ) from error


def _build(described: Description, path: Path) -> nn.Module:
    name = described.model
    packaged = "DEFAULT" if name in PACKAGED else None
    weights = described.weights if described.holds == ADAPTER else packaged
    try:
        find = find_model(name, weights, hidden=described.hidden, **described.model_options)
        model, head = find(len(described.classes))
        if described.weights is None:
            # random weights are saved whole, with what the strategy added
            find_strategy(described.strategy).apply(model, head, **described.strategy_options)
    # a TypeError: an option that model or strategy don't have
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model


def _fill(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"expected the weights {path}, found none; copy the whole folder of a run")
    try:
        state = load_file(path)
        check_sound(state, path, model.state_dict())
        model.load_state_dict(state)
    # safetensors raises its own error, load_state_dict a RuntimeError
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"expected the weights of this run in {path}, but {_short(error)}") from error


def _short(error: Exception) -> str:
    # load_state_dict has a line for every name
    lines = [line.strip() for line in str(error).splitlines()]
    return f"{' '.join(lines[:2])}{' …' if len(lines) > 2 else ''}"
