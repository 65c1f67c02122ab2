"""Pretrained weights: downloaded by their library, or read from a file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastlora.state.sound import check_sound

Made = TypeVar("Made")

# what training programs call the state_dict in a checkpoint, and what wrappers put before its names
_NESTED = ("state_dict", "model", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_SHOWN = 3


class DownloadError(RuntimeError, ConnectionError):
    """Weights that can't be fetched; the message says how to go on without a network."""


def download(name: str, make: Callable[[], Made]) -> Made:
    """Make a model whose library fetches its weights.

    Args:
        name: The model's name, for the error.
        make: Makes it; may go to the network.

    Raises:
        DownloadError: They can't be fetched; a ``RuntimeError``.
    """
    try:
        return make()
    # requests' and the hub's errors are OSErrors too
    except (URLError, OSError) as error:
        raise DownloadError(
            f"the weights of {name} could not be downloaded ({error}); without a network, fetch the file "
            "on another machine and give its path as weights, put it into "
            f"{torch.hub.get_dir()}/checkpoints, or take random weights with weights=None"
        ) from error


def load_weights(model: nn.Module, path: Path, head: str) -> None:
    """Fill a model, all but its head, from a file of a ``state_dict``.

    Args:
        model: The model to fill; changed only if everything fits.
        path: A ``.safetensors`` file, or a checkpoint of ``torch.save`` (read with ``weights_only=True``).
        head: Name of the layer that may differ or be absent.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It can't be read, holds the weights of another architecture, or values that are not finite
            or no floating-point numbers.
    """
    state = _without_prefix(_read(path), model)
    wanted = {name: t for name, t in model.state_dict().items() if not name.startswith(f"{head}.")}
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in wanted and not name.startswith(f"{head}.")]
    # an auxiliary head that was taken out
    unknown = [name for name in unknown if not name.lower().startswith("aux")]
    wrong = [name for name, t in wanted.items() if name in state and state[name].shape != t.shape]
    if missing or unknown or wrong:
        raise ValueError(
            f"expected weights of {type(model).__name__} in {path}, got those of another architecture "
            f"({_list('missing', missing)}{_list('unknown', unknown)}{_list('of another shape', wrong)}"
            f"{len(wanted)} wanted); name the model that they are of"
        )
    check_sound({name: state[name] for name in wanted if name in state}, path, wanted)
    model.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights, found none at {path}")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"expected a file that ends in {', '.join(_SUFFIXES)}, got {path.name}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"expected a state_dict in {path}, got a pickle that holds more than tensors and numbers; it "
            "could run code, so nothing of it was read; save the weights alone with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    # what isn't a checkpoint makes PyTorch's reader fail in any way
    except Exception as error:
        raise ValueError(
            f"expected a state_dict in {path}, but it can't be read ({_first_line(error)}); "
            "save it anew with safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"expected a state_dict in {path}, got {type(content).__name__} without tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    known = model.state_dict().keys()
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not known & state.keys():
            return {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _list(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}; " if names else ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
