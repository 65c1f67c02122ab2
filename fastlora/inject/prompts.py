"""Put learned prompts into a vision transformer or a text model, and take them out again."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from fastlora.anatomy.all_linear import tell_frozen_head
from fastlora.anatomy.names import Model, named_modules, prompt_modules, unwrap
from fastlora.anatomy.targets import left_out_names
from fastlora.inject.places import first_difference
from fastlora.inject.trained import forget_tuners, train_only_tuners
from fastlora.nn.prompts.hosts import Host, VisualHost, as_host, find_host
from fastlora.nn.prompts.modules import PROMPTS, PromptKind, PromptModule
from fastlora.nn.settings import PromptInit, PromptSettings
from fastlora.ops.weights.repacking import keep_as_stored


def apply_prompts(
    model: Model,
    *,
    num_tokens: int = 10,
    deep: bool = False,
    dropout: float = 0.0,
    init: PromptInit = "auto",
    modules_to_save: Collection[str] | None = None,
) -> Model:
    """Let a frozen transformer read learned tokens beside its input, and train nothing but these.

    A vision transformer gets visual prompts (Jia et al., https://arxiv.org/abs/2203.12119) between its class
    or register tokens and its patches; a text model of Hugging Face soft prompts (Lester et al.,
    https://arxiv.org/abs/2104.08691) in its embedded input: in an encoder after the first token, in a decoder
    before the text. The model keeps its signature and its output shapes, hidden states included; only
    attention maps show the prompts. Changes the model in place; what LoRA layers and adapters it has train
    on. What changed is logged at INFO on the logger ``fastlora`` and told by
    :func:`fastlora.adapter_summary`. Compile the model afterwards.

    Args:
        model: A ``VisionTransformer`` of torchvision or timm; a Hugging Face ViT, DeiT or DINOv2, a text
            encoder with absolute positions (BERT, RoBERTa) or a decoder with rotary ones (Llama); or a model
            around one of these.
        num_tokens: Number of prompts, in every block if ``deep``.
        deep: Whether every block has prompts of its own; vision only. Shallow prompts enter the first block,
            and timm's ``forward_intermediates`` refuses them.
        dropout: Probability in [0, 1] of zeroing an element of the prompts while training.
        init: ``"auto"``: visual prompts as ``"uniform"``, soft ones as ``"vocabulary"``. ``"uniform"``: from
            ±√(6 / (3 · patch area + hidden)) for vision, over the vocabulary's own spread for text.
            ``"vocabulary"``: different embeddings drawn from all of the vocabulary.
        modules_to_save: Names of modules to train whole, a new classification head, say.

    Returns:
        The same model, with the prompts as ``prompts`` in the transformer itself.

    Raises:
        TypeError: A model that takes no prompts, or a wrong argument type.
        ValueError: A setting out of range, a name that matches nothing, a model with prompts already, or one
            with several transformers. The model is unchanged after any error.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)
        >>> model = apply_prompts(model, num_tokens=5, deep=True, modules_to_save=["head"])
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        [('heads.head.weight', (3, 8)), ('heads.head.bias', (3,)), ('prompts.tokens', (2, 5, 8))]
    """
    settings = PromptSettings(num_tokens, deep, dropout, init)
    root = unwrap(model)
    modules = named_modules(root)
    prompted = [name for name, module in modules.items() if isinstance(module, PromptModule)]
    if prompted:
        raise ValueError(
            f"expected a model without prompts, got one with {prompted[0]!r}; take them out with "
            "fastlora.remove_prompts first"
        )
    host = find_host(modules)
    host.check(settings)
    _, whole = left_out_names(root, None, modules_to_save)
    keep_as_stored(root)
    _put_prompts(host, settings, host.draw(settings))
    train_only_tuners(root, whole)
    tell_frozen_head(root)
    return model


def remove_prompts(model: Model) -> Model:
    """Take the prompts out: every module is the one it was before, without a hook of ours.

    Args:
        model: A model with prompts, changed in place. Its parameters stay frozen or trainable as they are.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no prompts.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> model = apply_prompts(VisionTransformer(8, 4, 2, 2, 8, 16))
        >>> any("prompts" in name for name in remove_prompts(model).state_dict())
        False
    """
    root = unwrap(model)
    parents = [m for m in root.modules() if isinstance(m._modules.get(PROMPTS), PromptModule)]
    if not parents:
        raise ValueError(
            f"expected a model with prompts, got {type(root).__name__} without any; "
            "add them with fastlora.apply_prompts"
        )
    for parent in parents:
        prompts = parent._modules.pop(PROMPTS)
        assert isinstance(prompts, PromptModule)
        prompts.uninstall(parent)
    forget_tuners(root)
    return model


@dataclass(frozen=True)
class PromptPlace:
    """The prompts of one transformer, made or to be made.

    Attributes:
        kind: Whether they stand among patches or among words.
        hidden_size: Width of a token.
        position: How many entries of every sequence stay before them.
        settings: How many tokens there are, whether in every block, their dropout and start.
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
        return first_difference(self._decisive(), other._decisive())

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Shape ``[layers, num_tokens, hidden]`` of the tokens in this transformer, which they fit."""
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
        tokens = {"num_tokens": self.settings.num_tokens, "deep": self.settings.deep}
        return {"kind": self.kind, "hidden_size": self.hidden_size, "position": self.position, **tokens}


def _put_prompts(host: Host, settings: PromptSettings, tokens: Tensor) -> None:
    """Give a transformer prompts, all checked before; ``train_only_tuners`` decides what trains."""
    prompts = host.make(settings, tokens).train(host.module.training)
    host.module.register_module(PROMPTS, prompts)
    host.install(prompts)


def add_prompts(modules: Mapping[str, nn.Module], places: Mapping[str, PromptPlace]) -> None:
    """Give every transformer its prompts, all checked before, with values to be filled in."""
    for name, place in places.items():
        host = find_host({"": modules[host_name(name)]})
        _put_prompts(host, place.settings, torch.zeros(host.shape(place.settings)))


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
