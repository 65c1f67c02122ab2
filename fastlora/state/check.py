"""Does an adapter's content fit a model? Everything is compared before anything is changed."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora._core.checks import FLOATING_DTYPES
from fastlora._core.words import first_few
from fastlora.anatomy.blocks import output_sizes
from fastlora.anatomy.names import clean_name, named_modules
from fastlora.anatomy.tied import Holder, is_inside, shared_parameters, to_untie, without_parents
from fastlora.inject.lora import cannot_carry
from fastlora.inject.places import Place, cannot_adapt
from fastlora.inject.prompt_places import PromptPlace, host_name
from fastlora.nn import AdaptedModule, LoRAModule
from fastlora.nn.lora.layout import layout_of, lora_parts
from fastlora.nn.prompts.modules import PromptModule
from fastlora.state.base_copies import BaseCopies
from fastlora.state.peft_config import AdapterConfig
from fastlora.state.slots import (
    LORA_KEY,
    OUT_PROJ,
    PREFIX,
    adapter_key,
    file_settings,
    plain_layer,
    prompt_key,
    tensor_slots,
)

_LISTED = 5


class AdapterCheck:
    """Collects every difference between an adapter's tensors and a model; :meth:`finish` raises them."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """See the class."""
        self._all = named_modules(model)
        self._names = {name: module for name, module in self._all.items() if name}
        self._tensors = tensors
        self._explained: set[str] = set()
        self._problems: list[str] = []

    def targets(self, *, by_peft: bool) -> dict[str, nn.Module]:
        """The modules of a model without LoRA that the tensors belong to."""
        found = (LORA_KEY.fullmatch(key) for key in self._tensors)
        names = dict.fromkeys(match[1] for match in found if match)
        targets: dict[str, nn.Module] = {}
        for name in names:
            if name.removesuffix(OUT_PROJ) in names and name.endswith(OUT_PROJ):
                continue
            module = self._names.get(name)
            problem = "no module of this name in the model" if module is None else cannot_carry(module)
            if module is not None and problem is None and by_peft:
                # PEFT adapts one of several names, we the module under all of them
                twins = [other for other in self._twins(name) if other not in names]
                problem = f"one module with {twins[0]!r}, which the file leaves alone" if twins else None
            if module is not None and problem is None:
                targets[name] = module
            else:
                self._misfit(name, str(problem))
        return targets

    def layers(self, targets: Mapping[str, nn.Module], config: AdapterConfig) -> None:
        """Compare the A and B of every layer, adapted or about to be."""
        if not any(LORA_KEY.fullmatch(key) for key in self._tensors):
            self._problems.insert(0, f"no LoRA tensors ({PREFIX}<module>.lora_A.weight) in the file")
        for name, module in targets.items():
            rank, dora = config.settings(name).rank, config.dora
            problem = _lora_difference(module, rank, dora=dora)
            if problem is not None:
                self._misfit(name, problem)
                continue
            for key, owner, part in tensor_slots(name, module, dora=dora):
                self._compare(key, lora_parts(plain_layer(owner), rank, dora=dora)[part])

    def no_layers(self, layers: Iterable[str], kind: str) -> None:
        """Note layers of a kind that the file does not hold."""
        self._problems.extend(f"{name}: {kind} in the model, none in the file" for name in layers)

    def places(self, places: Mapping[str, Place]) -> None:
        """Compare the adapters about to be put into a model without any."""
        sizes = output_sizes(self._names)
        for name, place in places.items():
            module = self._names.get(name)
            problem = "no module of this name in the model" if module is None else cannot_adapt(module)
            if problem is None and sizes.get(name) not in (None, place.hidden_size):
                problem = f"expected hidden_size {sizes[name]} as in the model, got {place.hidden_size}"
            self._place(name, place, problem)

    def adapted(self, places: Mapping[str, Place], modules: Mapping[str, AdaptedModule]) -> None:
        """Compare the adapters of an adapted model."""
        for name, place in places.items():
            here = Place.of(modules[name]) if name in modules else None
            problem = "no adapter at this place in the model" if here is None else here.difference(place)
            self._place(name, place, problem)
        self.no_layers((name for name in modules if name not in places), "an adapter")

    def prompts(self, places: Mapping[str, PromptPlace]) -> None:
        """Compare the prompts about to be put into a model without any."""
        for name, place in places.items():
            module = self._all.get(host_name(name))
            problem = "no such transformer in the model" if module is None else place.misfit(module)
            shape = None if module is None or problem else place.shape(module)
            self._prompt(name, shape, problem)

    def prompted(self, places: Mapping[str, PromptPlace], modules: Mapping[str, PromptModule]) -> None:
        """Compare the prompts of a model that has some."""
        for name, place in places.items():
            if name in modules:
                here = modules[name]
                self._prompt(name, tuple(here.tokens.shape), PromptPlace.of(here).difference(place))
            else:
                self._prompt(name, None, "no prompts of this name in the model")
        self.no_layers((name for name in modules if name not in places), "prompts")

    def whole_modules(self, entries: Iterable[str], *, by_peft: bool) -> dict[str, nn.Module]:
        """The modules that ``modules_to_save`` means, their tensors compared.

        Entries that neither the model nor the file has are passed over: PEFT lists every name that a task's
        classifier may have.
        """
        whole: dict[str, nn.Module] = {}
        for entry in entries:
            # PEFT means every module whose name ends so, dot or not; ours are whole names
            meant = [n for n in self._names if (n.endswith(entry) if by_peft else n == entry)]
            held = [n for n in meant if any(key.startswith(f"{PREFIX}{n}.") for key in self._tensors)]
            filed = {id(self._names[n]) for n in held}
            whole |= {name: self._names[name] for name in held}
            for name in meant:
                module = self._names[name]
                there = id(module) in filed or any(is_inside(name, h) for h in held)
                if module.state_dict() and not there:
                    self._problems.append(
                        f"modules_to_save {entry!r}: {name!r} is in the model, but not in the file"
                    )
        for name, module in whole.items():
            for key, tensor in module.state_dict().items():
                self._compare(f"{PREFIX}{name}.{clean_name(key)}", tuple(tensor.shape), like=tensor)
        return whole

    def untied(
        self, model: nn.Module, whole: Iterable[str], config: AdapterConfig | None, *, fresh: bool
    ) -> list[Holder]:
        """Parameters of whole modules that the model shares with others, where the file has them apart."""
        filed = {key.removeprefix(PREFIX): tensor for key, tensor in self._tensors.items()}
        filed = {key: tensor for key, tensor in filed.items() if any(is_inside(key, name) for name in whole)}
        groups = shared_parameters(model)
        # PEFT trains its own copy of every module, unless it was told otherwise; we train what is tied as one
        by_peft = config is not None and config.by_peft
        if not by_peft:
            groups = [without_parents(group) for group in groups]
        together = not by_peft or (config is not None and config.weight_tying)
        holders, problems = to_untie(groups, filed, together=together)
        self._problems += problems
        if not fresh:
            self._problems += [
                f"{holder.key}: this model trains it as one with another module, the file has them apart; "
                "load it into a model without adapters"
                for holder in holders
                if holder.parameter.requires_grad
            ]
        return holders

    def base_copies(self, model: nn.Module, *, fresh: bool) -> list[tuple[Tensor, Tensor]]:
        """Frozen weights in the file that differ from the model's; a model without adapters takes them."""
        copies = BaseCopies(model, self._tensors, fresh=fresh)
        rest = [key for key in self._tensors if key not in self._explained]
        self._explained |= copies.read(rest)
        self._problems += copies.problems
        return copies.found

    def finish(self, folder: Path) -> None:
        """Report what was found.

        Raises:
            ValueError: There are differences.
        """
        unexpected = [key for key in self._tensors if key not in self._explained]
        problems = self._problems + [f"{key}: nothing in the model takes it" for key in unexpected]
        if problems:
            raise ValueError(
                f"expected an adapter that fits this model, got {folder} (differences: "
                f"{len(problems)}); load it into the model it was trained on. Nothing was changed:\n  "
                + "\n  ".join(first_few(problems, _LISTED))
            )

    def _twins(self, name: str) -> list[str]:
        """Other places of the same module; that of a module inside one with several names is the same."""
        module, (outer, _, last) = self._names[name], name.rpartition(".")
        places = {other: other.rpartition(".") for other, same in self._names.items() if same is module}
        return [
            other
            for other, (around, _, end) in places.items()
            if self._all[around] is not self._all[outer] or end != last
        ]

    def _misfit(self, name: str, problem: str) -> None:
        """One difference for a whole layer, in place of one for each of its tensors."""
        self._problems.append(f"{name}: {problem}")
        self._explained |= {key for key in self._tensors if key.startswith(f"{PREFIX}{name}.")}

    def _place(self, name: str, place: Place, problem: str | None) -> None:
        if problem is not None:
            self._problems.append(f"{name}: {problem}")
            prefix = adapter_key(name, "")
            self._explained |= {key for key in self._tensors if key.startswith(prefix)}
            return
        layer = place.make(torch.device("meta"), torch.float32)
        for part in layer.adapter_params():
            self._compare(adapter_key(name, part), tuple(layer.get_parameter(part).shape))

    def _prompt(self, name: str, shape: tuple[int, ...] | None, problem: str | None) -> None:
        if problem is None and shape is not None:
            self._compare(prompt_key(name), shape)
        else:
            self._problems.append(f"{name}: {problem}")
            self._explained.add(prompt_key(name))

    def _compare(self, key: str, shape: tuple[int, ...], like: Tensor | None = None) -> None:
        self._explained.add(key)
        tensor = self._tensors.get(key)
        if tensor is None:
            self._problems.append(f"{key}: missing")
        elif tuple(tensor.shape) != shape:
            self._problems.append(f"{key}: expected {list(shape)}, got {list(tensor.shape)}")
        elif not _dtype_fits(tensor, like):
            wanted = "a 16-, 32- or 64-bit floating dtype" if like is None else like.dtype
            self._problems.append(f"{key}: expected {wanted}, got {tensor.dtype}")


def _lora_difference(module: nn.Module, rank: int, *, dora: bool) -> str | None:
    if isinstance(module, LoRAModule) and file_settings(module).rank != rank:
        return f"expected rank {file_settings(module).rank} as in the model, got {rank}"
    if isinstance(module, LoRAModule) and module.dora != dora:
        return f"expected dora={module.dora} as in the model, got {dora}"
    plain = plain_layer(module)
    return layout_of(plain).misfit(plain, rank, dora=dora)


def _dtype_fits(tensor: Tensor, like: Tensor | None) -> bool:
    if like is None or like.is_floating_point():
        return tensor.dtype in FLOATING_DTYPES
    return tensor.dtype == like.dtype
