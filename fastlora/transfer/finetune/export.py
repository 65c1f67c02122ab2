"""Hand a fine-tuned model on, checked before it counts: merged weights, ONNX, a ``torch.export`` program."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastlora._core.backend import use_backend
from fastlora._core.extras import require
from fastlora._core.files import aside, check_file_place, settle, sync, write_file
from fastlora.anatomy.names import unwrap
from fastlora.inject.lora import remove_adapters
from fastlora.inject.merging import merge_adapters
from fastlora.nn.adapted import AdaptedModule
from fastlora.nn.lora.base import LoRAModule
from fastlora.nn.prompts.modules import PromptModule
from fastlora.transfer.finetune.card import CARD, as_texts, card_of
from fastlora.transfer.finetune.saved import SavedRun, load_run

Format = Literal["state_dict", "onnx", "torch"]
SUFFIXES: dict[str, str] = {"state_dict": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
_EXAMPLES, _CHECKED = 2, 3
# other libraries sum in another order; an error in the graph is not of this size
_FACTOR, _FLOOR = 8.0, 1e-5


@dataclass(frozen=True)
class Agreement:
    """How an exported model answers, compared with the one it was made from.

    Attributes:
        path: The file.
        error: Largest difference of a logit from float64, relative to the largest logit.
        eager_error: Largest difference of the model's own logits from float64, relative to the largest.
        same_answers: Whether both name the same class everywhere.
    """

    path: Path
    error: float
    eager_error: float
    same_answers: bool


def export_run(folder: str | Path, format: Format, output: str | Path | None = None) -> Agreement:
    """Write a finished run's model in another format, and check that it answers the same.

    Args:
        folder: That ``fastlora finetune`` wrote.
        format: ``"state_dict"``: LoRA merged into plain weights under the library's own names, safetensors;
            ``"onnx"``; ``"torch"``: a ``torch.export`` program. The last two take batches of any size. Each
            holds the names of its classes and what its pictures pass through, see
            :mod:`fastlora.transfer.finetune.card`.
        output: The file; None writes ``merged.safetensors``, ``model.onnx`` or ``model.pt2`` into the folder.

    Raises:
        ValueError: An unknown format, an adapter or prompts that plain weights can't hold, or the exported
            model answers otherwise; no file is left then.
        FileNotFoundError: The folder holds no finished run.
        ImportError: ONNX is wanted and its packages are not installed.
    """
    if format not in get_args(Format):
        raise ValueError(f"expected format as one of {', '.join(get_args(Format))}, got {format!r}")
    name = "merged" if format == "state_dict" else "model"
    path = Path(folder) / (name + SUFFIXES[format]) if output is None else Path(output)
    run = load_run(folder)
    check_file_place(path)
    model = _merged(run.model)
    # the exporters go by the suffix, whatever the name
    with aside(path.with_suffix(SUFFIXES[format])) as new:
        with use_backend("reference"), torch.no_grad():
            answer = _EXPORTERS[format](model, run, new)
            agreement = _compare(run, answer, path)
        sync(new)
        new.replace(path)
    settle(path.parent)
    return agreement


def _merged(model: nn.Module) -> nn.Module:
    """A copy with LoRA folded into its weights."""
    model = deepcopy(model)
    if any(isinstance(module, LoRAModule) for module in unwrap(model).modules()):
        remove_adapters(merge_adapters(model))
    return model.eval().requires_grad_(False)


def _examples(run: SavedRun, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, run.image_size, run.image_size, generator=generator)


def _write_state_dict(model: nn.Module, run: SavedRun, path: Path) -> Callable[[Tensor], Tensor]:
    added = {type(m).__name__ for m in model.modules() if isinstance(m, AdaptedModule | PromptModule)}
    if added:
        raise ValueError(
            f"expected a model that plain weights can hold, got one with {', '.join(sorted(added))}: an "
            "activation or tokens of its own can't be folded in; export it as onnx or torch"
        )
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    write_file(path, save(state, metadata={"format": "pt", **as_texts(card_of(run))}))
    read = deepcopy(model)
    read.load_state_dict(load_file(path))
    return read


def _write_onnx(model: nn.Module, run: SavedRun, path: Path) -> Callable[[Tensor], Tensor]:
    runtime = require("onnxruntime", distribution="onnxruntime", purpose="export to ONNX", extra="train")
    require("onnxscript", distribution="onnxscript", purpose="export to ONNX", extra="train")
    program = torch.onnx.export(
        model,
        (_examples(run, _EXAMPLES),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(as_texts(card_of(run)))
    program.save(str(path), external_data=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return answer


def _write_program(model: nn.Module, run: SavedRun, path: Path) -> Callable[[Tensor], Tensor]:
    dynamic: Any = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (_examples(run, _EXAMPLES),), dynamic_shapes=dynamic)
    torch.export.save(program, path, extra_files={CARD: json.dumps(card_of(run), indent=2)})
    return torch.export.load(path).module()


_EXPORTERS: dict[str, Callable[[nn.Module, SavedRun, Path], Callable[[Tensor], Tensor]]] = {
    "state_dict": _write_state_dict,
    "onnx": _write_onnx,
    "torch": _write_program,
}


def _compare(run: SavedRun, answer: Callable[[Tensor], Tensor], path: Path) -> Agreement:
    images = _examples(run, _CHECKED)
    exact = deepcopy(run.model).double()(images.double())
    theirs, ours = answer(images), run.model(images)
    scale = exact.abs().max()
    error, eager = (float((logits - exact).abs().max() / scale) for logits in (theirs, ours))
    if not error <= max(_FACTOR * eager, _FLOOR):
        raise ValueError(
            f"expected the exported model to answer as the run's own, got logits that are {error:.2g} of the "
            f"largest off (the model itself: {eager:.2g}); nothing was written to {path}"
        )
    same = bool((theirs.argmax(dim=1) == ours.argmax(dim=1)).all())
    return Agreement(path, error, eager, same)
