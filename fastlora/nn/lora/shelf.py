"""Several adapters of one LoRA layer: one is active, the others lie ready on a shelf beside it."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastlora.nn.lora.start import START_A, START_B, join, join_B, put_start, take_start
from fastlora.nn.settings import LoRASettings

if TYPE_CHECKING:
    from fastlora.nn.lora.base import LoRAModule

DEFAULT_NAME = "default"
SHELF = "lora_shelf"
_NAME = "adapter_name"


class ShelvedAdapter(nn.Module):
    """The parameters of an adapter that is not active, frozen, under the names that they have in the layer.

    Attributes:
        settings: What it is.
    """

    def __init__(
        self, settings: LoRASettings, parts: dict[str, nn.Parameter], start: tuple[Tensor, Tensor] | None
    ) -> None:
        """See the class."""
        super().__init__()
        self.settings = settings
        for name, buffer in zip((START_A, START_B), start or (), strict=False):
            self.register_buffer(name, buffer)
        for name, parameter in parts.items():
            parameter.requires_grad_(False)
            self.register_parameter(name, parameter)


def active_name(layer: "LoRAModule") -> str:
    """Name of the adapter that the layer computes with."""
    name: str = vars(layer).get(_NAME, DEFAULT_NAME)
    return name


def rename_active(layer: "LoRAModule", name: str) -> None:
    """Call the active adapter so."""
    vars(layer)[_NAME] = name


def names(layer: "LoRAModule") -> list[str]:
    """All adapters of a layer, the active one first."""
    return [active_name(layer), *_shelved(layer)]


def settings_of(layer: "LoRAModule", name: str) -> LoRASettings:
    """What an adapter of this layer is."""
    if name != active_name(layer):
        return _shelved(layer)[name].settings
    dtype = layer.get_parameter(layer.adapter_params()[0]).dtype
    return LoRASettings(layer.rank, layer.alpha, layer.lora_dropout, layer.rslora, dtype, layer.dora)


def parts_of(layer: "LoRAModule", name: str) -> list[Tensor]:
    """A, B and, with DoRA, the magnitude of an adapter."""
    owner: nn.Module = layer if name == active_name(layer) else _shelved(layer)[name]
    own = layer.adapter_params() if owner is layer else [part for part, _ in owner.named_parameters()]
    return [owner.get_parameter(part) for part in own]


def factors_of(layer: "LoRAModule", name: str) -> tuple[Tensor, Tensor]:
    """A and B that an adapter computes with, its start subtracted."""
    lora_A, lora_B = parts_of(layer, name)[:2]
    owner: nn.Module = layer if name == active_name(layer) else _shelved(layer)[name]
    if START_A not in owner._buffers:
        return lora_A, lora_B
    return join(lora_A, owner.get_buffer(START_A)), join_B(lora_B, owner.get_buffer(START_B))


def add(layer: "LoRAModule", name: str, settings: LoRASettings) -> None:
    """A fresh adapter on the shelf."""
    active = active_name(layer)
    trains = _put_away(layer)
    layer._new_update(settings)
    rename_active(layer, name)
    _put_away(layer)
    _take_up(layer, active, trains=trains)


def activate(layer: "LoRAModule", name: str) -> None:
    """Let the layer compute with another adapter, which trains if the one before did."""
    if name != active_name(layer):
        _take_up(layer, name, trains=_put_away(layer))


def remove(layer: "LoRAModule", name: str) -> None:
    """Drop a shelved adapter."""
    shelf = layer.get_submodule(SHELF)
    del shelf._modules[name]
    if not shelf._modules:
        del layer._modules[SHELF]


def _shelved(layer: "LoRAModule") -> dict[str, ShelvedAdapter]:
    shelf = layer._modules.get(SHELF)
    entries = {} if shelf is None else shelf._modules
    return {name: entry for name, entry in entries.items() if isinstance(entry, ShelvedAdapter)}


def _put_away(layer: "LoRAModule") -> bool:
    """Move the active adapter to the shelf; whether it trained."""
    layer.unmerge()
    name = active_name(layer)
    settings = settings_of(layer, name)
    parts = {part: layer.get_parameter(part) for part in layer.adapter_params()}
    trained = any(parameter.requires_grad for parameter in parts.values())
    for part in parts:
        del layer._parameters[part]
    if SHELF not in layer._modules:
        layer.register_module(SHELF, nn.ModuleDict())
    layer.get_submodule(SHELF).register_module(name, ShelvedAdapter(settings, parts, take_start(layer)))
    return trained


def _take_up(layer: "LoRAModule", name: str, *, trains: bool) -> None:
    entry = _shelved(layer)[name]
    remove(layer, name)
    layer._apply_settings(entry.settings)
    for part, parameter in entry.named_parameters():
        parameter.requires_grad_(trains)
        layer.register_parameter(part, parameter)
    if START_A in entry._buffers:
        put_start(layer, entry.get_buffer(START_A), entry.get_buffer(START_B))
    rename_active(layer, name)
