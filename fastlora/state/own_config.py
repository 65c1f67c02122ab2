"""``adapter_config.json`` in our own format, for models with more than LoRA, or in PEFT's, for LoRA alone."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_args

from fastlora._core.option_checks import check_count
from fastlora.inject.places import Place
from fastlora.inject.prompts import PromptPlace
from fastlora.nn.adapted import PLACEMENTS
from fastlora.nn.prompts.modules import PROMPTS, PromptKind
from fastlora.nn.settings import AdapterSettings, PromptSettings
from fastlora.state.peft_config import AdapterConfig, parse_config

_FORMAT, _VERSION = "fastlora", 1
_SETTINGS = {entry.name for entry in fields(AdapterSettings)} - {"reduction_factor"}
_PLACE_FIELDS = {"placement", "hidden_size", *_SETTINGS}
_PROMPT_SETTINGS = {entry.name for entry in fields(PromptSettings)}
_PROMPT_FIELDS = {"kind", "hidden_size", "position", *_PROMPT_SETTINGS}
Section = TypeVar("Section")


@dataclass(frozen=True)
class FileConfig:
    """What an adapter folder says that it holds; a kind that it does not hold is None or empty."""

    lora: AdapterConfig | None = None
    bottleneck: Mapping[str, Place] = field(default_factory=dict)
    prompts: Mapping[str, PromptPlace] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    @property
    def by_peft(self) -> bool:
        """Whether PEFT wrote it."""
        return self.lora is not None and self.lora.by_peft


def parse_file_config(raw: object) -> FileConfig:
    """Read our format or PEFT's, refusing what would compute something else here.

    Raises:
        ValueError: Another format, version or kind of adapter, or a setting that we do not have.
    """
    if not isinstance(raw, dict) or "format" not in raw:
        lora = parse_config(raw)
        return FileConfig(lora=lora, modules_to_save=lora.modules_to_save)
    given = (raw["format"], raw.get("format_version"))
    if given != (_FORMAT, _VERSION) or isinstance(given[1], bool):
        raise ValueError(
            f"expected format {_FORMAT!r} of version {_VERSION}, got {given[0]!r} of version {given[1]!r}; "
            "a newer fastlora may read it"
        )
    # a kind of adapter has a section of its own here and in build_file_config; null where there is none
    known = {"format", "format_version", "lora", "bottleneck", "prompts", "modules_to_save"}
    unknown = [name for name in raw if name not in known]
    if unknown:
        raise ValueError(
            f"expected LoRA layers, bottleneck adapters and prompts, got {', '.join(map(repr, unknown))} "
            "too; a newer fastlora may read it"
        )
    if not any(raw.get(kind) for kind in ("lora", "bottleneck", "prompts")):
        raise ValueError(
            "expected LoRA layers, bottleneck adapters or prompts, got none; save the adapter again"
        )
    return FileConfig(
        lora=_section("lora", parse_config, raw.get("lora")),
        bottleneck=_section("bottleneck", _parse_bottleneck, raw.get("bottleneck")) or {},
        prompts=_section("prompts", _parse_prompts, raw.get("prompts")) or {},
        modules_to_save=_parse_names(raw.get("modules_to_save")),
    )


def build_file_config(
    *,
    lora: dict[str, Any] | None,
    bottleneck: Mapping[str, Place],
    prompts: Mapping[str, PromptPlace],
    modules_to_save: list[str],
) -> dict[str, Any]:
    """The JSON of our format."""
    layers = {name: _build_place(place) for name, place in bottleneck.items()}
    modules = {name: _build_prompts(place) for name, place in prompts.items()}
    return {
        "format": _FORMAT,
        "format_version": _VERSION,
        "lora": lora,
        "bottleneck": {"layers": layers} if layers else None,
        "prompts": {"modules": modules} if modules else None,
        "modules_to_save": modules_to_save,
    }


def _section(name: str, parse: Callable[[object], Section], raw: object) -> Section | None:
    if raw is None:
        return None
    try:
        return parse(raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _parse_bottleneck(raw: object) -> dict[str, Place]:
    return {name: _parse_place(name, entry) for name, entry in _entries(raw, "layers").items()}


def _parse_prompts(raw: object) -> dict[str, PromptPlace]:
    return {name: _parse_prompt(name, entry) for name, entry in _entries(raw, "modules").items()}


def _entries(raw: object, key: str) -> dict[str, object]:
    if not isinstance(raw, dict) or set(raw) != {key} or not isinstance(raw[key], dict):
        raise ValueError(f"expected an object with {key!r}, got {_shown(raw)}; save the adapter again")
    entries: dict[str, object] = raw[key]
    return entries


def _entry(name: str, raw: object, kind: str, wanted: Collection[str]) -> dict[str, Any]:
    given = set(raw) if isinstance(raw, dict) else set()
    if not isinstance(raw, dict) or given != set(wanted):
        missing, extra = sorted(set(wanted) - given), sorted(given - set(wanted))
        raise ValueError(
            f"expected for {name!r} exactly the fields of {kind}, got {_shown(raw)} (missing: {missing}, "
            f"unknown: {extra}); save the adapter again, or read it with a newer fastlora"
        )
    return raw


def _parse_place(name: str, entry: object) -> Place:
    raw = _entry(name, entry, "an adapter", _PLACE_FIELDS)
    if raw["placement"] not in PLACEMENTS:
        raise ValueError(f"expected placement of {name!r} in {PLACEMENTS}, got {raw['placement']!r}")
    check_count("adapter_size", raw["adapter_size"], f"see {name!r}")
    return Place(
        placement=raw["placement"],
        hidden_size=check_count("hidden_size", raw["hidden_size"], f"see {name!r}"),
        settings=AdapterSettings(**{setting: raw[setting] for setting in _SETTINGS}),
    )


def _parse_prompt(name: str, entry: object) -> PromptPlace:
    raw = _entry(name, entry, "prompts", _PROMPT_FIELDS)
    if name.rpartition(".")[2] != PROMPTS:
        raise ValueError(f"expected a name that ends in {PROMPTS!r}, got {name!r}; save the adapter again")
    if raw["kind"] not in get_args(PromptKind):
        raise ValueError(f"expected kind of {name!r} in {get_args(PromptKind)}, got {raw['kind']!r}")
    position = raw["position"]
    if not isinstance(position, int) or isinstance(position, bool):
        raise TypeError(f"expected position of {name!r} to be an integer, got {position!r}")
    return PromptPlace(
        kind=raw["kind"],
        hidden_size=check_count("hidden_size", raw["hidden_size"], f"see {name!r}"),
        position=position,
        settings=PromptSettings(**{setting: raw[setting] for setting in _PROMPT_SETTINGS}),
    )


def _parse_names(raw: object) -> tuple[str, ...]:
    if raw is not None and not (isinstance(raw, list) and all(isinstance(name, str) for name in raw)):
        raise ValueError(f"expected modules_to_save to be a list of names, got {_shown(raw)}")
    return tuple(raw or ())


def _build_place(place: Place) -> dict[str, Any]:
    settings = {name: getattr(place.settings, name) for name in sorted(_SETTINGS)}
    return {"placement": place.placement, "hidden_size": place.hidden_size, **settings}


def _build_prompts(place: PromptPlace) -> dict[str, Any]:
    own = {"kind": place.kind, "hidden_size": place.hidden_size, "position": place.position}
    return own | vars(place.settings)


def _shown(raw: object) -> str:
    text = json.dumps(raw)
    return text if len(text) <= 80 else f"{text[:77]}…"
