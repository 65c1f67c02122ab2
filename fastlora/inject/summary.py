"""What an adapted model consists of, in one line."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from fastlora._core.words import first_few
from fastlora.anatomy.names import added, clean_name, tuner_parameters, unwrap
from fastlora.nn.prompts.modules import PromptModule

_LISTED = 4


@dataclass(frozen=True)
class AdapterSummary:
    """What :func:`adapter_summary` found; ``print`` it.

    Attributes:
        layers: How many LoRA layers there are of each kind, most frequent first. An attention is one layer.
        ranks: The ranks in use, ascending.
        also_trainable: Modules that train whole, a classification head, say.
        trainable_parameters: Number of scalars that train.
        total_parameters: Number of scalars altogether, what fastlora added included.
        merged: Whether any update is folded into its weight.
        adapters: How many bottleneck adapters there are.
        adapter_sizes: The widths of their bottlenecks, ascending.
        prompts: The prompts of every transformer that has some, each in a few words.
    """

    layers: dict[str, int]
    ranks: tuple[int, ...]
    also_trainable: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    merged: bool
    adapters: int = 0
    adapter_sizes: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def trainable_percent(self) -> float:
        """Share of the parameters that train, in percent."""
        return 100.0 * self.trainable_parameters / max(self.total_parameters, 1)

    def __str__(self) -> str:
        """One line for a log or a terminal."""
        kinds = " + ".join(f"{count} {kind}" for kind, count in self.layers.items())
        ranks = ", ".join(map(str, self.ranks))
        merged = " (merged)" if self.merged else ""
        parts = [f"LoRA rank {ranks} on {kinds}{merged}"] if kinds else []
        if self.adapters:
            sizes = ", ".join(map(str, self.adapter_sizes))
            parts.append(f"{self.adapters} bottleneck adapters of size {sizes}")
        text = " and ".join([*parts, *self.prompts]) or "no LoRA layers"
        if (parts or self.prompts) and self.also_trainable:
            text += f"; also training {', '.join(first_few(self.also_trainable, _LISTED))}"
        return (
            f"{text}; {self.trainable_parameters:,} of {self.total_parameters:,} parameters "
            f"train ({self.trainable_percent:.2f} %)"
        )


def adapter_summary(model: nn.Module) -> AdapterSummary:
    """Count a model's LoRA layers, bottleneck adapters, prompts and parameters.

    Args:
        model: Any model, adapted or not; only looked at.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Example:
        >>> import fastlora
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> print(fastlora.adapter_summary(fastlora.apply_lora(model, rank=2)))
        LoRA rank 2 on 2 LoRALinear; 84 of 262 parameters train (32.06 %)
    """
    model = unwrap(model)
    here = added(model)
    layers = here.layers.values()
    adapters = [place.adapter for place in here.places.values()]
    ours = set(map(id, tuner_parameters(model)))
    parameters = list(model.named_parameters())
    others = [clean_name(name) for name, p in parameters if p.requires_grad and id(p) not in ours]
    return AdapterSummary(
        layers=dict(Counter(type(layer).__name__ for layer in layers).most_common()),
        ranks=tuple(sorted({layer.rank for layer in layers})),
        also_trainable=tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in others)),
        trainable_parameters=sum(p.numel() for _, p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for _, p in parameters),
        merged=any(layer.merged for layer in layers),
        adapters=len(adapters),
        adapter_sizes=tuple(sorted({adapter.adapter_size for adapter in adapters})),
        prompts=tuple(_in_words(prompts) for prompts in here.prompts.values()),
    )


def _in_words(prompts: PromptModule) -> str:
    if prompts.kind == "soft":
        where = "in the embedded text"
    elif prompts.settings.deep:
        where = f"before {len(prompts.tokens)} blocks"
    else:
        where = "before the first block"
    return f"{prompts.settings.num_tokens} prompt tokens {where}"
