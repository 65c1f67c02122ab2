"""Damaged and hostile files of a run: each is refused in one line that names it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora.transfer.finetune import load_run
from fastlora.transfer.finetune.description import Description, read_description
from fastlora.transfer.training.checkpoint import Checkpoints
from fastlora.transfer.training.checks import check_state
from tests.run_folders import PROBE, change_json, make_run, refused

DEEP = "[" * 200_000
NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "truncated": b'{"format": 1, "model": "resn',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "deep list": DEEP.encode(),
    "deep object": b'{"a":' * 100_000,
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "huge integer": b'{"format": 1' + b"0" * 5000 + b"}",
    "nan": b"NaN",
}
WRONG: dict[str, list[Any]] = {
    "format": [None, "1", 2, 1.0, True, [1], {}],
    "model": [None, 3, "", "resnte18", "timm:nothing", ["resnet18"], "resnet18\n", "\ud800", "../resnet18"],
    "weights": [3, "", ["x"], {"a": 1}, "\0.pt"],
    "strategy": [None, 3, "loar", ["lora"], {}],
    "strategy_options": [None, [], {"rank": "4"}, {"rank": float("nan")}, {"size": 3}, {"rank": [4]}],
    "model_options": [None, [], {"image_size": "32"}, {"image_size": -1}, {"x": 1}, {"image_size": 28}],
    "hidden": ["3", -1, 0, 1.5, True, 10**12, [3], 10**30],
    "classes": [None, [], ["one"], "dark", ["dark", 3], ["dark", "dark"], {"dark": 0, "light": 1}, ["a"] * 3],
    "image_size": [None, "32", 0, -3, 10**9, 3.5, float("inf"), True, 10**400],
    "holds": [None, "adapter ", "../model.safetensors", 3, ["adapter"]],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    return make_run(folder, epochs=2)[1]


@pytest.fixture
def description(run: Path, tmp_path: Path) -> Path:
    """A folder with nothing but the run's ``model.json`` and weights."""
    for name in ("model.json", "model.safetensors"):
        os.link(run / name, tmp_path / name) if name.endswith("s") else shutil.copy(run / name, tmp_path)
    return tmp_path / "model.json"


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_description_is_refused(description: Path, content: bytes) -> None:
    description.write_bytes(content)
    with pytest.raises(ValueError, match=r"^expected .*model\.json"):
        load_run(description.parent)


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda value: repr(value)[:24])
def test_a_field_of_another_kind_is_refused_by_its_name(description: Path, name: str, value: Any) -> None:
    change_json(description, **{name: value})
    with pytest.raises(ValueError, match=name.split("_")[0]) as caught:
        load_run(description.parent)
    assert str(description.parent) in str(caught.value)


@pytest.mark.parametrize("name", Description.__dataclass_fields__)
def test_a_missing_field_is_named(description: Path, name: str) -> None:
    change_json(description, **{name: ...})
    with pytest.raises(ValueError, match=rf"expected {name} in .*model\.json"):
        read_description(description.parent)


def test_a_folder_in_the_place_of_the_description(tmp_path: Path) -> None:
    (tmp_path / "model.json").mkdir()
    with pytest.raises(FileNotFoundError, match=r"found no model\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize("command", [["predict"], ["export"]], ids=lambda command: command[0])
def test_commands_tell_of_a_damaged_description_in_one_line(description: Path, command: list[str]) -> None:
    description.write_text(DEEP)
    picture = [description] if command == ["predict"] else []
    refused(*command, description.parent, *picture, told="nested too deeply")


def _damaged(change: Callable[[torch.Tensor], torch.Tensor], path: Path) -> None:
    state = load_file(path)
    state["layer1.0.conv1.weight"] = change(state["layer1.0.conv1.weight"])
    path.unlink()
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.fill_(float("nan")), "expected finite weights"),
        (lambda w: w.index_fill_(0, torch.tensor([3]), float("inf")), "expected finite weights"),
        (lambda w: (w * 100).to(torch.int8), "as float32, got int8"),
        (lambda w: w.to(torch.int64), "as float32, got int64"),
        (lambda w: w[:1], "size mismatch"),
    ],
    ids=["nan", "inf", "int8", "int64", "shape"],
)
def test_weights_that_give_nonsense_are_refused(description: Path, change: Any, told: str) -> None:
    weights = description.with_name("model.safetensors")
    _damaged(change, weights)
    with pytest.raises(ValueError, match=told):
        load_run(description.parent)
    # the same file as pretrained weights
    settings = [*PROBE, "--weights", weights, "--output", description.parent / "new"]
    if told != "size mismatch":
        refused("finetune", description.parent.parent / "x", *settings, told="found nothing at")


def test_pretrained_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    weights = shutil.copy(run / "model.safetensors", tmp_path / "weights.safetensors")
    _damaged(lambda w: w.fill_(float("nan")), Path(weights))
    settings = [*PROBE, "--weights", weights, "--epochs", 1, "--output", tmp_path / "new"]
    told = refused("finetune", run.parent / "pictures", *settings, told="expected finite weights in ")
    assert "layer1.0.conv1.weight" in told


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    import fastlora

    model = fastlora.apply_lora(torch.nn.Sequential(torch.nn.Linear(4, 3)), rank=2)
    fastlora.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0] = float("inf")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"expected finite weights in .*adapter_model"):
        fastlora.load_adapter(torch.nn.Sequential(torch.nn.Linear(4, 3)), tmp_path)
    (tmp_path / "adapter_config.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"adapter_config\.json, got something nested too deeply"):
        fastlora.load_adapter(torch.nn.Sequential(torch.nn.Linear(4, 3)), tmp_path)


@pytest.mark.parametrize("content", [DEEP, "a = " + "[" * 100_000, "a = 'x", "\x00"], ids=lambda c: c[:8])
def test_a_damaged_config_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(content)
    refused("finetune", "--config", path, told=f"expected TOML in {path}")


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self._flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._flag),)


def _replace(folder: Path, state: Any) -> None:
    torch.save(state, folder / "state.pt")
    digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"step": 4, "bytes": 1, "sha256": digest}))


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "hostile": lambda newest, flag: _replace(newest, {"fingerprint": Hostile(flag)}),
    "a list": lambda newest, flag: _replace(newest, [1, 2]),
    "other names": lambda newest, flag: _replace(newest, {"weights": torch.ones(2)}),
    "deep manifest": lambda newest, flag: (newest / "manifest.json").write_text(DEEP),
    "manifest": lambda newest, flag: (newest / "manifest.json").write_text('{"step": null}'),
    "no manifest": lambda newest, flag: (newest / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    run: Path, tmp_path: Path, damage: Callable[[Path, Path], object], caplog: Any
) -> None:
    folder = Path(shutil.copytree(run / "checkpoints", tmp_path / "checkpoints"))
    before, newest = sorted(folder.iterdir())
    damage(newest, tmp_path / "flag")
    found = Checkpoints(folder).latest(check_state)
    assert found is not None
    assert found[0] == int(before.name.removeprefix("step-"))
    assert f"checkpoint {newest} is damaged" in caplog.text
    assert not (tmp_path / "flag").exists()


def test_a_state_that_holds_something_else_inside_is_told(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    state = torch.load(newest / "state.pt", weights_only=True)
    _replace(newest, state | {"progress": {"step": "x"}})
    settings = [*PROBE, "--epochs", 2, "--output", folder, "--resume"]
    told = "remove that checkpoint to go on from the one before"
    refused("finetune", run.parent / "pictures", *settings, told=told)


def test_a_hostile_file_of_weights_is_refused(run: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"fc.bias": Hostile(tmp_path / "flag")}}, tmp_path / "evil.pt")
    settings = [*PROBE, "--weights", tmp_path / "evil.pt", "--output", tmp_path / "new"]
    refused(
        "finetune", run.parent / "pictures", *settings, told="it could run code, so nothing of it was read"
    )
    assert not (tmp_path / "flag").exists()
