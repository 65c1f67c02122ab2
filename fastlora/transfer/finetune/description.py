"""``model.json``: what a run's files belong to, checked field by field."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastlora._core.files import read_json
from fastlora.transfer.finetune.settings import LARGEST, OPTIONS
from fastlora.transfer.places import MODEL, check_run
from fastlora.transfer.strategies import STRATEGIES

WEIGHTS, ADAPTER = "model.safetensors", "adapter"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Description:
    """How to build what a run's weights belong to.

    Attributes:
        model: Name of the pretrained model, as ``FinetuneSettings`` takes it.
        weights: Pretrained weights it began with; None for random ones.
        strategy: What was trained.
        strategy_options: Options of the strategy that were given.
        model_options: Options of the model itself.
        hidden: Width of the head's hidden layer, if it has one.
        classes: Names of the outputs.
        image_size: Height and width of the pictures.
        holds: ``"adapter"`` or ``"model.safetensors"``: where the weights are.
    """

    model: str
    weights: str | None
    strategy: str
    strategy_options: Mapping[str, Any]
    model_options: Mapping[str, Any]
    hidden: int | None
    classes: tuple[str, ...]
    image_size: int
    holds: str


def read_description(folder: Path) -> Description:
    """What a finished run's ``model.json`` says.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged; the message names the field.
    """
    check_run(folder)
    path = folder / MODEL
    given = read_json(path)
    if not isinstance(given, dict):
        raise ValueError(f"expected an object in {path}, got {type(given).__name__}; {_ADVICE}")
    if type(given.get("format")) is not int or given["format"] != FORMAT:
        raise ValueError(
            f"expected format {FORMAT} in {path}, got {_shown(given.get('format'))}; another version wrote it"
        )
    names = [field.name for field in fields(Description)]
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in {path}, found no such field; {_ADVICE}")
    for name in names:
        wanted, fits = _FIELDS[name]
        if not fits(given[name]):
            raise ValueError(f"expected {name} in {path} as {wanted}, got {_shown(given[name])}; {_ADVICE}")
    return Description(**{name: given[name] for name in names} | {"classes": tuple(given["classes"])})


_ADVICE = "copy the folder of the run again, or train anew"


def _is_size(name: str) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 1 <= value <= LARGEST[name]


def _are_classes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 2
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


def _are_options(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in OPTIONS and type(each) in (int, float, bool) and math.isfinite(each)
        for name, each in value.items()
    )


def _are_model_options(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name == "image_size" and _is_size(name)(each) for name, each in value.items()
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a name", _is_text),
    "weights": ("a name, a path or null", lambda value: value is None or _is_text(value)),
    "strategy": (
        f"one of {', '.join(STRATEGIES)}",
        lambda value: isinstance(value, str) and value in STRATEGIES,
    ),
    "strategy_options": (f"an object of numbers out of {', '.join(OPTIONS)}", _are_options),
    "model_options": ("an object of image_size or nothing", _are_model_options),
    "hidden": (
        f"an integer from 1 to {LARGEST['hidden']:,} or null",
        lambda value: value is None or _is_size("hidden")(value),
    ),
    "classes": ("a list of two different names or more", _are_classes),
    "image_size": (f"an integer from 1 to {LARGEST['image_size']:,}", _is_size("image_size")),
    "holds": (f"{ADAPTER!r} or {WEIGHTS!r}", lambda value: value in (ADAPTER, WEIGHTS)),
}
