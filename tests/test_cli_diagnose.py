"""``fastlora diagnose`` on pictures whose shift is known."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastlora.cli import app
from tests.cases import cases


def write(folder: Path, counts: dict[str, int], seed: int, brighter: int = 0) -> Path:
    """Two textures, a class each: stripes and noise."""
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 120, (28, 28, 3))
            if name == "stripes":
                pixels[:, :: generator.integers(2, 5)] += 80
            Image.fromarray((pixels + brighter).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{index}.png"
            )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("domains")
    even = {"noise": 40, "stripes": 40}
    source = write(top / "source", even, 0)
    bare = top / "bare"
    bare.mkdir()
    write(top / "same", even, 1)
    for path in (top / "same").rglob("*.png"):
        shutil.copy(path, bare / f"{path.parent.name}-{path.name}")
    return {
        "cache": top / "cache",
        "source": source,
        "same": top / "same",
        "bare": bare,
        "bright": write(top / "bright", even, 2, brighter=90),
        "few": write(top / "few", {"noise": 72, "stripes": 8}, 3),
    }


def run(folders: dict[str, Path], target: str, *more: str) -> Any:
    arguments = ["--source", folders["source"], "--target", folders[target], "--cache", folders["cache"]]
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments), "--image-size", "28", *more])


@pytest.mark.parametrize(
    ("target", "kind"),
    cases([("same", "none"), ("bright", "covariate shift")], [("bare", "none"), ("few", "label shift")]),
)
def test_known_shifts_are_told(folders: dict[str, Path], target: str, kind: str) -> None:
    result = run(folders, target, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kind"] == kind, found
    assert [row["class"] for row in found["classes"]] == ["noise", "stripes"]
    labelled = target != "bare"
    assert (found["bound"]["target_error"] is not None) == labelled
    assert (found["recommendation"]["strategy"] == "domain_adaptation") == (kind == "covariate shift")
    assert 1 <= found["effective_sample_size"] <= 80


def test_what_is_printed_explains_itself(folders: dict[str, Path]) -> None:
    printed = run(folders, "bright").stdout
    for text in (
        "Shift: covariate shift",
        "Proxy A-distance",
        "observed target error",
        "no virtue",
        "DANN",
        "Strategy",
    ):
        assert text in printed


def test_bad_folders_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"noise": 4, "dots": 4}, 4)
    result = CliRunner().invoke(
        app, ["diagnose", "--source", str(folders["source"]), "--target", str(other), "--image-size", "28"]
    )
    assert result.exit_code == 2
    assert "expected only classes that training has (noise, stripes), got dots" in result.stderr
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(
        app, ["diagnose", "--source", str(folders["source"]), "--target", str(tmp_path / "empty")]
    )
    assert result.exit_code == 2
    assert "found none" in result.stderr
