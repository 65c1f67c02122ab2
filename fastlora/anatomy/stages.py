"""Head and stages of a model: what a classifier ends in, and what is unfrozen together."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torch import nn

_HEAD_NAMES = ("heads", "head", "fc", "classifier")
# modules that only hold the trunk, whatever their class
_TRUNKS = frozenset(
    {
        "features",
        "trunk_output",
        "encoder",
        "layers",
        "layer",
        "blocks",
        "stages",
        "stack",
        "backbone",
        "feature_extractor",
        "model",
    }
)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
# one of these inside the other is one trunk: Hugging Face's model.vit.encoder.layer, say
_DOMINANT = 0.9


@dataclass(frozen=True)
class Stage:
    """Layers that are frozen and unfrozen together.

    Attributes:
        name: ``"stem"``, or the name of the module that is the largest part of it.
        modules: What it is made of, in order.
        parameters: Parameters that belong to none of the modules: a class token, a position table.
    """

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...] = ()

    def all_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the stage."""
        return chain(self.parameters, *(module.parameters() for module in self.modules))


def head(model: nn.Module) -> tuple[str, nn.Module]:
    """The last layer, which maps features to classes or words, and its name.

    Raises:
        ValueError: There is none under a usual name.
    """
    # timm's and Hugging Face's ways to ask
    for ask in ("get_classifier", "get_output_embeddings"):
        asked = getattr(model, ask, lambda: None)()
        if isinstance(asked, nn.Module) and _own_leaves(asked):
            return _last_leaf(_name_of(model, asked), asked)
    for name in _HEAD_NAMES:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module) and _own_leaves(module):
            return _last_leaf(name, module)
    raise ValueError(
        f"expected a head called {', '.join(_HEAD_NAMES)}, got {type(model).__name__} without one; "
        "wrap its features in fastlora.TransferLearningModel, which brings a head"
    )


def stages(model: nn.Module, head: nn.Module | None = None) -> list[Stage]:
    """The stages of a model from input to output, the head excluded.

    A ResNet's are its stem and ``layer1`` to ``layer4``, a transformer's its embedding and its blocks; plain
    networks such as VGG are cut at their poolings. What stands before the first stage is the stem; what
    follows the last one, a final norm, say, belongs to it. Every parameter but the head's is in one stage.

    Args:
        model: Image classifier, backbone or transformer.
        head: The layer to leave out; an ``nn.ModuleList`` stands for each of its members.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18()
        >>> [stage.name for stage in stages(model, model.fc)]
        ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    units = _Units(model, head)
    builder = _Builder(units)
    for name, module in units.found:
        builder.add(name, module)
    return builder.finish(units.bare)


def parts_of(head: nn.Module | None) -> list[nn.Module]:
    """The members of an ``nn.ModuleList``, which need not lie beside each other; else the module itself."""
    if isinstance(head, nn.ModuleList):
        return list(head)
    return [] if head is None else [head]


class _Units:
    """The parts of the trunk in order, looked for through the modules that only hold it."""

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        self._heads = {id(part) for part in parts_of(head)}
        self.found: list[tuple[str, nn.Module]] = []
        self.bare: list[nn.Parameter] = []
        self._open(model, "")
        stacks = [name for name, module in self.found if _is_stack(module)]
        # one stack alone would make a model of one stage
        self.cut_at_stacks = len(stacks) > 1
        self.plain = not any(_is_composite(module) for _, module in self.found)

    def _open(self, module: nn.Module, name: str) -> None:
        self.bare += [p for p in module._parameters.values() if p is not None]
        for child_name, child in module._modules.items():
            if child is None or id(child) in self._heads:
                continue
            full = f"{name}.{child_name}" if name else child_name
            if self._holds_the_trunk(module, child, child_name):
                self._open(child, full)
            else:
                self.found.append((full, child))

    def _holds_the_trunk(self, parent: nn.Module, child: nn.Module, name: str) -> bool:
        if any(id(inner) in self._heads for inner in child.modules()):
            return True
        trunk = name in _TRUNKS and bool(child._modules)
        only = not parent._parameters and _count(child) >= _DOMINANT * _count(parent) > 0
        return trunk or (only and len(child._modules) > 1 and not isinstance(parent, nn.Sequential))


class _Builder:
    """Gathers units into stages."""

    def __init__(self, units: _Units) -> None:
        self._units = units
        self._stages: list[Stage] = []
        self._waiting: list[tuple[str, nn.Module]] = []

    def add(self, name: str, module: nn.Module) -> None:
        """Take the next unit."""
        self._waiting.append((name, module))
        if self._units.plain:
            if isinstance(module, _POOLS) and self._holds_weights():
                self._close(self._waiting[0][0])
        elif self._starts_a_stage(module):
            if not self._stages and len(self._waiting) > 1:
                self._waiting, kept = self._waiting[-1:], self._waiting[:-1]
                self._stages.append(Stage("stem", tuple(m for _, m in kept)))
            self._close(name)

    def finish(self, bare: list[nn.Parameter]) -> list[Stage]:
        """The stages, with what is left over in the last one and bare parameters in the first."""
        if self._waiting and self._stages and not self._units.plain:
            last = self._stages.pop()
            self._stages.append(Stage(last.name, last.modules + tuple(m for _, m in self._waiting)))
        elif self._holds_weights():
            self._close(next(name for name, module in self._waiting if _count(module)))
        if bare:
            first = self._stages.pop(0) if self._stages else Stage("stem", ())
            self._stages.insert(0, Stage(first.name, first.modules, tuple(bare)))
        return [stage for stage in self._stages if any(True for _ in stage.all_parameters())]

    def _starts_a_stage(self, module: nn.Module) -> bool:
        return _is_stack(module) if self._units.cut_at_stacks else _is_composite(module)

    def _holds_weights(self) -> bool:
        return any(_count(module) for _, module in self._waiting)

    def _close(self, name: str) -> None:
        self._stages.append(Stage(name, tuple(m for _, m in self._waiting)))
        self._waiting = []


def _is_stack(module: nn.Module) -> bool:
    """Whether it repeats one kind of block: a ResNet's layer, a dense block."""
    children = list(module.children())
    alike = len({type(child) for child in children}) == 1
    return alike and all(map(_is_composite, children))


def _is_composite(module: nn.Module) -> bool:
    """Whether it computes more than one product; a convolution with its norm does not."""
    return sum(isinstance(part, _WEIGHTED) for part in module.modules()) > 1


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _own_leaves(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if m._parameters and not list(m.children())]


def _last_leaf(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    leaf = _own_leaves(module)[-1]
    return f"{name}.{leaf}" if leaf else name, module.get_submodule(leaf)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(wanted)]
