"""What an exported file says of itself: class names, the size of its input, and what pictures pass through.

ONNX files have it as ``metadata_props``, safetensors files as metadata (each value of it as JSON text), and
programs of ``torch.export`` as the extra file ``model.json``.
"""

import json
from collections.abc import Mapping
from typing import Any

from torchvision.transforms import v2

from fastlora._version import __version__
from fastlora.transfer.data.transforms import LONGEST, MiddleOfStrip
from fastlora.transfer.finetune.saved import SavedRun

CARD = "model.json"


def card_of(run: SavedRun) -> dict[str, Any]:
    """Everything that another program needs to use an exported model, as JSON values.

    ``transform`` lists what a picture passes through, in order, before a batch of them is the input.
    """
    return {
        "producer": f"fastlora {__version__}",
        "model": run.name,
        "classes": list(run.classes),
        "input": {
            "name": "images",
            "shape": ["batch", 3, run.image_size, run.image_size],
            "dtype": "float32",
        },
        "output": {"name": "logits", "shape": ["batch", len(run.classes)]},
        "transform": [{"step": "convert", "mode": "RGB"}, *_steps(run.transform)],
    }


def as_texts(card: Mapping[str, Any]) -> dict[str, str]:
    """The card's values as text, for formats whose metadata holds nothing else.

    Example:
        >>> as_texts({"model": "resnet18", "classes": ["cat", "dog"]})
        {'model': 'resnet18', 'classes': '["cat", "dog"]'}
    """
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in card.items()
    }


def _steps(transform: Any) -> list[dict[str, Any]]:
    described = (_described(each) for each in getattr(transform, "transforms", [transform]))
    return [step for step in described if step is not None]


def _described(transform: Any) -> dict[str, Any] | None:
    """One step in words that don't belong to torchvision; None for what only changes the container."""
    if isinstance(transform, MiddleOfStrip):
        return {"step": "crop the middle of strips", "to": f"{LONGEST}:1"}
    if isinstance(transform, v2.Resize):
        return {
            "step": "resize the shorter side",
            "to": transform.size[0],
            "interpolation": transform.interpolation.value,
            "antialias": bool(transform.antialias),
        }
    if isinstance(transform, v2.CenterCrop):
        return {"step": "crop the centre", "to": transform.size[0]}
    if isinstance(transform, v2.ToImage):
        return None
    if isinstance(transform, v2.ToDtype):
        return {"step": "scale", "divide by": 255} if transform.scale else None
    if isinstance(transform, v2.Normalize):
        return {"step": "normalise", "mean": list(transform.mean), "std": list(transform.std)}
    return {"step": repr(transform)}
