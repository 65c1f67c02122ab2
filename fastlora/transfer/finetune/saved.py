"""A fine-tuned model in a folder: an adapter or all weights, and how to build what they belong to."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from fastlora._stages import head as find_head
from fastlora.state import load_into_active, save_adapter
from fastlora.transfer.create import create_transfer_model
from fastlora.transfer.data import pretrained_transforms
from fastlora.transfer.data.transforms import Transform
from fastlora.transfer.finetune.settings import FinetuneSettings
from fastlora.transfer.heads import deepen_head
from fastlora.transfer.names import DINOV2, EFFICIENTNET_LITE0
from fastlora.transfer.places import MODEL as MODEL
from fastlora.transfer.places import check_run
from fastlora.transfer.report import write_file, write_report
from fastlora.transfer.strategies import Strategy, find_strategy
from fastlora.transfer.training.whole import whole

WEIGHTS, ADAPTER = "model.safetensors", "adapter"
_FORMAT = 1
# their weights come with a package, always
_PACKAGED = (DINOV2, EFFICIENTNET_LITE0)


@dataclass(frozen=True)
class SavedRun:
    """A fine-tuned model, ready to predict.

    Attributes:
        model: In eval mode.
        classes: Names of its outputs.
        transform: What pictures pass through.
        image_size: Height and width of the pictures it sees.
    """

    model: nn.Module
    classes: tuple[str, ...]
    transform: Transform
    image_size: int


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
        "format": _FORMAT,
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
    described = _read_description(folder)
    classes = tuple(described["classes"])
    model = _build(described, len(classes))
    if described["holds"] == ADAPTER:
        load_into_active(model, folder / ADAPTER)
    else:
        _fill(model, folder / WEIGHTS)
    size = int(described["image_size"])
    transform = pretrained_transforms(
        described["model"], image_size=size, weights=described["weights"] or "DEFAULT"
    )[1]
    return SavedRun(model.eval().requires_grad_(False), classes, transform, size)


def _read_description(folder: Path) -> dict[str, Any]:
    check_run(folder)
    path = folder / MODEL
    try:
        described: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got something else ({error})") from error
    if described.get("format") != _FORMAT:
        raise ValueError(
            f"expected format {_FORMAT} in {path}, got {described.get('format')!r}; another version wrote it"
        )
    return described


def _build(described: dict[str, Any], num_classes: int) -> nn.Module:
    name, own, hidden = described["model"], described["model_options"], described.get("hidden")
    packaged = "DEFAULT" if name in _PACKAGED else None
    weights = described["weights"] if described["holds"] == ADAPTER else packaged
    model = create_transfer_model(name, num_classes, weights=weights, **own)
    head = find_head(model)[0] if hidden is None else deepen_head(model, hidden)
    if described["weights"] is None:
        # random weights are saved whole, with what the strategy added
        find_strategy(described["strategy"]).apply(model, head, **described["strategy_options"])
    return model


def _fill(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"expected the weights {path}, found none; copy the whole folder of a run")
    try:
        model.load_state_dict(load_file(path))
    # safetensors raises its own error, load_state_dict a RuntimeError
    except Exception as error:
        raise ValueError(f"expected the weights of this run in {path}, but {error}") from error
