"""``fastlora diagnose``: which kind of shift lies between two folders of pictures."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastlora.cli._console import make_console
from fastlora.cli._progress import LiveReporter

_MOST_CLASSES = 40


def diagnose(
    source: Annotated[
        Path, typer.Option(help="Labelled pictures: a folder with a folder for each class, or a .csv file.")
    ],
    target: Annotated[
        Path, typer.Option(help="The other domain: labelled as well, or a folder of pictures without labels.")
    ],
    model: Annotated[
        str, typer.Option(help="Model in whose features to compare, one that finetune takes.")
    ] = "dinov2_vits14",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels; the model's own without it.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder that keeps the features.")] = Path("features"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of every split.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.")] = False,
) -> None:
    """Tell covariate shift from label shift between two folders of pictures, and say what to do.

    Shows how well a linear classifier tells the domains apart, the distances, the class shares that the
    target seems to have (BBSE), and Ben-David's bound term by term with its caveats.

    [bold]Example[/bold]: fastlora diagnose --source photos --target drawings --image-size 112
    """
    from fastlora.transfer.places import check_labelled, check_pictures

    check_labelled(source)
    check_pictures(target)
    # models are slow to import
    from fastlora.domain.pictures import diagnose_pictures

    console = make_console(to_stderr=as_json)
    with LiveReporter(console) as reporter:
        found = diagnose_pictures(
            source,
            target,
            model=model,
            image_size=image_size,
            cache=cache,
            seed=seed,
            told=lambda task, done, total: reporter.advance(task, done, total, None),
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found, console)


def _show(found: dict[str, Any], console: Console) -> None:
    distance = found["a_distance"]
    table = Table(title=f"Shift: {found['kind']}", show_header=False)
    table.add_row("Domains told apart", f"{found['domain_accuracy']:.1%} (p = {found['domain_p_value']:.2g})")
    if found["class_shift"]:
        residual = f"{found['residual_accuracy']:.1%} (p = {found['residual_p_value']:.2g})"
        table.add_row("… with the target's class shares", residual)
    low, high = distance["interval"]
    saturated = ", saturated" if distance["saturated"] else ""
    table.add_row("Proxy A-distance", f"{distance['value']:.2f} ({low:.2f} to {high:.2f}{saturated})")
    table.add_row("Source pictures count as, by importance", f"{found['effective_sample_size']:.0f}")
    table.add_row("MMD², CORAL", f"{found['mmd']:.3g}, {found['coral']:.3g}")
    console.print(table)
    console.print(_shares(found["classes"]))
    console.print(Text(found["bound"]["text"]))
    console.print()
    console.print(found["remedy"])
    advice = found["recommendation"]
    console.print(f"Strategy: {advice['strategy']}. {advice['reason']}")


def _shares(classes: list[dict[str, Any]]) -> Table:
    """Of many classes those whose share changes most."""
    table = Table("Class", "Share in the source", "In the target (estimated)", "95 % interval")
    shown = classes
    if len(classes) > _MOST_CLASSES:
        shown = sorted(classes, key=lambda row: -abs(row["target"] - row["source"]))[:_MOST_CLASSES]
        table.caption = f"The {_MOST_CLASSES} of {len(classes)} classes that change most; --json has all."
    for row in shown:
        low, high = row["interval"]
        table.add_row(
            row["class"], f"{row['source']:.1%}", f"{row['target']:.1%}", f"{low:.1%} to {high:.1%}"
        )
    return table
