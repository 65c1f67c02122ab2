"""Options of a command, made from the dataclass that they fill: one place for name, default and help."""

import inspect
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, get_args, get_origin, get_type_hints

import typer

from fastlora._core.words import did_you_mean


def options_of(
    kinds: Iterable[type], *, arguments: Iterable[str] = (), leave_out: Iterable[str] = ()
) -> list[inspect.Parameter]:
    """A keyword parameter for Typer for each field of dataclasses, with the help of their docstrings.

    Of a name that two have, the first counts.

    Args:
        kinds: Dataclasses whose docstrings list their attributes.
        arguments: Fields that are given without a name.
        leave_out: Fields that are no options.
    """
    made: dict[str, inspect.Parameter] = {}
    for kind in kinds:
        helps, hints = attribute_help(kind), get_type_hints(kind)
        for field in fields(kind):
            if field.name in leave_out:
                continue
            info: Any = typer.Argument if field.name in arguments else typer.Option
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            made.setdefault(
                field.name,
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=Annotated[_shown(hints[field.name]), info(help=helps[field.name])],
                ),
            )
    return list(made.values())


def with_options(command: Callable[..., None], options: Iterable[inspect.Parameter]) -> Callable[..., None]:
    """A command whose ``**values`` are these options."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*own, *options]

    def run(**values: Any) -> None:
        command(**{name: _plain(value) for name, value in values.items()})

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def settings_of(kinds: Iterable[type], values: Mapping[str, Any], **more: Any) -> list[Any]:
    """An object of each dataclass, filled with the options of its fields' names and with ``more``.

    Of a name that two have, the first takes it, as in :func:`options_of`.
    """
    left, made = dict(values), []
    for kind in kinds:
        names = {field.name for field in fields(kind)}
        own = {name: left.pop(name) for name in names & left.keys()}
        made.append(kind(**own, **{name: value for name, value in more.items() if name in names}))
    return made


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a TOML file's values as defaults, so that it says what flags say and flags win.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no TOML, or names something that the command doesn't have.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"expected a TOML file at {path}, got none ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected TOML in {path}, got something else ({error})") from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = [str(parameter.name) for parameter in context.command.params]
    for name in values:
        if name not in known:
            advice = did_you_mean(name, known, count=1)
            raise ValueError(f"{advice}expected only options of the command in {path}, got {name!r}")
    context.default_map = {**(context.default_map or {}), **values}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of these options; what is given here wins.", callback=read_config, is_eager=True
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the output folder, to the bit on a CPU.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


def attribute_help(kind: type) -> Mapping[str, str]:
    """What a docstring in Google's style says of each attribute.

    Example:
        >>> class Thing:
        ...     '''A thing.
        ...
        ...     Attributes:
        ...         size: How large
        ...             it is.
        ...     '''
        >>> attribute_help(Thing)
        {'size': 'How large it is.'}
    """
    text = inspect.getdoc(kind) or ""
    section = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", words).replace("``", "").replace('"', "") for name, words in entries}


def _shown(hint: Any) -> Any:
    """The type that Typer understands: choices become an enum."""
    if get_origin(hint) is Literal:
        # Typer shows an enum's values
        return Enum("Choice", {str(value): str(value) for value in get_args(hint)})
    inner = [part for part in get_args(hint) if part is not type(None)]
    return Optional[inner[0]] if len(inner) == 1 and type(None) in get_args(hint) else hint  # noqa: UP045


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
