"""Which strategies are compared, with which of their options."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora._core.words import look_up
from fastlora.anatomy.stages import head as find_head
from fastlora.anatomy.stages import stages
from fastlora.transfer.strategies import Strategy, find_strategy
from fastlora_kernels.choose.quantised import Stored

# as the libraries call separate projections of query and value, and one of query, key and value
_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"))
_PACKED = ("qkv", "query_key_value", "c_attn")

# options of a strategy, and a remark for readers, maybe empty
Choice = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class CostSettings:
    """Sizes of what is added to a frozen model.

    Attributes:
        rank: Rank of every LoRA update.
        adapter_size: Width of every adapter's bottleneck.
        prompts: Number of prompt tokens.
        weight: How frozen weights of linear layers are stored: nf4, int8, fp8 or fp8-rows; None: in the
            model's dtype.
    """

    rank: int = 16
    adapter_size: int = 64
    prompts: int = 10
    weight: Stored | None = None


@dataclass(frozen=True)
class Row:
    """A strategy with some of its options.

    Attributes:
        name: Name of the strategy, and what is special about the options, if anything.
        strategy: The strategy that is applied.
        suffix: What follows the strategy's title, with the names of :class:`CostSettings` to fill in.
        choose: From a model and sizes to the strategy's options and a remark.
    """

    name: str
    strategy: Strategy
    suffix: str
    choose: Callable[[nn.Module, CostSettings], Choice]

    def title(self, settings: CostSettings) -> str:
        """What readers see: the strategy's title and the sizes."""
        return self.strategy.title + self.suffix.format(**vars(settings))

    def apply(self, model: nn.Module, settings: CostSettings, *, new_head: bool) -> str:
        """Choose what trains in a fresh model, in place.

        Args:
            model: The model, changed in place.
            settings: Sizes of what is added.
            new_head: Whether the model's head is new for the task, so that it trains beside what is added.

        Returns:
            A remark for readers, maybe empty.

        Raises:
            ValueError: The model can't have it.

        Example:
            >>> from torchvision.models import resnet18
            >>> model = resnet18()
            >>> find_row("fine_tuning").apply(model, CostSettings(), new_head=True)
            'trains layer4 and fc'
        """
        head, _ = find_head(model)
        options, remark = self.choose(model, settings)
        self.strategy.apply_to(model, head if new_head or not self.strategy.adds else None, **options)
        return remark


def find_row(name: str) -> Row:
    """A row by its name.

    Raises:
        ValueError: There is none; near names are listed first.
    """
    return look_up(name, ROWS, "a strategy")


def _plain(model: nn.Module, settings: CostSettings) -> Choice:
    return {}, ""


def _last(model: nn.Module, settings: CostSettings) -> Choice:
    name, head = find_head(model)
    return {}, "".join(f"trains {stage.name} and {name}" for stage in stages(model, head)[-1:])


def _lora(model: nn.Module, settings: CostSettings) -> Choice:
    return {"rank": settings.rank}, ""


def _attention(model: nn.Module, settings: CostSettings) -> Choice:
    """Query and value, or what has them in it."""

    def on(targets: Iterable[str]) -> dict[str, Any]:
        return {"rank": settings.rank, "target_modules": list(targets)}

    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for pair in _QUERY_AND_VALUE:
        if ends.issuperset(pair):
            return on(pair), f"{pair[0]} and {pair[1]} only"
    packed = [name for name in _PACKED if name in ends]
    if packed:
        return on(packed), f"{packed[0]} packs q, k and v into one layer, so k is in it"
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    if attentions:
        alone = sum(4 * settings.rank * attention.embed_dim for attention in attentions.values())
        return on(attentions), (
            "nn.MultiheadAttention packs q, k and v, so k and the output projection are in it; "
            f"q and v alone would be {alone:,} parameters"
        )
    raise ValueError(f"expected attention, got {type(model).__name__} without any that is recognised")


def _adapter(model: nn.Module, settings: CostSettings) -> Choice:
    return {"adapter_size": settings.adapter_size}, ""


def _prompt(deep: bool) -> Callable[[nn.Module, CostSettings], Choice]:
    return lambda model, settings: ({"num_tokens": settings.prompts, "deep": deep}, "")


ROWS: Mapping[str, Row] = {
    name: Row(name, find_strategy(strategy), suffix, choose)
    for name, strategy, suffix, choose in (
        ("full", "full", "", _plain),
        ("fine_tuning", "fine_tuning", "", _last),
        ("lora", "lora", " r={rank}, all layers", _lora),
        ("lora_attention", "lora", " r={rank}, attention", _attention),
        ("adapter", "adapter", ", {adapter_size} wide", _adapter),
        ("prompt_shallow", "prompt", ", {prompts} shallow", _prompt(deep=False)),
        ("prompt", "prompt", ", {prompts} deep", _prompt(deep=True)),
        ("feature_extraction", "feature_extraction", "", _plain),
    )
}
