"""Adapter files are written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest

import fastlora
from fastlora import LoRALinear
from tests.lora_models import mlp, same_bits, tiny_vit, trained

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_trainable_parameter_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    model = trained(tiny_vit())
    model.get_parameter("encoder.pos_embedding").requires_grad_(True)
    with pytest.raises(ValueError, match=r"got 'encoder\.pos_embedding'; PEFT's format saves whole modules"):
        fastlora.save_adapter(model, tmp_path)
    mixed = trained(mlp())
    mixed.get_submodule("head").rslora = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="expected rslora on all layers or on none"):
        fastlora.save_adapter(mixed, tmp_path)
    with pytest.raises(ValueError, match="expected a model with LoRA layers"):
        fastlora.save_adapter(mlp(), tmp_path)
    with pytest.raises(ValueError, match="got a bare LoRALinear"):
        fastlora.save_adapter(LoRALinear(4, 4, rank=2), tmp_path)
    assert not contents(tmp_path)


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_a_failed_write_leaves_the_older_adapter(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastlora.save_adapter(trained(mlp()), tmp_path)
    before = contents(tmp_path)
    real = os.fsync
    calls = []

    def full_disk(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == [TENSORS, CONFIG].index(name) + 1:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fastlora.save_adapter(trained(mlp(), rank=4), tmp_path)
    assert contents(tmp_path) == before


def test_a_crash_between_the_files_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other alpha, same shapes: old config with new tensors would load and be wrong."""
    fastlora.save_adapter(trained(mlp()), tmp_path)
    real = Path.replace

    def crash_at_config(self: Path, target: Any) -> Path:
        if Path(target).name == CONFIG:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash_at_config)
        with pytest.raises(KeyboardInterrupt):
            fastlora.save_adapter(trained(mlp(), alpha=9), tmp_path)
    assert sorted(contents(tmp_path)) == [TENSORS]
    with pytest.raises(FileNotFoundError, match=f"found no {CONFIG}"):
        fastlora.load_adapter(mlp(), tmp_path)


def test_saving_again_replaces_everything(tmp_path: Path) -> None:
    fastlora.save_adapter(trained(mlp(), rank=4), tmp_path)
    model = trained(mlp(), target_modules=["head"])
    fastlora.save_adapter(model, tmp_path)
    assert same_bits(
        fastlora.load_adapter(mlp(), tmp_path).get_parameter("head.lora_A"),
        model.get_parameter("head.lora_A"),
    )
    assert sorted(contents(tmp_path)) == [CONFIG, TENSORS]


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=r"expected a folder to write.*give another path"):
            fastlora.save_adapter(trained(mlp()), path)
    assert file.read_text() == "mine"

    # root may write anywhere, so the refusal itself is staged
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    folder = tmp_path / "read-only"
    fastlora.save_adapter(trained(mlp()), folder)
    before = contents(folder)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(
        PermissionError, match=r"expected a folder that can be written.*Permission denied.*another path"
    ):
        fastlora.save_adapter(trained(mlp(), rank=4), folder)
    monkeypatch.undo()
    assert contents(folder) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root ignores file permissions")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="expected a folder that can be written"):
        fastlora.save_adapter(trained(mlp()), tmp_path / "adapter")
    tmp_path.chmod(0o700)
