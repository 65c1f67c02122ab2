"""Which part of a model takes prompts, recognised by its structure, whatever library it came from."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nn.prompts.modules import CACHES, PROMPTS, PromptModule, SoftPrompts, VisualPrompts
from fastlora.nn.settings import PromptSettings

_SUPPORTED = (
    "a VisionTransformer of torchvision or timm, a ViT, DeiT or DINOv2 of Hugging Face, one of its text "
    "encoders with absolute positions (BERT, RoBERTa, DistilBERT, MiniLM), or one of its decoders with "
    "rotary positions (Llama, Mistral, Qwen), alone or inside another module"
)
# words whose spread stands for the vocabulary's
_SAMPLED_WORDS = 4096


@dataclass(frozen=True)
class VisualHost:
    """A vision transformer.

    Attributes:
        module: The module that owns the blocks and becomes the prompts' parent.
        blocks: What a forward pass calls one after the other with ``[batch, prefix + patches, hidden]``.
        hidden_size: Size of the last dimension there.
        prefix: Number of class, distillation and register tokens before the patches.
        patch_size: Height and width of a patch in pixels, if known.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    hidden_size: int
    prefix: int
    patch_size: tuple[int, ...] | None

    def check(self, settings: PromptSettings) -> None:
        """Refuse what an image can't have, and blocks that a hook can't tell apart."""
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(
                f"expected {type(self.module).__name__} with blocks that differ, got {len(self.blocks)} "
                f"places for {len(set(self.blocks))} of them; build the model without sharing"
            )
        if settings.init == "vocabulary":
            raise ValueError(
                f"expected init='uniform' or 'auto' for {type(self.module).__name__}, got 'vocabulary'; "
                "a vision transformer has no vocabulary"
            )

    def shape(self, settings: PromptSettings) -> tuple[int, int, int]:
        """Shape ``[layers, num_tokens, hidden]`` of the tokens."""
        return len(self.blocks) if settings.deep else 1, settings.num_tokens, self.hidden_size

    def draw(self, settings: PromptSettings) -> Tensor:
        """Tokens drawn as in the paper: uniformly from ±√(6 / (3 · patch area + hidden))."""
        # the Xavier bound of the patch embedding; without its patch size, of a square layer
        fan_in = self.hidden_size if self.patch_size is None else 3 * math.prod(self.patch_size)
        bound = math.sqrt(6.0 / (fan_in + self.hidden_size))
        return torch.empty(self.shape(settings)).uniform_(-bound, bound)

    def make(self, settings: PromptSettings, tokens: Tensor) -> VisualPrompts:
        """Prompts of these values."""
        return VisualPrompts(settings, _like(self.module, tokens), position=self.prefix)

    def install(self, prompts: PromptModule) -> None:
        """Hook the prompts in."""
        assert isinstance(prompts, VisualPrompts)
        prompts.install(self.module, self.blocks)


@dataclass(frozen=True)
class TextHost:
    """A text model of Hugging Face.

    Attributes:
        module: The module that embeds the text and becomes the prompts' parent.
        embedding: The model's embedding of its vocabulary.
        position_embedding: The absolute positions of an encoder, None for a decoder with rotary ones.
    """

    module: nn.Module
    embedding: nn.Embedding
    position_embedding: nn.Embedding | None

    def check(self, settings: PromptSettings) -> None:
        """Refuse deep prompts, and more prompts than there are words to start from."""
        if settings.deep:
            raise ValueError(
                f"expected deep=False for {type(self.module).__name__}, got True; soft prompts stand in the "
                "embedded input only"
            )
        words = len(self._words())
        if settings.init != "uniform" and settings.num_tokens > words:
            raise ValueError(
                f"expected num_tokens <= {words}, the size of the vocabulary, got {settings.num_tokens}; "
                "use init='uniform' for more"
            )

    def shape(self, settings: PromptSettings) -> tuple[int, int, int]:
        """Shape ``[layers, num_tokens, hidden]`` of the tokens."""
        return 1, settings.num_tokens, self.embedding.embedding_dim

    def draw(self, settings: PromptSettings) -> Tensor:
        """Tokens drawn from the vocabulary without repetition, or uniformly with its spread."""
        words = self._words()
        if settings.init == "uniform":
            bound = math.sqrt(3.0) * float(self._embedded(words[:_SAMPLED_WORDS]).float().std())
            return torch.empty(self.shape(settings)).uniform_(-bound, bound)
        chosen = words[torch.randperm(len(words))[: settings.num_tokens]]
        return self._embedded(chosen).unsqueeze(0)

    def make(self, settings: PromptSettings, tokens: Tensor) -> SoftPrompts:
        """Prompts of these values."""
        positions = self.position_embedding
        return SoftPrompts(
            settings,
            _like(self.module, tokens),
            argument_names=_argument_names(self.module),
            positions=None if positions is None else positions.num_embeddings,
            padding_idx=None if positions is None else positions.padding_idx,
        )

    def install(self, prompts: PromptModule) -> None:
        """Hook the prompts in."""
        assert isinstance(prompts, SoftPrompts)
        prompts.install(self.module)

    @torch.no_grad()
    def _embedded(self, words: Tensor) -> Tensor:
        # called, not looked up: some models scale what they embed
        embedded: Tensor = self.embedding(words.to(self.embedding.weight.device))
        return embedded

    def _words(self) -> Tensor:
        # a padding row holds zeros
        rows = torch.arange(self.embedding.num_embeddings)
        return rows[rows != (-1 if self.embedding.padding_idx is None else self.embedding.padding_idx)]


Host = VisualHost | TextHost


def find_host(modules: Mapping[str, nn.Module]) -> Host:
    """The one module, among these by name, that takes prompts.

    Raises:
        TypeError: There is none.
        ValueError: There are several, or the one there has no values yet.
    """
    found: dict[int, tuple[str, Host]] = {}
    for name, module in modules.items():
        candidate = as_host(module)
        if candidate is not None:
            found.setdefault(id(module), (name, candidate))
    if not found:
        kind = type(next(iter(modules.values()))).__name__
        raise TypeError(f"expected {_SUPPORTED}; got {kind}; use LoRA or adapters there")
    if len(found) > 1:
        names = ", ".join(repr(name) for name, _ in found.values())
        raise ValueError(
            f"expected one transformer that takes prompts, got {len(found)}: {names}; give one of them"
        )
    ((name, host),) = found.values()
    _check_ready(host.module)
    return host


def as_host(module: nn.Module) -> Host | None:
    """This module as one that takes prompts, or has some, if it does."""
    hosts: Iterator[Host | None] = (recognise(module) for recognise in _RECOGNISERS)
    return next((host for host in hosts if host is not None), None)


def _check_ready(module: nn.Module) -> None:
    if hasattr(module, PROMPTS):
        raise ValueError(
            f"expected {type(module).__name__} to have no attribute {PROMPTS!r}, got one; rename it, "
            "the learned tokens need the name"
        )
    if _reference(module).is_meta:
        raise ValueError(
            f"expected {type(module).__name__} to hold values, got meta tensors; load the model's weights "
            "before adding prompts"
        )


def _torchvision(module: nn.Module) -> VisualHost | None:
    blocks = _path(module, "encoder.layers")
    if not isinstance(blocks, nn.Sequential) or not _all(module, "class_token", "conv_proj", "hidden_dim"):
        return None
    patch: Any = module.patch_size
    return VisualHost(module, list(blocks), _integer(module.hidden_dim), 1, (patch, patch))


def _timm(module: nn.Module) -> VisualHost | None:
    blocks = getattr(module, "blocks", None)
    needed = ("_pos_embed", "patch_embed", "num_prefix_tokens", "embed_dim")
    if not isinstance(blocks, nn.Sequential) or not _all(module, *needed) or _has_relative_positions(module):
        return None
    prefix, size = _integer(module.num_prefix_tokens), _integer(module.embed_dim)
    return VisualHost(module, list(blocks), size, prefix, _pair(_path(module, "patch_embed.patch_size")))


def _hugging_face_vision(module: nn.Module) -> VisualHost | None:
    embeddings = getattr(module, "embeddings", None)
    blocks = _path(module, "layers") or _path(module, "encoder.layer")
    # the backbones for detectors read every hidden state themselves
    unfit = hasattr(module, "stage_names") or _has_relative_positions(module)
    if embeddings is None or not isinstance(blocks, nn.ModuleList) or unfit:
        return None
    if not _all(embeddings, "cls_token", "patch_embeddings"):
        return None
    tokens = [
        getattr(embeddings, kind, None) for kind in ("cls_token", "distillation_token", "register_tokens")
    ]
    prefix = sum(token.shape[1] for token in tokens if isinstance(token, Tensor))
    patch = _pair(_path(module, "config.patch_size"))
    return VisualHost(module, list(blocks), _integer(_path(module, "config.hidden_size")), prefix, patch)


def _encoder(module: nn.Module) -> TextHost | None:
    words = _path(module, "embeddings.word_embeddings")
    positions = _path(module, "embeddings.position_embeddings")
    if not isinstance(words, nn.Embedding) or not isinstance(positions, nn.Embedding):
        return None
    # ESM's token dropout scales embeddings, but not those given as inputs_embeds
    unfit = _path(module, "config.is_decoder") or _path(module, "embeddings.token_dropout")
    if unfit or not _takes(module, "inputs_embeds", "position_ids"):
        return None
    return TextHost(module, words, positions)


def _decoder(module: nn.Module) -> TextHost | None:
    words = getattr(module, "embed_tokens", None)
    rotary = _all(module, "rotary_emb", "layers", "norm") and not _path(module, "config.is_encoder_decoder")
    takes = any(_takes(module, "inputs_embeds", "position_ids", "use_cache", name) for name in CACHES)
    return TextHost(module, words, None) if isinstance(words, nn.Embedding) and rotary and takes else None


_RECOGNISERS: tuple[Callable[[nn.Module], Host | None], ...] = (
    _torchvision,
    _timm,
    _hugging_face_vision,
    _encoder,
    _decoder,
)


def _reference(module: nn.Module) -> Tensor:
    """The parameter whose device and dtype the prompts follow."""
    return next(p for p in module.parameters() if p.is_floating_point())


def _like(module: nn.Module, tokens: Tensor) -> Tensor:
    reference = _reference(module)
    # as for LoRA: float32 beside 16-bit weights
    dtype = torch.float32 if reference.dtype.itemsize < 4 else reference.dtype
    return tokens.to(device=reference.device, dtype=dtype)


def _argument_names(module: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters
    return [name for name, parameter in parameters.items() if parameter.kind in kinds]


def _takes(module: nn.Module, *names: str) -> bool:
    return {"input_ids", "attention_mask", *names} <= set(_argument_names(module))


def _has_relative_positions(module: nn.Module) -> bool:
    """Whether attention has a table or a rotation that fits the patches only."""
    kinds = ("relative_position", "rel_pos", "rope", "rotary")
    return any(part.startswith(kinds) for name, _ in module.named_modules() for part in name.split("."))


def _path(module: object, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _all(module: object, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _integer(value: object) -> int:
    assert isinstance(value, int)
    return value


def _pair(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    return (value, value) if isinstance(value, int) else tuple(value)
