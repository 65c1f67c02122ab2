"""Parameters that several modules share, such as a language model's tied embeddings."""

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora._core.log import logger
from fastlora.anatomy.names import clean_name


@dataclass(frozen=True)
class Holder:
    """One name of a parameter: the module that has it, and what it is called there."""

    key: str
    module: nn.Module
    name: str

    @property
    def owner(self) -> str:
        """Name of the module."""
        return self.key.rpartition(".")[0]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        return self.module.get_parameter(self.name)


def all_holders(model: nn.Module) -> list[list[Holder]]:
    """Every parameter, with a name of each place that has it.

    A module in one that has several names is one place, a module with a name in several others is several.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, dict[tuple[int, str, str], Holder]] = {}
    for prefix, module in modules.items():
        outer, _, last = prefix.rpartition(".")
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holder = Holder(clean_name(f"{prefix}.{name}".lstrip(".")), module, name)
                holders.setdefault(id(parameter), {}).setdefault((id(modules[outer]), last, name), holder)
    return [list(found.values()) for found in holders.values()]


def shared_parameters(model: nn.Module) -> list[list[Holder]]:
    """The places of every parameter that has several."""
    return [holders for holders in all_holders(model) if len(holders) > 1]


def without_parents(holders: Iterable[Holder]) -> list[Holder]:
    """Without modules around another holder, which keep a reference to its parameter (BERT's output bias)."""
    found = list(holders)
    return [h for h in found if not any(is_inside(other.owner, h.owner) for other in found)]


def is_inside(name: str, outer: str) -> bool:
    """Whether a module of this name is a part of the outer one; every other one is a part of the model."""
    return name != outer and name.startswith(f"{outer}." if outer else "")


def to_untie(
    groups: Iterable[Collection[Holder]], filed: Mapping[str, Tensor], *, together: bool
) -> tuple[list[Holder], list[str]]:
    """Holders that need a parameter of their own for what a file holds, and why it is impossible where it is.

    Args:
        groups: Names that share a parameter in the model.
        filed: The file's tensors for modules that train whole, by name.
        together: Whether tensors that are equal in the file may train as one.
    """
    apart: list[Holder] = []
    problems: list[str] = []
    for group in groups:
        given = [holder for holder in group if holder.key in filed]
        values = [filed[holder.key] for holder in given]
        alike = all(torch.equal(values[0], value) for value in values[1:])
        if not given or (together and alike and len(given) == len(group)):
            continue
        # what remains tied beside others would be left out when transformers saves the model
        rest = [holder for holder in group if holder not in given]
        apart += given + rest[1:]
        for holder in given:
            twins = [h for h in group if h.module is holder.module and h.key != holder.key]
            if any(
                twin not in given or not torch.equal(filed[twin.key], filed[holder.key]) for twin in twins
            ):
                problems.append(
                    f"{holder.key}: {holder.owner!r} and {twins[0].owner!r} are one module in the model, "
                    "and not in the file"
                )
    return apart, problems


def check_tied_targets(chosen: Mapping[str, nn.Module], whole: Iterable[nn.Module]) -> None:
    """Refuse a layer to adapt whose weight a module to train whole has too: an adapted weight is frozen.

    Raises:
        ValueError: There is one.
    """
    trained = {id(parameter) for module in whole for parameter in module.parameters()}
    tied = [name for name, module in chosen.items() if any(id(p) in trained for p in module.parameters())]
    if tied:
        raise ValueError(
            f"expected targets with weights of their own, got {tied[0]!r}, which shares its weight with a "
            "module in modules_to_save; leave one of them out, or untie them in the model first"
        )


def any_tied(modules: Iterable[nn.Module]) -> bool:
    """Whether two of these modules share a parameter."""
    found = [id(parameter) for module in modules for parameter in module.parameters()]
    return len(set(found)) < len(found)


def tell_of_ties(model: nn.Module, whole: Collection[nn.Module]) -> None:
    """Log what else trains with the ``whole`` modules, where PEFT would train a copy of them."""
    inside = {id(part) for module in whole for part in module.modules()}
    for holders in map(without_parents, shared_parameters(model)):
        others = [holder.key for holder in holders if id(holder.module) not in inside]
        if len(others) < len(holders) and others:
            logger.warning("%s is tied to a module in modules_to_save and trains with it", others[0])


def untie(model: nn.Module, holders: Iterable[Holder]) -> None:
    """Give every holder a parameter of its own, and let a Hugging Face model know that it is not tied."""
    # a module with several names is one place
    places = {(id(holder.module), holder.name): holder for holder in holders}
    for holder in places.values():
        shared = holder.parameter
        own = nn.Parameter(shared.detach().clone(), shared.requires_grad)
        holder.module.register_parameter(holder.name, own)
    if places:
        _forget_tie(model)


def _forget_tie(model: nn.Module) -> None:
    """Else a later ``tie_weights`` would tie the embeddings again."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weights = [getattr(end, "weight", None) for end in ends]
    config = getattr(model, "config", None)
    # encoder-decoder models such as T5 may scale their outputs by this setting
    tied = weights[0] is weights[1]
    if tied or getattr(config, "is_encoder_decoder", True) or any(weight is None for weight in weights):
        return
    # other models may have been made from the same object
    new = copy.deepcopy(config)
    pairs = [(config, new), (getattr(config, "text_config", None), getattr(new, "text_config", None))]
    for old, part in pairs:
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
        for module in model.modules():
            if old is not None and vars(module).get("config") is old:
                vars(module)["config"] = part
