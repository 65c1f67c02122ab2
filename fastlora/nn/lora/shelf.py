"""Several adapters of one LoRA layer: one is active, the others lie ready on a shelf beside it."""

from torch import Tensor, nn

from fastlora.nn.lora.start import put_start, take_start, with_start
from fastlora.nn.lora.update import LoRAUpdate
from fastlora.nn.settings import LoRASettings

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
        if start is not None:
            put_start(self, *start)
        for name, parameter in parts.items():
            parameter.requires_grad_(False)
            self.register_parameter(name, parameter)


class Shelf:
    """The adapters of one LoRA layer, by name.

    Args:
        layer: Holds the active adapter itself, and the others in a child called ``lora_shelf``.
    """

    def __init__(self, layer: LoRAUpdate) -> None:
        """See the class."""
        self._layer = layer

    @property
    def active(self) -> str:
        """Name of the adapter that the layer computes with."""
        name: str = vars(self._layer).get(_NAME, DEFAULT_NAME)
        return name

    @active.setter
    def active(self, name: str) -> None:
        vars(self._layer)[_NAME] = name

    def names(self) -> list[str]:
        """All adapters, the active one first."""
        return [self.active, *self._shelved()]

    def settings(self, name: str) -> LoRASettings:
        """What an adapter is."""
        return self._layer._settings() if name == self.active else self._shelved()[name].settings

    def parts(self, name: str) -> list[nn.Parameter]:
        """A, B and, with DoRA, the magnitude of an adapter."""
        if name == self.active:
            return [self._layer.get_parameter(part) for part in self._layer.adapter_params()]
        return list(self._shelved()[name].parameters())

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B that an adapter computes with, its start subtracted."""
        owner: nn.Module = self._layer if name == self.active else self._shelved()[name]
        lora_A, lora_B, *_ = self.parts(name)
        return with_start(owner, lora_A, lora_B)

    def add(self, name: str, settings: LoRASettings) -> None:
        """Lay a fresh adapter on the shelf."""
        active = self.active
        trains = self._put_away()
        self._layer._new_update(settings)
        self.active = name
        self._put_away()
        self._take_up(active, trains=trains)

    def activate(self, name: str) -> None:
        """Let the layer compute with another adapter, which trains if the one before did."""
        if name != self.active:
            self._take_up(name, trains=self._put_away())

    def remove(self, name: str) -> None:
        """Drop an adapter that is not active."""
        shelf = self._layer.get_submodule(SHELF)
        del shelf._modules[name]
        if not shelf._modules:
            del self._layer._modules[SHELF]

    def _shelved(self) -> dict[str, ShelvedAdapter]:
        shelf = self._layer._modules.get(SHELF)
        entries = {} if shelf is None else shelf._modules
        return {name: entry for name, entry in entries.items() if isinstance(entry, ShelvedAdapter)}

    def _put_away(self) -> bool:
        """Move the active adapter to the shelf; whether it trained."""
        layer = self._layer
        layer.unmerge()
        settings = layer._settings()
        parts = {part: layer.get_parameter(part) for part in layer.adapter_params()}
        trained = any(parameter.requires_grad for parameter in parts.values())
        for part in parts:
            del layer._parameters[part]
        if SHELF not in layer._modules:
            layer.register_module(SHELF, nn.ModuleDict())
        entry = ShelvedAdapter(settings, parts, take_start(layer))
        layer.get_submodule(SHELF).register_module(self.active, entry)
        return trained

    def _take_up(self, name: str, *, trains: bool) -> None:
        entry = self._shelved()[name]
        self.remove(name)
        self._layer._apply_settings(entry.settings)
        for part, parameter in entry.named_parameters():
            parameter.requires_grad_(trains)
            self._layer.register_parameter(part, parameter)
        start = take_start(entry)
        if start is not None:
            put_start(self._layer, *start)
        self.active = name
