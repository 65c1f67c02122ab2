"""Folders of small finished runs, and the command line inside this process."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fastlora.cli import app
from tests.finetune_models import write_pictures

RESNET = ["--model", "resnet18", "--weights", "none", "--image-size", "32"]
PROBE = [*RESNET, "--strategy", "feature_extraction", "--batch-size", "8", "--precision", "no"]


def invoke(*arguments: object) -> Any:
    """The command line's answer; an exception that it lets through is raised here too."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object, told: str = "", code: int = 2) -> str:
    """What the command says on stderr when it refuses, in one line without a traceback."""
    result = invoke(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.exit_code, len(lines)) == (code, 1), result.output
    assert told in lines[0], lines[0]
    return str(lines[0])


def make_run(folder: Path, *more: object, epochs: int = 1) -> tuple[Path, Path]:
    """Pictures and a finished run on them."""
    data, run = write_pictures(folder / "pictures", count=6), folder / "run"
    result = invoke("finetune", data, *PROBE, "--epochs", epochs, "--output", run, *more)
    assert result.exit_code == 0, result.output
    return data, run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; ``...`` takes one away."""
    given = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in given.items() if value is not ...}))
