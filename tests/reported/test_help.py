"""Help and mistyped paths answer without torch; one thing has one name in every command."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fastlora
from fastlora.cli import app

ROOT = Path(fastlora.__file__).parent
LAZY = ("__init__.py", "transfer/finetune/__init__.py", "transfer/training/__init__.py")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# what each command line ends with, in a process that only sees these
QUICK = """
import sys
from typer.testing import CliRunner
from fastlora.cli import app
for line in sys.argv[1:]:
    result = CliRunner().invoke(app, line.split())
    print(result.exit_code, *{"torch", "numpy", "PIL", "matplotlib"} & sys.modules.keys())
"""
HELP = ["--help", *(f"{name} --help" for name in COMMANDS), "bench report --help"]
MISTYPED = (
    "finetune nowhere",
    "finetune . --test nowhere",
    "finetune . --epoks 3",
    "finetune . --epochs 0",
    "adapt --source nowhere --target .",
    "adapt --source . --target nowhere",
    "diagnose --source nowhere --target .",
    "predict nowhere .",
    "export nowhere",
    "bench report nowhere",
)


def test_no_help_and_no_mistyped_path_waits_for_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUICK, *HELP, *MISTYPED], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["0"] * len(HELP) + ["2"] * len(MISTYPED), done.stderr
    # not even the folder that the run would have been written to
    assert not list(tmp_path.iterdir())


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"fastlora {fastlora.__version__}\n")


@pytest.mark.parametrize("line", [line for line in HELP if line not in ("--help", "bench --help")])
def test_every_help_has_an_example(line: str) -> None:
    shown = CliRunner().invoke(app, line.split(), env={"COLUMNS": "120"}).stdout
    assert re.search(rf"Examples?: fastlora {line.removesuffix(' --help')}", shown)


def test_long_help_has_headings() -> None:
    for command in ("finetune", "adapt"):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"}).stdout
        found = re.findall(r"╭─ (.+?) ─", shown)
        assert {"Options", "Pictures", "Model and what trains", "Training"} <= set(found)
        assert len(found) == len(set(found))


def test_a_picture_that_is_not_there_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    result = CliRunner().invoke(app, ["predict", str(tmp_path), str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: expected a picture or a folder of pictures, found nothing at")


@pytest.mark.parametrize("path", LAZY)
def test_what_is_imported_late_is_what_checkers_see(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    seen, late = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.name for node in seen.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    listed = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    places = next(node for node in ast.walk(late) if isinstance(node, ast.Dict))
    found = ast.literal_eval(places)
    # a place without names is shown itself
    assert names == {name for place, own in found.items() for name in own or (place,)}
    assert names == set(ast.literal_eval(listed))


def test_star_import_and_misspellings() -> None:
    namespace: dict[str, Any] = {}
    exec("from fastlora import *", namespace)
    assert set(fastlora.__all__) <= namespace.keys()
    assert namespace["LoRALinear"] is fastlora.nn.LoRALinear
    with pytest.raises(AttributeError, match="has no attribute 'LoraLinear'"):
        _ = fastlora.LoraLinear  # type: ignore[attr-defined]


def shown(command: Any) -> set[str]:
    """A command's options, without those that are kept for who knows them."""
    return {
        option
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
        for option in parameter.opts
    }


def test_one_thing_has_one_name() -> None:
    names = {name: shown(command) for name, command in COMMANDS.items()}
    every = set().union(*names.values())
    for kept, other in (
        ("--output", "--out"),
        ("--image-size", "--size"),
        ("--num-tokens", "--prompts"),
        ("--json", "--as-json"),
    ):
        assert kept in every
        assert other not in every
    for name in names.keys() - {"bench", "export"}:
        assert "--json" in names[name]
    assert all("--gpu" in names[name] for name in ("plan", "kernels"))
    assert "--target" not in names["kernels"]
