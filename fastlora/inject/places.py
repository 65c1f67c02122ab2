"""The places of a model that get a bottleneck adapter: chosen, checked, filled."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import nn

from fastlora._core.words import first_few
from fastlora.anatomy.blocks import find_blocks, output_sizes
from fastlora.anatomy.names import adapted_modules, lora_layers, named_modules, replace_modules
from fastlora.anatomy.targets import left_out_names
from fastlora.inject.prompt_places import follow_blocks
from fastlora.nn import AdaptedModule, AdapterLayer
from fastlora.nn.adapted import AdapterPlacement, check_wrappable
from fastlora.nn.settings import AdapterSettings

BLOCK_STYLES = ("houlsby", "pfeiffer", "parallel")
NAMED_STYLES: tuple[AdapterPlacement, ...] = ("sequential", "parallel")
_DECISIVE = ("placement", "hidden_size", "adapter_size", "activation", "layer_norm", "bias", "scale")


@dataclass(frozen=True)
class Place:
    """One adapter, made or to be made.

    Attributes:
        placement: How it works with its module, see :class:`AdaptedModule`.
        hidden_size: Width of what it adapts.
        settings: The rest.
    """

    placement: AdapterPlacement
    hidden_size: int
    settings: AdapterSettings

    @classmethod
    def of(cls, module: AdaptedModule) -> Self:
        """What an adapter in a model was made from."""
        layer = module.adapter
        settings = AdapterSettings(
            adapter_size=layer.adapter_size,
            activation=layer.activation,
            layer_norm=layer.layer_norm,
            scale="learned" if isinstance(layer.scale, nn.Parameter) else layer.scale,
            dropout=layer.dropout,
            bias=layer.down_proj.bias is not None,
        )
        return cls(module.placement, layer.hidden_size, settings)

    def difference(self, other: "Place") -> str | None:
        """What keeps an adapter made for ``other`` from working here; dropout and a fixed scale do not."""
        for name, mine, theirs in zip(_DECISIVE, self._decisive(), other._decisive(), strict=True):
            if mine != theirs:
                return f"expected {name} {mine!r} as in the model, got {theirs!r}"
        return None

    def make(self, device: torch.device, dtype: torch.dtype) -> AdapterLayer:
        """A fresh adapter for this place."""
        return AdapterLayer(self.hidden_size, **asdict(self.settings), device=device, dtype=dtype)

    def _decisive(self) -> tuple[object, ...]:
        learned = "learned" if self.settings.scale == "learned" else "fixed"
        settings = (getattr(self.settings, name) for name in _DECISIVE[2:-1])
        return (self.placement, self.hidden_size, *settings, learned)


def choose_blocks(
    model: nn.Module,
    style: str,
    exclude_modules: str | Collection[str] | None,
    modules_to_save: Collection[str] | None,
) -> tuple[dict[str, AdapterPlacement], list[nn.Module]]:
    """The places of a style in the transformer blocks of a model, and the modules to train whole.

    Raises:
        ValueError: No known block, a block without such a place, or none left.
    """
    names = named_modules(model)
    blocks = find_blocks(names)
    if not blocks:
        raise ValueError(
            f"expected transformer blocks of torch, torchvision, timm or Hugging Face, got "
            f"{type(model).__name__} with none that we know; say where adapters go with target_modules"
        )
    chosen: dict[str, AdapterPlacement] = {}
    for block in blocks:
        if style == "parallel" and block.beside_mlp is None:
            raise ValueError(
                "expected placement 'houlsby' or 'pfeiffer' for torch's own layers, got 'parallel'; their "
                "MLP is no module that an adapter could run beside"
            )
        if style == "parallel" and block.beside_mlp is not None:
            chosen |= dict([block.beside_mlp])
        else:
            spots = [*block.attentions, block.mlp] if style == "houlsby" else [block.mlp]
            chosen |= dict.fromkeys(spots, "sequential")
    left_out, whole = left_out_names(model, exclude_modules, modules_to_save)
    kept = {n: p for n, p in chosen.items() if not any(n == o or n.startswith(f"{o}.") for o in left_out)}
    if not kept:
        raise ValueError(
            f"expected at least one place for an adapter, got none: exclude_modules={exclude_modules!r} and "
            f"modules_to_save={modules_to_save!r} leave out all {len(chosen)}"
        )
    return kept, whole


def plan_places(
    model: nn.Module,
    chosen: Mapping[str, AdapterPlacement],
    settings: AdapterSettings,
    hidden_size: int | None,
) -> dict[str, Place]:
    """Give every chosen place its width.

    Raises:
        ValueError: Modules that can't have an adapter, a width that we can't tell, or one that differs from
            the given; all are listed.
    """
    names, problems = named_modules(model), []
    sizes = output_sizes(names)
    places: dict[str, Place] = {}
    for name, placement in chosen.items():
        known = sizes.get(name)
        size = hidden_size or known
        problem = cannot_adapt(names[name])
        if problem is None and size is None:
            problem = f"{type(names[name]).__name__} does not say how wide its output is; give hidden_size"
        elif problem is None and known not in (None, size):
            problem = f"its output is {known} wide, not hidden_size={hidden_size}"
        if problem is None and size is not None:
            settings.size(size)
            places[name] = Place(placement, size, settings)
        else:
            problems.append(f"{name}: {problem}")
    if problems:
        raise ValueError(
            f"expected only modules that an adapter fits, got {len(problems)} others; leave them out with "
            "exclude_modules or name other ones:\n  " + "\n  ".join(first_few(problems, 5))
        )
    return places


def cannot_adapt(module: nn.Module) -> str | None:
    """Why this module can't have an adapter, or None if it can."""
    try:
        check_wrappable(module)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def check_no_adapters(model: nn.Module) -> None:
    """Refuse a model that has adapters already, or is itself one, or whose weights are sharded.

    Raises:
        TypeError: They are.
        ValueError: It has.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise TypeError(
                f"expected {name} to be a plain Parameter, got {type(parameter.data).__name__}; add adapters "
                "before sharding"
            )
    places = [name or "the model itself" for name in adapted_modules(model)]
    if places:
        raise ValueError(
            f"expected a model without bottleneck adapters, got {len(places)}, {places[0]!r} first; take "
            "them out with fastlora.remove_adapters first"
        )


def check_whole(model: nn.Module, whole: Collection[nn.Module]) -> None:
    """Refuse to train a module whole whose weights LoRA layers hold frozen.

    Raises:
        ValueError: There is one.
    """
    ours = {id(layer): name for name, layer in lora_layers(model).items()}
    for module in whole:
        for part in module.modules():
            if id(part) in ours:
                raise ValueError(
                    f"expected modules_to_save without LoRA layers, got one with {ours[id(part)]!r} in it; "
                    "name it in modules_to_save of apply_lora instead"
                )


def add_adapters(model: nn.Module, places: Mapping[str, Place], adapter_dtype: torch.dtype | None) -> None:
    """Put an adapter at every place, all checked before; ``train_only_tuners`` decides what trains."""
    names = named_modules(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, place in places.items():
        device, dtype = _device_and_dtype(name, names)
        layer = place.make(device, adapter_dtype or dtype)
        # a module with two names gets one adapter
        replacements.setdefault(names[name], AdaptedModule(names[name], layer, place.placement))
    replace_modules(model, replacements)
    follow_blocks(model, replacements)


def _device_and_dtype(name: str, names: Mapping[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    # a dropout has no weights of its own: what is around it says where and in which precision it works
    while True:
        for parameter in names[name].parameters():
            # beside 16-bit and quantised weights adapters stay in float32
            wide = parameter.is_floating_point() and parameter.dtype.itemsize >= 4
            return parameter.device, parameter.dtype if wide else torch.float32
        if not name:
            return torch.get_default_device(), torch.get_default_dtype()
        name = name.rpartition(".")[0]
        while name not in names:
            name = name.rpartition(".")[0]
