"""Which modules a request such as ``target_modules=["query", "value"]`` means."""

import re
from collections.abc import Collection, Iterable

from torch import nn

from fastlora._core.log import logger
from fastlora._core.words import did_you_mean, first_few
from fastlora.anatomy.all_linear import all_linear, unreached
from fastlora.anatomy.names import adaptable_modules, named_modules
from fastlora.anatomy.tied import check_tied_targets, tell_of_ties
from fastlora.anatomy.uncalled import bypassed

ALL_LINEAR = "all-linear"
_LISTED = 6


def select_targets(
    model: nn.Module,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] | None,
    modules_to_save: Collection[str] | None,
) -> tuple[dict[str, nn.Module], list[nn.Module]]:
    """The modules to adapt, by name, and those to train whole. Parts of adapters can be neither.

    Raises:
        TypeError: A request that is neither a string nor strings.
        ValueError: A name or pattern that matches nothing, an attention's ``out_proj`` without its attention,
            a layer that the model never calls, or nothing left to adapt.
    """
    names = adaptable_modules(model)
    heads: dict[str, nn.Module] = {}
    if target_modules == ALL_LINEAR:
        targeted, heads = all_linear(model, names, _out_projections(names))
    else:
        targeted = _matches("target_modules", target_modules, names)
    left_out, whole = left_out_names(model, exclude_modules, modules_to_save)
    whole += _heads_to_train(heads, left_out)
    left_out_ids = {id(names[name]) for name in left_out}
    chosen = {name: names[name] for name in names if name in targeted and id(names[name]) not in left_out_ids}
    chosen = _absorb_out_proj(names, chosen, left_out)
    check_tied_targets(chosen, whole)
    uncalled = bypassed(named_modules(model), chosen.values())
    if uncalled and target_modules == ALL_LINEAR:
        logger.warning(
            "left out %d of %d linear layers, %s", len(uncalled), len(chosen), why_uncalled(uncalled)
        )
        chosen = {name: module for name, module in chosen.items() if name not in uncalled}
    elif uncalled:
        raise ValueError(
            f"expected layers that the model calls, got {len(uncalled)} others, {why_uncalled(uncalled)}; "
            "name other layers, or leave these out with exclude_modules"
        )
    missed = None
    if target_modules == ALL_LINEAR:
        others = [names[name] for name in (*heads, *left_out, *uncalled)]
        missed = unreached(model, list(chosen.values()), others)
    if not chosen:
        raise ValueError(
            f"expected at least one module to adapt, got none for target_modules={target_modules!r}"
            f", exclude_modules={exclude_modules!r}, modules_to_save={modules_to_save!r}; "
            f"this model has {_inventory(names)}" + (f". Not reached: {missed}" if missed else "")
        )
    if missed:
        logger.warning("'all-linear' does not reach %s", missed)
    return chosen, whole


def _heads_to_train(heads: dict[str, nn.Module], left_out: Collection[str]) -> list[nn.Module]:
    trained = {name: head for name, head in heads.items() if name not in left_out}
    if trained:
        logger.info("training the head %s whole; exclude_modules leaves it frozen", ", ".join(trained))
    return list(trained.values())


def left_out_names(
    model: nn.Module,
    exclude_modules: str | Collection[str] | None,
    modules_to_save: Collection[str] | None,
) -> tuple[set[str], list[nn.Module]]:
    """Names that must not be adapted, those inside modules that train whole included, and these modules.

    Raises:
        TypeError: A request that is neither a string nor strings.
        ValueError: A name or pattern that matches nothing.
    """
    names = adaptable_modules(model)
    excluded = set() if exclude_modules is None else _matches("exclude_modules", exclude_modules, names)
    if isinstance(modules_to_save, str):
        raise TypeError(f"expected modules_to_save to be a list of names, got the string {modules_to_save!r}")
    saved = set() if modules_to_save is None else _matches("modules_to_save", modules_to_save, names)
    kept_whole = {name for name in names if any(name == top or name.startswith(top + ".") for top in saved)}
    whole = [names[name] for name in sorted(saved)]
    tell_of_ties(model, whole)
    return excluded | kept_whole, whole


def _matches(argument: str, request: str | Collection[str], names: Collection[str]) -> set[str]:
    if isinstance(request, str):
        return _pattern_matches(argument, request, names)
    if not isinstance(request, Iterable) or not all(isinstance(entry, str) for entry in request):
        raise TypeError(
            f"expected {argument} to be a list of names or one regular expression, got {request!r}"
            + (f"; {ALL_LINEAR!r} takes every linear layer" if argument == "target_modules" else "")
        )
    found: set[str] = set()
    unmatched = []
    for entry in request:
        matched = {name for name in names if name == entry or name.endswith("." + entry)}
        found |= matched
        if not matched:
            unmatched.append(entry)
    if unmatched:
        raise ValueError("; ".join(_no_match(argument, entry, names) for entry in unmatched))
    return found


def _pattern_matches(argument: str, pattern: str, names: Collection[str]) -> set[str]:
    try:
        found = {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
        raise ValueError(
            f"expected {argument} to be a regular expression, got {pattern!r} ({error}); "
            "give a list for plain names"
        ) from error
    if not found:
        raise ValueError(
            f"{_no_match(argument, pattern, names)}. A string is a regular expression for whole names; "
            f"give a list, [{pattern!r}], to match the end of a name"
        )
    return found


def _no_match(argument: str, entry: str, names: Collection[str]) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    candidates = dict.fromkeys([*ends, *names])
    near = did_you_mean(entry, candidates, count=_LISTED, cutoff=0.5).rstrip()
    advice = near or f"names here end in {_some(ends)}"
    return f"expected {argument} to name modules of this model, got {entry!r}, which matches none; {advice}"


def _absorb_out_proj(
    names: dict[str, nn.Module], chosen: dict[str, nn.Module], excluded: set[str]
) -> dict[str, nn.Module]:
    """Let an attention take its ``out_proj`` along, and refuse one without the other."""
    inner = _out_projections(names)
    for name, owner in inner.items():
        alone = name in chosen and owner not in chosen
        if alone or (name in excluded and owner in chosen):
            raise ValueError(
                f"expected {owner!r} as a whole, got {name!r} {'alone' if alone else 'excluded from it'}: "
                "nn.MultiheadAttention never calls out_proj by itself, so both are adapted or neither; "
                f"name {owner.rpartition('.')[2]!r} instead"
            )
    return {name: module for name, module in chosen.items() if name not in inner}


def _out_projections(names: dict[str, nn.Module]) -> dict[str, str]:
    return {
        f"{name}.out_proj": name
        for name, module in names.items()
        if isinstance(module, nn.MultiheadAttention)
    }


def why_uncalled(uncalled: dict[str, str]) -> str:
    """What :func:`bypassed` found, in words."""
    kinds = ", ".join(dict.fromkeys(uncalled.values()))
    return (
        f"{next(iter(uncalled))!r} first: {kinds} reads their weights without calling them, so that nothing "
        "put there would run or train"
    )


def _inventory(names: dict[str, nn.Module]) -> str:
    kinds = [name for name, m in names.items() if isinstance(m, nn.Linear | nn.MultiheadAttention)]
    if kinds:
        return f"linear and attention layers {_some(kinds)}"
    others = [name for name, m in names.items() if isinstance(m, nn.Conv2d | nn.Embedding)]
    by_name = f"; name what to adapt of {_some(others)} in target_modules" if others else ""
    return f"no linear or attention layer{by_name}"


def _some(words: Iterable[str]) -> str:
    return ", ".join(first_few([repr(word) for word in words], _LISTED))
