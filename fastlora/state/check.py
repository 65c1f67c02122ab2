"""Does an adapter's content fit a model? Everything is compared before anything is changed."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from fastlora._core.checks import FLOATING_DTYPES
from fastlora._core.words import first_few
from fastlora.anatomy.blocks import output_sizes
from fastlora.anatomy.names import Added, clean_name, named_modules
from fastlora.anatomy.tied import Holder, is_inside, shared_parameters, to_untie, without_parents
from fastlora.inject.adapters import cannot_adapt
from fastlora.inject.lora import cannot_carry
from fastlora.inject.places import Place
from fastlora.inject.prompts import PromptPlace, host_name
from fastlora.nn import LoRAModule
from fastlora.nn.lora.layout import layout_of, lora_parts
from fastlora.state.base_copies import BaseCopies
from fastlora.state.folder import AdapterFile
from fastlora.state.keys import (
    LORA_KEY,
    OUT_PROJ,
    PREFIX,
    adapter_key,
    plain_layer,
    prompt_key,
    tensor_slots,
)
from fastlora.state.peft_config import file_settings

_LISTED = 5


class AdapterCheck:
    """Collects every difference between an adapter file and a model; :meth:`finish` raises them.

    A model to which nothing was added is about to get what the file holds; another one must have just that.

    Args:
        model: Only looked at.
        here: What was added to it.
        file: With the names that the model has.
    """

    def __init__(self, model: nn.Module, here: Added, file: AdapterFile) -> None:
        """See the class."""
        self._model, self._here, self._file = model, here, file
        self._tensors, self._config = file.tensors, file.config
        self._all = named_modules(model)
        self._names = {name: module for name, module in self._all.items() if name}
        self._explained: set[str] = set()
        self._problems: list[str] = []

    def layers(self) -> dict[str, nn.Module]:
        """The layers that the file's A and B are for, adapted or about to be, these compared."""
        config = self._config.lora
        if config is None:
            self._missing(self._here.layers, (), "LoRA")
            return {}
        targets: dict[str, nn.Module] = {**self._here.layers} if self._here else self._targets()
        if not any(LORA_KEY.fullmatch(key) for key in self._tensors):
            self._problems.insert(0, f"no LoRA tensors ({PREFIX}<module>.lora_A.weight) in the file")
        for name, module in targets.items():
            rank, dora = config.settings(name).rank, config.dora
            problem = _lora_difference(module, rank, dora=dora)
            if problem is not None:
                self._misfit(name, problem, f"{PREFIX}{name}.")
                continue
            for key, owner, part in tensor_slots(name, module, dora=dora):
                self._compare(key, lora_parts(plain_layer(owner), rank, dora=dora)[part])
        return targets

    def _targets(self) -> dict[str, nn.Module]:
        """The modules of a model without LoRA that the tensors belong to."""
        found = (LORA_KEY.fullmatch(key) for key in self._tensors)
        names = dict.fromkeys(match[1] for match in found if match)
        targets: dict[str, nn.Module] = {}
        for name in names:
            if name.removesuffix(OUT_PROJ) in names and name.endswith(OUT_PROJ):
                continue
            module = self._names.get(name)
            problem = "no module of this name in the model" if module is None else cannot_carry(module)
            if module is not None and problem is None and self._config.by_peft:
                # PEFT adapts one of several names, we the module under all of them
                twins = [other for other in self._twins(name) if other not in names]
                problem = f"one module with {twins[0]!r}, which the file leaves alone" if twins else None
            if module is not None and problem is None:
                targets[name] = module
            else:
                self._misfit(name, str(problem), f"{PREFIX}{name}.")
        return targets

    def places(self) -> None:
        """Compare the bottleneck adapters."""
        sizes = {} if self._here else output_sizes(self._names)
        for name, place in self._config.bottleneck.items():
            self._place(name, place, self._place_difference(name, place, sizes.get(name)))
        self._missing(self._here.places, self._config.bottleneck, "an adapter")

    def _place_difference(self, name: str, place: Place, size: int | None) -> str | None:
        if self._here:
            there = self._here.places.get(name)
            if there is None:
                return "no adapter at this place in the model"
            return Place.of(there).difference(place)
        module = self._names.get(name)
        if module is None:
            return "no module of this name in the model"
        problem = cannot_adapt(module)
        if problem is None and size not in (None, place.hidden_size):
            problem = f"expected hidden_size {size} as in the model, got {place.hidden_size}"
        return problem

    def prompts(self) -> None:
        """Compare the prompts."""
        for name, place in self._config.prompts.items():
            there, host = self._here.prompts.get(name), self._all.get(host_name(name))
            if there is not None:
                self._prompt(name, tuple(there.tokens.shape), PromptPlace.of(there).difference(place))
            elif self._here or host is None:
                what = "prompts of this name" if self._here else "such transformer"
                self._prompt(name, None, f"no {what} in the model")
            else:
                problem = place.misfit(host)
                self._prompt(name, None if problem else place.shape(host), problem)
        self._missing(self._here.prompts, self._config.prompts, "prompts")

    def whole_modules(self, further: Iterable[str] = ()) -> dict[str, nn.Module]:
        """The modules that ``modules_to_save`` and the ``further`` names mean, their tensors compared.

        Entries that neither the model nor the file has are passed over: PEFT lists every name that a task's
        classifier may have.
        """
        whole: dict[str, nn.Module] = {}
        for entry in (*self._config.modules_to_save, *further):
            # PEFT means every module whose name ends so, dot or not; ours are whole names
            meant = [n for n in self._names if (n.endswith(entry) if self._config.by_peft else n == entry)]
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

    def untied(self, whole: Iterable[str]) -> list[Holder]:
        """Parameters of whole modules that the model shares with others, where the file has them apart."""
        by_peft, lora = self._config.by_peft, self._config.lora
        filed = {key.removeprefix(PREFIX): tensor for key, tensor in self._tensors.items()}
        filed = {key: tensor for key, tensor in filed.items() if any(is_inside(key, name) for name in whole)}
        groups = shared_parameters(self._model)
        # PEFT trains its own copy of every module, unless it was told otherwise; we train what is tied as one
        if not by_peft:
            groups = [without_parents(group) for group in groups]
        if not self._file.every_name:
            groups = [group for group in groups if not self._in_doubt(group, filed)]
        together = not by_peft or (lora is not None and lora.weight_tying)
        holders, problems = to_untie(groups, filed, together=together)
        self._problems += problems
        if self._here:
            self._problems += [
                f"{holder.key}: this model trains it as one with another module, the file has them apart; "
                "load it into a model without adapters"
                for holder in holders
                if holder.parameter.requires_grad
            ]
        return holders

    def _in_doubt(self, group: list[Holder], filed: Collection[str]) -> bool:
        """Whether a file by an earlier version does not tell if these names trained as one; noted if so."""
        held = [holder.key for holder in group if holder.key in filed]
        if not 0 < len(held) < len(group):
            return False
        if not (self._here and group[0].parameter.requires_grad):
            other = next(holder.key for holder in group if holder.key not in filed)
            self._problems.append(
                f"{other}: the model shares it with {held[0]}, and an earlier fastlora wrote that alone, "
                "whether they trained as one or not; if they did, adapt the model first (apply_lora with "
                "modules_to_save) and load into that; if not, untie them in the model first"
            )
        return True

    def base_copies(self) -> list[tuple[Tensor, Tensor]]:
        """Frozen weights in the file that differ from the model's; a model without adapters takes them."""
        copies = BaseCopies(self._model, self._tensors, fresh=not self._here)
        rest = [key for key in self._tensors if key not in self._explained]
        self._explained |= copies.read(rest)
        self._problems += copies.problems
        return copies.found

    def finish(self) -> None:
        """Report what was found.

        Raises:
            ValueError: There are differences.
        """
        unexpected = [key for key in self._tensors if key not in self._explained]
        problems = self._problems + [f"{key}: nothing in the model takes it" for key in unexpected]
        if problems:
            raise ValueError(
                f"expected an adapter that fits this model, got {self._file.folder} (differences: "
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

    def _missing(self, names: Iterable[str], filed: Collection[str], kind: str) -> None:
        """Note what the model has of a kind and the file does not."""
        missing = (name for name in names if name not in filed)
        self._problems.extend(f"{name}: {kind} in the model, none in the file" for name in missing)

    def _misfit(self, name: str, problem: str, prefix: str) -> None:
        """One difference in place of one for each of the tensors whose keys begin so."""
        self._problems.append(f"{name}: {problem}")
        self._explained |= {key for key in self._tensors if key.startswith(prefix)}

    def _place(self, name: str, place: Place, problem: str | None) -> None:
        if problem is not None:
            self._misfit(name, problem, adapter_key(name, ""))
            return
        layer = place.make(torch.device("meta"), torch.float32)
        for part in layer.adapter_params():
            self._compare(adapter_key(name, part), tuple(layer.get_parameter(part).shape))

    def _prompt(self, name: str, shape: tuple[int, ...] | None, problem: str | None) -> None:
        if problem is None and shape is not None:
            self._compare(prompt_key(name), shape)
        else:
            self._misfit(name, str(problem), prompt_key(name))

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
