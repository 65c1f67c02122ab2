"""Learned prompt tokens: Parameters, and the hooks that put them into a model and take them out again."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from fastlora.nn.prompts.sequence import behind_padding, insert_after, strip_after, strip_output
from fastlora.nn.settings import PromptSettings
from fastlora.nn.tuner import TunerModule

Call = tuple[tuple[Any, ...], dict[str, Any]]
PromptKind = Literal["visual", "soft"]
PROMPTS = "prompts"
# what a text model takes beside every token, and soft prompts lengthen
# of Hugging Face's forwards, before transformers 5.24 and since
CACHES = ("past_key_values", "cache")
_EXTENDED = ("attention_mask", "position_ids", "token_type_ids")
# what in timm shows or makes the model end before its last block, where shallow prompts are stripped
_WITHOUT_LAST_BLOCK = ("forward_intermediates", "prune_intermediate_layers")


class PromptModule(TunerModule):
    """What visual and soft prompts share: the tokens, their dropout, their state dict and their hooks.

    Args:
        settings: What was asked for.
        tokens: ``[layers, num_tokens, hidden]``, the values to start from.
        position: How many entries of every sequence stay before the prompts.

    Attributes:
        tokens: ``[layers, num_tokens, hidden]``, trainable; cast to the activations' dtype where used.
        settings: What was asked for; ``apply_prompts(model, **vars(settings))`` makes such prompts.
        position: How many entries of every sequence stay before the prompts.
        kind: Whether they stand among patches or among words.
    """

    tokens: nn.Parameter
    kind: PromptKind

    def __init__(self, settings: PromptSettings, tokens: Tensor, *, position: int) -> None:
        """See the class."""
        super().__init__()
        self.settings = settings
        self.position = position
        self.tokens = nn.Parameter(tokens)
        # handles, not only hooks: unpickling one keeps torch from giving its number to another hook
        self._handles: list[RemovableHandle] = []

    def adapter_params(self) -> list[str]:
        """Names of this module's own trainable parameters."""
        return ["tokens"]

    def forward(self, x: Tensor, layer: int = 0) -> Tensor:
        """``[batch, length, hidden]`` to ``[batch, length + num_tokens, hidden]``."""
        tokens = self.tokens[layer].to(x).expand(x.shape[0], -1, -1)
        tokens = F.dropout(tokens, self.settings.dropout, self.training)
        return insert_after(x, tokens, self.position)

    def uninstall(self, host: nn.Module) -> None:
        """Take every trace of this module, but the module itself, out of its host."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.settings).items())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, _ = args
        super()._load_from_state_dict(state_dict, prefix, *args)
        # the plain model's state dict is complete without prompts, unless there is nothing here to keep
        if not self.tokens.is_meta:
            missing[:] = [key for key in missing if key != prefix + "tokens"]


class VisualPrompts(PromptModule):
    """Learned tokens between the prefix (class, register) tokens and the patches of a vision transformer.

    Visual prompt tuning: Jia et al., https://arxiv.org/abs/2203.12119. Deep prompts are new before every
    block and gone after it. Shallow ones go in before the first block, pass through all, and are gone after
    the last. Nothing before or after the blocks sees them, and they get no position embedding.

    Args:
        settings: What was asked for.
        tokens: ``[blocks, num_tokens, hidden]``, or ``[1, num_tokens, hidden]`` for shallow prompts.
        position: Number of prefix tokens.

    Example:
        >>> prompts = VisualPrompts(PromptSettings(num_tokens=5), torch.zeros(1, 5, 8), position=1)
        >>> prompts(torch.zeros(2, 17, 8)).shape
        torch.Size([2, 22, 8])
    """

    kind: PromptKind = "visual"

    def install(self, host: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Hook into the blocks, and into the host, whose output may hold hidden states of every block."""
        last = len(blocks) - 1
        for index, block in enumerate(blocks):
            if self.settings.deep or index == 0:
                hook = functools.partial(self._insert, index)
                self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
            if self.settings.deep or index == last:
                # first, so that a hook which collects hidden states never meets a prompt
                self._handles.append(block.register_forward_hook(self._strip, prepend=True))
        self._handles.append(host.register_forward_hook(self._strip_hidden_states, prepend=True))
        for name in _WITHOUT_LAST_BLOCK:
            if hasattr(host, name) and not self.settings.deep:
                setattr(host, name, _refuse_without_last_block)

    def uninstall(self, host: nn.Module) -> None:
        """Take every trace of this module, but the module itself, out of its host."""
        super().uninstall(host)
        for name in _WITHOUT_LAST_BLOCK:
            if vars(host).get(name) is _refuse_without_last_block:
                delattr(host, name)

    def _insert(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            raise ValueError(
                f"expected {type(block).__name__} to be called with a tensor [batch, length, hidden], got "
                f"{_kind(args)}; visual prompts know no other blocks"
            )
        masks = [*args[1:], *(value for value in kwargs.values() if isinstance(value, Tensor))]
        if kwargs.get("is_causal") or not all(mask is None or isinstance(mask, bool) for mask in masks):
            raise ValueError(
                "expected no attention mask, got one: it would have no entries for the prompts; call the "
                "model without it, or fastlora.remove_prompts first"
            )
        return (self(args[0], layer), *args[1:]), kwargs

    def _strip(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._strip(block, args, output[0]), *output[1:])
        return strip_after(output, self.settings.num_tokens, self.position)

    def _strip_hidden_states(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return output
        length = output[0].shape[1] + self.settings.num_tokens
        return strip_output(output, self.settings.num_tokens, self.position, length)


class SoftPrompts(PromptModule):
    """Learned tokens in the embedded input of a Hugging Face text model.

    Prompt tuning: Lester et al., https://arxiv.org/abs/2104.08691. In an encoder the prompts stand after the
    first token, so that the class token stays where poolers look for it. The text keeps its own absolute
    positions: every prompt has the first one, a constant that training absorbs. In a decoder they stand
    before the text, whose rotary positions move on by as many.

    Args:
        settings: What was asked for.
        tokens: ``[1, num_tokens, hidden]``.
        argument_names: The names of the model's positional arguments, in order.
        positions: Number of absolute positions of an encoder; None makes it a decoder.
        padding_idx: The position of a padding token, which real ones follow (RoBERTa); None counts from 0.

    Example:
        >>> names = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
        >>> prompts = SoftPrompts(PromptSettings(num_tokens=5), torch.zeros(1, 5, 8), argument_names=names)
        >>> prompts(torch.zeros(2, 7, 8)).shape
        torch.Size([2, 12, 8])
    """

    kind: PromptKind = "soft"

    def __init__(
        self,
        settings: PromptSettings,
        tokens: Tensor,
        *,
        argument_names: Sequence[str],
        positions: int | None = None,
        padding_idx: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__(settings, tokens, position=0 if positions is None else 1)
        self.argument_names = tuple(argument_names)
        self.positions = positions
        self.padding_idx = padding_idx

    @property
    def causal(self) -> bool:
        """Whether the model is a decoder."""
        return self.positions is None

    def install(self, host: nn.Module) -> None:
        """Hook into the model that embeds the text."""
        self._handles.append(host.register_forward_pre_hook(self._insert, with_kwargs=True))
        self._handles.append(host.register_forward_hook(self._strip, with_kwargs=True, prepend=True))

    def _insert(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) is (embedded is None) or len(args) > len(self.argument_names):
            # a mistake that the model reports itself
            return args, kwargs
        text: Any = embedded if ids is None else ids
        self._refuse(given, text.shape[1])
        if embedded is None:
            embedded = host.get_input_embeddings()(ids)  # type: ignore[operator]
        given["position_ids"] = self._position_ids(text, ids, given)
        given["input_ids"], given["inputs_embeds"] = None, self(embedded)
        for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
            if given.get(name) is not None:
                given[name] = self._extend(given[name], value)
        if self.causal:
            given["use_cache"] = False
        return (), given

    def _strip(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        length = kwargs["inputs_embeds"].shape[1]
        return strip_output(output, self.settings.num_tokens, self.position, length)

    def _extend(self, entries: Tensor, value: int) -> Tensor:
        new = entries.new_full((entries.shape[0], self.settings.num_tokens), value)
        return insert_after(entries, new, self.position)

    def _position_ids(self, text: Tensor, ids: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
        tokens, position_ids = self.settings.num_tokens, given.get("position_ids")
        if self.causal:
            if position_ids is None:
                position_ids = behind_padding(given.get("attention_mask"))
            if position_ids is None:
                return None
            own = torch.arange(tokens, dtype=position_ids.dtype, device=position_ids.device)
            return insert_after(position_ids + tokens, own.expand(position_ids.shape[0], -1), 0)
        first = 0 if self.padding_idx is None else self.padding_idx + 1
        if position_ids is None:
            position_ids = self._own_positions(text, ids, first)
        return self._extend(position_ids, first)

    def _own_positions(self, text: Tensor, ids: Tensor | None, first: int) -> Tensor:
        assert self.positions is not None
        length, limit = text.shape[1], self.positions - first
        if length > limit:
            raise ValueError(
                f"expected at most {limit} tokens of text, as the model has positions for, got {length}; "
                "truncate the text (the prompts need no position)"
            )
        if self.padding_idx is None or ids is None:
            return torch.arange(first, first + length, device=text.device).unsqueeze(0)
        real = ids.ne(self.padding_idx).long()
        return real.cumsum(1) * real + self.padding_idx

    def _refuse(self, given: Mapping[str, Any], length: int) -> None:
        cached = [name for name in CACHES if given.get(name) is not None]
        if cached or (self.causal and given.get("use_cache")):
            raise ValueError(
                "expected a call without a key-value cache, got one: cached keys would hold the prompts a "
                "second time; call generate(..., use_cache=False)"
            )
        for name in _EXTENDED:
            value = given.get(name)
            if value is not None and not (isinstance(value, Tensor) and value.dim() == 2):
                raise ValueError(
                    f"expected {name} as [batch, length] or None, got {_kind([value])}; "
                    "soft prompts can extend no other kind"
                )
        for name, value in given.items():
            per_token = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == length
            if per_token and name not in (*_EXTENDED, "input_ids", "inputs_embeds"):
                raise ValueError(
                    f"expected no {name}, got {_kind([value])}: it has no entry for a prompt; leave it out"
                )


def _refuse_without_last_block(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"expected deep prompts for {' and '.join(_WITHOUT_LAST_BLOCK)}, got shallow ones, which stand among "
        "the patches until the last block; use fastlora.apply_prompts(model, deep=True), or forward_features"
    )


def _kind(args: Sequence[Any]) -> str:
    if not args:
        return "no positional argument"
    shape = f" of shape {tuple(args[0].shape)}" if isinstance(args[0], Tensor) else ""
    return type(args[0]).__name__ + shape
