"""The prompts of a transformer: what they are made from, checked, put in, and hooked in anew."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from fastlora.anatomy.names import named_modules, prompt_modules
from fastlora.nn.prompts.hosts import Host, VisualHost, as_host, find_host
from fastlora.nn.prompts.modules import PROMPTS, PromptKind, PromptModule
from fastlora.nn.prompts.settings import PromptSettings


@dataclass(frozen=True)
class PromptPlace:
    """The prompts of one transformer, made or to be made.

    Attributes:
        kind: Whether they stand among patches or among words.
        hidden_size: Width of a token.
        position: How many entries of every sequence stay before them.
        settings: The rest.
    """

    kind: PromptKind
    hidden_size: int
    position: int
    settings: PromptSettings

    @classmethod
    def of(cls, prompts: PromptModule) -> Self:
        """What prompts in a model were made from."""
        return cls(prompts.kind, prompts.tokens.shape[-1], prompts.position, prompts.settings)

    def difference(self, other: "PromptPlace") -> str | None:
        """What keeps prompts made for ``other`` from working here; dropout and init do not."""
        for name, mine in self._decisive().items():
            theirs = other._decisive()[name]
            if mine != theirs:
                return f"expected {name} {mine!r} as in the model, got {theirs!r}"
        return None

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Of the tokens in this transformer, which they fit."""
        return find_host({"": module}).shape(self.settings)

    def misfit(self, module: nn.Module) -> str | None:
        """What keeps such prompts from being put into this transformer, or None."""
        try:
            host = find_host({"": module})
            host.check(self.settings)
        except (TypeError, ValueError) as error:
            return str(error)
        tokens = torch.empty(host.shape(self.settings))
        return PromptPlace.of(host.make(self.settings, tokens)).difference(self)

    def _decisive(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "hidden_size": self.hidden_size,
            "position": self.position,
            "num_tokens": self.settings.num_tokens,
            "deep": self.settings.deep,
        }


def put_prompts(host: Host, settings: PromptSettings, tokens: Tensor) -> None:
    """Give a transformer prompts, all checked before; ``train_only_tuners`` decides what trains."""
    prompts = host.make(settings, tokens).train(host.module.training)
    host.module.register_module(PROMPTS, prompts)
    host.install(prompts)


def add_prompts(modules: Mapping[str, nn.Module], places: Mapping[str, PromptPlace]) -> None:
    """Give every transformer its prompts, all checked before, with values to be filled in."""
    for name, place in places.items():
        host = find_host({"": modules[host_name(name)]})
        put_prompts(host, place.settings, torch.zeros(host.shape(place.settings)))


def follow_blocks(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Hook prompts into the modules that stand in the place of blocks now."""
    modules, new = named_modules(model), set(replacements.values())
    for name, prompts in prompt_modules(model).items():
        host = as_host(modules[host_name(name)])
        if isinstance(host, VisualHost) and not new.isdisjoint(host.blocks):
            prompts.uninstall(host.module)
            host.install(prompts)


def host_name(prompts: str) -> str:
    """The transformer that prompts of this name are in."""
    return prompts.rpartition(".")[0]
