"""Adapter files that are refused before anything changes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fastlora
from tests.lora_models import Snapshot, mlp, tiny_vit, trained

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.head.lora_A.weight"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / TENSORS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / TENSORS)

    return edit


def only_pickle(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "truncated": (
        lambda f: os.truncate(f / TENSORS, 300),
        ValueError,
        "expected a safetensors file.*truncated or something else",
    ),
    "last-byte-gone": (
        lambda f: os.truncate(f / TENSORS, (f / TENSORS).stat().st_size - 1),
        ValueError,
        "expected a safetensors file",
    ),
    "empty": (lambda f: (f / TENSORS).write_bytes(b""), ValueError, "expected a safetensors file"),
    "garbage": (lambda f: (f / TENSORS).write_bytes(b"\xff" * 99), ValueError, "expected a safetensors file"),
    "pickle": (only_pickle, ValueError, "got adapter_model.bin, a pickle, which can run code"),
    "no-tensors": (lambda f: (f / TENSORS).unlink(), FileNotFoundError, f"found no {TENSORS}"),
    "no-config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, f"found no {CONFIG}"),
    "half-a-config": (lambda f: os.truncate(f / CONFIG, 40), ValueError, "expected JSON in .*damaged"),
    "binary-config": (
        lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"),
        ValueError,
        "expected JSON in .*damaged",
    ),
    "list-config": (
        lambda f: (f / CONFIG).write_text("[]"),
        ValueError,
        "expected peft_type 'LORA', got 'list'",
    ),
    "other-kind": (edit_config(peft_type="LOHA"), ValueError, "expected peft_type 'LORA', got 'LOHA'"),
    "dora": (
        edit_config(use_dora=True),
        ValueError,
        "lora_magnitude_vector: missing|expected dora=False as in the model",
    ),
    "bias": (edit_config(bias="all"), ValueError, "expected plain LoRA, got bias='all'"),
    "pissa": (edit_config(init_lora_weights="pissa"), ValueError, "'pissa'.*changes the frozen weights"),
    "from-the-future": (edit_config(use_magic=7), ValueError, "expected plain LoRA, got use_magic=7"),
    "rank-text": (edit_config(r="8"), ValueError, "expected rank to be an integer, got '8'"),
    "alpha-null": (edit_config(lora_alpha=None), ValueError, "expected alpha to be a number, got None"),
    "dropout-two": (edit_config(lora_dropout=2), ValueError, r"expected dropout in \[0, 1\], got 2"),
    "rslora-text": (
        edit_config(use_rslora="yes"),
        ValueError,
        "expected use_rslora to be true or false, got 'yes'",
    ),
    "pattern": (
        edit_config(alpha_pattern={"(": 3}),
        ValueError,
        r"expected a regular expression, got the pattern '\('",
    ),
    "pattern-rank": (edit_config(rank_pattern={"x": 0}), ValueError, "expected rank >= 1, got 0"),
    "other-rank": (edit_config(r=3), ValueError, r"head.lora_A.weight: expected \[3, 8\], got \[2, 8\]"),
    "whole-module": (
        edit_config(modules_to_save=["2"]),
        ValueError,
        r"base_model\.model\.2\.weight: missing",
    ),
    "missing": (edit_tensors(lambda t: t.pop(KEY)), ValueError, f"differences: 1.*{KEY}: missing"),
    "unexpected": (
        edit_tensors(lambda t: t.update(extra=torch.zeros(1))),
        ValueError,
        "extra: nothing in the model",
    ),
    "foreign-name": (
        edit_tensors(lambda t: t.update({KEY.replace("head", "tail"): t.pop(KEY)})),
        ValueError,
        "differences: 2.*tail: no module of this name",
    ),
    "wrong-kind": (
        edit_tensors(lambda t: t.update({KEY.replace("head", "1"): t.pop(KEY)})),
        ValueError,
        "1: expected an nn.Linear, got GELU",
    ),
    "shape": (
        edit_tensors(lambda t: t.update({KEY: torch.zeros(2, 9)})),
        ValueError,
        r"expected \[2, 8\], got \[2, 9\]",
    ),
    "scalar": (
        edit_tensors(lambda t: t.update({KEY: torch.tensor(1.0)})),
        ValueError,
        r"expected \[2, 8\], got \[\]",
    ),
    "integers": (
        edit_tensors(lambda t: t.update({KEY: t[KEY].int()})),
        ValueError,
        "floating dtype, got torch.int32",
    ),
    "no-lora": (edit_tensors(lambda t: t.clear()), ValueError, "no LoRA tensors"),
}


# where a model that has its layers already sees the same damage differently
SEEN_BY_ADAPTED = {
    "whole-module": r"base_model\.model\.2\..*: missing",
    "other-rank": "0: expected rank 2 as in the model, got 3",
    "foreign-name": f"{KEY}: missing",
    "wrong-kind": f"{KEY}: missing",
}


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_file_changes_nothing(tmp_path: Path, case: str, adapted: bool) -> None:
    damage, error, match = DAMAGE[case]
    fastlora.save_adapter(trained(mlp()), tmp_path)
    damage(tmp_path)
    model = trained(mlp(), alpha=4) if adapted else mlp()
    before = Snapshot(model)
    with pytest.raises(error, match=f"(?s){SEEN_BY_ADAPTED.get(case, match) if adapted else match}"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    fastlora.save_adapter(trained(tiny_vit(), modules_to_save=["head"]), tmp_path)
    model = mlp()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)expected an adapter that fits this model.*… and \d+ more"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()
    wider = tiny_vit()
    wider.heads = nn.Sequential()
    wider.heads.add_module("head", nn.Linear(8, 7))
    before = Snapshot(wider)
    with pytest.raises(ValueError, match=r"heads.head.weight: expected \[7, 8\], got \[3, 8\]"):
        fastlora.load_adapter(wider, tmp_path)
    before.assert_unchanged()


def test_other_layers_than_the_models(tmp_path: Path) -> None:
    fastlora.save_adapter(trained(mlp(), target_modules=["head"]), tmp_path)
    model = trained(mlp())
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)differences: 4.*0\.lora_A\.weight: missing"):
        fastlora.load_adapter(model, tmp_path)
    before.assert_unchanged()
    other_rank = trained(mlp(), rank=4, target_modules=["head"])
    before = Snapshot(other_rank)
    with pytest.raises(ValueError, match="head: expected rank 4 as in the model, got 2"):
        fastlora.load_adapter(other_rank, tmp_path)
    before.assert_unchanged()


def test_places_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an adapter folder, found nothing at"):
        fastlora.load_adapter(mlp(), tmp_path / "nowhere")
    fastlora.save_adapter(trained(mlp()), tmp_path)
    with pytest.raises(NotADirectoryError, match="give the folder it is in"):
        fastlora.load_adapter(mlp(), tmp_path / TENSORS)
    with pytest.raises(ValueError, match="got a bare Linear"):
        fastlora.load_adapter(nn.Linear(4, 4), tmp_path)
