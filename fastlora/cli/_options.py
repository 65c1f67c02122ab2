"""Options of a command, made from the dataclass that they fill: one place for name, default and help."""

import functools
import inspect
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fastlora._core.words import did_you_mean

# under which heading of --help a field stands; the others are the run's own
_HEADINGS = {
    "Pictures": """data source target validation validation_share test image_column label_column on_corrupt
        image_size flip""",
    "Model and what trains": """model weights strategy rank alpha dropout adapter_size num_tokens num_stages
        train_batch_norm hidden cache_features""",
    "Adaptation": "method strength gamma weighting select separate_batch_norm",
    "Training": """lr head_factor epochs batch_size optimizer weight_decay layer_decay lora_plus_ratio
        schedule warmup accumulation clip_norm precision label_smoothing mixup class_weights ema patience
        monitor restore_best max_steps""",
}
_HEADING = {name: heading for heading, names in _HEADINGS.items() for name in names.split()}


def with_options(
    command: Callable[..., None],
    kinds: Iterable[type],
    *,
    arguments: Iterable[str] = (),
    leave_out: Iterable[str] = (),
) -> Callable[..., None]:
    """A command whose ``**values`` are options: the fields of dataclasses, with the help of their docstrings.

    Of a name that two have, the first counts.

    Args:
        command: Takes ``**values`` beside options of its own.
        kinds: Dataclasses whose docstrings list their attributes.
        arguments: Fields that are given without a name.
        leave_out: Fields that are no options.
    """
    own = inspect.signature(command).parameters.values()
    made = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD}
    for kind in kinds:
        helps, hints = attribute_help(kind), get_type_hints(kind)
        for field in fields(kind):
            if field.name in made or field.name in leave_out:
                continue
            info: Any = typer.Argument if field.name in arguments else typer.Option
            heading = None if field.name in arguments else _HEADING.get(field.name)
            made[field.name] = inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=Annotated[
                    hints[field.name], info(help=helps[field.name], rich_help_panel=heading)
                ],
            )

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(**values)

    run.__signature__ = inspect.Signature(list(made.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in made.items()}
    return run


def settings_of(kinds: Iterable[type], values: Mapping[str, Any], **more: Any) -> list[Any]:
    """An object of each dataclass, filled with the options of its fields' names and with ``more``.

    Of a name that two have, the first takes it, as :func:`with_options` takes its option.
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


def paragraphs(command: Callable[..., None]) -> str:
    """A command's docstring, a line for each paragraph: a terminal wraps them at its own width.

    Example:
        >>> def command():
        ...     '''Do this
        ...     and that.
        ...
        ...     Example: do
        ...     '''
        >>> paragraphs(command)
        'Do this and that.\\n\\nExample: do'
    """
    return "\n\n".join(" ".join(each.split()) for each in (inspect.getdoc(command) or "").split("\n\n"))


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
    return {name: " ".join(words.split()).replace("``", "").replace('"', "") for name, words in entries}
