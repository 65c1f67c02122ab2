"""``adapter_config.json`` in our own format, for models with more than LoRA, or in PEFT's, for LoRA alone."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from fastlora._adapter_config import AdapterConfig, parse_config
from fastlora._places import Place
from fastlora.nn._settings import AdapterSettings, check_count
from fastlora.nn.adapted import PLACEMENTS

_FORMAT, _VERSION = "fastlora", 1
_SETTINGS = {entry.name for entry in fields(AdapterSettings)} - {"reduction_factor"}
_PLACE_FIELDS = {"placement", "hidden_size", *_SETTINGS}
Section = TypeVar("Section")


@dataclass(frozen=True)
class FileConfig:
    """What an adapter folder says that it holds; a kind that it does not hold is None or empty."""

    lora: AdapterConfig | None = None
    bottleneck: Mapping[str, Place] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()


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
    unknown = [name for name, value in raw.items() if name not in known or (name == "prompts" and value)]
    if unknown:
        raise ValueError(
            f"expected LoRA layers and bottleneck adapters, got {', '.join(map(repr, unknown))} too; a newer "
            "fastlora may read it"
        )
    if not raw.get("lora") and not raw.get("bottleneck"):
        raise ValueError("expected LoRA layers or bottleneck adapters, got neither; save the adapter again")
    return FileConfig(
        lora=_section("lora", parse_config, raw.get("lora")),
        bottleneck=_section("bottleneck", _parse_bottleneck, raw.get("bottleneck")) or {},
        modules_to_save=_parse_names(raw.get("modules_to_save")),
    )


def build_file_config(
    *, lora: dict[str, Any] | None, bottleneck: Mapping[str, Place], modules_to_save: list[str]
) -> dict[str, Any]:
    """The JSON of our format."""
    layers = {name: _build_place(place) for name, place in bottleneck.items()}
    return {
        "format": _FORMAT,
        "format_version": _VERSION,
        "lora": lora,
        "bottleneck": {"layers": layers} if layers else None,
        "prompts": None,
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
    if not isinstance(raw, dict) or set(raw) != {"layers"} or not isinstance(raw["layers"], dict):
        raise ValueError(f"expected an object with 'layers', got {_shown(raw)}; save the adapter again")
    return {name: _parse_place(name, entry) for name, entry in raw["layers"].items()}


def _parse_place(name: str, raw: object) -> Place:
    given = set(raw) if isinstance(raw, dict) else set()
    if not isinstance(raw, dict) or given != _PLACE_FIELDS:
        missing, extra = sorted(_PLACE_FIELDS - given), sorted(given - _PLACE_FIELDS)
        raise ValueError(
            f"expected for {name!r} exactly the fields of an adapter, got {_shown(raw)} (missing: {missing}, "
            f"unknown: {extra}); save the adapter again, or read it with a newer fastlora"
        )
    if raw["placement"] not in PLACEMENTS:
        raise ValueError(f"expected placement of {name!r} in {PLACEMENTS}, got {raw['placement']!r}")
    check_count("adapter_size", raw["adapter_size"], f"see {name!r}")
    return Place(
        placement=raw["placement"],
        hidden_size=check_count("hidden_size", raw["hidden_size"], f"see {name!r}"),
        settings=AdapterSettings(**{setting: raw[setting] for setting in _SETTINGS}),
    )


def _parse_names(raw: object) -> tuple[str, ...]:
    if raw is not None and not (isinstance(raw, list) and all(isinstance(name, str) for name in raw)):
        raise ValueError(f"expected modules_to_save to be a list of names, got {_shown(raw)}")
    return tuple(raw or ())


def _build_place(place: Place) -> dict[str, Any]:
    settings = {name: getattr(place.settings, name) for name in sorted(_SETTINGS)}
    return {"placement": place.placement, "hidden_size": place.hidden_size, **settings}


def _shown(raw: object) -> str:
    text = json.dumps(raw)
    return text if len(text) <= 80 else f"{text[:77]}…"
