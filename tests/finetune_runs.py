"""Short runs of ``fastlora finetune``."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fastlora.cli import app

RESNET = ["--model", "resnet18", "--weights", "none", "--image-size", "32"]
DINO = ["--model", "dinov2_vits14", "--image-size", "28"]
SHORT = ["--epochs", "2", "--batch-size", "8", "--precision", "no"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


def finetuned(*arguments: object) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report
