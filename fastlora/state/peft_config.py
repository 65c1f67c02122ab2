"""``adapter_config.json`` as PEFT writes it: what of it we understand, and nothing silently ignored."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastlora.nn import LoRAModule
from fastlora.nn.lora.start import has_start
from fastlora.nn.settings import LoRASettings

_UNDERSTOOD = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save",
    "peft_type", "r", "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
# say where an adapter came from or where it sits, which its tensors' names say too
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
    # of transformers' Conv1D, which is refused by its type; PEFT ignores it elsewhere
    "fan_in_fan_out",
}  # fmt: skip
# what else PEFT's LoRA may come with, and why it is no LoRA as we compute it
_REASONS = {
    "alora_invocation_tokens": "acts on some tokens only",
    "arrow_config": "chooses among several adapters",
    "bias": "trains biases of the frozen layers",
    "init_lora_weights": "changes the frozen weights",
    "layer_replication": "is for a model with repeated layers",
    "lora_bias": "adds a bias to the update",
    "megatron_config": "is for Megatron's layers",
    "target_parameters": "adapts parameters that are no layer's",
    "trainable_token_indices": "trains rows of an embedding",
    "use_qalora": "pools the update's input",
}
# initialisations that leave the frozen weights alone; the others (PiSSA, OLoRA, LoftQ, …) change them
_HARMLESS_INIT = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """The part of PEFT's ``LoraConfig`` that decides what a loaded adapter computes.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value out of range, or a pattern that is no regular expression.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    by_peft: bool = False
    target_modules: str | tuple[str, ...] = ()
    weight_tying: bool = False
    # what patterns and targets call a layer, where the model has another name for it
    file_names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every value through the settings it leads to."""
        LoRASettings(self.rank, self.alpha, self.dropout, dora=self.dora)
        if not isinstance(self.rslora, bool):
            raise TypeError(f"expected use_rslora to be true or false, got {self.rslora!r}")
        for patterns in (self.rank_pattern, self.alpha_pattern):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"expected a regular expression, got the pattern {pattern!r}") from error
        for rank in self.rank_pattern.values():
            LoRASettings(rank=rank)
        for alpha in self.alpha_pattern.values():
            LoRASettings(alpha=alpha)

    def settings(self, name: str) -> LoRASettings:
        """What the module of this name gets; the first pattern that matches its end decides, as in PEFT."""
        filed = self.file_names.get(name, name)
        rank = _first_match(self.rank_pattern, filed, self.rank)
        alpha = _first_match(self.alpha_pattern, filed, self.alpha)
        return LoRASettings(rank, alpha, self.dropout, self.rslora, dora=self.dora)

    def targets(self, name: str) -> bool:
        """Whether ``target_modules`` means this module: as a regular expression, or the end of its name."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.target_modules)


def parse_config(raw: object) -> AdapterConfig:
    """Read PEFT's fields, refusing what would compute something else here.

    Raises:
        ValueError: Not a LoRA config, or one with settings we do not have; all are listed.
    """
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"expected peft_type 'LORA', got {kind!r}")
    unsupported = {
        name: value
        for name, value in raw.items()
        if value and name not in _UNDERSTOOD | _NEUTRAL and not _is_pefts_default(name, value)
    }
    if raw.get("bias", "none") != "none":
        unsupported["bias"] = raw["bias"]
    if raw.get("init_lora_weights", True) not in _HARMLESS_INIT:
        unsupported["init_lora_weights"] = raw["init_lora_weights"]
    if unsupported:
        told = [
            f"{name}={value!r}" + (f" ({_REASONS[name]})" if name in _REASONS else "")
            for name, value in unsupported.items()
        ]
        raise ValueError(f"expected plain LoRA, got {', '.join(told)}; convert the adapter with PEFT first")
    targets = raw.get("target_modules") or ()
    try:
        return AdapterConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout") or 0.0,
            rslora=raw.get("use_rslora", False),
            dora=raw.get("use_dora", False),
            rank_pattern=dict(raw.get("rank_pattern") or {}),
            alpha_pattern=dict(raw.get("alpha_pattern") or {}),
            modules_to_save=tuple(map(str, raw.get("modules_to_save") or ())),
            # PEFT always writes this field, we never do
            by_peft="auto_mapping" in raw,
            target_modules=targets if isinstance(targets, str) else tuple(map(str, targets)),
            weight_tying=bool(raw.get("ensure_weight_tying")),
        )
    except KeyError as error:
        raise ValueError(f"expected the field {error}, got none") from error
    except TypeError as error:
        raise ValueError(str(error)) from error


def _is_pefts_default(name: str, value: object) -> bool:
    """Whether the PEFT that is installed, if one is, knows this field and has this value for it."""
    try:
        from peft import LoraConfig
    except ImportError:
        return False
    known = LoraConfig.__dataclass_fields__.get(name)
    return known is not None and known.default == value


def build_config(
    layers: Mapping[str, LoRAModule], names: Iterable[str], whole: Iterable[str], base_model: str | None
) -> dict[str, Any]:
    """The JSON that makes PEFT build the same layers.

    Args:
        layers: LoRA layers by name.
        names: Every module name of the model, to keep targets from matching others too.
        whole: Names of modules saved whole.
        base_model: Where the frozen model comes from, if known.

    Raises:
        ValueError: Some layers use rank-stabilised scaling, or DoRA, and some do not; PEFT has one flag for
            all.
    """
    for flag in ("rslora", "dora"):
        if len({getattr(layer, flag) for layer in layers.values()}) > 1:
            raise ValueError(
                f"expected {flag} on all layers or on none, got both; PEFT's format has one flag for all, "
                "so save them from two models"
            )
    settings = {name: file_settings(layer) for name, layer in layers.items()}
    first = next(iter(settings.values()))
    rank = _most_common(entry.rank for entry in settings.values())
    alpha = _most_common(entry.alpha for entry in settings.values())
    # an embedding has none
    dropouts = [layer.lora_dropout for layer in layers.values() if layer._layout.drops]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _integral(alpha),
        "lora_dropout": _most_common(dropouts or [0.0]),
        "use_rslora": first.rslora,
        # anchored, as PEFT documents it for one module out of several whose names end alike
        "rank_pattern": {f"^{n}": entry.rank for n, entry in settings.items() if entry.rank != rank},
        "alpha_pattern": {f"^{n}": _integral(e.alpha) for n, e in settings.items() if e.alpha != alpha},
        "target_modules": _targets(list(layers), names),
        "modules_to_save": list(whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": first.dora,
        "task_type": None,
    }


def file_settings(layer: LoRAModule) -> LoRASettings:
    """What the adapter in a file is, with the layer's scaling; its dtype is that of its tensors."""
    settings = replace(layer._settings(), adapter_dtype=None)
    if not has_start(layer):
        return settings
    doubled = math.sqrt(2) if settings.rslora else 2
    return replace(settings, rank=2 * settings.rank, alpha=doubled * settings.alpha)


def _targets(targets: list[str], names: Iterable[str]) -> list[str] | str:
    """Whole names, or a regular expression where PEFT would read one as the end of another module's name."""
    others = set(names) - set(targets)
    if any(other.endswith(f".{target}") for target in targets for other in others):
        return "|".join(map(re.escape, targets))
    return targets


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _integral(value: float) -> float | int:
    return int(value) if value.is_integer() else value
